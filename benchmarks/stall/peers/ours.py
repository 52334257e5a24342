"""Ours, on the public road: a `Handler`, its `batches`, and a receiver that asks for a save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

import trainbus
from benchmarks.stall.peers.base import Peer, flat
from benchmarks.stall.workloads import Unavailable
from trainbus import Handler

__all__ = ["Auto", "Overlap"]


class Auto(Peer):
    """``Handler(module, optimizer)`` as it comes: snapshot="auto"."""

    fsync = "yes"
    background = True

    def __enter__(self) -> Auto:
        self._handler = self._make_handler()
        return self

    def _make_handler(self) -> Handler:
        return Handler(self.workload.module, self.workload.optimizer)

    def loop(self, batches: Iterable[int], step_end: Callable[[], None]) -> Iterator[int]:
        """Hand out batches as the handler does; the step ends with its ``train_batch_end``."""

        @self._handler.on("train_batch_end")
        def end() -> None:
            step_end()

        for _ in self._handler.epochs(1):
            yield from self._handler.batches(batches)

    def save(self, path: str) -> Callable[[], object]:
        """Ask the handler."""
        return self._handler.save_async(path).result

    def close(self) -> None:
        """Leave the handler as ``with`` does."""
        self._handler.__exit__(None, None, None)

    def load(self, path: str) -> dict[str, torch.Tensor]:
        """Load verified; the handler's own parts are not compared."""
        state = trainbus.load(path)
        return flat({part: state[part] for part in ("module", "optimizer")})


class Overlap(Auto):
    """The copy goes on behind the next step's forward and backward, up to the optimizer."""

    def _make_handler(self) -> Handler:
        try:
            return Handler(self.workload.module, self.workload.optimizer, snapshot="overlap")
        except TypeError as error:
            raise Unavailable(f"this trainbus has no snapshot='overlap' ({error})") from error

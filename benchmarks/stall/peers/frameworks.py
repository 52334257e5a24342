"""Savers that come with frameworks: Ignite, Lightning, TorchSnapshot."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from benchmarks.stall.peers.base import Peer, emptied, flat
from benchmarks.stall.workloads import Workload

__all__ = ["Ignite", "Lightning", "TorchSnapshot"]


class Ignite(Peer):
    """
    ``ignite.handlers.DiskSaver`` with its defaults: a temporary file, renamed.

    Source: API reference of ``ignite.handlers.DiskSaver``; ``require_empty=False`` is what it
    tells to pass where files are in the folder already.
    """

    fsync = "no"

    def __init__(self, workload: Workload, folder: str) -> None:
        super().__init__(workload, folder)
        from ignite.handlers import DiskSaver

        self._saver = DiskSaver(folder, require_empty=False)

    def save(self, path: str) -> None:
        """Write in the foreground."""
        self._saver(self.workload.state(), os.path.basename(path))


class Lightning(Peer):
    """
    Lightning's ``AsyncCheckpointIO`` around its default ``TorchCheckpointIO``.

    It clones every tensor where it lies, then serialises to a ``BytesIO`` and writes that on a
    thread. Its queue has no bound; here at most four saves wait, so that the benchmark itself
    has memory left.

    Source: Lightning docs, "AsyncCheckpointIO" (``Trainer(plugins=[AsyncCheckpointIO()])``).
    """

    fsync = "no"
    background = True
    most_unfinished = 4

    def __init__(self, workload: Workload, folder: str) -> None:
        super().__init__(workload, folder)
        from pytorch_lightning.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

        self._unfinished: deque[Future[None]] = deque()
        self._by_path: dict[str, Future[None]] = {}
        peer = self

        class Reporting(TorchCheckpointIO):
            """Tells when a file is complete, which the plugin itself does not."""

            def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
                done = peer._by_path.pop(str(path))
                try:
                    super().save_checkpoint(checkpoint, path, storage_options)
                except BaseException as error:
                    done.set_exception(error)
                    raise
                done.set_result(None)

        self._plugin = AsyncCheckpointIO(Reporting())

    def save(self, path: str) -> Callable[[], object]:
        """Queue a clone."""
        while self._unfinished and (
            self._unfinished[0].done() or len(self._unfinished) >= self.most_unfinished
        ):
            self._unfinished.popleft().result()
        done: Future[None] = Future()
        self._by_path[path] = done
        self._unfinished.append(done)
        self._plugin.save_checkpoint(self.workload.state(), path)
        return done.result

    def close(self) -> None:
        """Write what is queued."""
        self._plugin.teardown()


class TorchSnapshot(Peer):
    """
    ``torchsnapshot.Snapshot.async_take``, one at a time.

    Source: TorchSnapshot docs, "Getting Started": modules and optimizers go in as they are;
    ``async_take`` returns when it is safe to change them and a handle to wait on.
    """

    fsync = "no"
    background = True

    def __init__(self, workload: Workload, folder: str) -> None:
        super().__init__(workload, folder)
        from torchsnapshot import Snapshot

        self._snapshot = Snapshot
        self._pending: Any = None

    def save(self, path: str) -> Callable[[], object]:
        """Wait for the snapshot before, then take one."""
        if self._pending is not None:
            self._pending.wait()
        state = {"module": self.workload.module, "optimizer": self.workload.optimizer}
        self._pending = self._snapshot.async_take(path, state)
        wait: Callable[[], object] = self._pending.wait
        return wait

    def close(self) -> None:
        """Wait for the last snapshot."""
        if self._pending is not None:
            self._pending.wait()

    def load(self, path: str) -> dict[str, torch.Tensor]:
        """Restore into a state of the same shape, as TorchSnapshot does."""
        parts = {part: _Holder(state) for part, state in emptied(self.workload.state()).items()}
        self._snapshot(path).restore(parts)
        return flat({part: holder.state for part, holder in parts.items()})


class _Holder:
    """A state dict with the two methods that TorchSnapshot asks for."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state

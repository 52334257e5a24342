"""What the measuring loop asks of a peer."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch

from benchmarks.stall.workloads import Workload, tensors_of

__all__ = ["Peer", "emptied", "flat"]


def flat(state: Any) -> dict[str, torch.Tensor]:
    """Return a nested state's tensors by their place, for comparing."""
    return dict(tensors_of(state))


def emptied(state: Any) -> Any:
    """Return *state* with new tensors of NaN or zero on the CPU, so that what is not loaded shows."""
    if isinstance(state, torch.Tensor):
        fill = float("nan") if state.is_floating_point() else 0
        return torch.full_like(state, fill, device="cpu")
    if isinstance(state, dict):
        return {key: emptied(value) for key, value in state.items()}
    if isinstance(state, list):
        return [emptied(value) for value in state]
    return state


class Peer:
    """
    A way to save, used as a context manager around the loop. This one saves nothing.

    Attributes:
        fsync: Whether a complete save is on the disk: ``yes``; ``files``, but not the folder that
            names them; or ``no``, it may still be in memory only.
        background: Whether the call returns before the file is complete.
        processes: Whether it has processes of its own, whose memory counts too.
    """

    fsync = "-"
    background = False
    processes = False

    def __init__(self, workload: Workload, folder: str) -> None:
        self.workload = workload
        self.folder = folder

    def __enter__(self) -> Peer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish what is pending and leave."""

    def loop(self, batches: Iterable[int], step_end: Callable[[], None]) -> Iterator[int]:
        """Hand out *batches* and call *step_end* after each, before the next."""
        for batch in batches:
            yield batch
            step_end()

    def before_update(self) -> None:
        """Do what must be done before the optimizer touches the state."""

    def save(self, path: str) -> Callable[[], object] | None:
        """
        Save the state.

        Returns:
            What waits until the file is complete, by the peer's own means, and raises what went
            wrong; None if it already is. Called on another thread.
        """
        return None

    def load(self, path: str) -> dict[str, torch.Tensor]:
        """Return the tensors saved in *path* by their place in `Workload.state`, on the CPU."""
        return flat(torch.load(path, map_location="cpu", weights_only=True))

    def remove(self, path: str) -> None:
        """Remove a save."""
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)

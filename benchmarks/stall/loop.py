"""The measured loop, and one save in it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from torch.utils.data import DataLoader

from benchmarks.stall.peers.base import Peer
from benchmarks.stall.workloads import Workload

__all__ = ["Loop", "Request"]

_ENDLESS = range(10**9)


class Loop:
    """
    Trains step by step and times each: the batch, what is done at its end, and getting the next.

    Attributes:
        durations: Of all steps so far, in seconds.
    """

    def __init__(self, workload: Workload, peer: Peer) -> None:
        self.durations: list[float] = []
        self._workload = workload
        self._peer = peer
        self._at_end: Callable[[], None] | None = None
        loader: DataLoader[int] = DataLoader(_ENDLESS, batch_size=None)
        self._batches = iter(peer.loop(loader, self._end))
        self._batch = next(self._batches)

    def step(self, at_end: Callable[[], None] | None = None) -> None:
        """Train one batch; call *at_end* where a loop would ask for a save. Both are timed."""
        begun = time.perf_counter()
        self._at_end = at_end
        self._workload.step(self._batch, self._peer.before_update)
        self._workload.settle()
        self._batch = next(self._batches)
        self.durations.append(time.perf_counter() - begun)

    def steps(self, count: int) -> list[float]:
        """Train *count* batches without a save and return how long each took, in seconds."""
        for _ in range(count):
            self.step()
        return self.durations[len(self.durations) - count :]

    def _end(self) -> None:
        at_end, self._at_end = self._at_end, None
        if at_end is not None:
            at_end()


class Request:
    """
    One save: asked for by `start`, complete by the peer's own means.

    Attributes:
        path: Where to.
        returned: Seconds until the call returned.
        complete: Seconds from the request until the file was complete; once `done`.
    """

    def __init__(self, peer: Peer, path: str) -> None:
        self.path = path
        self.returned = 0.0
        self.complete = 0.0
        self._peer = peer
        self._begun = 0.0
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._asked: SimpleQueue[Callable[[], object]] = SimpleQueue()
        # A thread that only waits, so that the moment is known and no step is needed to see it. Begun here,
        # where nothing is timed: where every core is busy a thread's start takes up to 3 ms.
        threading.Thread(target=self._watch, name="completion", daemon=True).start()

    def start(self) -> None:
        """Ask for the save; called on the training thread."""
        self._begun = time.perf_counter()
        wait = self._peer.save(self.path)
        self.returned = time.perf_counter() - self._begun
        if wait is None:
            self.complete = self.returned
            self._done.set()
        else:
            self._asked.put(wait)

    def start_in_thread(self) -> None:
        """Ask for the save on another thread, for peers that write in the foreground."""
        self._asked.put(self.start)

    def done(self) -> bool:
        """
        Return whether the file is complete.

        Raises:
            RuntimeError: It will never be.
        """
        if self._error is not None:
            raise RuntimeError(f"{self.path} was not saved: {self._error}") from self._error
        return self._done.is_set()

    def result(self) -> None:
        """Wait until the file is complete."""
        self._done.wait()
        self.done()

    def _watch(self) -> None:
        wait = self._asked.get()
        try:
            wait()
        except BaseException as error:
            self._error = error
        self.complete = self.complete or time.perf_counter() - self._begun
        self._done.set()

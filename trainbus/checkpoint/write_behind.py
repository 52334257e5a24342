"""Writes that go on while the next bytes are made ready, and the memory those are collected in."""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future

import numpy as np

from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.staging_memory import map_pages

try:
    from trainbus.checkpoint._writing import begin_write, finish_write
except ImportError:  # built where there was a C compiler
    begin_write = None  # type: ignore[assignment]

__all__ = ["CHUNK_BYTES", "WriteBehind"]

# Large, because a training thread that never leaves Python costs each call its 5 ms turn at the
# interpreter; three of them stay well below the 64 MiB that a save may take beside its snapshot.
CHUNK_BYTES = 16 << 20


class WriteBehind:
    """
    What the files of one thread, one after the other, are written with.

    Chunks are reused for as long as this exists: memory that is touched for the first time
    costs several times what writing into it does. A forked child begins with none.

    Attributes:
        chunk_bytes: Size of a chunk.
        most: How many writes may be unfinished at once.
        last_progress: ``time.monotonic()`` when a disk last took bytes, as its writer knows; 0 before.

    Args:
        most: With 0, whoever asks for a write makes it itself.
        chunk_bytes: A multiple of 4,096 if chunks are to bypass the page cache.
            Its memory is a page longer.
        rest: Called before each write, by the thread that asks for it; may wait.
    """

    def __init__(
        self, *, most: int = 2, chunk_bytes: int = CHUNK_BYTES, rest: Callable[[], None] = lambda: None
    ) -> None:
        self.chunk_bytes = chunk_bytes
        self.most = most
        self.last_progress = 0.0
        self._rest = rest
        self._free: list[np.ndarray] = []
        _ALL.add(self)

    def take(self) -> np.ndarray:
        """Return a chunk's memory to fill; `give_back` ends its use."""
        if self._free:
            return self._free.pop()
        return np.frombuffer(map_pages(self.chunk_bytes + mmap.PAGESIZE), dtype=np.uint8)

    def give_back(self, chunk: np.ndarray) -> None:
        """Say that a chunk is not needed any more. May be said twice, before it is taken again."""
        if not any(chunk is free for free in self._free):
            self._free.append(chunk)

    def begin(self, disk: Disk, fd: int, data: memoryview, position: int) -> Callable[[], int]:
        """
        Begin what ``disk.write`` does with these arguments.

        Of the real disk a thread makes it that never needs the interpreter: it is not kept waiting by
        others that do, nor are they by it. Of one that takes its place in a test a Python thread does.
        Where no thread can be had this one does.

        Returns:
            What waits for the write, and then returns or raises what it did; *data* must not change
            until then. To be called once.
        """
        self._rest()
        if self.most and begin_write is not None and getattr(disk.write, "__func__", None) is Disk.write:
            with contextlib.suppress(OSError):  # the system has no more threads
                return functools.partial(finish_write, begin_write(fd, data, position))
        write = functools.partial(disk.write, fd, data, position)
        outcome: Future[int] = Future()
        if self.most == 0:
            _make(write, outcome)
            return outcome.result
        thread = threading.Thread(target=_make, args=(write, outcome), name="trainbus-disk", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no more, or the interpreter exits
            _make(write, outcome)
        return outcome.result


def _make(write: Callable[[], int], outcome: Future[int]) -> None:
    try:
        outcome.set_result(write())
    except BaseException as error:
        outcome.set_exception(error)


_ALL: weakref.WeakSet[WriteBehind] = weakref.WeakSet()


def _forget_in_child() -> None:
    for one in list(_ALL):
        one._free.clear()


os.register_at_fork(after_in_child=_forget_in_child)

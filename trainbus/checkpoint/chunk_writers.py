"""The threads that bring chunks of a file to the disk, and the memory the chunks lie in."""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from trainbus.checkpoint.staging_memory import map_pages

__all__ = ["CHUNK_BYTES", "ChunkWriters"]

# Large, because a training thread that never leaves Python costs each call its 5 ms turn at the
# interpreter; three of them stay well below the 64 MiB that a save may take beside its snapshot.
CHUNK_BYTES = 16 << 20


class ChunkWriters:
    """
    Writes chunks while the next ones are being filled.

    Chunks are reused for as long as this exists: memory that is touched for the first time
    costs several times what writing into it does. A forked child begins with no threads and
    no chunks.

    Attributes:
        last_progress: ``time.monotonic()`` when a disk last took bytes; 0 before.

    Args:
        threads: How many write; with 0 whoever calls `write` does it itself.
        chunk_bytes: Size of a chunk, a multiple of 4,096 if chunks are to bypass the page cache.
            Its memory is a page longer.
    """

    def __init__(self, *, threads: int = 2, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.chunk_bytes = chunk_bytes
        self._number = threads
        self._begin_empty()
        _ALL.add(self)

    def _begin_empty(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], None]] = deque()
        self._free: list[np.ndarray] = []
        self._made = 0
        self.last_progress = 0.0
        self._threads: list[threading.Thread] = []
        self._closed = False

    def start(self) -> None:
        """Start the threads, unless they run."""
        with self._changed:
            self._closed = False
            while len(self._threads) < self._number:
                name = f"trainbus-disk-{len(self._threads)}"
                thread = threading.Thread(target=self._run, name=name, daemon=True)
                thread.start()
                self._threads.append(thread)

    def close(self) -> None:
        """Let the threads end once everything handed to them is written. Does not wait for it."""
        with self._changed:
            self._closed = True
            self._threads.clear()
            self._changed.notify_all()

    def take(self) -> np.ndarray:
        """Return a chunk's memory to fill; waits until one is free. `write` or `give_back` ends its use."""
        with self._changed:
            if not self._free and self._made <= len(self._threads):
                self._made += 1
                return np.frombuffer(map_pages(self.chunk_bytes + mmap.PAGESIZE), dtype=np.uint8)
            self._changed.wait_for(lambda: self._free)
            return self._free.pop()

    def give_back(self, chunk: np.ndarray) -> None:
        """Say that a chunk is not needed any more."""
        with self._changed:
            self._free.append(chunk)
            self._changed.notify_all()

    def write(self, chunk: np.ndarray | None, write: Callable[[], None]) -> None:
        """
        Have *write* called by one of the threads, then take *chunk* back.

        Args:
            chunk: What it writes from; None if that is not one of these chunks.
            write: Must not raise: what it meets is its own to remember.
        """

        def job() -> None:
            try:
                write()
            finally:
                if chunk is not None:
                    self.give_back(chunk)

        with self._changed:
            if self._threads:
                self._jobs.append(job)
                self._changed.notify_all()
                return
        job()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closed)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            job()


_ALL: weakref.WeakSet[ChunkWriters] = weakref.WeakSet()


def _forget_in_child() -> None:
    for writers in list(_ALL):
        writers._begin_empty()


os.register_at_fork(after_in_child=_forget_in_child)

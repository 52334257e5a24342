"""The reused host buffers that snapshots are copied into. Needs no torch."""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import tempfile
import threading
import weakref

import numpy as np

__all__ = ["StagingBuffer", "StagingMemory", "map_file", "map_pages"]

_log = logging.getLogger("trainbus")

_TOUCHED_AT_A_TIME = 4 << 20


def map_pages(size: int) -> mmap.mmap:
    """
    Return at least *size* bytes of anonymous memory, all zeros.

    Left out of forked children where the system can do that, and in huge pages where it has them: the
    first touch, and page-locking, take a third of the time. Elsewhere shared, because a private mapping
    that a child has too is copied page by page after the fork.
    """
    length = _whole_pages(size)
    if not hasattr(mmap, "MADV_DONTFORK"):
        mapping = mmap.mmap(-1, length)
    else:
        mapping = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return _for_this_process(mapping)


def map_file(size: int, folder: str) -> mmap.mmap:
    """
    Return at least *size* bytes that lie on the disk of *folder*, in an unnamed file, for as long as needed.

    The system keeps of them in memory what it has room for. They cost a write to that disk, and are left
    out of forked children as those of `map_pages`.

    Raises:
        OSError: That disk has no room for them, or cannot set it aside.
    """
    if not hasattr(os, "posix_fallocate"):
        raise OSError(errno.ENOTSUP, "this system sets no room aside")
    folder = os.path.abspath(folder)
    while not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    length = _whole_pages(size)
    with tempfile.TemporaryFile(dir=folder) as file:
        # A write to a page that the disk has no room for would kill the process.
        os.posix_fallocate(file.fileno(), 0, length)
        return _for_this_process(mmap.mmap(file.fileno(), length))


def _whole_pages(size: int) -> int:
    return max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE


def _for_this_process(mapping: mmap.mmap) -> mmap.mmap:
    if hasattr(mmap, "MADV_DONTFORK"):
        mapping.madvise(mmap.MADV_DONTFORK)
    _MAPPED.add(mapping)
    return mapping


_MAPPED: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_INHERITED: list[mmap.mmap] = []


class StagingBuffer:
    """
    One mapping, kept and grown as snapshots need it.

    Attributes:
        mapping: The memory, or None before the first use.
        is_spilled: Whether that lies on a disk.
        views: Whatever the copier keeps for reuse with this very mapping; dropped with it.
        pins: What keeps the mapping page-locked; dropped before it. None while it is not.
    """

    def __init__(self) -> None:
        self._is_warm = False
        self.is_spilled = False
        self.mapping: mmap.mmap | None = None
        self.views: object | None = None
        self.pins: object | None = None

    def reserve(self, size: int, spill_folder: str | None = None) -> None:
        """
        Make room for *size* bytes. What was in a mapping that is too small is lost.

        Args:
            size: How many.
            spill_folder: On whose disk they go, with a warning, if the system has no memory for them.

        Raises:
            OSError: There is no memory, nor room on that disk.
        """
        if self.mapping is not None and len(self.mapping) >= size:
            return
        # Let go of the old one first, so that both never count at the same time.
        self.views = None
        self.pins = None
        self._is_warm = self.is_spilled = False
        self.mapping = None
        try:
            self.mapping = map_pages(size)
        except OSError as error:
            if spill_folder is None:
                raise
            self.mapping = _map_elsewhere(size, spill_folder, error)
            # Neither is it touched, which would be a write to the disk.
            self._is_warm = self.is_spilled = True

    def touch(self, stop: threading.Event) -> None:
        """
        Have the system give the mapping its memory now, not when a snapshot is copied into it.

        Takes up to two seconds a gigabyte, without the GIL; ends soon after *stop* is set.
        """
        if self.mapping is None or self._is_warm:
            return
        pages = np.frombuffer(self.mapping, dtype=np.uint8)
        for start in range(0, pages.size, _TOUCHED_AT_A_TIME):
            if stop.is_set():
                return
            pages[start : start + _TOUCHED_AT_A_TIME] = 0
        self._is_warm = True


def _map_elsewhere(size: int, folder: str, why: OSError) -> mmap.mmap:
    try:
        mapping = map_file(size, folder)
    except OSError as error:
        raise OSError(
            why.errno,
            f"{why.strerror}: {size / 1e6:.0f} MB for a copy of the state, which cannot lie in {folder!r} "
            f"either ({error.strerror})",
        ) from why
    _log.warning(
        "No host memory for a copy of the state, %.0f MB (%s): it lies in an unnamed file in %r, and saves "
        "take longer. Free memory, or use a smaller max_pending.",
        size / 1e6,
        why.strerror,
        folder,
    )
    return mapping


class StagingMemory:
    """
    Hands out *buffers* buffers, one to each snapshot that is not released yet.

    Safe to use from several threads. A forked child starts with none of the parent's.

    Args:
        buffers: How many snapshots may exist at a time; as many as saves may be pending.

    Attributes:
        spill_folder: On whose disk a buffer lies for which there is no memory; None: none does. It need
            not be there yet.
    """

    def __init__(self, buffers: int = 1) -> None:
        self._buffers = buffers
        self.spill_folder: str | None = None
        self._reset()
        _ALL.add(self)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        # Used as a stack: the warm buffer first, so that no second one is ever made without need.
        self._free = [StagingBuffer() for _ in range(self._buffers)]
        self._taken: list[StagingBuffer] = []

    @property
    def size(self) -> int:
        """Bytes mapped at the moment, by all buffers together."""
        with self._lock:
            return sum(len(buffer.mapping or b"") for buffer in (*self._free, *self._taken))

    def acquire(self, size: int) -> StagingBuffer:
        """
        Take a buffer of at least *size* bytes. Never waits.

        Raises:
            RuntimeError: All are taken.
            OSError: The system has no memory left, nor the disk of `spill_folder` any room.
        """
        with self._lock:
            if not self._free:
                raise RuntimeError(
                    f"Cannot take another snapshot: all {self._buffers} staging buffers hold one that is "
                    "not released. Release it first, or make StagingMemory with more buffers."
                )
            # Reserved while it is still free: a failure leaves it there.
            self._free[-1].reserve(size, self.spill_folder)
            self._taken.append(self._free.pop())
            return self._taken[-1]

    def release(self, buffer: StagingBuffer) -> None:
        """Give a buffer back. One that is not taken, as after a fork, is ignored."""
        with self._lock:
            if buffer in self._taken:
                self._taken.remove(buffer)
                self._free.append(buffer)


_ALL: weakref.WeakSet[StagingMemory] = weakref.WeakSet()


def _forget_in_child() -> None:
    # Kept for ever, whoever has them, be it garbage not yet collected: they are not there in the child,
    # so freeing one would unmap addresses that by then hold something else.
    _INHERITED.extend(_MAPPED)
    _MAPPED.clear()
    for memory in list(_ALL):
        memory._reset()


os.register_at_fork(after_in_child=_forget_in_child)

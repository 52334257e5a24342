"""Host memory that devices write into by themselves, because its pages cannot be moved."""

from __future__ import annotations

import logging
import mmap
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import cast

import torch

from trainbus.checkpoint.cuda import Cuda
from trainbus.checkpoint.staging_memory import StagingBuffer

__all__ = ["is_locked", "lock", "pieces"]

_log = logging.getLogger("trainbus")

PIECE_BYTES = 32 << 20
"""
Bytes of a buffer that are page-locked at a time; no copy of a device may reach over two such pieces.

While they are, no thread can give a device any work: 7 ms on an H200 for memory that nobody has touched.
"""


def pieces(start: int, size: int) -> Iterator[tuple[int, int]]:
    """
    Cut bytes of a buffer where one piece of page-locked memory ends and the next begins.

    CUDA refuses to copy to memory of which a part is locked and a part is not
    (cuMemcpyAsync: "must be either entirely registered with CUDA or ... not registered at all").

    Args:
        start: Their first one in the buffer.
        size: How many.

    Yields:
        Offset from *start*, and length.
    """
    offset = 0
    while offset < size:
        length = min(size - offset, PIECE_BYTES - (start + offset) % PIECE_BYTES)
        yield offset, length
        offset += length


def lock(
    buffer: StagingBuffer,
    device: torch.device,
    cuda: Cuda,
    *,
    gently: bool = False,
    stop: threading.Event | None = None,
) -> None:
    """
    Have what is left of a buffer's memory page-locked, so that devices write into it by themselves.

    Takes up to half a second a gigabyte, without the GIL, in which no thread can give a device any work;
    a copy into memory that is not locked keeps them from it four times as long. Memory that cannot be
    locked is warned of and used as it is.

    Args:
        buffer: Its ``pins`` hold what is locked.
        device: One of those that write into it; it is locked for all.
        cuda: Locks.
        gently: Pause between two pieces, so that a training's steps go on; takes three times as long.
        stop: Return soon after it is set, with what is locked by then.
    """
    # What lies on a disk does so because there is no memory that it could be locked in.
    if buffer.mapping is None or buffer.is_spilled:
        return
    if buffer.pins is None:
        buffer.pins = _Pins(buffer.mapping, device, cuda)
    pins = cast(_Pins, buffer.pins)
    while not pins.is_over and not (stop is not None and stop.is_set()):
        begun = time.monotonic()
        pins.lock_next()
        if gently:
            time.sleep(2 * (time.monotonic() - begun))


def is_locked(buffer: StagingBuffer) -> bool:
    """Tell whether `lock` has nothing more to do for *buffer*."""
    return buffer.is_spilled or (buffer.pins is not None and cast(_Pins, buffer.pins).is_over)


class _Pins:
    """
    The page-locked pieces of a mapping; unlocked when this is dropped, before the mapping is.

    Attributes:
        is_over: Whether all are locked, or one was refused.
    """

    def __init__(self, mapping: mmap.mmap, device: torch.device, cuda: Cuda) -> None:
        self.is_over = False
        self._device = device
        self._cuda = cuda
        self._address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        self._size = len(mapping)
        self._left = deque(pieces(0, self._size))
        self._locked: list[int] = []
        weakref.finalize(self, _unlock, mapping, cuda, self._locked)

    def lock_next(self) -> None:
        """Lock one more piece."""
        offset, size = self._left.popleft()
        refused = self._cuda.lock_pages(self._address + offset, size, self._device)
        if refused is None:
            self._locked.append(self._address + offset)
            self.is_over = not self._left
            return
        self.is_over = True
        _log.warning(
            "Cannot page-lock the host memory of snapshots (%s, after %d of %d MiB): copies from the "
            "device will be slower. Raise the limit of locked memory (ulimit -l).",
            refused,
            offset >> 20,
            self._size >> 20,
        )


def _unlock(mapping: mmap.mmap, cuda: Cuda, addresses: Iterable[int]) -> None:
    # The mapping is an argument so that it lives until here.
    for address in addresses:
        cuda.unlock_pages(address)

"""The sums of a zip's records, CRC-32, and what is done where they are made: in one pass over the memory."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import numpy as np

from trainbus.checkpoint.hasher import Hasher, HasherInC
from trainbus.checkpoint.turns import Turns

try:
    from isal import isal_zlib
    from isal.isal_zlib import crc32
except ImportError:  # where it has no wheel: the same sum, at a seventh of the speed
    from zlib import crc32

    isal_zlib = None  # type: ignore[assignment]

try:
    from trainbus.checkpoint._writing import complete as complete_in_c
except ImportError:  # built where there was a C compiler
    complete_in_c = None  # type: ignore[assignment]

__all__ = ["Gaps", "Pieces", "complete", "crc32"]

_SUM_BYTES = 4


class Pieces(NamedTuple):
    """
    Bytes of neighbouring records, of each all or a part.

    Attributes:
        starts, sizes: Of each piece, in bytes of the memory, as uint64.
        sums: CRC-32 of each record so far, as uint32.
    """

    starts: np.ndarray
    sizes: np.ndarray
    sums: np.ndarray


class Gaps(NamedTuple):
    """
    What stands behind records, and ends with them.

    Attributes:
        starts: Where on the memory each is to stand, as uint64.
        bounds: Where in *parts* each begins, and behind it where the last one ends, as uint64.
        parts: All of them, one behind the other, and maybe others.
        sum_at: At which of its bytes each has the record's sum, four bytes in little-endian order.
    """

    starts: np.ndarray
    bounds: np.ndarray
    parts: bytearray
    sum_at: int


def complete(memory: memoryview, pieces: Pieces, gaps: Gaps, hasher: Hasher) -> None:
    """
    Sum up *pieces* of *memory*, put *gaps* behind the first of them with these sums, and hash all of it.

    Changes the sums of *pieces*, the *parts* of *gaps*, and *memory*.

    With the C extension this lets go of the interpreter's lock once, and reads the memory once: what the sum
    has read is in the core's cache when the digest reads it (512 MiB: 45 ms instead of 62). Without it, the
    lock is let go for each piece; then a thread that never leaves Python makes each of them wait for 5 ms.

    Args:
        memory: Has the pieces and the gaps, one behind the other.
        pieces: One or more.
        gaps: As many, or one less: behind the last piece none if its record goes on, or is the last.
        hasher: Has been given all that is before.
    """
    function = _crc32_in_c()
    if complete_in_c is not None and function is not None and isinstance(hasher, HasherInC):
        complete_in_c((function, hasher.function, hasher.state), memory, pieces, gaps)
        return
    turns = Turns()
    for index, (start, size) in enumerate(zip(pieces.starts.tolist(), pieces.sizes.tolist(), strict=True)):
        end = start + size
        pieces.sums[index] = crc32(memory[start:end], int(pieces.sums[index]))
        if index < len(gaps.starts):
            end = _fill(memory, gaps, index, int(pieces.sums[index]))
        turns.offer()
    hasher.update(memory[int(pieces.starts[0]) : end])


def _fill(memory: memoryview, gaps: Gaps, index: int, sum_: int) -> int:
    """Put one gap on *memory*, and return where it ends there."""
    begin, stop = int(gaps.bounds[index]), int(gaps.bounds[index + 1])
    at = begin + gaps.sum_at
    gaps.parts[at : at + _SUM_BYTES] = sum_.to_bytes(_SUM_BYTES, "little")
    start = int(gaps.starts[index])
    memory[start : start + stop - begin] = memoryview(gaps.parts)[begin:stop]
    return start + stop - begin


@functools.cache
def _crc32_in_c() -> int | None:
    """
    Return the address of isal's CRC-32, or None.

    It is ``crc32_gzip_refl`` of Intel's ISA-L, which isal's wheels have built in and visible.
    """
    if isal_zlib is None:
        return None
    try:
        function = ctypes.CDLL(isal_zlib.__file__).crc32_gzip_refl
    except (AttributeError, OSError):
        return None
    function.argtypes, function.restype = (ctypes.c_uint32, ctypes.c_char_p, ctypes.c_uint64), ctypes.c_uint32
    data = b"The sum of this, continued."
    works = function(crc32(data[:9]), data[9:], len(data) - 9) == crc32(data)
    return ctypes.cast(function, ctypes.c_void_p).value if works else None

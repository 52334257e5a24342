"""The sums of a zip's records: CRC-32, of many of them at a time."""

from __future__ import annotations

import ctypes
import functools

import numpy as np

try:
    from isal import isal_zlib
    from isal.isal_zlib import crc32
except ImportError:  # where it has no wheel: the same sum, at a seventh of the speed
    from zlib import crc32

    isal_zlib = None  # type: ignore[assignment]

try:
    from trainbus.checkpoint._writing import sum_up
except ImportError:  # built where there was a C compiler
    sum_up = None  # type: ignore[assignment]

__all__ = ["add_to_sums", "crc32"]


def add_to_sums(sums: np.ndarray, memory: memoryview, starts: np.ndarray, sizes: np.ndarray) -> None:
    """
    Continue each of *sums* over a piece of *memory*.

    With the C extension this lets go of the interpreter's lock once. Without it, once for each piece; then
    a thread that never leaves Python makes each of them wait for 5 ms.

    Args:
        sums: CRC-32s so far, as uint32; changed in place.
        memory: What the pieces are parts of.
        starts, sizes: Of each piece, in bytes, as uint64.
    """
    function = _crc32_in_c()
    if sum_up is None or function is None:
        for index, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
            sums[index] = crc32(memory[start : start + size], int(sums[index]))
        return
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    sum_up(function, starts + np.uint64(address), sizes, sums)


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

from collections.abc import Callable
from typing import Any

import numpy as np

def complete(
    functions: tuple[int, int, int],
    memory: memoryview,
    pieces: tuple[np.ndarray, np.ndarray, np.ndarray],
    gaps: tuple[np.ndarray, np.ndarray, bytearray, int],
) -> None:
    """
    Sum up pieces of *memory*, complete the gaps behind them, and hash all in this order, without the GIL.

    Args:
        functions: Addresses of ``uint32_t sum(uint32_t sum, const unsigned char *bytes, uint64_t size)``, of
            ``int hash(void *state, const void *bytes, size_t size)``, and of its state.
        memory: Writable.
        pieces: Of each, where on *memory* it begins and its size, in bytes, as uint64, and its sum so far,
            as uint32, which is continued in place.
        gaps: Of each of those behind the first pieces, where on *memory* it begins, as uint64; where in the
            parts that are to stand there its part begins, and behind these where the last part ends, as
            uint64; the parts, one behind the other; at which of its bytes each is given the piece's sum,
            four bytes in little-endian order.

    Raises:
        ValueError: The lengths do not fit each other, or something would lie outside of *memory* or of the
            parts; nothing was changed.
    """

def begin_write(fd: int, data: memoryview, position: int) -> object:
    """
    Begin to write *data* at a byte of a file, with one ``pwrite``, on a thread that Python knows nothing of.

    Returns:
        The write. It keeps *data*; when nothing refers to it any more, its end is waited for.

    Raises:
        OSError: The system has no more threads.
    """

def finish_write(write: object) -> int:
    """
    Wait for a write, without the GIL. Once for each.

    Returns:
        How many bytes were written.

    Raises:
        OSError: None was.
        ValueError: It was waited for before.
    """

def only_about(types: frozenset[type], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """
    Return what calls *function* with a value whose type is one of *types*, and returns None for others.

    Raises:
        TypeError: *types* is no frozenset.
    """

from collections.abc import Callable
from typing import Any

import numpy as np

def sum_up(function: int, addresses: np.ndarray, sizes: np.ndarray, sums: np.ndarray) -> None:
    """
    Continue each of *sums* over a range of this process's memory, without the GIL.

    Args:
        function: Address of ``uint32_t function(uint32_t sum, const unsigned char *bytes, uint64_t size)``.
        addresses, sizes: Of each range, as uint64; nothing checks that memory is there.
        sums: As uint32; changed in place.

    Raises:
        ValueError: The three are not equally long.
    """

def scatter(memory: memoryview, starts: np.ndarray, parts: bytearray, bounds: np.ndarray) -> None:
    """
    Copy each of *parts* to its place on *memory*.

    Args:
        memory: Writable.
        starts: Of each part's place on *memory*, in bytes, as uint64.
        parts: All of them, one behind the other.
        bounds: Where in *parts* each begins, and behind it where the last one ends, as uint64.

    Raises:
        ValueError: A part would lie outside of *memory*, or is none; nothing was copied.
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

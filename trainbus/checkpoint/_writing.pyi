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

def only_about(types: frozenset[type], function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """
    Return what calls *function* with a value whose type is one of *types*, and returns None for others.

    Raises:
        TypeError: *types* is no frozenset.
    """

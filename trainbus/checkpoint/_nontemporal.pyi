import numpy as np

def copy(targets: np.ndarray, sources: np.ndarray, sizes: np.ndarray, threads: int) -> None:
    """
    Copy byte ranges of this process's memory past the caches, without the GIL.

    Args:
        targets, sources: Addresses, as many as *sizes*; nothing checks that memory is there.
        sizes: Bytes of each range. All three are contiguous arrays of uint64.
        threads: How many may copy, the calling one among them. They have ended when this returns.

    Raises:
        ValueError: The three are not equally long.
    """

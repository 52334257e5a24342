"""``torch.load`` as trainbus calls it, and which of its failures say that a file is damaged."""

from __future__ import annotations

import errno
import re
import warnings
from collections.abc import Callable
from typing import Any, BinaryIO, TypeAlias

import torch

__all__ = ["MapLocation", "raise_if_no_damage", "unpickle"]

MapLocation: TypeAlias = str | torch.device | dict[str, str] | Callable[[Any, str], Any] | None
"""What ``torch.load`` takes as ``map_location``."""

_ASKED = re.compile(r"allocate (\d+) bytes")


def unpickle(file: BinaryIO, map_location: MapLocation = "cpu", *, weights_only: bool = True) -> Any:
    """
    Return what ``torch.load`` gives for *file*; it checks sparse tensors too.

    What torch warns of is shown also where the script makes errors of warnings: it says nothing of the file.
    """
    check = torch.sparse.check_sparse_tensor_invariants(True)  # type: ignore[no-untyped-call]
    with check, warnings.catch_warnings():
        shown = [("default" if action == "error" else action, *rest) for action, *rest in warnings.filters]
        warnings.filters[:] = shown  # type: ignore[index]
        # From 2.14 on torch checks them by itself, and warns each time that it does.
        warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
        try:
            # Without mmap, which torch's own option may ask for: it takes paths only.
            return torch.load(file, map_location=map_location, weights_only=weights_only, mmap=False)
        except BaseException:
            # Or torch would check the sparse tensors of this file with those of the next one.
            getattr(torch._utils, "_sparse_tensors_to_validate", []).clear()
            raise


def raise_if_no_damage(error: Exception, verified: int) -> None:
    """
    Raise *error* if it says nothing of the file: what a disk or the machine's memory refused.

    Args:
        error: What came out of `unpickle`.
        verified: Bytes of the file, if they are those that were written, else 0.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        raise error
    if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which a seek to nowhere gives
        raise error
    text = str(error)
    if "Attempting to deserialize object on" in text:  # of a device that is not there
        raise error
    # Torch's word for it is RuntimeError. A size that nobody has verified may be what is damaged, and no
    # tensor of a good file is larger than that.
    if verified and any(words in text for words in ("can't allocate memory", "not enough memory")):
        asked = _ASKED.search(text)
        if asked is None or int(asked[1]) <= verified:
            raise MemoryError(text) from error

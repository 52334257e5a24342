"""Python's garbage collector, kept from running in the middle of a save."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Iterator

__all__ = ["paused"]

_lock = threading.Lock()
_pauses = 0
_was_enabled = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """
    Let no automatic collection begin, on any thread, until the last of these contexts is left.

    A snapshot or a file of thousands of tensors makes so many short-lived objects that they set
    off full collections. Each goes through all that a training holds, with the GIL: 150 ms in a
    process that had imported torch and held 4,096 tensors, where the snapshot took 25 ms. Nothing
    is collected here instead; a collector that was off before stays off.
    """
    global _pauses, _was_enabled
    with _lock:
        if _pauses == 0:
            _was_enabled = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0 and _was_enabled:
                gc.enable()


def _resume_in_child() -> None:
    global _lock, _pauses
    _lock = threading.Lock()
    if _pauses:
        _pauses = 0
        if _was_enabled:
            gc.enable()


os.register_at_fork(after_in_child=_resume_in_child)

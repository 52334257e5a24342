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
_thresholds = gc.get_threshold()


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """
    Let no automatic collection begin, on any thread, until the last of these contexts is left.

    A snapshot or a file of thousands of tensors makes so many short-lived objects that they set
    off full collections. Each goes through all that a training holds, with the GIL: 150 ms in a
    process that had imported torch and held 4,096 tensors, where the snapshot took 25 ms. Nothing
    is collected here instead.

    Whether the collector is on is left to the script, which may turn it off or on meanwhile; so are its
    thresholds, if it sets others meanwhile.
    """
    global _pauses, _thresholds
    with _lock:
        if _pauses == 0:
            _thresholds = gc.get_threshold()
            gc.set_threshold(0, *_thresholds[1:])
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if _pauses == 0:
                _resume()


def _resume() -> None:
    if gc.get_threshold() == (0, *_thresholds[1:]):
        gc.set_threshold(*_thresholds)


def _resume_in_child() -> None:
    global _lock, _pauses
    _lock = threading.Lock()
    if _pauses:
        _pauses = 0
        _resume()


os.register_at_fork(after_in_child=_resume_in_child)

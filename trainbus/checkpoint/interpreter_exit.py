"""
What becomes of saves when the process ends: they are finished, or its exit code says that one was lost.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import weakref
from typing import Protocol

from trainbus.errors import CheckpointError

__all__ = ["EXIT_CODE", "drain_at_exit", "is_exiting", "remember"]

EXIT_CODE = 74
"""``EX_IOERR`` of sysexits.h. Replaces the script's own when a save was lost and nobody was told."""


class Drainable(Protocol):
    """What has something left to finish."""

    def flush(self) -> None:
        """Block until all is finished or failed."""

    def abandon(self, reason: str) -> None:
        """Fail what is not finished."""


_drainables: weakref.WeakSet[Drainable] = weakref.WeakSet()
_failures: list[CheckpointError] = []
_exiting = False


def drain_at_exit(drainable: Drainable) -> None:
    """Have *drainable* flushed before the interpreter exits."""
    _drainables.add(drainable)


def is_exiting() -> bool:
    """Return whether the interpreter exits, so that no thread can be started any more."""
    return _exiting


def remember(failure: CheckpointError) -> None:
    """Have *failure* told at exit, unless somebody has seen it by then."""
    _failures[:] = [earlier for earlier in _failures if not earlier.seen] + [failure]


def _finish() -> None:
    global _exiting
    _exiting = True
    for drainable in list(_drainables):
        _drain(drainable)
    processes = sys.modules.get("multiprocessing.process")
    if processes is not None and processes.parent_process() is not None:
        # Children of multiprocessing end without the hooks of atexit: nothing comes after this.
        _leave_if_something_was_lost()


def _drain(drainable: Drainable) -> None:
    try:
        try:
            drainable.flush()
        except KeyboardInterrupt:
            _print(f"still writing {drainable!r}; interrupt again to give it up.")
            drainable.flush()
    except KeyboardInterrupt:
        drainable.abandon("the process was interrupted while it ended")


def _finish_last() -> None:
    _finish()
    _leave_if_something_was_lost()


def _leave_if_something_was_lost() -> None:
    lost = [failure for failure in _failures if not failure.seen]
    if not lost:
        return
    others = f" ({len(lost) - 1} more saves were lost.)" if lost[1:] else ""
    _print(f"{lost[0]}{others}")
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(EXIT_CODE)


def _print(text: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(f"trainbus: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _forget_in_child() -> None:
    _failures.clear()


os.register_at_fork(after_in_child=_forget_in_child)
# Both: the first also runs in forked multiprocessing children; the second also comes after threads of
# the user's that outlive the main one.
if hasattr(threading, "_register_atexit"):
    with contextlib.suppress(RuntimeError):
        threading._register_atexit(_finish)
atexit.register(_finish_last)

"""What is asked of a forked child."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

__all__ = ["holds_in_child"]

TOO_LONG = 30  # seconds


def holds_in_child(claim: Callable[[], bool]) -> bool:
    """Tell whether *claim* is true in a forked child; a child that hangs is killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(TOO_LONG)
            status = 0 if claim() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""Who writes a file stands aside while the training needs every core."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Throttle"]

LONGEST_REST = 0.1  # seconds
_LOOK_EVERY = 0.004  # seconds: each look is a turn at the interpreter's lock


class Throttle:
    """
    Lets a thread rest while the training is busy, but never for longer than it has worked before.

    Between two optimizer steps the host mostly waits for a device, and a file is written meanwhile. In a
    step that the host itself makes, or launches piece by piece, each core and each turn at the
    interpreter's lock that writing takes makes the training wait.

    Args:
        is_busy: Tells, on any thread and at once, whether the training is.
    """

    def __init__(self, is_busy: Callable[[], bool]) -> None:
        self._is_busy = is_busy
        self._left = LONGEST_REST  # seconds that may be rested now
        self._worked_since = time.monotonic()

    def rest(self) -> None:
        """Return when the training is not busy, or when there was rest enough. One thread at a time."""
        begun = time.monotonic()
        self._left = min(LONGEST_REST, self._left + begun - self._worked_since)
        until = begun + self._left
        while self._is_busy() and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)
        self._worked_since = time.monotonic()
        self._left -= self._worked_since - begun

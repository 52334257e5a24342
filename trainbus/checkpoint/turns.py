"""Long work in Python gives other threads their turn at the interpreter's lock."""

from __future__ import annotations

import time

__all__ = ["Turns"]

LONGEST_TURN = 0.0003  # seconds
# Long enough for a thread that waits to wake up. With 0 this one would have the lock back before that, and
# the other would begin anew to wait.
_LET_GO = 0.0001


class Turns:
    """
    Lets go of the interpreter's lock now and then, for one thread.

    By itself CPython takes it from a thread only when another has waited 5 ms, each time that it waits.
    A training that launches work for a GPU waits at every launch.
    """

    def __init__(self) -> None:
        self._ends = time.perf_counter() + LONGEST_TURN

    def offer(self) -> None:
        """Sleep for a moment if this turn has been long enough. To be called every few microseconds."""
        if time.perf_counter() >= self._ends:
            time.sleep(_LET_GO)
            self._ends = time.perf_counter() + LONGEST_TURN

"""How long a Python thread that only looks at the clock is kept from it while a save is written."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.stall.loop import Request

__all__ = ["WATCHED_SECONDS", "idle", "look_at_clock", "watch"]

IDLE_SECONDS = 0.5
WATCHED_SECONDS = 2.0
_SLICE = 0.001


def look_at_clock(enough: Callable[[], bool]) -> list[float]:
    """
    Look at the clock without end, until *enough* says so.

    Returns:
        The longest time between two looks, in seconds, in each millisecond; one that is longer
        than a millisecond counts once. (Of all looks nearly all take as long as a look takes, so
        that their percentiles would say nothing.)
    """
    pauses = []
    clock = time.perf_counter
    last = clock()
    longest, ends = 0.0, last + _SLICE
    while not enough():
        now = clock()
        longest = max(longest, now - last)
        last = now
        if now >= ends:
            pauses.append(longest)
            longest, ends = 0.0, now + _SLICE
    return pauses


def watch(request: Request, *, background: bool) -> tuple[list[float], float | None]:
    """
    Return the pauses while *request* is written, from when its call has returned, for two seconds at most.

    And how long it took until it was complete, in seconds; None if it was not by then.

    What is not written in the background by itself is given to a thread, as people do. A writer
    of thousands of tensors gets the interpreter's lock back from a thread like this one only after
    5 ms each time; it may need half a minute, of which the first seconds say enough.
    """
    if background:
        request.start()
    else:
        request.start_in_thread()
    begun = time.perf_counter()
    ends = begun + WATCHED_SECONDS
    pauses = look_at_clock(lambda: request.done() or time.perf_counter() >= ends)
    return pauses, time.perf_counter() - begun if request.done() else None


def idle() -> list[float]:
    """Return the pauses while nothing is written: what the machine and the interpreter do to everyone."""
    ends = time.perf_counter() + IDLE_SECONDS
    return look_at_clock(lambda: time.perf_counter() >= ends)

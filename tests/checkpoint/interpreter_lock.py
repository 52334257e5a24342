"""Who has the interpreter's lock."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

__all__ = ["is_let_go_by"]

TOO_LONG = 30  # seconds


def is_let_go_by(action: Callable[[], object]) -> bool:
    """Tell whether another Python thread runs while *action* is called, a hundred times if need be."""
    gate, ran = threading.Lock(), threading.Event()

    def run() -> None:
        with gate:
            ran.set()

    gate.acquire()
    other = threading.Thread(target=run)
    other.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000)  # seconds: the other one has the interpreter only when it is let go of
    try:
        gate.release()
        ends = time.monotonic() + 1
        calls = 0
        while not ran.is_set() and (calls < 100 or time.monotonic() < ends):
            action()
            calls += 1
        return ran.is_set()
    finally:
        sys.setswitchinterval(interval)
        other.join(TOO_LONG)

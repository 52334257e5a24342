from __future__ import annotations

import pytest

from trainbus.checkpoint import turns
from trainbus.checkpoint.turns import LONGEST_TURN, Turns

from .interpreter_lock import is_let_go_by


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept = 0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += 1


class TestTurns:
    def test_another_thread_runs(self):
        """
        A thread that waits for the interpreter has it when a turn is offered.
        """
        assert is_let_go_by(Turns().offer)

    def test_only_after_a_turn(self, monkeypatch: pytest.MonkeyPatch):
        """
        The interpreter is let go of once a turn has been long enough, and then a new one begins.
        """
        clock = Clock()
        monkeypatch.setattr(turns, "time", clock)
        mine = Turns()

        for expected in (0, 0, 1, 1, 2):
            clock.now += 0.4 * LONGEST_TURN
            mine.offer()
            mine.offer()
            assert clock.slept == expected, clock.now
            if expected == 1:
                clock.now += 0.2 * LONGEST_TURN

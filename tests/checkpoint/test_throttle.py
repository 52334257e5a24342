"""Writing rests while the training is busy, and never for longer than it has worked."""

from __future__ import annotations

import pytest

from trainbus.checkpoint import throttle
from trainbus.checkpoint.throttle import LONGEST_REST, Throttle


class Clock:
    """A clock that only sleeping and `work` move on."""

    def __init__(self):
        self.now = self.slept = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.slept += seconds

    def work(self, seconds):
        self.now += seconds


@pytest.fixture(name="clock")
def _clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throttle, "time", clock)
    return clock


def rested(clock: Clock, limiter: Throttle) -> float:
    """Return the seconds that one rest takes."""
    before = clock.slept
    limiter.rest()
    return clock.slept - before


class TestRest:
    def test_idle(self, clock):
        """
        While the training is not busy nobody rests.
        """
        assert rested(clock, Throttle(lambda: False)) == 0

    def test_until_it_is_over(self, clock):
        """
        A rest ends soon after what it is for.
        """
        limiter = Throttle(lambda: clock.now < 0.05)

        assert 0.05 <= rested(clock, limiter) < 0.06

    def test_at_most(self, clock):
        """
        A training that is always busy is waited for once, and not again before there was as much work.
        """
        limiter = Throttle(lambda: True)

        assert rested(clock, limiter) == pytest.approx(LONGEST_REST, abs=0.005)
        assert rested(clock, limiter) == 0
        clock.work(0.03)
        assert rested(clock, limiter) == pytest.approx(0.03, abs=0.005)

    def test_long_work_earns_no_long_rest(self, clock):
        """
        However long the work was, one rest is no longer than the longest.
        """
        limiter = Throttle(lambda: True)
        limiter.rest()
        clock.work(60)

        assert rested(clock, limiter) == pytest.approx(LONGEST_REST, abs=0.005)

    def test_half_of_the_time(self, clock):
        """
        Beside a training that is always busy a file takes twice the time at most, and one rest more.
        """
        limiter = Throttle(lambda: True)
        for _ in range(100):
            limiter.rest()
            clock.work(0.01)

        assert clock.slept <= 100 * 0.01 + LONGEST_REST + 0.005

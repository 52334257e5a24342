"""What a run says of its saves at its end."""

from __future__ import annotations

import logging

import pytest

from trainbus import EventBus
from trainbus.checkpoint.stats import CheckpointStats, LostTime
from trainbus.save_reports import SaveReports


@pytest.fixture(name="bus")
def _bus():
    return EventBus()


@pytest.fixture(name="reports")
def _reports(bus, caplog):
    caplog.set_level(logging.INFO, "trainbus")
    return SaveReports(bus, raises=False)


class TestSummary:
    def test_counts_what_became_of_each(self, bus, reports):
        """Files, skipped saves and failed ones are counted, each by its event."""
        for number in range(3):
            bus.emit("checkpoint_saved", path=f"{number}.pt", size=2_000_000, seconds=0.5)
        for number in range(2):
            bus.emit("checkpoint_skipped", path=f"{number}.pt", reason="the writer was busy")

        stats = reports.stats_with(LostTime(waiting=0.2, copying=0.3, fenced=0.1))
        assert stats == CheckpointStats(
            saves=3,
            bytes=6_000_000,
            seconds_lost=pytest.approx(0.6),
            seconds_waiting=0.2,
            seconds_copying=0.3,
            seconds_fenced=0.1,
            seconds_to_durable=1.5,
            skipped=2,
        )

    @pytest.mark.parametrize(
        ("counts", "end"),
        [
            ({}, "in the background"),
            ({"skipped": 2}, "in the background, 2 skipped"),
            ({"failed": 1}, "in the background, 1 failed"),
            ({"skipped": 2, "failed": 1}, "in the background, 2 skipped, 1 failed"),
        ],
    )
    def test_line(self, counts, end):
        """The line says what was lost a save, and of skipped and failed ones where there are some."""
        stats = CheckpointStats(saves=4, bytes=8_000_000, seconds_lost=0.2, seconds_to_durable=1.25, **counts)

        assert stats.summary() == (
            f"4 checkpoints, 8.0 MB: training lost 0.20 s (50.0 ms each), 1.25 s of writing went on {end}"
        )

    def test_nothing_saved(self, reports, caplog):
        """A run without saves says nothing."""
        reports.log_summary(LostTime(overlappable=1e6))

        assert caplog.messages == []


class TestAdvice:
    def test_copying_that_takes_long(self, bus, reports, caplog):
        """Overlap is spoken of where copying within the host takes more than a hundredth of the run."""
        bus.emit("checkpoint_saved", path="a.pt", size=1, seconds=0.5)

        reports.log_summary(LostTime(copying=1e6, overlappable=1e6))

        assert "Handler(snapshot='overlap')" in caplog.messages[-1]

    def test_copying_that_does_not(self, bus, reports, caplog):
        """Where it could not hide anything, it is not."""
        bus.emit("checkpoint_saved", path="a.pt", size=1, seconds=0.5)

        reports.log_summary(LostTime(copying=1e6))

        assert "overlap" not in caplog.text

"""Ranks that save a sharded state all the time, all killed at once at any moment."""

from __future__ import annotations

import pytest


class TestOneKilled:
    def test_others_are_told(self, ask, tmp_path):
        """When one rank dies amid a save the others fail at once, however long their time-out is."""
        outcome = ask("sharded_loop.one_killed", folder=str(tmp_path))

        assert outcome["told"].startswith("RankFailedError: the ranks did not do it together: ")
        assert outcome["left"] == []


@pytest.mark.parametrize(
    "exchange",
    [pytest.param(True, id="exchange"), pytest.param(False, id="two renames", marks=pytest.mark.full)],
)
class TestKilled:
    def test_at_each_call(self, ask, tmp_path, exchange):
        """
        Whichever call to the disk a save dies before, the old checkpoint or the new one is loaded under its
        name; all that is listed is whole; and the next save leaves nothing else.
        """
        outcome = ask("sharded_loop.killed_at_each_call", folder=str(tmp_path), exchange=exchange)

        assert outcome["problems"] == []
        assert outcome["calls"] > 20

    @pytest.mark.full
    def test_again_and_again(self, ask, tmp_path, request, exchange):
        """
        After each kill every committed checkpoint verifies, loads, and is of one step; the newest is the
        last that was reported, at least; and under a name that is being replaced there is always one.
        """
        kills = request.config.getoption("--runs") or 30

        outcome = ask(
            "sharded_loop.killed",
            folder=str(tmp_path),
            times=kills,
            exchange=exchange,
            limit=60 + 20 * kills,
        )

        assert outcome["problems"] == []
        assert outcome["unfinished"] > 0  # some were killed amid a save

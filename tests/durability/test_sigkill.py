"""Trainings that save all the time, killed at any moment and started again."""

from __future__ import annotations

import pytest


class TestKilled:
    def test_now_and_then(self, ask, tmp_path, request):
        """
        After each kill the newest checkpoint is whole and of one step, none that was reported as saved
        is lost, and one hidden unfinished file remains at most, which is not taken for a checkpoint.
        """
        kills = request.config.getoption("--runs") or 10

        outcome = ask("saving_loop.killed", folder=str(tmp_path), times=kills, limit=60 + 2 * kills)

        assert outcome["problems"] == []

    @pytest.mark.full
    @pytest.mark.parametrize(("kills", "mebibytes"), [(300, 0), (30, 18)], ids=["small", "several chunks"])
    def test_again_and_again(self, ask, tmp_path, request, kills, mebibytes):
        """The same holds over hundreds of kills, also with files of several chunks."""
        kills = request.config.getoption("--runs") or kills

        outcome = ask(
            "saving_loop.killed",
            folder=str(tmp_path),
            times=kills,
            mebibytes=mebibytes,
            limit=60 + 5 * kills,
        )

        assert outcome["problems"] == []
        assert outcome["saves"] > kills

"""Real ranks, started by torchrun: what one of them sees or wants, all do, at the same step."""

from __future__ import annotations

import os

import pytest

import trainbus
from trainbus import read_manifest

pytestmark = pytest.mark.full


class TestResume:
    @pytest.mark.parametrize("ranks", [2, 4])
    def test_amid_an_epoch(self, train, ranks):
        """Killed amid an epoch, the ranks go on, bit for bit: weights, losses, random numbers of each."""
        whole = train("whole", ranks, folder="whole")
        assert train("whole", ranks, step=8) == {}
        parts = train("whole", ranks)

        saved = 5
        for rank in range(ranks):
            assert parts[rank]["error"] is None
            assert parts[rank]["losses"] == whole[rank]["losses"][saved:]
            assert parts[rank]["weights"] == whole[rank]["weights"]
            assert parts[rank]["random"] == whole[rank]["random"]
        assert len({tuple(whole[rank]["random"]) for rank in range(ranks)}) == ranks
        assert len({tuple(whole[rank]["losses"]) for rank in range(ranks)}) == ranks

    def test_another_number_of_ranks(self, train, tmp_path, capfd):
        """With other ranks the epoch is done again from the weights of the file, and the log says so."""
        train("whole", 4, step=8)
        told = train("whole", 2)

        # 4 ranks have 3 batches an epoch, 2 have 6: the file stands in epoch 2, which is done again.
        assert [told[rank]["error"] for rank in (0, 1)] == [None, None]
        assert [len(told[rank]["losses"]) for rank in (0, 1)] == [12, 12]
        assert told[0]["weights"] == told[1]["weights"]
        printed = capfd.readouterr().out
        assert "was saved by 4 ranks and is loaded by 2 ranks" in printed
        assert "epoch 2 is done again from its first batch, of which 2 batches were done" in printed


class TestStop:
    @pytest.mark.parametrize("rank", [0, 1])
    def test_sigterm_on_one_rank(self, train, tmp_path, rank):
        """A signal to one rank: all stop behind the next batch, with one file of that moment."""
        told = train("sigterm", 2, step=7, rank=rank)

        assert {(one["step"], one["reason"], one["error"]) for one in told.values()} == {
            (9, "SIGTERM came.", None)
        }
        assert read_manifest(tmp_path / "run/preempted_9.pt").global_step == 9
        assert len(trainbus.load(tmp_path / "run/preempted_9.pt")["ranks"]["parts"]) == 2

    @pytest.mark.parametrize("scenario", ["stop", "nan"])
    def test_one_rank_stops(self, train, scenario):
        """stop() on one rank ends all behind the batch at hand, with its reason."""
        told = train(scenario, 2, step=7)

        assert {one["step"] for one in told.values()} == {8}
        assert {one["reason"] for one in told.values()} == {
            "enough" if scenario == "stop" else "bad is nan at step 8."
        }

    def test_request_on_one_rank(self, train, tmp_path):
        """SIGUSR2 to one rank: all save once, and training goes on."""
        told = train("request", 2, step=2)

        assert [one["error"] for one in told.values()] == [None, None]
        assert os.listdir(tmp_path / "run") == ["asked_4.pt"]


class TestFailedSave:
    def test_full_disk(self, train):
        """Rank 0's disk is full: all ranks hear of each save at the same event, and raise at the same."""
        told = train("full_disk", 2, rank=0)

        # While the run is left, rank 0 may hear of a save that was under way.
        first, second = (
            one["seen"][: 1 + one["seen"].index(["checkpoint_failed", 6])] for one in told.values()
        )
        assert first == second and ["checkpoint_saved", 2] in first
        assert told[0]["error"] == told[1]["error"]
        assert told[0]["error"].startswith("CheckpointWriteError: Cannot write checkpoint")
        assert "No space left" in told[0]["error"]

    def test_save_that_is_waited_for(self, train):
        """save() raises the same on all ranks."""
        told = train("full_disk_save", 2, step=1)

        assert told[0]["error"] == told[1]["error"]
        assert "No space left" in told[0]["error"] and told[0]["step"] == told[1]["step"] == 1


class TestSlowDisk:
    def test_longer_than_ranks_wait(self, train, tmp_path):
        """Rank 0's disk takes longer than the ranks wait for each other: all wait, and nothing fails."""
        told = train("slow_disk", 2, rank=0, timeout=2)

        assert [one["error"] for one in told.values()] == [None, None]
        assert sorted(os.listdir(tmp_path / "run")) == ["2.pt", "4.pt", "6.pt"]


class TestDecisions:
    def test_one(self, train, tmp_path):
        """A metric, a clock and a predicate that differ by rank: rank 0 decides, all save the same."""
        told = train("decisions", 2)

        assert [one["error"] for one in told.values()] == [None, None]
        names = sorted(os.listdir(tmp_path / "run"))
        assert [name for name in names if name.startswith("best")] == [
            "best_0.5.pt",
            "best_1.0.pt",
            "best_3.0.pt",
        ]
        assert [name for name in names if name.startswith("odd")] == [
            f"odd_{step}.pt" for step in range(1, 7)
        ]
        assert any(name.startswith("timed") for name in names)
        assert told[0]["best"] == told[1]["best"] == [0.5, str(tmp_path / "run/best_0.5.pt")]

    def test_metric_of_one_rank(self, train):
        """A metric that one rank logs is in the logs of all, and nobody waits for it."""
        told = train("one_logs", 2)

        assert told[0]["logs"] == told[1]["logs"]
        assert told[0]["logs"]["only_there"] == 5.0


class TestApart:
    def test_save_under_if_rank_0(self, train):
        """save() on rank 0 alone amid the loop: the others wait in DDP, rank 0 says who did not come."""
        told = train("alone", 2, timeout=3)

        assert "RankError: Cannot go on at handler.save" in told[0]["error"]
        assert "rank 1 did not come within 3 s" in told[0]["error"] and "if rank == 0:" in told[0]["error"]
        assert told[0]["seconds"] < 3 * 4

    def test_save_under_if_rank_0_behind_the_loop(self, train, tmp_path):
        """Where the others do nothing more, too; and no file is left that is none of all ranks."""
        told = train("alone_behind", 2, timeout=3)

        assert "rank 1 did not come within 3 s" in told[0]["error"] and told[1]["error"] is None
        assert not (tmp_path / "run/a.pt").exists()

    def test_killed_rank(self, train):
        """A rank is killed: the others fail at once, and say which."""
        told = train("killed", 4, step=5, rank=2, timeout=60)

        assert sorted(told) == [0, 1, 3]
        for one in told.values():
            assert "RankError: Cannot go on at the end of step 5: rank 2 did not come" in one["error"]
            assert one["step"] == 5 and one["seconds"] < 30

"""Rank and world size, with and without a process group."""

from __future__ import annotations

import pickle

import pytest
import torch.distributed as dist

from trainbus import CheckpointWriteError, ranks
from trainbus.errors import (
    CheckpointSkipped,
    RankError,
    RankFailedError,
    UnsavableStateError,
    UnsyncedNameError,
)


class TestRank:
    def test_alone_is_zero(self, monkeypatch):
        """Without a launcher there is one process, rank 0."""
        monkeypatch.delenv("RANK", raising=False)
        monkeypatch.delenv("WORLD_SIZE", raising=False)

        assert (ranks.rank(), ranks.world_size()) == (0, 1)

    def test_launcher_counts_before_the_group_exists(self, monkeypatch):
        """Under a launcher RANK tells, so that two processes never both think they are 0."""
        monkeypatch.setenv("RANK", "3")
        monkeypatch.setenv("WORLD_SIZE", "8")

        assert (ranks.rank(), ranks.world_size()) == (3, 8)

    def test_group_wins_over_the_environment(self, monkeypatch, tmp_path):
        """Once there is a process group, it tells."""
        monkeypatch.setenv("RANK", "3")
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            assert (ranks.rank(), ranks.world_size()) == (0, 1)
            assert ranks.gather("x") == ["x"]
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("text", ["", "two"])
    def test_nonsense_is_ignored(self, monkeypatch, text):
        """A RANK that is no number counts as none."""
        monkeypatch.setenv("RANK", text)

        assert ranks.rank() == 0


class Mine(Exception):
    """It can be pickled, and not unpickled: its arguments are not what it was made with."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class FakeTable:
    """Stands in for the group: the words of the other ranks are given, rank 0's answer is worked out."""

    def __init__(self, *others):
        self.others = [pickle.dumps(one) for one in others]
        self.met = []

    def exchange(self, what, mine, answer):
        self.met.append(what)
        self.said = mine
        rank = ranks.rank()
        return answer([*self.others[:rank], mine, *self.others[rank:]])


@pytest.fixture
def meet(monkeypatch):
    """Return a function that puts this process among others, as the given rank."""

    def at(rank, *others):
        table = FakeTable(*others)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(ranks, "together", lambda: True)
        monkeypatch.setattr(ranks, "_table", lambda: table)
        return table

    return at


class TestAlone:
    def test_each_gives_the_value(self, monkeypatch):
        """Without other ranks nothing is exchanged: one value, and what is decided here counts."""
        monkeypatch.delenv("RANK", raising=False)

        assert not ranks.together()
        assert ranks.gather({"a": 1}) == [{"a": 1}]
        assert ranks.agree("x") == ranks.decide(lambda: "x") == "x"

    def test_launcher_without_a_group(self, monkeypatch):
        """Under a launcher, before the process group exists, nobody is waited for."""
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        ranks.join()

        assert ranks.gather("x") == ["x"]


class TestTogether:
    def test_gather(self, meet):
        """Every rank gets what each one gave, in their order, and the text says where they met."""
        table = meet(1, "zero", "two")

        assert ranks.gather("one", "the test") == ["zero", "one", "two"]
        assert table.met == ["the test"]

    def test_agree(self, meet):
        """Rank 0's value is everybody's."""
        meet(1, "mine")

        assert ranks.agree("yours") == "mine"

    def test_decide(self, meet):
        """What is decided is decided on rank 0 and called nowhere else."""
        meet(1, ("here", None))

        assert ranks.decide(lambda: 1 / 0) == "here"

    @pytest.mark.parametrize("rank", [0, 1])
    def test_decide_raises_everywhere(self, meet, rank):
        """An error on rank 0 is raised on every rank, with its attributes."""
        error = CheckpointWriteError("a.pt", 3, OSError(28, "No space left on device"))

        def fail():
            raise error

        meet(rank, (None, error))
        with pytest.raises(CheckpointWriteError, match=r"'a\.pt' of global step 3") as info:
            ranks.decide(fail)
        assert (info.value.path, info.value.errno, info.value.seen) == ("a.pt", 28, False)

    @pytest.mark.parametrize("rank", [0, 1])
    def test_decide_raises_what_cannot_be_sent(self, meet, rank):
        """An error that cannot be sent is raised as it is on rank 0, and told of on the others."""

        def fail():
            raise Mine(1, 2)

        table = meet(rank, (None, RankFailedError(0, "Mine: 1 and 2")))
        with pytest.raises(Mine if rank == 0 else RankFailedError, match="1 and 2"):
            ranks.decide(fail)
        if rank == 0:
            assert type(pickle.loads(table.said)[1]) is RankFailedError

    @pytest.mark.parametrize(
        "error",
        [
            UnsavableStateError([("state['a']", "a set")]),
            RankError("rank 1 did not come", [1]),
            RankFailedError(2, "no space", 28, is_unsynced=True),
            CheckpointSkipped("a.pt", "busy"),
            UnsyncedNameError(28, "No space left on device"),
        ],
    )
    def test_errors_of_ours_can_be_sent(self, error):
        """Each arrives as what it was."""
        arrived = pickle.loads(pickle.dumps(error))

        assert (type(arrived), str(arrived), vars(arrived)) == (type(error), str(error), vars(error))
        assert getattr(arrived, "errno", None) == getattr(error, "errno", None)

"""Rank and world size, with and without a process group."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from trainbus import ranks


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


class TestGather:
    def test_alone_gives_the_value(self):
        """Without a process group there is one value."""
        assert ranks.gather({"a": 1}) == [{"a": 1}]

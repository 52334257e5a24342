"""FSDP2 through a handler: each rank writes its part, and all that DDP promises is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import trainbus
from trainbus import CheckpointFolder
from trainbus.cli.app import app

pytestmark = pytest.mark.full


@pytest.fixture
def train_fsdp(train):
    """Return a function that runs a scenario of ``train.py`` with a model of FSDP2."""
    return lambda *args, **options: train(*args, fsdp=1, **options)


class TestResume:
    def test_amid_an_epoch(self, train_fsdp):
        """Killed amid an epoch, the ranks go on, bit for bit: weights, losses, random numbers of each."""
        whole = train_fsdp("whole", 2, folder="whole")
        assert train_fsdp("whole", 2, step=8) == {}
        parts = train_fsdp("whole", 2)

        saved = 5
        for rank in range(2):
            assert parts[rank]["error"] is None and whole[rank]["error"] is None
            assert parts[rank]["losses"] == whole[rank]["losses"][saved:]
            assert parts[rank]["weights"] == whole[rank]["weights"]
            assert parts[rank]["random"] == whole[rank]["random"]
        assert whole[0]["losses"] != whole[1]["losses"]

    def test_another_number_of_ranks(self, train_fsdp, capfd):
        """Saved by 4 ranks, 2 go on with its weights and optimizer, and the log says what is not exact."""
        train_fsdp("whole", 4, step=8)
        told = train_fsdp("whole", 2)

        assert [told[rank]["error"] for rank in (0, 1)] == [None, None]
        assert told[0]["weights"] == told[1]["weights"]
        printed = capfd.readouterr().out
        assert "was saved by 4 ranks and is loaded by 2 ranks" in printed

    @pytest.mark.parametrize("ranks", [2, 1])
    def test_equals_the_oracle(self, train_fsdp, tmp_path, ranks):
        """Of 4 ranks' folder and whole file, fewer make the weights and optimizer that torch gathered."""
        saved = train_fsdp("save_with_oracle", 4)
        assert [one["error"] for one in saved.values()] == [None] * 4
        told = train_fsdp("load_and_compare", ranks)

        assert [one["error"] for one in told.values()] == [None] * ranks
        names = ("divided", "whole.pt", "weights", "weights.pt")
        assert told[0]["differs"] == {name: [] for name in names}
        # Plain torch opens the whole file, and plain PyTorch modules take it.
        state = torch.load(tmp_path / "run/whole.pt", weights_only=True)
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        net.load_state_dict(state["module"])
        net.load_state_dict(trainbus.load(tmp_path / "run/weights"))
        assert os.path.isdir(tmp_path / "run/divided") and os.path.isfile(tmp_path / "run/whole.pt")

    def test_one_plain_process(self, train_fsdp, tmp_path):
        """A process without ranks loads the folder into a plain model and optimizer."""
        train_fsdp("save_with_oracle", 2)
        oracle = torch.load(tmp_path / "run/oracle")
        net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
        optimizer = torch.optim.Adam(net.parameters())
        with trainbus.Handler(net, optimizer) as handler:
            handler.load(tmp_path / "run/divided", only=("module", "optimizer"))

        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, oracle["module"][name])
        for name, parameter in net.named_parameters():
            assert torch.equal(
                optimizer.state[parameter]["exp_avg"], oracle["optimizer"]["state"][name]["exp_avg"]
            )


class TestFolder:
    def test_retention(self, train_fsdp, tmp_path):
        """Of a folder each step the last stays; `ls` lists it, `verify` finds it whole."""
        told = train_fsdp("retention", 2)

        assert [one["error"] for one in told.values()] == [None, None]
        names = [name for name in os.listdir(tmp_path / "run") if not name.startswith(".")]
        assert names == ["6"]
        (found,) = CheckpointFolder(tmp_path / "run")
        assert found.is_sharded and found.manifest.global_step == 6
        assert sorted(os.listdir(found.path))[-2:] == ["digests.xxh128", "manifest.json"]
        listed = json.loads(CliRunner().invoke(app, ["ls", str(tmp_path / "run"), "--json"]).stdout)
        assert (listed["global_step"], listed["path"]) == (6, found.path)
        assert CliRunner().invoke(app, ["verify", found.path]).exit_code == 0


def test_other_layouts(torchrun, tmp_path):
    """Replicas are written once; tensor parallel, alone and within FSDP2, is loaded as it was saved."""
    printed = torchrun(4, Path(__file__).parent / "layouts.py", tmp_path)

    assert "replicas: [True, True], 2 files" in printed
    assert "tensor parallel: [True, True], 4 files" in printed
    assert "both: [True, True], 4 files" in printed


class TestSlowDisk:
    def test_longer_than_ranks_wait(self, train_fsdp, tmp_path):
        """A rank's disk takes longer than the ranks wait for each other: all wait, and nothing fails."""
        told = train_fsdp("slow_disk", 2, rank=1, timeout=2)

        assert [one["error"] for one in told.values()] == [None, None]
        assert sorted(os.listdir(tmp_path / "run")) == ["2.pt", "4.pt", "6.pt"]


class TestFailedSave:
    @pytest.mark.parametrize(("rank", "at"), [(0, 6), (1, 2)])
    def test_full_disk(self, train_fsdp, tmp_path, rank, at):
        """A rank's disk is full: all raise at the same event, and the checkpoint before is whole."""
        told = train_fsdp("full_disk", 2, rank=rank, at=at)

        first, second = (
            one["seen"][: 1 + one["seen"].index(["checkpoint_failed", 4])] for one in told.values()
        )
        assert first == second and ["checkpoint_saved", 2] in first
        assert told[0]["error"] == told[1]["error"]
        assert told[0]["error"].startswith("CheckpointWriteError: Cannot write checkpoint")
        assert f"it failed on rank {rank}: [Errno 28] No space left" in told[0]["error"]
        assert trainbus.verify(tmp_path / "run/2.pt").global_step == 2
        assert [found.path for found in CheckpointFolder(tmp_path / "run")] == [str(tmp_path / "run/2.pt")]


class TestApart:
    def test_exception(self, train_fsdp, tmp_path):
        """An exception ends each rank without the others: OnException saves nothing and says why."""
        told = train_fsdp("exception", 2, step=3)

        assert {one["error"] for one in told.values()} == {"ValueError: bad batch"}
        assert told[0]["seen"] == [
            "the state is divided among ranks, and the others may not come to give theirs"
        ]
        assert list(CheckpointFolder(tmp_path / "run")) == []

    def test_save_under_if_rank_0(self, train_fsdp):
        """save() on rank 0 alone: rank 0 says who did not come."""
        told = train_fsdp("alone_behind", 2, timeout=3)

        assert "rank 1 did not come within 3 s" in told[0]["error"] and told[1]["error"] is None

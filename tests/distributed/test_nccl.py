"""Ranks on GPUs with NCCL: a run that dies goes on bit for bit, and FSDP2 saves what torch gathers."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.fixture(params=[0, 1], ids=["DDP", "FSDP2"])
def fsdp(request):
    """Each way to have several ranks."""
    return request.param


@pytest.fixture
def train_nccl(train, fsdp):
    """Return a function that runs a scenario of ``train.py`` with a rank on each GPU."""
    ranks = torch.cuda.device_count()
    return lambda scenario, **options: train(scenario, ranks, device="cuda", fsdp=fsdp, **options)


def test_amid_an_epoch(train_nccl):
    """Killed amid an epoch, the ranks go on: weights, losses, random numbers of host and device."""
    whole = train_nccl("whole", folder="whole")
    assert whole and train_nccl("whole", step=8) == {}
    parts = train_nccl("whole")

    saved = 5
    for rank, told in whole.items():
        assert told["error"] is None and parts[rank]["error"] is None
        assert parts[rank]["losses"] == told["losses"][saved:]
        assert parts[rank]["weights"] == told["weights"]
        assert parts[rank]["random"] == told["random"]


def test_equals_the_oracle(train_nccl):
    """A folder and a whole file hold the weights and the optimizer that torch gathers."""
    saved = train_nccl("save_with_oracle")
    assert saved and {one["error"] for one in saved.values()} == {None}
    told = train_nccl("load_and_compare")

    assert {one["error"] for one in told.values()} == {None}
    assert told[0]["differs"] == {name: [] for name in ("divided", "whole.pt", "weights", "weights.pt")}

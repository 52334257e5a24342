"""What splits its state over the ranks for good is refused when the handler is made."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from trainbus import Handler


class Split(nn.Module):
    """Stands in for FSDP1, whose module takes long to import."""


class Zero(torch.optim.SGD):
    """Stands in for ZeroRedundancyOptimizer."""


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torch.distributed.fsdp", SimpleNamespace(FullyShardedDataParallel=Split)
    )
    monkeypatch.setitem(sys.modules, "torch.distributed.optim", SimpleNamespace(ZeroRedundancyOptimizer=Zero))


FSDP1 = r"FSDP1 \(FullyShardedDataParallel\).*fully_shard\(module\)"
ZERO = r"ZeroRedundancyOptimizer: each rank holds.*plain optimizer"


@pytest.mark.usefixtures("stand_ins")
class TestRefuseSplitState:
    def test_fsdp1(self):
        """FSDP1 is refused wherever it is in the module, and FSDP2 recommended."""
        for module in (Split(), {"net": Split()}, nn.Sequential(nn.Sequential(Split()))):
            with pytest.raises(TypeError, match=FSDP1):
                Handler(module)

    def test_zero(self):
        """So is a ZeroRedundancyOptimizer."""
        module = nn.Linear(1, 1)
        for optimizer in (Zero(module.parameters()), {"adam": Zero(module.parameters())}):
            with pytest.raises(TypeError, match=ZERO):
                Handler(module, optimizer)

    def test_others(self):
        """Plain ones are taken."""
        module = nn.Linear(1, 1)
        Handler(module, torch.optim.SGD(module.parameters(), 0.1)).close()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")  # of torch, about what it deprecates
def test_real_ones(tmp_path):
    """Torch's own are known under these names."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        module = nn.Linear(1, 1)
        with pytest.raises(TypeError, match=ZERO):
            Handler(module, ZeroRedundancyOptimizer(module.parameters(), torch.optim.SGD, lr=0.1))
        with pytest.raises(TypeError, match=FSDP1):
            Handler(nn.Sequential(FullyShardedDataParallel(module, device_id=torch.device("cpu"))))
    finally:
        dist.destroy_process_group()

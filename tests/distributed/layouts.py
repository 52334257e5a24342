"""Save and load at 4 ranks with parameters that are divided in other ways than over all ranks."""

from __future__ import annotations

import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from trainbus import Handler


def build(layout: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model and its optimizer: replicas, tensor parallel, or that within FSDP2."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    if layout == "replicas":
        fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard")))
    else:
        sizes = (1, 4) if layout == "tensor parallel" else (2, 2)
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
        parallelize_module(net, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if layout == "both":
            fully_shard(net, mesh=mesh["data"])
    # Some parameters stay whole under tensor parallel, and foreach takes no mixture.
    return net, torch.optim.AdamW(net.parameters(), lr=0.1, foreach=False)


def whole(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Return all tensors of both, whole."""
    found = list(net.state_dict().values())
    for state in optimizer.state_dict()["state"].values():
        found += state.values()
    return [one.full_tensor() if isinstance(one, DTensor) else one for one in found]


def main(folder: str) -> None:
    """Train, save, load into fresh ones, compare; rank 0 prints what came of it."""
    dist.init_process_group("gloo")
    for layout in ("replicas", "tensor parallel", "both"):
        net, optimizer = build(layout, seed=0)
        with Handler(net, optimizer) as handler:
            for _ in range(2):
                net(torch.ones(2, 4)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            handler.save(f"{folder}/{layout}")
            handler.save(f"{folder}/{layout}.pt", full_state=True)
        before = whole(net, optimizer)
        equal = []
        for name in (layout, f"{layout}.pt"):
            others = build(layout, seed=1)
            with Handler(*others) as handler:
                handler.load(f"{folder}/{name}", only=("module", "optimizer"))
            after = whole(*others)
            equal.append(len(before) == len(after) == 16 and all(map(torch.equal, before, after)))
        if dist.get_rank() == 0:
            files = sum(name.endswith(".distcp") for name in os.listdir(f"{folder}/{layout}"))
            print(f"{layout}: {equal}, {files} files", flush=True)
    dist.destroy_process_group()
    gc.collect()  # a group that is left to the interpreter's end may abort the process


if __name__ == "__main__":
    main(sys.argv[1])

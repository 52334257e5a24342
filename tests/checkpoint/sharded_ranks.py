"""What each rank of a torchrun does for ``test_sharded_ranks.py``: ``sharded_ranks.py SCENARIO FOLDER``."""

from __future__ import annotations

import collections
import datetime
import errno
import gc
import json
import math
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import trainbus
from trainbus import Manifest
from trainbus.checkpoint.sharded import ShardedSaver, collect_sharded, restore_sharded
from trainbus.checkpoint.sharded_load import load_into
from trainbus.errors import RankFailedError, StateMismatchError
from trainbus.testing import FaultyDisk

WAIT = 120.0


def build(mesh):
    """Return a model that is sharded over *mesh*, unevenly, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 10), nn.BatchNorm1d(10), nn.Linear(10, 3), nn.Linear(3, 1))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def train(model, optimizer, steps=2):
    """Train on the same data everywhere, so that what is no DTensor is equal on all ranks."""
    for step in range(steps):
        torch.manual_seed(100 + step)
        model(torch.randn(8, 7)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def whole(value):
    """Return a state with each DTensor gathered from all ranks."""
    if isinstance(value, DTensor):
        return value.full_tensor().clone()
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    return [whole(item) for item in value] if isinstance(value, list) else value


def same(a, b):
    """Tell whether two states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def manifest(step=0):
    """Return what a checkpoint says of itself."""
    return Manifest(contents="state", sequence=step, global_step=step)


def saved(group, folder, mesh):
    """Save at this many ranks, change everything at once, and have the oracle beside it."""
    model, optimizer = build(mesh)
    train(model, optimizer)
    state = {**collect_sharded(model, optimizer), "progress": {"step": 2, 3: (1, "a")}, "empty": {}}
    oracle = whole(state)
    state["stages"] = {str(dist.get_rank()): torch.full((2,), dist.get_rank())}
    saver = ShardedSaver(group)
    pending = saver.save(f"{folder}/run/a", state, manifest)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(-1)
    final = pending.result(WAIT)
    if dist.get_rank() == 0:
        torch.save(oracle, f"{folder}/oracle.pt")
    saver.close()
    return {"manifest": final.digest, "files": sorted(os.listdir(f"{folder}/run/a"))}


def save(group, folder):
    """Save with FSDP2 over all ranks."""
    return saved(group, folder, init_device_mesh("cpu", (dist.get_world_size(),)))


def save_hsdp(group, folder):
    """Save with FSDP2 over two replicas."""
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replica", "shard"))
    return saved(group, folder, mesh)


def load(group, folder):
    """Load at this many ranks into a fresh model; then train on with it."""
    model, optimizer = build(init_device_mesh("cpu", (dist.get_world_size(),)))
    oracle = torch.load(f"{folder}/oracle.pt")
    target = collect_sharded(model, optimizer)
    state, final = load_into(f"{folder}/run/a", target, group=group)
    restore_sharded(model, optimizer, state)
    there = {
        **whole(collect_sharded(model, optimizer)),
        "progress": state["progress"],
        "empty": state["empty"],
    }
    train(model, optimizer, steps=1)
    part, _ = load_into(f"{folder}/run/a", target, group=group, keys=["module"])
    try:
        load_into(f"{folder}/run/a", {**target, "module": {"new": torch.zeros(1)}}, group=group)
        refused = ""
    except StateMismatchError as error:
        refused = str(error)
    return {"same": same(there, oracle), "keys": list(part), "refused": refused, "manifest": final.digest}


def damaged(group, folder):
    """Load what is damaged: every rank finds out before a tensor has changed."""
    model, optimizer = build(init_device_mesh("cpu", (dist.get_world_size(),)))
    target = collect_sharded(model, optimizer)
    before = whole(target)
    try:
        load_into(f"{folder}/run/a", target, group=group)
    except trainbus.CheckpointCorruptError as error:
        return {"reason": error.reason, "unchanged": same(before, whole(target))}
    return {}


def failing(group, folder):
    """Save on disks that fail on one rank; each time all ranks are told the same, and go on."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    model, optimizer = build(init_device_mesh("cpu", (dist.get_world_size(),)))
    train(model, optimizer)
    state = collect_sharded(model, optimizer)
    saver = ShardedSaver(group)
    path = f"{folder}/a"
    first = saver.save(path, state, manifest).result(WAIT)
    told = []

    def attempt(state=state, describe=manifest, disk=None):
        with disk or FaultyDisk():
            try:
                saver.save(path, state, describe).result(WAIT)
            except RankFailedError as error:
                told.append([str(error), error.rank, error.errno])
        dist.barrier(group)
        assert trainbus.verify(path) == first
        assert os.listdir(folder) == ["a"], os.listdir(folder)

    def broken():
        raise ValueError("no manifest")

    for at in (0, last):
        disk = FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf) if rank == at else None
        attempt(disk=disk)
    for call in ("make_folder", "exchange"):
        attempt(disk=FaultyDisk(errno.EROFS, calls=[call]) if rank == 0 else None)
    attempt(describe=broken)
    attempt(state=collections.ChainMap() if rank != last else {"a": collections.defaultdict(list)})
    second = saver.save(path, state, manifest).result(WAIT)
    saver.close()
    return {"told": told, "again": second.digest != first.digest or second == first}


def absent(group, folder):
    """Save while the last rank does not: the others fail within the time-out of their group."""
    brief = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=3))
    saver = ShardedSaver(brief)
    told = ""
    if dist.get_rank() != dist.get_world_size() - 1:
        try:
            saver.save(f"{folder}/a", {"a": torch.ones(3)}, manifest).result(WAIT)
        except RankFailedError as error:
            told = str(error)
    dist.barrier(group)
    return {"told": told, "left": os.listdir(folder)}


def main() -> None:
    """Run one scenario; rank 0's file holds what all ranks return."""
    scenario, folder = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=WAIT))
    group = dist.new_group(backend="gloo")
    results = [None] * dist.get_world_size()
    dist.all_gather_object(results, globals()[scenario](group, folder))
    if dist.get_rank() == 0:
        print("RESULTS " + json.dumps(results), flush=True)
    dist.destroy_process_group()
    # Errors and what they came from hold each other, and a group; one left to the end may abort the process.
    gc.collect()


if __name__ == "__main__":
    main()

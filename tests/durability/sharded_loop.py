"""Two ranks that save a sharded state all the time, killed at any moment and started again."""

from __future__ import annotations

import datetime
import os
import random
import select
import signal
import tempfile
import time
import traceback
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from volumes import die_with_parent

import trainbus
from trainbus import CheckpointFolder, Manifest
from trainbus.checkpoint.disk import Disk, use_disk
from trainbus.checkpoint.sharded import ShardedSaver
from trainbus.testing import FaultyDisk

RANKS = 2
NAMES = ("a", "b")
LIMIT = 60.0
MOST_SAVES = 3
MOST_SECONDS = 0.06  # after the last of them: some three times what a save takes


class NoExchange(Disk):
    """A disk on which two names cannot change places."""

    def exchange(self, folder: int, one: str, other: str) -> bool:
        """Say so."""
        os.stat(other, dir_fd=folder)
        return False


def save(rank: int, folder: str, store: str, first: int, pipe: int, disk: Disk) -> None:
    """Save one step after the other, each a tensor full of its number; rank 0 tells of the durable ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    saver = ShardedSaver(dist.new_group(backend="gloo", timeout=datetime.timedelta(hours=1)))
    whole = distribute_tensor(torch.zeros(64, 1000), mesh, [Shard(0)])
    with use_disk(disk):
        for step in range(first, 1_000_000):
            whole.fill_(step)
            state = {"module": {"w": whole}, "step": step, "buffer": torch.tensor(step)}
            manifest = Manifest(contents="state", sequence=step, global_step=step)
            saver.save(f"{folder}/{NAMES[step % 2]}", state, lambda manifest=manifest: manifest).result()
            if rank == 0:
                os.write(pipe, b"%d\n" % step)


def run_and_kill(folder: str, first: int, disk: Disk) -> int:
    """Let the ranks save from step *first* on and kill them all at once; return the last durable step."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                die_with_parent()
                os.close(read)
                try:
                    save(rank, folder, f"{scratch}/store", first, write, disk)
                except BaseException:
                    traceback.print_exc()
                os._exit(1)
            ranks.append(child)
        os.close(write)
        last, text = first - 1, b""
        try:
            for _ in range(random.randint(1, MOST_SAVES)):
                if not select.select([read], [], [], LIMIT)[0]:
                    raise TimeoutError(f"nothing was saved within {LIMIT} s")
                text += os.read(read, 1 << 16)
            time.sleep(random.uniform(0, MOST_SECONDS))
        finally:
            for child in ranks:
                os.kill(child, signal.SIGKILL)
            for child in ranks:
                os.waitpid(child, 0)
        with os.fdopen(read, "rb") as pipe:
            lines = (text + pipe.read()).split()
    return int(lines[-1]) if lines else last


def one_killed(folder: str) -> dict[str, Any]:
    """Kill rank 1 amid its first save; return what rank 0 was told, and what it has left."""
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = []
        for rank in range(RANKS):
            child = os.fork()
            if child == 0:
                die_with_parent()
                dies = FaultyDisk(calls=["fsync"], before=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
                try:
                    save(rank, folder, f"{scratch}/store", 1, write, dies if rank == 1 else Disk())
                except BaseException as error:
                    os.write(write, f"{type(error).__name__}: {error}".encode())
                os._exit(1)
            ranks.append(child)
        os.close(write)
        for child in ranks:
            os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            return {"told": pipe.read(), "left": os.listdir(folder)}


def look(folder: str, last: int, names: tuple[str, ...]) -> list[str]:
    """Return what is not as it must be in *folder*, where step *last* was durable, and all *names* once."""
    problems = []
    found = list(CheckpointFolder(folder))
    for file in found:
        try:
            trainbus.verify(file.path)
            state = trainbus.load(file.path, verify=False)
        except trainbus.CheckpointError as error:
            problems.append(str(error))
            continue
        step = file.manifest.global_step
        values = {*state["module"]["w"].aminmax(), state["buffer"], state["step"]}
        if {int(value) for value in values} != {step}:
            problems.append(f"{file.path} of step {step} holds {values}")
    newest = max((file.manifest.global_step for file in found), default=0)
    if newest < last:
        problems.append(f"the newest is of step {newest}, and {last} was reported")
    for name in names:
        try:
            trainbus.load(f"{folder}/{name}")
        except (trainbus.CheckpointError, OSError) as error:
            problems.append(f"neither the old {name} nor the new one is there: {error}")
    return problems


def killed(folder: str, times: int, exchange: bool = True) -> dict[str, Any]:
    """Kill the ranks so many times, each time going on in the same folder."""
    problems: list[str] = []
    last, unfinished = 0, 0
    saved: tuple[str, ...] = ()
    for _ in range(times):
        first = last + 10
        last = run_and_kill(folder, first, Disk() if exchange else NoExchange())
        saved = NAMES if last > first else saved
        problems += look(folder, last, saved)
        hidden = [name for name in os.listdir(folder) if name.startswith(".")]
        unfinished += bool(hidden)
        # Those of the one save that was under way; what runs before have left is swept.
        if len(hidden) > 2:
            problems.append(f"{hidden} are left")
        if last < first:
            problems.append("nothing was saved")
    return {"problems": problems, "unfinished": unfinished}


def killed_at_each_call(folder: str, exchange: bool = True) -> dict[str, Any]:
    """Replace a checkpoint and die before the first call to the disk; then before the second; and so on."""
    problems: list[str] = []
    path, number = f"{folder}/a", 0
    _save_alone(path, 1, Disk())
    while True:
        number += 1
        calls = FaultyDisk(before=lambda name, made, last=number: os._exit(9) if made == last else None)
        if not exchange:
            calls.exchange = NoExchange().exchange  # type: ignore[method-assign]
        child = os.fork()
        if child == 0:
            die_with_parent()
            _save_alone(path, number + 1, calls)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = set()
        try:
            for file in CheckpointFolder(folder):
                found.add(trainbus.verify(file.path).global_step)
            trainbus.verify(path)
            step = int(trainbus.load(path)["w"][0])
        except (trainbus.CheckpointError, OSError) as error:
            problems.append(f"call {number}: {error}")
            break
        if step not in found or step not in (number, number + 1):
            problems.append(f"call {number}: step {step} is loaded, {found} are listed")
        if os.waitstatus_to_exitcode(status) == 0:
            break
        _save_alone(path, number + 1, Disk())
        if os.listdir(folder) != ["a"]:
            problems.append(f"call {number}: {os.listdir(folder)} is left after the next save")
    return {"problems": problems, "calls": number}


def _save_alone(path: str, step: int, disk: Disk) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver = ShardedSaver(dist.new_group(backend="gloo"))
    manifest = Manifest(contents="state", sequence=step, global_step=step)
    with use_disk(disk):
        saver.save(path, {"w": torch.full((3,), float(step))}, lambda: manifest).result()
    saver.close()
    dist.destroy_process_group()

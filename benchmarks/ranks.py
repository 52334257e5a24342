"""
What a sharded checkpoint costs an FSDP2 training, beside ``torch.distributed.checkpoint`` as documented.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.ranks [--size-mib 256] [--rounds 5] [--json]

Lost time per checkpoint: over the steps from a save to the next, the sum of (step minus median step of the
same loop without saves), the save's call included. The ranks meet at each step, as gradients make them, so
the slowest one counts. The ways take turns; the first save of each turn, which touches fresh memory, is
left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.stall.summary import median_interval
from trainbus import Handler

MIB = 1 << 20
FLOAT = 4
Save = Callable[[str], Any]


class App(Stateful):
    """A training as the tutorial of ``torch.distributed.checkpoint`` hands it over."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Return both states."""
        module, optimizer = get_state_dict(self.module, self.optimizer)
        return {"model": module, "optim": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load both states."""
        set_state_dict(
            self.module, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optim"]
        )


class Training:
    """
    Steps in which the host is idle, then an optimizer changes every parameter.

    Args:
        size_mib: Of the whole state: parameters and one momentum each.
        tensors: In how many parameters.
        step_seconds: How long a step sleeps, beside the optimizer's.
    """

    def __init__(self, size_mib: int, tensors: int, step_seconds: float) -> None:
        torch.manual_seed(0)
        width = size_mib * MIB // FLOAT // 2 // tensors // 1024
        self.module = nn.Sequential(*[nn.Linear(1024, width, bias=False) for _ in range(tensors)])
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in self.module:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.module, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.module.parameters(), lr=1e-3, momentum=0.9)
        for parameter in self.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self._step_seconds = step_seconds
        self._meets = torch.zeros(1)

    def step(self) -> None:
        """Make one step; all ranks come out of it together."""
        time.sleep(self._step_seconds)
        self.optimizer.step()
        dist.all_reduce(self._meets)


def ours(training: Training) -> tuple[Save, Callable[[], None]]:
    """Return how trainbus saves, and what ends it."""
    handler = Handler(training.module, training.optimizer)
    return handler.save_async, handler.close


def documented(training: Training) -> tuple[Save, Callable[[], None]]:
    """Return how the tutorial saves: one save under way, the one before waited for; and what ends it."""
    app = App(training.module, training.optimizer)
    # There training has NCCL and the checkpoint gloo. In one gloo group the two wait for each other for ever.
    group = dist.new_group(backend="gloo")
    last: list[Future[Any]] = []

    def wait() -> None:
        while last:
            last.pop().result()

    def save(path: str) -> None:
        wait()
        last.append(dcp.async_save({"app": app}, checkpoint_id=path, process_group=group))  # type: ignore[arg-type]

    return save, wait


def nothing(training: Training) -> tuple[Save, Callable[[], None]]:
    """Return no save at all: the baseline."""
    return lambda path: None, lambda: None


WAYS = {"no saves": nothing, "trainbus": ours, "dcp.async_save": documented}


def turn(way: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train and save; return the seconds of the steps, and of the save's calls."""
    training = Training(options.size_mib, options.tensors, options.step_ms / 1000)
    save, end = WAYS[way](training)
    for _ in range(5):
        training.step()
    steps, calls = [], []
    for number in range((1 + options.saves) * options.save_every):
        begun = time.perf_counter()
        if number % options.save_every == 0:
            save(os.path.join(folder, f"{way}-{number}"))
            calls.append(time.perf_counter() - begun)
        training.step()
        steps.append(time.perf_counter() - begun)
    end()
    dist.barrier()
    if dist.get_rank() == 0:
        for entry in os.listdir(folder):
            shutil.rmtree(os.path.join(folder, entry))
    return {"way": way, "steps": steps, "calls": calls}


def lost(turns: list[dict[str, Any]], way: str, every: int) -> list[float]:
    """Return what each save of a way cost, against the turn without saves of the same round."""
    costs = []
    baselines = [statistics.median(one["steps"]) for one in turns if one["way"] == "no saves"]
    for usual, one in zip(baselines, [one for one in turns if one["way"] == way], strict=True):
        starts = range(every, len(one["steps"]), every)
        costs += [sum(one["steps"][start : start + every]) - usual * every for start in starts]
    return costs


def main() -> None:
    """Measure, and print a table on rank 0."""
    parser = argparse.ArgumentParser(prog="benchmarks.ranks")
    parser.add_argument("--size-mib", type=int, default=256, help="whole state, over all ranks")
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--step-ms", type=float, default=100.0)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--saves", type=int, default=6, help="of a turn, after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=".")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    places = [tempfile.mkdtemp(prefix="ranks-", dir=options.folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(places)
    turns = [turn(way, options, places[0]) for _ in range(options.rounds) for way in WAYS]
    if dist.get_rank() == 0:
        os.rmdir(places[0])
        report(turns, options)
    dist.destroy_process_group()


def report(turns: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print what came out."""
    rows = {}
    for way in WAYS:
        costs = median_interval(lost(turns, way, options.save_every))
        calls = [call for one in turns if one["way"] == way for call in one["calls"][1:]]
        longest = max(max(one["steps"][options.save_every :]) for one in turns if one["way"] == way)
        rows[way] = {"lost": asdict(costs), "call": statistics.median(calls), "longest_step": longest}
    if options.json:
        print(json.dumps({"options": vars(options) | {"folder": None}, "ways": rows}))
        return
    print(
        f"{options.size_mib} MiB in {options.tensors} parameters on {dist.get_world_size()} ranks, "
        f"a save every {options.save_every} steps; {options.rounds} rounds of {options.saves} saves",
        file=sys.stdout,
    )
    for way, row in rows.items():
        low, high = (1e3 * row["lost"][side] for side in ("low", "high"))
        print(
            f"{way:15} lost {1e3 * row['lost']['median']:7.0f} ms [{low:.0f}, {high:.0f}]   "
            f"call {1e3 * row['call']:6.1f} ms   longest step {1e3 * row['longest_step']:6.0f} ms"
        )


if __name__ == "__main__":
    main()

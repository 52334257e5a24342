"""What the ranks run: a small training, with what is to go wrong in it. Each rank tells what it saw."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from trainbus import Handler
from trainbus.testing import FaultyDisk
from trainbus.testing.differences import value_differences
from trainbus_callbacks import (
    Every,
    KeepLast,
    ModelCheckpoint,
    OnException,
    Preemption,
    SaveOnRequest,
    TerminateOnNaN,
)


class Run:
    """The training: dropout, noise from the global generator of each rank, shuffling, a validation."""

    def __init__(self, folder: Path, *, device: str = "cpu", fsdp: bool = False, **options) -> None:
        self.rank = dist.get_rank()
        self.folder = folder
        self.device = device
        torch.manual_seed(0)
        data = TensorDataset(torch.randn(48, 4), torch.randn(48, 1))
        net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).to(device)
        torch.manual_seed(1 + self.rank)  # a rank that drew another's numbers would be seen
        self.model = divided(net) if fsdp else replicated(net)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.05)
        self.loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=7))
        self.losses: list[float] = []
        self.handler = Handler(self.model, self.optimizer, **{"rank_timeout": 20.0, **options})

    def train(self, epochs: int, at_step=lambda step: None) -> None:
        """Train; *at_step* is called in the body of each batch, on every rank."""
        with self.handler as handler:
            for _ in handler.epochs(epochs):
                self.model.train()
                for x, y in self.on_device(handler.batches(self.loader)):
                    at_step(handler.global_step)
                    loss = mse_loss(self.model(x + 0.1 * torch.randn_like(x)), y)
                    self.optimizer.zero_grad()
                    loss.backward()
                    self.optimizer.step()
                    self.losses.append(loss.item())
                    handler.log(loss=loss)
                self.model.eval()
                for x, y in self.on_device(handler.val_batches(self.loader)):
                    handler.log(loss=mse_loss(self.model(x), y))

    def on_device(self, batches):
        """Hand out the batches where the model is."""
        return ([one.to(self.device) for one in batch] for batch in batches)

    def told(self) -> dict:
        """Return what to compare."""
        return {
            "weights": [whole_of(tensor).flatten().tolist() for tensor in self.model.state_dict().values()],
            "losses": self.losses,
            "random": torch.rand(2).tolist(),
            "step": self.handler.global_step,
            "reason": self.handler.stop_reason,
        }


def replicated(net: nn.Module) -> nn.Module:
    """Return *net* for DDP."""
    # Else DDP sorts its buckets anew behind the first batch of a process, which with more than two ranks
    # changes the order of additions: the last bit of that one gradient.
    return nn.parallel.DistributedDataParallel(net, find_unused_parameters=True)


def divided(net: nn.Module) -> nn.Module:
    """Return *net* for FSDP2."""
    mesh = dist.device_mesh.init_device_mesh(next(net.parameters()).device.type, (dist.get_world_size(),))
    fully_shard(net[0], mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the parts of all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(run: Run, args) -> None:
    """Train, resuming if there is something to resume from, and die at a step if asked to."""

    def die(step: int) -> None:
        if step == args.step:
            run.handler.finish_writing()
            os._exit(9)

    run.handler.add_callback(ModelCheckpoint(run.folder / "{global_step}.pt", save_freq=5))
    run.handler.resume(run.folder)
    run.train(3, die)


def sigterm(run: Run, args) -> None:
    """Send one rank SIGTERM."""
    run.handler.add_callback(Preemption(run.folder / "preempted_{global_step}.pt"))
    run.train(3, lambda step: step == args.step and run.rank == args.rank and signal.raise_signal(15))


def request(run: Run, args) -> None:
    """Ask for a save by a signal to one rank."""
    run.handler.add_callback(SaveOnRequest(run.folder / "asked_{global_step}.pt"))
    run.train(1, lambda step: step == args.step and run.rank == args.rank and signal.raise_signal(12))


def stop(run: Run, args) -> None:
    """Stop on one rank alone."""
    run.train(3, lambda step: step == args.step and run.rank == args.rank and run.handler.stop("enough"))


def nan(run: Run, args) -> None:
    """Let one rank alone see a NaN."""
    run.handler.add_callback(TerminateOnNaN("bad"))
    run.train(
        3, lambda step: run.handler.log(bad=math.nan if (step, run.rank) == (args.step, args.rank) else 1.0)
    )


def full_disk(run: Run, args) -> None:
    """Let a rank's disk be full from its n-th sync on; what happens after which event is noted."""
    seen = run.seen = []
    for name in ("train_batch_begin", "train_batch_end", "checkpoint_saved", "checkpoint_failed"):
        run.handler.on(name, lambda global_step, name=name: seen.append([name, global_step]), priority=-99)
    run.handler.add_callback(ModelCheckpoint(run.folder / "{global_step}.pt", save_freq=2))
    if run.rank == args.rank:
        FaultyDisk(errno.ENOSPC, calls=["fsync"], at=args.at, times=math.inf).__enter__()
    run.train(3)


def slow_disk(run: Run, args) -> None:
    """Let a rank's disk take twice as long for a sync as the ranks wait for each other."""
    run.handler.add_callback(ModelCheckpoint(run.folder / "{global_step}.pt", save_freq=2))
    if run.rank == args.rank:
        FaultyDisk(calls=["fsync"], seconds=2 * args.timeout).__enter__()
    run.train(1)


def full_disk_save(run: Run, args) -> None:
    """The same, with a save that is waited for."""
    if run.rank == 0:
        FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf).__enter__()
    run.train(1, lambda step: step == args.step and run.handler.save(run.folder / "a.pt"))


def decisions(run: Run, args) -> None:
    """Judge by a metric of batches that each rank sees differently, by the clock, and by a predicate."""
    first = run.handler.add_callback(
        ModelCheckpoint(run.folder / "best_{m:.1f}.pt", "m", True, mode="min", save_freq=1)
    )
    run.handler.add_callback(
        ModelCheckpoint(run.folder / "timed_{global_step}.pt", save_freq=Every(minutes=0.3 / 60))
    )
    run.handler.add_callback(
        ModelCheckpoint(run.folder / "odd_{global_step}.pt", save_freq=lambda moment: run.rank == 0)
    )

    def log(step: int) -> None:
        run.handler.log(m=[3.0, 1.0, 2.0, 0.5, 4.0, 5.0][step] if run.rank == 0 else float(step))
        time.sleep(0.1 * (run.rank + 1))

    run.train(1, log)
    run.best = first.best_score, first.best_path


def one_logs(run: Run, args) -> None:
    """Log a metric on one rank alone."""
    run.handler.on("epoch_end", lambda logs: setattr(run, "logs", dict(logs)))
    run.train(1, lambda step: run.rank == 1 and run.handler.log(only_there=5.0))


def alone(run: Run, args) -> None:
    """Save under ``if rank == 0``."""
    run.train(1, lambda step: step == 1 and run.rank == 0 and run.handler.save(run.folder / "a.pt"))


def alone_behind(run: Run, args) -> None:
    """Save under ``if rank == 0`` behind the loop, where the others do nothing more together."""
    run.train(1)
    again = Handler(run.model, run.optimizer, rank_timeout=args.timeout)
    if run.rank == 0:
        again.save(run.folder / "a.pt")
    time.sleep(args.timeout + 4)


def killed(run: Run, args) -> None:
    """Kill one rank between two batches, where the next collective is one of ours."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end the others before they can tell

    def die(global_step: int) -> None:
        if global_step == args.step and run.rank == args.rank:
            os.kill(os.getpid(), signal.SIGKILL)

    run.handler.on("train_batch_end", die)
    run.train(3)


def oracle(run: Run) -> dict:
    """Return the whole state as torch itself gathers it; on rank 0."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    module, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    return {"module": module, "optimizer": optimizer}


def save_with_oracle(run: Run, args) -> None:
    """Train, save divided and whole, and beside it what torch gathers."""
    run.train(1)
    again = Handler(run.model, run.optimizer, rank_timeout=args.timeout)
    again.save(run.folder / "divided")
    again.save(run.folder / "weights", weights_only=True)
    again.save(run.folder / "whole.pt", full_state=True)
    again.save(run.folder / "weights.pt", weights_only=True, full_state=True)
    again.close()
    state = oracle(run)
    if run.rank == 0:
        torch.save(state, run.folder / "oracle")


def load_and_compare(run: Run, args) -> None:
    """Load what another number of ranks has saved, and compare it with what torch gathered there."""
    saved = torch.load(run.folder / "oracle")
    run.differs = {}
    for name in ("divided", "whole.pt", "weights", "weights.pt"):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.fill_(7.0)
        key = ("module",) if name.startswith("weights") else ("module", "optimizer")
        run.handler.load(run.folder / name, only=key)
        state = oracle(run)
        if run.rank == 0:
            expected = {one: saved[one] for one in key}
            run.differs[name] = list(
                value_differences(expected, {one: state[one] for one in key}, "state", ())
            )
    run.handler.close()


def exception(run: Run, args) -> None:
    """Raise in a batch, with what saves then."""
    seen = run.seen = []
    run.handler.on("checkpoint_skipped", lambda reason: seen.append(reason))
    run.handler.add_callback(OnException(run.folder / "broken"))

    def fail(step: int) -> None:
        if step == args.step:
            raise ValueError("bad batch")

    run.train(1, fail)


def retention(run: Run, args) -> None:
    """Keep the last only, of a file each step."""
    run.handler.add_callback(ModelCheckpoint(run.folder / "{global_step}", save_freq=1, keep=KeepLast(1)))
    run.train(1)


def main() -> None:
    """Run the scenario, and write what came of it to ``<out>/<rank>.json``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario")
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--step", type=int, default=-1)
    parser.add_argument("--at", type=int, default=3)
    parser.add_argument("--rank", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=20.0)
    parser.add_argument("--fsdp", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    run = Run(args.folder, rank_timeout=args.timeout, device=args.device, fsdp=bool(args.fsdp))
    begun, error = time.monotonic(), None
    try:
        globals()[args.scenario](run, args)
    except Exception as one:
        traceback.print_exc()
        error = f"{type(one).__name__}: {one}"
    told = {**run.told(), "error": error, "seconds": time.monotonic() - begun}
    told |= {name: getattr(run, name) for name in ("seen", "logs", "best", "differs") if hasattr(run, name)}
    args.out.mkdir(exist_ok=True, parents=True)
    (args.out / f"{run.rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)  # without waiting for ranks that have died


if __name__ == "__main__":
    main()

"""Runs small trainings in forked processes and lets some of them be killed; spoken to in JSON lines.

One process imports torch; each training is forked from it, so that it costs milliseconds. A
request names a folder, a kind of loader, and the moment at which the training kills itself.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

SAMPLES, BATCH, EPOCHS, ACCUMULATE = 23, 3, 3, 2


class Noisy(Dataset):
    """Samples with random augmentation from all three global generators."""

    def __init__(self, augment: bool) -> None:
        self.augment = augment
        self.x = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.rand(()) + random.random() + np.random.rand() if self.augment else 0.0
        return self.x[index] + noise, self.x[index].sum(0, keepdim=True)


class Stream(IterableDataset):
    """The same samples as a stream."""

    def __iter__(self):
        data = Noisy(augment=False)
        return (data[index] for index in range(SAMPLES))


def loader_of(kind: str):
    """Return the training loader of one row of the table in the docs."""
    generator = torch.Generator().manual_seed(7)
    if kind == "no workers":
        return DataLoader(Noisy(augment=True), BATCH, shuffle=True)
    if kind == "generator":
        return DataLoader(Noisy(augment=True), BATCH, shuffle=True, generator=generator)
    if kind == "sampler":
        data = Noisy(augment=True)
        return DataLoader(data, BATCH, sampler=RandomSampler(data, replacement=True, generator=generator))
    if kind == "workers":
        return DataLoader(Noisy(augment=False), BATCH, shuffle=True, num_workers=2)
    if kind == "persistent workers":
        return DataLoader(Noisy(augment=False), BATCH, shuffle=True, num_workers=2, persistent_workers=True)
    if kind == "stream":
        return DataLoader(Stream(), BATCH)
    if kind == "list":
        return [(x, y) for x, y in DataLoader(Noisy(augment=False), BATCH)]
    if kind == "stateful":
        from torchdata.stateful_dataloader import StatefulDataLoader

        return StatefulDataLoader(Noisy(augment=False), BATCH, shuffle=True)
    raise ValueError(kind)


class Fuse:
    """Kills the process at the n-th event of a name."""

    def __init__(self, handler: Handler, event: str, count: int, durable: bool) -> None:
        self.handler, self.count, self.durable = handler, count, durable
        handler.on(event, self.burn, priority=200)

    def burn(self) -> None:
        self.count -= 1
        if self.count == 0:
            if self.durable:
                self.handler.finish_writing()
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: str, loader: str, kill: list | None, seed: int) -> None:
    """Train to the end, or until the fuse burns; resume what the folder holds."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    val_loader = DataLoader(Noisy(augment=True), 8)
    with Handler(model, optimizer, scheduler=scheduler) as handler:
        handler.add_callback(ModelCheckpoint(f"{folder}/last.pt", save_freq=1))
        handler.add_callback(ModelCheckpoint(f"{folder}/best.pt", monitor="val_loss", save_best_only=True))
        handler.add_callback(ModelCheckpoint(f"{folder}/epoch.pt"))
        handler.on("val_batch_end", lambda: handler.save_async(f"{folder}/val.pt"))
        handler.on("epoch_end", lambda epoch, logs: note(folder, epoch, logs))
        if kill:
            Fuse(handler, *kill)
        handler.resume(folder)
        random.random(), torch.rand(1)  # what a script draws before its loop must not matter
        handler.fit(loader_of(loader), val_loader, epochs=EPOCHS, loss_fn=mse_loss, accumulate=ACCUMULATE)
        handler.save(f"{folder}/end.pt")


def note(folder: str, epoch: int, logs) -> None:
    """Append the epoch's metrics, exactly."""
    with open(f"{folder}/metrics.jsonl", "a") as file:
        file.write(json.dumps({"epoch": epoch, **{name: value.hex() for name, value in logs.items()}}) + "\n")


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        os.makedirs(request["folder"], exist_ok=True)
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr  # the other is for answers
            try:
                train(**request)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()

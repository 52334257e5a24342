"""Exact resume, exhaustively: saved at each event of a run, left right there, continued by a new process."""

from __future__ import annotations

import contextlib
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import trainbus
from trainbus import Handler

# How many of each to try; the run is over with its second epoch_end.
EVENTS = {
    "epoch_begin": 2,
    "train_batch_begin": 3,
    "train_batch_end": 3,
    "val_begin": 2,
    "val_batch_begin": 3,
    "val_batch_end": 3,
    "val_end": 2,
    "epoch_end": 1,
}


def draw(log):
    """Draw from each global generator, as scripts do between their loops."""
    log.append((random.random(), np.random.rand(), torch.rand(()).item()))


class Script:
    """A training as people write it, with random numbers drawn at every place of its body."""

    def __init__(self, folder, validate="epoch", accumulate=1):
        self.folder = folder
        self.validate = validate
        self.accumulate = accumulate
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(3)
        data = TensorDataset(torch.randn(10, 2, generator=generator), torch.randn(10, 1, generator=generator))
        self.model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.3), nn.Linear(4, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.train = DataLoader(data, 3, shuffle=True)
        self.extra = DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(5))
        self.val = DataLoader(data, 5, shuffle=True)

    def run(self, seed, stop_at=None):
        """Train to the end, or save and leave at the *n*-th event of a name. Return what came out."""
        for seed_one in (random.seed, np.random.seed, torch.manual_seed):
            seed_one(seed)
        draws, metrics = [], {}
        with Handler(self.model, self.optimizer) as handler, contextlib.suppress(InterruptedError):
            if stop_at is not None:
                name, number = stop_at
                self.leave(handler, name, number)
            handler.on("epoch_end", lambda epoch, logs: metrics.update({epoch: dict(logs)}), priority=-1)
            self.begin(handler)
            draw([])
            for _ in handler.epochs(2):
                draw(draws)
                self.train_on(handler, self.train, draws)
                draw(draws)
                self.train_on(handler, self.extra, draws)
                draw(draws)
                if self.validate == "epoch":
                    self.validate_with(handler, draws)
                draw(draws)
        return nn.utils.parameters_to_vector(self.model.parameters()).detach(), draws, metrics

    def begin(self, handler):
        handler.resume(self.folder)

    def train_on(self, handler, loader, draws):
        for x, y in handler.batches(loader):
            loss = mse_loss(self.model(x), y)
            loss.backward()
            if (handler.batch + 1) % self.accumulate == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            handler.log(loss=loss)
            draw(draws)
            if self.validate == "batch" and handler.batch == 1:
                self.validate_with(handler, draws)

    def validate_with(self, handler, draws):
        for x, y in handler.val_batches(self.val):
            handler.log(loss=mse_loss(self.model(x), y).detach())
            draw(draws)

    def leave(self, handler, name, number):
        seen = []

        def save_and_leave():
            seen.append(name)
            if len(seen) == number:
                handler.save_async(self.folder / "a.pt")
                raise InterruptedError

        handler.on(name, save_and_leave, priority=100)


def assert_same_end(folder, stop_at, script=Script, **options):
    whole = script(folder / "whole", **options).run(seed=1)
    part = folder / "part"
    script(part, **options).run(seed=1, stop_at=stop_at)
    assert trainbus.CheckpointFolder(part).latest() is not None
    weights, draws, metrics = script(part, **options).run(seed=2)

    assert torch.equal(weights, whole[0]), stop_at
    assert draws[-1] == whole[1][-1], stop_at
    assert all(metrics[epoch] == whole[2][epoch] for epoch in metrics), stop_at


class Breaking(Script):
    """Takes four batches an epoch, leaving its loop by break."""

    def train_on(self, handler, loader, draws):
        for x, y in handler.batches(self.train):
            mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            draw(draws)
            if handler.batch % 2 == 1:
                break


class BreakingAtTheTop(Script):
    """Takes two batches of a pass, leaving its loop by break as soon as it has a third."""

    def train_on(self, handler, loader, draws):
        for index, (x, y) in enumerate(handler.batches(self.train)):
            if index == 2:
                break
            mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            draw(draws)


class WithBaseline(Script):
    """Validates before the training too."""

    def begin(self, handler):
        super().begin(handler)
        for x, y in handler.val_batches(self.val):
            handler.log(loss=mse_loss(self.model(x), y).detach())


class InBody(Script):
    """Saves in the loop body, after the step."""

    def leave(self, handler, name, number):
        self.number = number

    def train_on(self, handler, loader, draws):
        for x, y in handler.batches(loader):
            mse_loss(self.model(x), y).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            draw(draws)
            if handler.global_step == getattr(self, "number", None):
                handler.save(self.folder / "a.pt")
                raise InterruptedError


class TestPlacesInTheBody:
    @pytest.mark.parametrize("number", range(1, 9))
    def test_break(self, tmp_path, number):
        """Each batch of loops that are left by break."""
        assert_same_end(tmp_path, ("train_batch_end", number), script=Breaking)

    @pytest.mark.parametrize("event", ["val_begin", "val_end", "epoch_end"])
    def test_break_before_the_step(self, tmp_path, event):
        """Loops left by break before a batch's step: that batch counts for nothing, random numbers go on."""
        assert_same_end(tmp_path, (event, 1), script=BreakingAtTheTop)

    @pytest.mark.parametrize(
        ("event", "number"), [("train_batch_end", 2), ("val_batch_end", 3), ("epoch_end", 1)]
    )
    def test_validation_before_the_training(self, tmp_path, event, number):
        """A validation before the training, in each process, leaves what is restored to the training."""
        assert_same_end(tmp_path, (event, number), script=WithBaseline)

    @pytest.mark.parametrize("number", range(12))
    def test_after_the_step(self, tmp_path, number):
        """A save after the step counts the batch."""
        assert_same_end(tmp_path, ("body", number), script=InBody)

    @pytest.mark.parametrize("event", ["val_begin", "val_batch_end", "val_end"])
    def test_validation_in_the_body(self, tmp_path, event):
        """A save in a validation inside of a batch is taken at the end of that batch."""
        folder = tmp_path / "part"
        whole = Script(tmp_path / "whole", validate="batch").run(seed=1)
        part = Script(folder, validate="batch")
        with Handler(part.model, part.optimizer) as handler:
            handler.on(event, lambda: handler.save_async(folder / "a.pt"), once=True)
            torch.manual_seed(1), np.random.seed(1), random.seed(1)
            draw([])
            for _ in handler.epochs(1):
                draw([])
                part.train_on(handler, part.train, [])
        weights, draws, _ = Script(folder, validate="batch").run(seed=2)

        assert torch.equal(weights, whole[0]) and draws[-1] == whole[1][-1]


class TestEveryEvent:
    @pytest.mark.parametrize(
        ("event", "number"),
        [(event, number) for event, count in EVENTS.items() for number in range(1, count + 1)],
    )
    def test_validation_each_epoch(self, tmp_path, event, number):
        """Two training loaders and a validation in each epoch."""
        assert_same_end(tmp_path, (event, number))

    def test_twice_in_one_validation(self, tmp_path):
        """Left in a validation, and again in the same one when it is done anew."""
        whole = Script(tmp_path / "whole").run(seed=1)
        part = tmp_path / "part"
        Script(part).run(seed=1, stop_at=("val_batch_end", 1))
        Script(part).run(seed=2, stop_at=("val_batch_end", 2))
        weights, draws, _ = Script(part).run(seed=3)

        assert torch.equal(weights, whole[0]) and draws[-1] == whole[1][-1]

    @pytest.mark.parametrize("number", range(1, 13))
    def test_each_batch(self, tmp_path, number):
        """Each of the twelve batches."""
        assert_same_end(tmp_path, ("train_batch_end", number))

    @pytest.mark.parametrize("number", range(1, 7))
    def test_each_step_of_accumulation(self, tmp_path, number):
        """Each batch in which the optimizer stepped on the gradients of two."""
        assert_same_end(tmp_path, ("train_batch_end", 2 * number), accumulate=2)

    @pytest.mark.parametrize("number", [1, 2, 3, 4])
    def test_after_a_validation_in_the_body(self, tmp_path, number):
        """A validation in the body of a training batch, saved at that batch's end and the next one's."""
        assert_same_end(tmp_path, ("train_batch_end", number), validate="batch")

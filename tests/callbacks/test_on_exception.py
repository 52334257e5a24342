"""OnException: what is saved when a run is ended by an exception, and where it stands."""

from __future__ import annotations

import errno
import math
import random

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import trainbus
from trainbus import CheckpointFolder, Handler, read_manifest
from trainbus.testing import FakeHandler, emit_run
from trainbus.testing.faults import FaultyDisk
from trainbus_callbacks import ModelCheckpoint, OnException


class Bang(Exception):
    pass


class Noisy(TensorDataset):
    """Draws random numbers whenever an example is fetched."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + torch.randn(4) * random.random(), y


def bang(*_):
    raise Bang("bang")


def make_run(folder, **options):
    """Return a handler of a model with dropout, its optimizer and loader; the seed is always the same."""
    torch.manual_seed(0)
    random.seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    data = Noisy(torch.randn(24, 4), torch.randn(24, 1))
    handler = Handler(model, optimizer, **options)
    handler.add_callback(OnException(folder / "interrupted.pt"))
    return handler, model, optimizer, DataLoader(data, 4, shuffle=True)


def train(run, *, epochs=2, at=None, where="forward", steps=None, losses=None):
    """Train; raise Bang in batch *at* of the run, before or after the optimizer's step or inside of it."""
    handler, model, optimizer, loader = run
    with handler:
        for _ in handler.epochs(epochs):
            for x, y in handler.batches(loader):
                loss = mse_loss(model(x), y)
                handler.log(loss=loss)
                if handler.global_step == at and where == "forward":
                    bang()
                loss.backward()
                if handler.global_step == at and where == "inside":
                    optimizer.register_step_pre_hook(bang)
                optimizer.step()
                if handler.global_step == at and where == "after":
                    bang()
                optimizer.zero_grad()
    return model


class TestFakeEvents:
    def fail(self, handler, **fields):
        """Emit the beginning of a run, a batch, and an exception."""
        handler.bus.emit("train_begin")
        handler.epoch, handler.batch, handler.global_step = 1, 2, 7
        handler.bus.emit("exception", error=Bang(), **fields)

    def test_saves(self):
        """The file is asked for with its mark and the counters of the moment, epochs and batches from 1."""
        handler = FakeHandler()
        handler.add_callback(OnException("{epoch}_{batch}_{global_step}.pt"))
        self.fail(handler)

        assert [(save.path, save.interrupted) for save in handler.saves] == [("2_3_7.pt", True)]

    def test_inside_a_step(self, caplog):
        """Half-updated weights are not saved, and the log says why."""
        handler = FakeHandler()
        handler.add_callback(OnException("a.pt"))
        handler.is_stepping = True
        self.fail(handler)

        assert handler.saves == [] and "may be half-updated" in caplog.text

    def test_after_the_training(self):
        """An exception after the training leaves its last checkpoint the newest."""
        handler = FakeHandler()
        handler.add_callback(OnException("a.pt"))
        emit_run(handler.bus, epochs=1)
        handler.bus.emit("exception", error=Bang())

        assert handler.saves == []

    def test_metric_in_the_name(self):
        """A name that depends on metrics is refused at once."""
        with pytest.raises(ValueError, match=r"the field 'loss'.* moment of the exception"):
            OnException("{loss}.pt")


class TestResume:
    @pytest.mark.parametrize("at", [0, 3, 6, 10])
    @pytest.mark.parametrize("where", ["forward", "after"])
    def test_is_exact(self, tmp_path, at, where):
        """The run goes on to the weights of one that nothing interrupted, bit for bit."""
        expected = train(make_run(tmp_path / "whole")).state_dict()
        with pytest.raises(Bang):
            train(make_run(tmp_path), at=at, where=where)
        run = make_run(tmp_path)
        manifest = run[0].resume(tmp_path, interrupted=True)
        found = train(run).state_dict()

        assert manifest.interrupted and manifest.global_step == at + (where == "after")
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_metrics_count_the_batch_once(self, tmp_path):
        """What the interrupted batch had logged is not counted again when it is repeated."""

        def epoch_losses(run, **options):
            found = []
            run[0].on("epoch_end", lambda logs: found.append(logs["loss"]))
            train(run, **options)
            return found

        expected = epoch_losses(make_run(tmp_path / "whole"), epochs=1)
        with pytest.raises(Bang):
            train(make_run(tmp_path), epochs=1, at=3)
        run = make_run(tmp_path)
        run[0].resume(tmp_path, interrupted=True)

        assert epoch_losses(run, epochs=1) == expected

    def test_only_when_asked(self, tmp_path, caplog):
        """Without interrupted=True the newest whole checkpoint is taken, and the log names the other."""
        run = make_run(tmp_path)
        run[0].add_callback(ModelCheckpoint(tmp_path / "last.pt"))
        with pytest.raises(Bang):
            train(run, at=8)
        run = make_run(tmp_path)
        manifest = run[0].resume(tmp_path)

        assert manifest.global_step == 6
        assert "interrupted.pt" in caplog.text and "resume(interrupted=True) takes it" in caplog.text

    def test_the_newest_of_both(self, tmp_path):
        """With interrupted=True too a whole checkpoint that is newer is taken."""
        with pytest.raises(Bang):
            train(make_run(tmp_path), at=2)
        run = make_run(tmp_path)
        run[0].add_callback(ModelCheckpoint(tmp_path / "last.pt"))
        train(run, epochs=1)

        assert make_run(tmp_path)[0].resume(tmp_path, interrupted=True).global_step == 6


class TestFile:
    def test_inside_a_step(self, tmp_path):
        """A step that an exception left saves nothing; the file there was stays."""
        with pytest.raises(Bang):
            train(make_run(tmp_path), at=1)
        with pytest.raises(Bang):
            train(make_run(tmp_path), at=4, where="inside")

        assert read_manifest(tmp_path / "interrupted.pt").global_step == 1

    def test_a_step_that_was_caught(self, tmp_path):
        """A step that failed in an earlier batch and was caught there does not keep a later save away."""
        handler, model, optimizer, loader = make_run(tmp_path)
        hook = optimizer.register_step_pre_hook(bang)
        with pytest.raises(KeyboardInterrupt), handler:
            for _ in handler.epochs(1):
                for x, y in handler.batches(loader):
                    mse_loss(model(x), y).backward()
                    if handler.global_step == 2:
                        raise KeyboardInterrupt
                    try:
                        optimizer.step()
                    except Bang:
                        hook.remove()

        assert read_manifest(tmp_path / "interrupted.pt").global_step == 2

    def test_while_accumulating(self, tmp_path):
        """The save does not wait for an optimizer step that will not come."""
        handler, model, _, loader = make_run(tmp_path)
        with pytest.raises(Bang), handler:
            for _ in handler.epochs(1):
                for x, y in handler.batches(loader):
                    mse_loss(model(x), y).backward()
                    if handler.batch == 2:
                        bang()

        assert CheckpointFolder(tmp_path).greatest_sequence() == 1

    def test_asked_for_by_hand(self, tmp_path):
        """A save that is marked as interrupted is taken at once also while gradients accumulate."""
        handler, model, _, loader = make_run(tmp_path)
        with handler:
            for _ in handler.epochs(1):
                for x, y in handler.batches(loader):
                    mse_loss(model(x), y).backward()
                    if handler.batch == 1:
                        pending = handler.save_async(tmp_path / "now.pt", interrupted=True)
                        assert pending.result(timeout=60).interrupted

    def test_of_a_validation(self, tmp_path):
        """Interrupted in a validation, it stands behind the batches that were trained."""
        handler, model, optimizer, loader = make_run(tmp_path)
        with pytest.raises(Bang), handler:
            for _ in handler.epochs(1):
                for x, y in handler.batches(loader):
                    mse_loss(model(x), y).backward()
                    optimizer.step()
                for _ in handler.val_batches(loader):
                    bang()

        assert read_manifest(tmp_path / "interrupted.pt").global_step == 6
        assert trainbus.load(tmp_path / "interrupted.pt")["progress"]["in_validation"]

    @pytest.mark.parametrize("reaction", ["raise", "warn"])
    def test_own_failure(self, tmp_path, reaction):
        """A full disk does not take the place of the exception that ended the run."""
        run = make_run(tmp_path, on_write_error=reaction)
        with FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf), pytest.raises(Bang) as caught:
            train(run, at=1)

        (told,) = caught.value.__notes__
        assert "interrupted.pt" in told and "No space left" in told

"""A handler among several ranks, of which the others say whatever rank 0 says."""

from __future__ import annotations

import errno
import logging
import math
import threading

import numpy as np
import pytest
import torch
from torch import nn

import trainbus
from trainbus import CheckpointWriteError, Handler, ranks
from trainbus.checkpoint import staging_memory
from trainbus.checkpoint.staging_memory import map_pages
from trainbus.testing import FaultyDisk
from trainbus_callbacks import ModelCheckpoint


class Echo:
    """Stands in for the group: each other rank is in the same state as this one, rank 0."""

    def __init__(self, size):
        self.size = size
        self.met = []

    def exchange(self, what, mine, answer):
        self.met.append(what)
        return answer([mine] * self.size)


@pytest.fixture
def among(monkeypatch):
    """Return a function that puts this process among so many ranks, as rank 0."""

    def put(size=2):
        table = Echo(size)
        monkeypatch.setattr(ranks, "together", lambda: size > 1)
        monkeypatch.setattr(ranks, "world_size", lambda: size)
        monkeypatch.setattr(ranks, "_table", lambda: table)
        return table

    return put


def make(**options):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.5), nn.Linear(4, 1))
    return Handler(module, torch.optim.SGD(module.parameters(), 0.1), **options)


def train(handler, epochs=2, at_step=lambda step: None):
    losses = []
    with handler:
        for _ in handler.epochs(epochs):
            for x in handler.batches([torch.full((2, 2), float(n)) for n in range(4)]):
                at_step(handler.global_step)
                loss = handler.model(x).sum()
                handler.optimizer.zero_grad()
                loss.backward()
                handler.optimizer.step()
                losses.append(loss.item())
    return losses


class TestSeveralRanks:
    def test_resume(self, among, tmp_path):
        """One file holds a part of each rank, from which each goes on exactly."""
        among(3)
        handler = make()
        handler.add_callback(ModelCheckpoint(tmp_path / "{global_step}.pt", save_freq=3))
        losses = train(handler)
        assert len(trainbus.load(tmp_path / "3.pt")["ranks"]["parts"]) == 3

        handler = make()
        handler.load(tmp_path / "3.pt")
        assert train(handler) == losses[3:]

    @pytest.mark.parametrize("what", ["load", "resume"])
    def test_waits_for_another_handlers_save(self, among, tmp_path, what):
        """Before any rank looks for a file, what rank 0 writes for another handler is there, in slices."""
        go = threading.Event()

        def hold(name, number):
            assert go.wait(30)

        table = among()
        writer = make()
        table.size = 1
        with FaultyDisk(calls=["fsync"], before=hold):
            save = writer.save_async(tmp_path / "a.pt")
            reader = make(rank_timeout=0.4)
            table.met.clear()

            def exchange(where, mine, answer):
                if len(table.met) == 3:
                    go.set()
                return Echo.exchange(table, where, mine, answer)

            table.exchange = exchange
            reader.load(tmp_path / "a.pt") if what == "load" else reader.resume(tmp_path)
        assert save.result(0) is not None
        assert set(table.met[:4]) == {f"handler.{what}"}

    def test_another_number(self, among, tmp_path, caplog):
        """Loaded by another number of ranks the weights are taken, and the log says what is not exact."""
        among(3)
        with make() as handler:
            for _ in handler.epochs(1):
                for _ in handler.batches([1, 2]):
                    handler.save(tmp_path / "a.pt")
                    break
        among(1)
        again = make()
        with caplog.at_level(logging.WARNING, "trainbus"):
            again.resume(tmp_path)

        assert "continued exactly. It was saved by 3 ranks and is loaded by 1 process" in caplog.text
        assert torch.equal(again.module[0].weight, handler.module[0].weight)

    def test_one_meeting_a_batch(self, among):
        """Without a save the ranks meet once a batch and at epoch ends, and each time say where."""
        table = among()
        train(make(), epochs=1)

        assert table.met == [
            "train_begin",
            *(f"the end of step {step}" for step in range(1, 5)),
            "the end of epoch 1",
            "the metrics of an epoch",
            "epoch_end of epoch 1",
        ]

    def test_stop_waits_for_the_meeting(self, among):
        """stop() takes effect behind the batch, where the others hear of it."""
        among()
        handler, seen = make(), []

        def stop(step):
            if step == 1:
                handler.stop("enough")
                seen.append(handler.stopped)

        losses = train(handler, at_step=stop)

        assert (len(losses), seen, handler.stop_reason) == (2, [False], "enough")

    def test_full_disk(self, among, tmp_path):
        """A failed save is raised where all ranks have heard of it."""
        table = among()
        handler = make()
        handler.add_callback(ModelCheckpoint(tmp_path / "{global_step}.pt", save_freq=1))
        with FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf), pytest.raises(CheckpointWriteError):
            train(handler)

        assert any(what.startswith("the end of step") for what in table.met)

    def test_full_disk_at_the_end(self, among, tmp_path):
        """Also when it is the last thing to come."""
        among()
        with (
            FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf),
            pytest.raises(CheckpointWriteError, match=r"last\.pt"),
            make() as handler,
        ):
            handler.save_async(tmp_path / "last.pt")

    def test_exception_meets_nobody(self, among, tmp_path):
        """A rank that fails saves what it can without the others, who may never come."""
        table = among()
        handler = make()

        def fail(step):
            if step == 1:
                handler.save_async(tmp_path / "b.pt")
            if step == 2:
                table.met.clear()
                raise ZeroDivisionError

        handler.on("exception", lambda: handler.save_async(tmp_path / "a.pt", interrupted=True))
        with pytest.raises(ZeroDivisionError):
            train(handler, at_step=fail)

        assert table.met == []
        assert trainbus.load(tmp_path / "a.pt")["ranks"] == {"world_size": 2, "parts": None}

    @pytest.mark.parametrize("size", [1, 8])
    def test_prepared(self, among, tmp_path, monkeypatch, size):
        """The first save goes into the memory made for it, also with NumPy and with what other ranks give."""

        class Numbers:
            def state_dict(self):
                return {"numbers": np.zeros(10_000)}

            def load_state_dict(self, state):
                raise NotImplementedError

        mapped = []
        monkeypatch.setattr(staging_memory, "map_pages", lambda size: mapped.append(size) or map_pages(size))
        among(size)
        handler = make(extra={"mine": Numbers()})

        def save(step):
            if step == 1:
                handler.prepare_saves()
                assert len(mapped) == 1
            elif step == 3:
                handler.save_async(tmp_path / "a.pt")

        train(handler, epochs=1, at_step=save)

        assert mapped[0] > 80_000 and len(mapped) == 1

    def test_preparing_fails_nobody(self, among, tmp_path):
        """What cannot be saved is told by the save, on all ranks, and not by one that prepares."""
        among()
        handler = make()

        def save(step):
            if step == 1:
                handler.extra["mine"] = object()
                handler.prepare_saves()
            elif step == 2:
                handler.save(tmp_path / "a.pt")

        with pytest.raises(CheckpointWriteError, match="state_dict"):
            train(handler, at_step=save)

    def test_weights_only(self, among, tmp_path):
        """A file of weights has no parts of ranks; all come to it all the same."""
        table = among()
        with make() as handler:
            handler.save(tmp_path / "a.pt", weights_only=True)

        assert "handler.save or save_async" in table.met
        assert set(trainbus.load(tmp_path / "a.pt")) == set(handler.module.state_dict())

    @pytest.mark.parametrize("seconds", [0, -1, float("nan")])
    def test_no_time(self, seconds):
        """Ranks must wait for each other for some time."""
        with pytest.raises(ValueError, match=f"rank_timeout must be more than 0 seconds, got {seconds}"):
            make(rank_timeout=seconds)

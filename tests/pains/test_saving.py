"""What people suffered from while a checkpoint was being written."""

from __future__ import annotations

import errno
import math
import os
import signal

import pytest
import torch

import trainbus
from trainbus import CheckpointFolder, Handler
from trainbus.checkpoint import write_job
from trainbus.errors import CheckpointWriteError, UnsavableStateError
from trainbus.testing import FaultyDisk
from trainbus_callbacks import Every, ModelCheckpoint, SaveOnRequest


def weight(path):
    return float(trainbus.load(path)["module"]["weight"])


class TestInTheBackground:
    def test_training_goes_on_and_changes_the_weights_being_saved(self, stuck_disk):
        """A file holds the state of the moment at which it was asked for, whatever happens meanwhile."""
        module = torch.nn.Linear(1, 1, bias=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5, momentum=0.9)
        history = [1]
        torch.nn.init.ones_(module.weight)
        with Handler(module, optimizer, extra={"history": Listed(history)}) as handler:
            handler.save_async("a.pt")
            torch.nn.init.zeros_(module.weight)
            optimizer.param_groups[0]["lr"] = 9.0
            history.append(2)
            stuck_disk.go()

        state = trainbus.load("a.pt")
        assert (float(state["module"]["weight"]), state["extra"]["history"]) == (1.0, {"items": [1]})
        assert state["optimizer"]["param_groups"][0]["lr"] == 0.5

    def test_saves_pile_up_on_a_slow_disk(self, stuck_disk):
        """No more saves are unfinished, and no more copies of the state held, than max_pending says."""
        with Handler(torch.nn.Linear(1, 1), on_busy="skip") as handler:
            saves = [handler.save_async(f"{i}.pt") for i in range(20)]
            unfinished = sum(not save.done() for save in saves)
            stuck_disk.go()

        assert unfinished == 1
        assert os.listdir() == ["0.pt"]

    def test_the_program_ends_right_after_a_save(self, in_process):
        """A save that was asked for is finished before the process ends."""
        assert in_process(lambda: trainbus.save_async({"x": torch.ones(1_000_000)}, "a.pt")) == 0

        assert trainbus.load("a.pt")["x"].sum() == 1_000_000

    def test_latest_names_a_file_that_is_not_there_yet(self, stuck_disk):
        """The newest checkpoint is the newest durable one, whatever is being written."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.save_async("a.pt")
            assert CheckpointFolder(".").latest() is None
            stuck_disk.go()
            handler.flush()
            assert CheckpointFolder(".").latest().path.endswith("a.pt")


class Listed:
    """An object of the user's whose state is a live list."""

    def __init__(self, items):
        self.items = items

    def state_dict(self):
        return {"items": self.items}

    def load_state_dict(self, state):
        self.items[:] = state["items"]


class TestSize:
    def test_tied_weights_are_written_twice(self):
        """Tied weights are one tensor in the file, and tied again when they are loaded."""
        tied = torch.ones(100_000)

        trainbus.save({"embedding": tied, "head": tied}, "tied.pt")

        assert os.path.getsize("tied.pt") < 1.1 * tied.nbytes
        state = trainbus.load("tied.pt")
        state["embedding"][0] = 5
        assert state["head"][0] == 5

    def test_a_small_view_drags_its_large_storage_along(self):
        """Ten numbers of a million are ten numbers in the file."""
        trainbus.save({"view": torch.ones(1_000_000)[:10]}, "view.pt")

        assert os.path.getsize("view.pt") < 10_000


class TestOldFile:
    @pytest.fixture(autouse=True)
    def _old(self):
        trainbus.save({"x": 1}, "a.pt")

    def test_something_in_the_state_cannot_be_pickled(self):
        """A state that cannot be saved is refused, naming the place, before the old file is touched."""
        with pytest.raises(UnsavableStateError, match=r"state\['transform'\]"):
            trainbus.save({"x": 2, "transform": lambda x: x}, "a.pt")

        assert trainbus.load("a.pt") == {"x": 1}

    @pytest.mark.parametrize("call", ["create", "write", "fsync", "rename"])
    def test_the_disk_is_full(self, call):
        """A write that fails anywhere leaves the old file, whole, and nothing else."""
        with FaultyDisk(errno.ENOSPC, calls=[call], times=math.inf):
            with pytest.raises(CheckpointWriteError, match="No space left"):
                trainbus.save({"x": 2}, "a.pt")

        assert (trainbus.load("a.pt"), os.listdir()) == ({"x": 1}, ["a.pt"])

    @pytest.mark.parametrize("call", ["write", "fsync", "rename"])
    def test_the_machine_dies_while_it_is_overwritten(self, in_process, call):
        """Killed in the middle of a save, the old file stands under its name and is whole."""

        def save_and_die():
            with FaultyDisk(calls=[call], before=lambda *_: os.kill(os.getpid(), signal.SIGKILL)):
                trainbus.save({"x": 2}, "a.pt")

        assert in_process(save_and_die) == -signal.SIGKILL
        assert trainbus.load("a.pt") == {"x": 1}


class TestDisk:
    def test_one_passing_error_ends_a_run_of_days(self, monkeypatch):
        """What passes by itself is tried again, on a fresh file."""
        monkeypatch.setattr(write_job, "PAUSES", (0.0, 0.0))

        with FaultyDisk(errno.EIO, calls=["fsync"]) as disk:
            trainbus.save({"x": 1}, "a.pt")

        assert (disk.failed, trainbus.load("a.pt")) == (1, {"x": 1})

    def test_a_disk_too_small_is_noticed_after_gigabytes(self):
        """Room for a large state is claimed before its first byte is written."""
        with FaultyDisk(errno.ENOSPC, calls=["allocate", "write"], times=math.inf) as disk:
            with pytest.raises(CheckpointWriteError, match="No space left"):
                trainbus.save({"x": torch.zeros(20_000_000)}, "a.pt")

        assert disk.made == ["allocate"]

    def test_colleagues_cannot_read_the_file(self):
        """A checkpoint has the mode that any file of this user has."""
        mask = os.umask(0o022)
        try:
            trainbus.save({"x": 1}, "a.pt")
        finally:
            os.umask(mask)

        assert os.stat("a.pt").st_mode & 0o777 == 0o644


class TestWhen:
    def test_every_few_epochs_cannot_be_asked_for(self, train):
        """Every so many epochs, steps or minutes, or whichever of them comes first."""
        train([0.5] * 7, ModelCheckpoint("{epoch}.pt", save_freq=Every(epochs=3) | Every(minutes=1000)))

        assert sorted(os.listdir()) == ["3.pt", "6.pt"]

    def test_a_run_that_goes_on_cannot_be_asked_for_a_save(self):
        """Whoever touches a file gets a checkpoint of this moment, and training goes on."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(SaveOnRequest("asked_{global_step}.pt", seconds_between_looks=0))
            for _ in handler.epochs(1):
                for batch in handler.batches(range(9)):
                    if batch == 4:
                        with open("save-now", "w"):
                            pass

        assert (os.listdir(), handler.global_step) == (["asked_5.pt"], 9)

    def test_saving_after_a_validation_is_refused(self):
        """A save may be asked for at any event, also at the end of a validation."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.on("val_end", lambda handler, epoch: handler.save_async(f"{epoch}.pt"))
            for _ in handler.epochs(2):
                for _ in handler.val_batches(range(2)):
                    pass

        assert [file.manifest.epoch for file in CheckpointFolder(".")] == [0, 1]


class TestLast:
    def test_last_is_the_best_one(self, train):
        """One callback for the last and one for the best: the last is of the last epoch, and no link."""
        train(
            [0.5, 0.7, 0.9],
            ModelCheckpoint("last.pt"),
            ModelCheckpoint("best.pt", monitor="val_loss", save_best_only=True),
        )

        assert (weight("last.pt"), weight("best.pt")) == (2.0, 0.0)
        assert not any(entry.is_symlink() for entry in os.scandir())

    def test_each_file_is_written_twice(self, train):
        """A save is one file written once."""
        with FaultyDisk() as disk:
            train([0.5, 0.7, 0.9], ModelCheckpoint("last.pt"))

        assert disk.made.count("rename") == 3

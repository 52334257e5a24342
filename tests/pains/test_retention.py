"""What people suffered from while old checkpoints were being removed."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch

from trainbus import CheckpointFolder, Handler
from trainbus.errors import CheckpointWriteError
from trainbus.testing import FaultyDisk
from trainbus_callbacks import KeepBest, KeepEvery, KeepLast, ModelCheckpoint


def names():
    return sorted(name for name in os.listdir() if not name.startswith("."))


class TestWhatStays:
    def test_a_slow_disk_leaves_more_files_than_asked_for(self, train):
        """One file is one file, however slow the disk and however many saves wait for it."""
        with FaultyDisk(seconds=0.002):
            train(
                [0.4, 0.3, 0.2, 0.1],
                ModelCheckpoint("{epoch}.pt", monitor="val_loss", save_best_only=True, keep=KeepLast(1)),
                max_pending=3,
            )

        assert names() == ["4.pt"]

    def test_the_old_one_is_removed_before_the_new_one_is_written(self, train):
        """With one file to keep and a disk that is full, that file is still there."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(ModelCheckpoint("{epoch}.pt", keep=KeepLast(1)))
            handler.emit("epoch_end", epoch=0)
            handler.flush()
            with FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf):
                handler.emit("epoch_end", epoch=1)
                with pytest.raises(CheckpointWriteError):
                    handler.flush()
            assert names() == ["1.pt"]
            handler.emit("epoch_end", epoch=2)

        assert names() == ["3.pt"]

    def test_the_best_is_removed(self, train):
        """The best file stays beside the newest ones."""
        train([0.5, 0.1, 0.7, 0.8], ModelCheckpoint("{epoch}.pt", monitor="val_loss", keep=KeepLast(1)))

        assert names() == ["2.pt", "4.pt"]

    def test_the_newest_is_removed(self, train):
        """Rules that are combined keep what any of them keeps, so the newest stays beside the best."""
        keep = KeepLast(1) | KeepBest(1) | KeepEvery(epochs=2)

        train([0.1, 0.5, 0.7, 0.8, 0.9], ModelCheckpoint("{epoch}.pt", monitor="val_loss", keep=keep))

        assert names() == ["1.pt", "2.pt", "4.pt", "5.pt"]

    def test_everything_is_removed(self, train):
        """While no file has a score by which it could be among the best, the newest stays."""
        train([math.nan, math.nan], ModelCheckpoint("{epoch}.pt", monitor="val_loss", keep=KeepBest(1)))

        assert names() == ["2.pt"]

    def test_nothing_new_is_there_to_resume_from(self, train):
        """The newest file stays until there is a newer one, so that a run can be continued."""
        train([0.5] * 6, ModelCheckpoint("{epoch}.pt", keep=KeepEvery(epochs=4)))

        assert names() == ["4.pt", "6.pt"]

    def test_an_interval_leaves_one_file(self, train):
        """Without a rule every file stays: one for each epoch, as the name says."""
        train([0.5] * 3, ModelCheckpoint("{epoch}.pt"))

        assert names() == ["1.pt", "2.pt", "3.pt"]


class TestRestart:
    def test_the_limit_is_forgotten(self, train):
        """A run that goes on counts what it saved before."""
        train([0.5] * 3, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)))

        train([0.5] * 5, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)), resume=True)

        assert names() == ["4.pt", "5.pt"]

    def test_in_a_folder_that_was_moved(self, train, tmp_path, monkeypatch):
        """So it does where the folder has another name now."""
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        monkeypatch.chdir(old)
        train([0.5, 0.1], ModelCheckpoint(old / "{epoch}.pt", monitor="val_loss", keep=KeepLast(1)))
        old.rename(new)
        monkeypatch.chdir(new)

        checkpoint = ModelCheckpoint(new / "{epoch}.pt", monitor="val_loss", keep=KeepLast(1))
        train([0.5, 0.1, 0.7, 0.6], checkpoint, resume=True)

        assert names() == ["2.pt", "4.pt"]
        assert checkpoint.best_path == str(new / "2.pt")


class TestOthers:
    @pytest.mark.filterwarnings("ignore:This run did not resume:RuntimeWarning")
    def test_files_of_another_run_are_removed(self, train):
        """Another run's files in the same folder are neither counted nor removed."""
        train([0.5] * 2, ModelCheckpoint("a{epoch}.pt"))

        train([0.5] * 3, ModelCheckpoint("b{epoch}.pt", keep=KeepLast(1)))

        assert names() == ["a1.pt", "a2.pt", "b3.pt"]

    def test_the_file_that_was_fine_tuned_from_is_removed(self, train):
        """Nor is the file whose weights a run began with."""
        train([0.5], ModelCheckpoint("pretrained.pt"))
        with Handler(torch.nn.Linear(1, 1, bias=False)) as handler:
            handler.load("pretrained.pt", only=("module",))
            handler.add_callback(ModelCheckpoint("{epoch}.pt", keep=KeepLast(1)))
            for _ in handler.epochs(3):
                pass

        assert names() == ["3.pt", "pretrained.pt"]

    def test_files_that_look_like_checkpoints_are_removed(self, train):
        """What trainbus did not write stays, whatever it is called."""
        torch.save({"mine": 1}, "0.pt")
        with open("notes.txt", "w") as file:
            file.write("mine")

        train([0.5] * 3, ModelCheckpoint("{epoch}.pt", keep=KeepLast(1)))

        assert names() == ["0.pt", "3.pt", "notes.txt"]

    def test_the_wrong_one_is_removed_because_of_its_date(self, train):
        """Which is newest does not depend on the dates of files."""
        train([0.5] * 3, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)))
        os.utime("2.pt")  # copied, touched: now the newest by its date

        train([0.5] * 4, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)), resume=True)

        assert names() == ["3.pt", "4.pt"]
        assert CheckpointFolder(".").latest().manifest.epoch == 3

    def test_a_damaged_file_counts_as_one_to_keep(self, train, caplog):
        """A file that cannot be read takes no good one's place, and is left for its owner to look at."""
        train([0.5] * 2, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)))
        with open("1.pt", "r+b") as file:
            file.truncate(100)

        train([0.5] * 3, ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)), resume=True)

        assert names() == ["1.pt", "2.pt", "3.pt"]
        assert "'./1.pt' is damaged" in caplog.text

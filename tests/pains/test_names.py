"""What people suffered from in the names and folders of checkpoints."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from trainbus import CheckpointFolder, Handler
from trainbus.errors import CheckpointLockedError
from trainbus.testing import FakeHandler
from trainbus_callbacks import ModelCheckpoint


def names():
    return sorted(name for name in os.listdir() if not name.startswith("."))


def end_epoch(template, /, **logs):
    """Return the name under which the end of the first epoch is saved."""
    handler = FakeHandler()
    handler.add_callback(ModelCheckpoint(template))
    handler.bus.emit("epoch_end", logs=logs)
    return handler.saves[0].path


class TestTemplate:
    def test_a_slash_in_a_metric_makes_folders(self):
        """A metric with a slash is a field like any other, and what it fills in is part of one name."""
        assert end_epoch("m_{val/loss:.2f}.pt", **{"val/loss": 0.25}) == "m_0.25.pt"

    def test_an_unknown_field_ends_the_training(self):
        """A field that is not there leaves the name with a warning; the save is made."""
        with pytest.warns(RuntimeWarning, match="Did you mean 'val_loss'"):
            assert end_epoch("m-{val_los:.2f}.pt", val_loss=0.25) == "m_epoch1.pt"

    def test_an_unknown_field_becomes_zero(self):
        """A field that is not there is never a number that was not measured, nor its label left alone."""
        with pytest.warns(RuntimeWarning, match=r"cannot hold 'typo_loss'"):
            assert end_epoch("e{epoch}-typo_loss={typo_loss:.3f}.pt", val_loss=0.25) == "e1.pt"

    def test_a_metric_called_epoch(self):
        """A metric of a counter's name disturbs nothing."""
        assert end_epoch("m{epoch}.pt", epoch=99, batch=98) == "m1.pt"

    @pytest.mark.parametrize("value", [torch.tensor([0.25]), torch.nn.Parameter(torch.tensor(0.25))])
    def test_a_tensor_cannot_be_formatted(self, value):
        """A metric may be any tensor of one element."""
        assert end_epoch("m{val_loss:.2f}.pt", val_loss=value) == "m0.25.pt"

    def test_a_broken_template_is_noticed_after_the_first_epoch(self):
        """A template that cannot be read is refused when the callback is made."""
        with pytest.raises(ValueError, match=r"Cannot read the template 'm\{epoch.pt'"):
            ModelCheckpoint("m{epoch.pt")


class TestPath:
    @pytest.mark.parametrize("path", ["best.pt", "not/there/yet/best.pt", "~/best.pt"])
    def test_a_name_without_a_folder_or_with_one_that_is_not_there(self, train, monkeypatch, tmp_path, path):
        """A bare name, a missing folder and a home are all understood."""
        monkeypatch.setenv("HOME", str(tmp_path))

        train([0.5], ModelCheckpoint(path))

        assert os.path.isfile(os.path.expanduser(path))

    def test_one_fixed_name(self, train):
        """A fixed name is the name, with nothing added to it."""
        train([0.5, 0.4], ModelCheckpoint("model.pt"))

        assert names() == ["model.pt"]

    def test_a_folder_with_files_in_it_is_refused(self, train):
        """A run continues in the folder in which it was interrupted, whatever else is there."""
        with open("notes.txt", "w") as file:
            file.write("mine")
        train([0.5], ModelCheckpoint("{epoch}.pt"))

        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"), resume=True)

        assert names() == ["1.pt", "2.pt", "notes.txt"]


class TestOtherRuns:
    def test_numbers_begin_anew_after_a_restart(self, train):
        """A run that goes on goes on in its names, and overwrites nothing of before."""
        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"))
        first = [os.stat(name).st_ino for name in names()]

        train([0.5, 0.4, 0.3], ModelCheckpoint("{epoch}.pt"), resume=True)

        assert names() == ["1.pt", "2.pt", "3.pt"]
        assert [os.stat(name).st_ino for name in names()[:2]] == first

    def test_a_new_run_overwrites_the_old_one_without_a_word(self, train):
        """A run that finds another's files under its names says so before the first is overwritten."""
        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"))

        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(ModelCheckpoint("{epoch}.pt"))
            with pytest.warns(RuntimeWarning, match=r"2 checkpoints of another run .*call handler.resume"):
                next(handler.epochs(1))
            assert CheckpointFolder(".").latest().manifest.epoch == 1

    def test_two_processes_overwrite_each_others_files(self, train, in_process):
        """A second process that saves under the same names fails when it begins."""

        def second():
            with pytest.raises(CheckpointLockedError, match="Two runs would overwrite each other's files"):
                train([0.5], ModelCheckpoint("{epoch}.pt"))
            os.kill(os.getpid(), signal.SIGUSR1)  # it came here

        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(ModelCheckpoint("{epoch}.pt"))
            handler.emit("train_begin")
            assert in_process(second) == -signal.SIGUSR1

"""Saves on their way from who asks for them to the writer: postponed, numbered, given up."""

from __future__ import annotations

import errno
import os

import pytest
import torch
from torch import nn

from trainbus import CheckpointSkipped, CheckpointWriteError, Handler, read_manifest
from trainbus.checkpoint.folder import CheckpointFolder
from trainbus.checkpoint.saver import Saver
from trainbus_callbacks import KeepLast, ModelCheckpoint


def make(**options):
    """Return a handler of a small model with SGD."""
    model = nn.Linear(2, 1)
    return Handler(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def names_in(folder):
    """Return the names of the checkpoints in a folder, the oldest first."""
    return [os.path.basename(file.path) for file in CheckpointFolder(folder)]


def accumulate(handler, *, steps_at=()):
    """Hand out four batches, each with a backward pass, and step behind some of them."""
    for _ in handler.epochs(1):
        for batch in handler.batches(range(4)):
            handler.module(torch.randn(4, 2)).sum().backward()
            if batch in steps_at:
                handler.optimizer.step()
            yield batch


class TestPostponed:
    def test_interrupted_while_it_is_taken(self, tmp_path, monkeypatch):
        """Ctrl-C while one waits for room finishes it and the one behind it, each with its reason."""

        def interrupt(saver, pending):
            raise KeyboardInterrupt

        monkeypatch.setattr(Saver, "wait_for_room", interrupt)
        saves = []
        with pytest.raises(KeyboardInterrupt), make() as handler:
            for batch in accumulate(handler, steps_at=[2]):
                if batch == 1:
                    saves = [handler.save_async(tmp_path / name) for name in ("a.pt", "b.pt")]

        reasons = []
        for save in saves:
            with pytest.raises(CheckpointSkipped) as caught:
                save.result(0)
            reasons.append(str(caught.value))
        assert "KeyboardInterrupt came while it was taken" in reasons[0]
        assert "left by an exception" in reasons[1]

    def test_given_up_by_a_load(self, tmp_path):
        """One that waits when another moment is loaded is not taken of that one."""
        with make() as handler:
            handler.save(tmp_path / "start.pt")
        with make() as handler:
            for batch in accumulate(handler, steps_at=[0]):
                if batch == 2:
                    pending = handler.save_async(tmp_path / "a.pt")
                    handler.load(tmp_path / "start.pt")
                    break
            with pytest.raises(CheckpointSkipped, match=r"start\.pt' was loaded before the next optimizer"):
                pending.result(0)

        assert not (tmp_path / "a.pt").exists()

    def test_stays_when_weights_are_loaded(self, tmp_path):
        """Weights that are loaded alone change no moment, and the save is taken at the next step."""
        with make() as handler:
            handler.save(tmp_path / "start.pt")
        with make() as handler:
            for batch in accumulate(handler, steps_at=[0, 3]):
                if batch == 2:
                    pending = handler.save_async(tmp_path / "a.pt")
                    handler.load(tmp_path / "start.pt", only=("module",))

            assert pending.result(30).global_step == 4


class TestSequence:
    """The numbers tell which file is newer, so they go on from what lies in the folder."""

    @pytest.fixture
    def failing_listing(self, monkeypatch):
        """Lets the first look into a folder fail."""
        real, failures = os.scandir, [OSError(errno.ESTALE, "Stale file handle")]

        def scandir(*args):
            if failures:
                raise failures.pop()
            return real(*args)

        def begin():
            monkeypatch.setattr(os, "scandir", scandir)

        return begin

    def test_looks_once(self, tmp_path, monkeypatch):
        """A folder is looked through once, however many saves go there."""
        looks = []
        real = CheckpointFolder.greatest_sequence
        monkeypatch.setattr(
            CheckpointFolder, "greatest_sequence", lambda folder: looks.append(folder.path) or real(folder)
        )
        with make() as handler:
            for name in ("a.pt", "b.pt", "c.pt"):
                handler.save(tmp_path / name)

        assert looks == [str(tmp_path)]

    @pytest.mark.parametrize("reaction", ["warn", "raise"])
    def test_folder_that_cannot_be_listed(self, tmp_path, caplog, failing_listing, reaction):
        """It fails that save, as any refusal of the disk does; the next one is numbered as the newest."""
        with make() as handler:
            for name in ("a.pt", "b.pt", "c.pt"):
                handler.save(tmp_path / name)
        with make(on_write_error=reaction) as handler:
            failing_listing()
            pending = handler.save_async(tmp_path / "failed.pt")
            with pytest.raises(CheckpointWriteError, match=r"failed\.pt.*Stale file handle"):
                pending.result(30)
            handler.save(tmp_path / "d.pt")

        assert [read_manifest(tmp_path / f"{name}.pt").sequence for name in "abcd"] == [1, 2, 3, 4]
        assert names_in(tmp_path)[-1] == "d.pt"

    def test_goes_on_under_warn(self, tmp_path, caplog, failing_listing):
        """With on_write_error="warn" the training goes on, and the newest of the files is the last."""
        with make() as handler:
            handler.save(tmp_path / "old.pt")
        with make(on_write_error="warn") as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt", keep=KeepLast(2)))
            handler.resume(tmp_path)
            for epoch in handler.epochs(3):
                if epoch == 0:
                    failing_listing()

        assert "Stale file handle" in caplog.text
        assert names_in(tmp_path) == ["old.pt", "2.pt", "3.pt"]

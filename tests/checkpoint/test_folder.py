from __future__ import annotations

import logging
import math
import os

import pytest
import torch

from trainbus.checkpoint.folder import CheckpointFolder


def names(files) -> list[str]:
    return [os.path.basename(file.path) for file in files]


class TestIteration:
    def test_order_of_sequence(self, tmp_path, write):
        """
        Checkpoints come in the order they were made, whatever their names and steps are.
        """
        write(tmp_path / "c.pt", {}, sequence=1, global_step=9)
        write(tmp_path / "a.pt", {}, sequence=10, global_step=3)
        write(tmp_path / "b.pt", {}, sequence=2, global_step=12)

        files = list(CheckpointFolder(tmp_path))

        assert names(files) == ["c.pt", "b.pt", "a.pt"]
        assert [file.manifest.global_step for file in files] == [9, 12, 3]
        assert files[0].path == str(tmp_path / "c.pt")

    def test_missing_folder(self, tmp_path):
        """
        A folder that is not there is an empty one.
        """
        folder = CheckpointFolder(tmp_path / "no")

        assert list(folder) == []
        assert folder.latest() is None
        assert folder.best("loss", "min") is None
        assert folder.greatest_sequence() == 0

    def test_home(self, tmp_path, write, monkeypatch):
        """
        The path may begin with ~.
        """
        monkeypatch.setenv("HOME", str(tmp_path))
        write(tmp_path / "runs" / "a.pt", {})

        assert names(CheckpointFolder("~/runs")) == ["a.pt"]

    def test_foreign_files(self, tmp_path, write, caplog):
        """
        What is no checkpoint is passed over without a word.
        """
        write(tmp_path / "a.pt", {})
        write(tmp_path / ".hidden.pt", {})
        write(tmp_path / "folder.pt" / "inner.pt", {})
        torch.save({}, tmp_path / "plain.pt")
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "empty.pt").touch()
        (tmp_path / ".a.pt.0123.tmp").write_bytes(b"PK\x03\x04")
        os.mkfifo(tmp_path / "pipe.pt")

        with caplog.at_level(logging.DEBUG, "trainbus"):
            assert names(CheckpointFolder(tmp_path)) == ["a.pt"]

        assert caplog.records == []

    def test_damaged_files(self, tmp_path, write, caplog):
        """
        A damaged file is passed over with one warning, however often the folder is read.
        """
        write(tmp_path / "a.pt", {}, sequence=1)
        write(tmp_path / "b.pt", {}, sequence=2)
        os.truncate(tmp_path / "b.pt", 700)
        folder = CheckpointFolder(tmp_path)

        with caplog.at_level(logging.WARNING, "trainbus"):
            assert names(folder) == ["a.pt"]
            assert names([folder.latest()]) == ["a.pt"]

        (record,) = caplog.records
        assert "b.pt' is damaged: it does not end as a zip file does" in record.getMessage()

    def test_unreadable_file(self, tmp_path, write, caplog, monkeypatch):
        """
        A file that cannot be read is passed over with a warning.
        """
        write(tmp_path / "a.pt", {})

        def refuse(path, *args, **kwargs):
            raise PermissionError(13, "Permission denied", path)

        monkeypatch.setattr(os, "open", refuse)
        with caplog.at_level(logging.WARNING, "trainbus"):
            assert list(CheckpointFolder(tmp_path)) == []

        assert "Permission denied" in caplog.text

    def test_file_that_vanishes(self, tmp_path, write, caplog, monkeypatch):
        """
        A file removed while the folder is read is passed over without a word.
        """
        write(tmp_path / "a.pt", {})
        folder = CheckpointFolder(tmp_path)
        paths = folder._candidates()
        monkeypatch.setattr(folder, "_candidates", lambda: paths)
        (tmp_path / "a.pt").unlink()

        assert list(folder) == []
        assert caplog.records == []


class TestLatest:
    def test_links(self, tmp_path, write):
        """A link to a checkpoint is listed as what it is; files from elsewhere can be resumed from by one."""
        write(tmp_path / "elsewhere" / "a.pt", {}, sequence=1)
        (tmp_path / "link.pt").symlink_to(tmp_path / "elsewhere" / "a.pt")
        for name, target in (("gone.pt", "nothing.pt"), ("loop.pt", "loop.pt"), ("through.pt", "link.pt/x")):
            (tmp_path / name).symlink_to(target)
        [file] = CheckpointFolder(tmp_path)

        assert file.is_link and file == CheckpointFolder(tmp_path).latest()
        os.rename(tmp_path / "link.pt", tmp_path / "a.pt")  # as the file itself is called
        assert not next(iter(CheckpointFolder(tmp_path))).is_original
        assert not next(iter(CheckpointFolder(tmp_path / "elsewhere"))).is_link

    def test_only_states(self, tmp_path, write):
        """
        Only a whole state that was not cut off can be resumed from.
        """
        write(tmp_path / "a.pt", {}, sequence=1)
        write(tmp_path / "b.pt", {}, sequence=2, contents="weights")
        write(tmp_path / "c.pt", {}, sequence=3, contents="object")
        write(tmp_path / "d.pt", {}, sequence=4, interrupted=True)
        folder = CheckpointFolder(tmp_path)

        assert names([folder.latest()]) == ["a.pt"]
        assert folder.greatest_sequence() == 4


class TestBest:
    @pytest.fixture(name="folder")
    def _folder(self, tmp_path, write):
        for sequence, loss in enumerate([0.5, 0.2, 0.2, math.nan, -math.inf, 0.9], start=1):
            write(tmp_path / f"{sequence}.pt", {}, sequence=sequence, logs={"loss": loss})
        write(tmp_path / "none.pt", {}, sequence=9, logs={"other": 0.0})
        return CheckpointFolder(tmp_path)

    @pytest.mark.parametrize(("mode", "expected"), [("min", "2.pt"), ("max", "6.pt")])
    def test_mode(self, folder, mode, expected):
        """
        The least or greatest finite value wins, and of equal ones the older.
        """
        assert names([folder.best("loss", mode)]) == [expected]

    def test_score(self, tmp_path, write):
        """
        A metric that there was no room for in the logs is known by the score it was judged by.
        """
        write(tmp_path / "a.pt", {}, sequence=1, monitor="loss", score=0.1)
        write(tmp_path / "b.pt", {}, sequence=2, monitor="accuracy", score=0.0)
        write(tmp_path / "c.pt", {}, sequence=3, logs={"loss": 0.2})

        assert names([CheckpointFolder(tmp_path).best("loss", "min")]) == ["a.pt"]

    def test_unknown_metric(self, folder):
        """
        There is no best by a metric that no checkpoint has.
        """
        assert folder.best("lost", "min") is None

    def test_unknown_mode(self, folder):
        """
        A mode other than min and max is refused.
        """
        with pytest.raises(ValueError, match="mode must be 'min' or 'max', got 'auto'"):
            folder.best("loss", "auto")

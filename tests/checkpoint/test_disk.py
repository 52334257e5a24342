from __future__ import annotations

import errno
import os

import pytest

from trainbus.checkpoint.disk import Disk


class Syncs(Disk):
    """Notes which folders were synced, by inode."""

    def __init__(self) -> None:
        self.synced: list[int] = []

    def fsync_folder(self, folder: int) -> bool:
        self.synced.append(os.fstat(folder).st_ino)
        return super().fsync_folder(folder)


class TestOpenFolder:
    def test_missing_folders_are_made_durably(self, tmp_path):
        """
        Each new folder's parent is synced, or a power cut would take it back.
        """
        disk = Syncs()

        os.close(disk.open_folder(str(tmp_path / "a" / "b" / "c")))

        assert (tmp_path / "a" / "b" / "c").is_dir()
        expected = [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
        assert disk.synced == [path.stat().st_ino for path in expected]

    def test_existing_folder(self, tmp_path):
        """
        Nothing is synced for a folder that is there.
        """
        disk = Syncs()

        os.close(disk.open_folder(str(tmp_path)))

        assert disk.synced == []

    def test_current_folder(self, tmp_path, monkeypatch):
        """
        An empty path is the current folder, and relative ones begin there.
        """
        monkeypatch.chdir(tmp_path)

        os.close(Disk().open_folder(""))
        os.close(Disk().open_folder("a/b/"))

        assert (tmp_path / "a" / "b").is_dir()

    def test_not_made(self, tmp_path):
        """
        With create=False a missing folder is an error and stays missing.
        """
        with pytest.raises(FileNotFoundError):
            Disk().open_folder(str(tmp_path / "a"), create=False)

        assert not (tmp_path / "a").exists()

    def test_link_to_nowhere(self, tmp_path):
        """
        A dangling link in the folder's place is an error, not an endless loop.
        """
        (tmp_path / "a").symlink_to(tmp_path / "b")

        with pytest.raises(FileNotFoundError):
            Disk().open_folder(str(tmp_path / "a"))


class TestCreate:
    def test_existing_file_is_refused(self, tmp_path):
        """
        A file or link that is there is never opened for writing.
        """
        (tmp_path / "victim").write_text("dear")
        (tmp_path / "link").symlink_to(tmp_path / "victim")
        folder = Disk().open_folder(str(tmp_path))

        for name in ("victim", "link"):
            with pytest.raises(FileExistsError):
                Disk().create(folder, name)
        os.close(folder)

        assert (tmp_path / "victim").read_text() == "dear"


class TestFsyncFolder:
    @pytest.fixture
    def folder(self, tmp_path):
        fd = os.open(tmp_path, os.O_RDONLY)
        yield fd
        os.close(fd)

    @staticmethod
    def refuse(monkeypatch, call, number, folder):
        """Let a call of `os` fail for that folder."""
        real = getattr(os, call)

        def fail(fd):
            if fd == folder:
                raise OSError(number, os.strerror(number))
            return real(fd)

        monkeypatch.setattr(os, call, fail)

    @pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
    def test_file_system_that_cannot(self, monkeypatch, folder, number):
        """
        A file system that cannot sync folders is no error: the answer says so.
        """
        self.refuse(monkeypatch, "fsync", number, folder)

        assert not Disk().fsync_folder(folder)

    @pytest.mark.parametrize("call", ["fsync", "fstat"])
    def test_failure(self, monkeypatch, folder, call):
        """
        A sync that fails is an error, and so is one after which the file system answers nothing.
        """
        self.refuse(monkeypatch, call, errno.EIO, folder)

        with pytest.raises(OSError, match="Input/output error"):
            Disk().fsync_folder(folder)

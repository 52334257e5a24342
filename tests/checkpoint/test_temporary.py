"""Unfinished files: whose they are, and that only those of the dead are swept."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest

from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.temporary import TEMPORARY, create_temporary, sweep
from trainbus.testing import FaultyDisk


@pytest.fixture
def folder(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY)
    yield fd
    os.close(fd)


def leave_behind(path):
    """Have a process die in the middle of a file; return the file's name."""
    code = (
        "import os, sys\n"
        "from trainbus.checkpoint.disk import Disk\n"
        "from trainbus.checkpoint.temporary import create_temporary\n"
        "with create_temporary(Disk(), os.open(sys.argv[1], os.O_RDONLY), 'a.pt') as (name, fd):\n"
        "    os.write(fd, b'half')\n"
        "    print(name, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


class TestSweep:
    def test_takes_what_the_dead_have_left(self, tmp_path):
        """The unfinished file of a killed process is removed, and named."""
        name = leave_behind(tmp_path)
        assert os.listdir(tmp_path) == [name]

        assert sweep(str(tmp_path), Disk()) == [name]
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("ending", [".trainbus.tmp", ".trainbus.tmp.d"])
    def test_takes_names_of_any_letters(self, tmp_path, ending):
        """Also what a checkpoint with an end of a line in its name has left is removed."""
        name = f".a\nb.pt.0123456789abcdef{ending}"
        (tmp_path / name).mkdir() if ending.endswith(".d") else (tmp_path / name).touch()

        assert sweep(str(tmp_path), Disk()) == [name]

    def test_gives_names_of_any_letters_back(self, tmp_path):
        """So is one that was moved out of the way given back its name."""
        (tmp_path / "a\nb.0123456789abcdef.trainbus.old").touch()
        sweep(str(tmp_path), Disk())

        assert os.listdir(tmp_path) == ["a\nb"]

    def test_leaves_what_is_being_written(self, tmp_path, folder):
        """A file that somebody is writing stays, also between its last byte and its rename."""
        with create_temporary(Disk(), folder, "a.pt") as (name, fd):
            assert sweep(str(tmp_path), Disk()) == []
            os.close(fd)
            assert sweep(str(tmp_path), Disk()) == []
            assert os.listdir(tmp_path) == [name]

    @pytest.mark.parametrize(
        "name",
        [
            ".a.pt.0123456789abcdef.tmp",
            "a.pt",
            ".hidden",
            ".a.pt.0123.trainbus.tmp",
            "x.0123456789abcdef.trainbus.tmp",
        ],
    )
    def test_leaves_what_is_not_ours(self, tmp_path, name):
        """A file whose name is not exactly like ours stays."""
        (tmp_path / name).write_text("dear")

        assert sweep(str(tmp_path), Disk()) == []
        assert (tmp_path / name).read_text() == "dear"

    def test_follows_no_link(self, tmp_path):
        """A link with a name like ours stays, and so does what it points to."""
        (tmp_path / "victim").write_text("dear")
        link = tmp_path / ".a.pt.0123456789abcdef.trainbus.tmp"
        link.symlink_to(tmp_path / "victim")

        assert sweep(str(tmp_path), Disk()) == []
        assert (tmp_path / "victim").exists() and link.is_symlink()

    def test_touches_no_pipe(self, tmp_path):
        """A pipe with a name like ours is neither waited for nor removed."""
        os.mkfifo(tmp_path / ".a.pt.0123456789abcdef.trainbus.tmp")

        assert sweep(str(tmp_path), Disk()) == []

    def test_needs_locks_to_tell(self, tmp_path):
        """Where the file system has no locks nothing is removed: it could be somebody's."""

        class NoLocks(Disk):
            def lock(self, fd):
                return False

        name = leave_behind(tmp_path)

        assert sweep(str(tmp_path), NoLocks()) == []
        assert os.listdir(tmp_path) == [name]

    def test_of_no_folder_finds_nothing(self, tmp_path):
        """A folder that does not exist yet has nothing to sweep, and is not made."""
        assert sweep(str(tmp_path / "none"), Disk()) == []
        assert os.listdir(tmp_path) == []


class TestCreate:
    def test_names_are_recognized(self, folder):
        """The name of an unfinished file is one that a sweep looks at, however long the final name is."""
        for final in ("a.pt", "x" * 255, "\u00fc" * 127):
            with create_temporary(Disk(), folder, final) as (name, fd):
                os.close(fd)
                assert TEMPORARY.fullmatch(name)
                assert len(os.fsencode(name)) <= 255

    def test_begins_anew_when_a_sweep_was_faster(self, tmp_path, folder):
        """A sweep between the creation and the lock costs a new file, never a lost one."""

        class Swept(Disk):
            times = 0

            def lock(self, fd):
                if self.times < 2:
                    self.times += 1
                    assert len(sweep(str(tmp_path), Disk())) == 1
                return super().lock(fd)

        with create_temporary(Swept(), folder, "a.pt") as (name, fd):
            os.close(fd)
            assert os.listdir(tmp_path) == [name]

    def test_begins_anew_when_a_sweep_holds_the_lock(self, tmp_path, folder):
        """A file that a sweep has locked already is left to it."""
        with create_temporary(FaultyDisk(errno.EAGAIN, calls=["lock"]), folder, "a.pt") as (name, fd):
            os.close(fd)
            assert len(os.listdir(tmp_path)) == 2 and name in os.listdir(tmp_path)

    def test_leaves_no_descriptor(self, folder):
        """Every descriptor but the caller's is closed again, also after an error."""
        before = set(os.listdir("/proc/self/fd"))
        with create_temporary(Disk(), folder, "a.pt") as (_, fd):
            os.close(fd)
        with pytest.raises(OSError, match="injected into lock"):
            with create_temporary(FaultyDisk(errno.EIO, calls=["lock"]), folder, "a.pt"):
                pass

        assert set(os.listdir("/proc/self/fd")) == before


class TestNames:
    @pytest.mark.parametrize("letter", ["x", "ü", "器", "😀", "\udcff"])
    @pytest.mark.parametrize("odd", range(4))
    def test_long(self, tmp_path, folder, letter, odd):
        """A long name is cut between two letters, for some file systems refuse half of one."""
        final = "y" * odd + letter * (240 // len(os.fsencode(letter)))
        with create_temporary(Disk(), folder, final) as (name, fd):
            os.close(fd)

            assert TEMPORARY.fullmatch(name) and len(os.fsencode(name)) <= 253
            assert final.startswith(name[1:].rsplit(".", 3)[0])

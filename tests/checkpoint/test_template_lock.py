"""One process at a time for the files of one name template."""

from __future__ import annotations

import errno
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from trainbus.checkpoint.disk import Disk, use_disk
from trainbus.checkpoint.template_lock import TemplateLock, lock_path
from trainbus.errors import CheckpointLockedError

HOLD = """
import os, sys, time
from trainbus.checkpoint.template_lock import TemplateLock
lock = TemplateLock(sys.argv[1], sys.argv[2])
if sys.argv[3] == "fork":
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b".")
        time.sleep(600)
    os.read(read, 1)
    print(child, flush=True)  # by one process alone, so that lines cannot mix
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold():
    """Have another process take the lock of a template."""
    started = []

    def start(folder, template, mode="alone"):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder), template, mode], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        lines = [process.stdout.readline().strip() for _ in range(2 if mode == "fork" else 1)]
        return process, [int(line) for line in lines if line.isdigit()]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


class TestTemplateLock:
    def test_second_process_fails_at_once(self, tmp_path, hold):
        """The second process is told who holds it: process, host and start."""
        process, _ = hold(tmp_path, "best_{val/loss}.pt")

        with pytest.raises(CheckpointLockedError, match="or shared=True if that is meant") as info:
            TemplateLock(str(tmp_path), "best_{val/loss}.pt")

        assert f"process {process.pid} on '{os.uname().nodename}', running since 20" in str(info.value)
        assert re.search(r"best_\{val/loss\}\.pt", str(info.value))

    def test_dies_with_its_process(self, tmp_path, hold):
        """After a SIGKILL the next run takes it, and its file."""
        process, _ = hold(tmp_path, "a.pt")
        process.kill()
        process.wait()

        TemplateLock(str(tmp_path), "a.pt").release()
        assert os.listdir(tmp_path) == []

    def test_does_not_live_on_in_forked_children(self, tmp_path, hold):
        """A forked child that outlives its killed parent does not keep the next run out."""
        process, (child,) = hold(tmp_path, "a.pt", "fork")
        try:
            process.kill()
            process.wait()

            TemplateLock(str(tmp_path), "a.pt").release()
        finally:
            os.kill(child, signal.SIGKILL)

    def test_is_of_one_template(self, tmp_path):
        """Another template in the same folder is another lock."""
        one = TemplateLock(str(tmp_path), "a_{epoch}.pt")
        other = TemplateLock(str(tmp_path), "b_{epoch}.pt")
        one.release()
        other.release()

    def test_release_removes_the_file(self, tmp_path):
        """What is released leaves nothing behind and may be taken again; a second release does nothing."""
        lock = TemplateLock(str(tmp_path / "new"), "a.pt")
        assert os.listdir(tmp_path / "new") == [".a.pt.lock"]
        lock.release()
        lock.release()

        assert os.listdir(tmp_path / "new") == []
        TemplateLock(str(tmp_path / "new"), "a.pt").release()

    def test_release_leaves_what_is_of_another(self, tmp_path, hold):
        """Where the folder was removed and made again, the lock that a new run has there stays its own."""
        old = TemplateLock(str(tmp_path / "run"), "a.pt")
        shutil.rmtree(tmp_path / "run")
        hold(tmp_path / "run", "a.pt")
        old.release()

        with pytest.raises(CheckpointLockedError):
            TemplateLock(str(tmp_path / "run"), "a.pt")

    def test_release_without_the_file(self, tmp_path):
        """Where the folder is gone there is nothing to remove."""
        lock = TemplateLock(str(tmp_path / "run"), "a.pt")
        shutil.rmtree(tmp_path / "run")
        lock.release()

        assert not (tmp_path / "run").exists()

    def test_forgotten_one_is_released(self, tmp_path):
        """One that nobody refers to any more is released."""
        lock = TemplateLock(str(tmp_path), "a.pt")
        del lock

        TemplateLock(str(tmp_path), "a.pt").release()

    def test_file_that_was_removed_meanwhile_is_made_anew(self, tmp_path, monkeypatch):
        """Who opened the file just before its holder removed it takes the next one, not the removed one."""
        first = TemplateLock(str(tmp_path), "a.pt")
        opened = []

        class Slow(Disk):
            def open(self, folder, name, *, create=False):
                fd = super().open(folder, name, create=create)
                if not opened:
                    opened.append(fd)
                    first.release()
                return fd

        with use_disk(Slow()):
            second = TemplateLock(str(tmp_path), "a.pt")
        with pytest.raises(CheckpointLockedError):
            TemplateLock(str(tmp_path), "a.pt")
        second.release()

    @pytest.mark.parametrize(
        "content", [b"", b"{", b'{"pid": "x"}', b"[1]", b"\xff" * 2000, b'{"pid": 1e999}']
    )
    def test_believes_nothing_the_file_says(self, tmp_path, content):
        """A file with anything in it is another process's, no more."""
        path = tmp_path / ".a.pt.lock"
        path.write_bytes(content)
        fd = os.open(path, os.O_RDWR)
        Disk().lock(fd)
        try:
            with pytest.raises(CheckpointLockedError, match="another process does"):
                TemplateLock(str(tmp_path), "a.pt")
        finally:
            os.close(fd)

    def test_follows_no_link(self, tmp_path):
        """A link in the lock file's place is refused, and what it points to stays as it is."""
        (tmp_path / "victim").write_text("dear")
        (tmp_path / ".a.pt.lock").symlink_to(tmp_path / "victim")

        with pytest.raises(OSError, match=r"a\.pt\.lock"):
            TemplateLock(str(tmp_path), "a.pt")
        assert (tmp_path / "victim").read_text() == "dear"

    def test_without_locks_is_said(self, tmp_path, caplog):
        """Where the file system has none, saving goes on and a warning says what is missing."""

        class NoLocks(Disk):
            def lock(self, fd):
                return False

        with use_disk(NoLocks()):
            TemplateLock(str(tmp_path), "a.pt").release()

        assert "has no locks" in caplog.text

    def test_full_disk(self, tmp_path, monkeypatch):
        """Where there is no room for a word about the holder, it holds the lock all the same."""

        def pwrite(fd, data, position):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as full:
            full.setattr(os, "pwrite", pwrite)
            lock = TemplateLock(str(tmp_path), "a.pt")
        with pytest.raises(CheckpointLockedError, match="another process does"):
            TemplateLock(str(tmp_path), "a.pt")
        lock.release()

        TemplateLock(str(tmp_path), "a.pt").release()

    @pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), KeyboardInterrupt()])
    def test_may_be_tried_again(self, tmp_path, monkeypatch, error):
        """An attempt that fails halfway holds nothing, so that this process does not keep itself out."""
        with monkeypatch.context() as failing, pytest.raises(type(error)):

            def stat(*args, **options):
                raise error

            failing.setattr(os, "stat", stat)
            TemplateLock(str(tmp_path), "a.pt")

        TemplateLock(str(tmp_path), "a.pt").release()

    def test_leaves_no_descriptor(self, tmp_path):
        """Whatever comes of it, the folder and the file are closed again."""
        before = set(os.listdir("/proc/self/fd"))
        lock = TemplateLock(str(tmp_path), "a.pt")
        with pytest.raises(CheckpointLockedError):
            TemplateLock(str(tmp_path), "a.pt")
        lock.release()

        assert set(os.listdir("/proc/self/fd")) == before


class TestLockPath:
    def test_is_a_hidden_sibling(self, tmp_path, monkeypatch):
        """It lies beside the files, hidden, whatever the template holds and however the folder is written."""
        monkeypatch.chdir(tmp_path)

        path = lock_path("runs", "best_{val/loss:.2f}.pt")
        assert re.fullmatch(
            re.escape(f"{tmp_path}/runs/.best__val_loss_.2f_.pt-") + "[0-9a-f]{16}.lock", path
        )
        assert lock_path(".", "a.pt") == lock_path(str(tmp_path), "a.pt") == str(tmp_path / ".a.pt.lock")

    def test_is_never_too_long(self, tmp_path):
        """A long template has a name that the file system takes."""
        assert len(os.path.basename(lock_path(str(tmp_path), "x" * 255))) <= 255

    @pytest.mark.parametrize(
        "one, other",
        [
            ("生成器.pt", "判别器.pt"),
            ("a b.pt", "a_b.pt"),
            ("{a}.pt", "_a_.pt"),
            ("x" * 210 + "1.pt", "x" * 210 + "2.pt"),
            ("x" * 201, "x" * 200),
            ("\udcff.pt", "\ud800.pt"),
        ],
    )
    def test_is_of_one_template(self, tmp_path, one, other):
        """Templates that differ in what a name of plain letters cannot hold have locks of their own."""
        first = TemplateLock(str(tmp_path), one)
        second = TemplateLock(str(tmp_path), other)
        with pytest.raises(CheckpointLockedError):
            TemplateLock(str(tmp_path), other)
        first.release()
        second.release()

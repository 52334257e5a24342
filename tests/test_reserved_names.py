"""A name template is one process's at a time, and a lost save is told however the process ends."""

from __future__ import annotations

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn

from trainbus import CheckpointLockedError, CheckpointWriteError, Handler
from trainbus.checkpoint.template_lock import lock_path
from trainbus.testing import FaultyDisk
from trainbus_callbacks import ModelCheckpoint


def make(**options):
    return Handler(nn.Linear(1, 1), **options)


class TestReservedNames:
    OTHER = """
import sys
from trainbus.checkpoint.template_lock import TemplateLock
lock = TemplateLock(sys.argv[1], "{epoch}.pt")
print("held", flush=True)
sys.stdin.read()
"""

    @pytest.fixture
    def other(self, tmp_path):
        """Another process that saves under the same template, until its input ends."""
        command = [sys.executable, "-c", self.OTHER, str(tmp_path)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "held\n"
            yield process
            process.stdin.close()

    def test_keep_a_second_process_out(self, tmp_path, other):
        """A run whose template another process saves under fails when its training begins."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt"))
            with pytest.raises(CheckpointLockedError, match=f"process {other.pid}"):
                handler.emit("train_begin")

    def test_may_be_shared(self, tmp_path, other):
        """With shared=True both save."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt", shared=True))
            for _ in handler.epochs(1):
                pass

        assert (tmp_path / "1.pt").exists()

    def test_are_free_once_the_handler_is_closed(self, tmp_path):
        """After the run nothing is left of the lock."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt"))
            for _ in handler.epochs(1):
                assert list(tmp_path.iterdir()) == [Path(lock_path(str(tmp_path), "{epoch}.pt"))]

        assert os.listdir(tmp_path) == ["1.pt"]

    def test_show_a_folder_that_cannot_be_written_at_once(self, tmp_path):
        """Where nothing can be written, the run fails when it begins and not after its first epoch."""
        with make() as handler, FaultyDisk(errno.EROFS, calls=["open"], times=math.inf):
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt"))
            with pytest.raises(CheckpointWriteError, match="Read-only file system"):
                handler.emit("train_begin")

    def test_are_only_wished_for_where_errors_warn(self, tmp_path, caplog):
        """With on_write_error="warn" a template that cannot be reserved is logged, and training goes on."""
        with make(on_write_error="warn") as handler, FaultyDisk(errno.EROFS, calls=["open"], times=math.inf):
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt"))
            for _ in handler.epochs(1):
                pass

        assert "Read-only file system" in caplog.text


class TestSystemExit:
    def test_tells_of_a_lost_save_by_its_code(self, tmp_path):
        """sys.exit(0) in the handler, with a save lost, ends with 74: nobody is shown the notes of that."""
        code = (
            "import errno, math, sys, torch, trainbus\n"
            "from trainbus.testing import FaultyDisk\n"
            "with FaultyDisk(errno.EROFS, calls=['create'], times=math.inf):\n"
            "    with trainbus.Handler(torch.nn.Linear(1, 1)) as handler:\n"
            "        handler.save_async(sys.argv[1])\n"
            "        sys.exit(0)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.pt")], capture_output=True, text=True, timeout=100
        )

        assert done.returncode == 74
        (line,) = done.stderr.splitlines()
        assert "Cannot write checkpoint" in line and "Read-only file system" in line

"""The disk that fails or is slow does so when it was told to, and is the real one otherwise."""

from __future__ import annotations

import errno
import math

import pytest

import trainbus
from trainbus.errors import CheckpointWriteError
from trainbus.testing import FaultyDisk, faults


class Clock:
    """Stands in for the module `time`: takes note of how long somebody slept."""

    def __init__(self):
        self.slept = []

    def sleep(self, seconds):
        self.slept.append(seconds)


class TestFails:
    @pytest.mark.parametrize("at", [1, 2])
    def test_the_nth_write(self, tmp_path, at):
        """The N-th write of all saves fails with the errno it was given, and the file before it stays."""
        trainbus.save(1, tmp_path / "a.pt")

        with FaultyDisk(errno.ENOSPC, calls=["write"], at=at) as disk:
            with pytest.raises(CheckpointWriteError, match="No space left") as info:
                trainbus.save(2, tmp_path / "a.pt")

        assert (info.value.errno, disk.failed, len(disk.made) >= at) == (errno.ENOSPC, 1, True)
        assert trainbus.load(tmp_path / "a.pt") == 1

    def test_the_write_of_a_later_save(self, tmp_path):
        """Writes are counted over saves, so that a run can be let fail in its middle."""
        with FaultyDisk() as counted:
            trainbus.save(1, tmp_path / "counted.pt")
        writes = counted.made.count("write")

        with FaultyDisk(errno.EROFS, calls=["write"], at=2 * writes + 1):
            trainbus.save(1, tmp_path / "1.pt"), trainbus.save(2, tmp_path / "2.pt")
            with pytest.raises(CheckpointWriteError, match="Read-only"):
                trainbus.save(3, tmp_path / "3.pt")
            trainbus.save(4, tmp_path / "4.pt")

        assert sorted(path.name for path in tmp_path.iterdir()) == ["1.pt", "2.pt", "4.pt", "counted.pt"]

    def test_for_ever(self, tmp_path):
        """With times=math.inf it stays broken, until the block ends."""
        with FaultyDisk(errno.EROFS, calls=["create"], times=math.inf):
            for _ in range(2):
                with pytest.raises(CheckpointWriteError):
                    trainbus.save(1, tmp_path / "a.pt")

        assert trainbus.save(1, tmp_path / "a.pt").size > 0


class TestSlow:
    def test_each_call(self, tmp_path, monkeypatch):
        """Each call that counts takes so much longer, and nothing fails."""
        clock = Clock()
        monkeypatch.setattr(faults, "time", clock)

        with FaultyDisk(seconds=0.5, calls=["write", "fsync"]) as disk:
            trainbus.save(1, tmp_path / "a.pt")

        assert disk.made.count("fsync") == 1
        assert clock.slept == [0.5] * len(disk.made)
        assert trainbus.load(tmp_path / "a.pt") == 1

    def test_and_failing(self, tmp_path, monkeypatch):
        """A slow disk may fail as well: late."""
        clock = Clock()
        monkeypatch.setattr(faults, "time", clock)

        with FaultyDisk(errno.EROFS, seconds=2.0, calls=["fsync"]):
            with pytest.raises(CheckpointWriteError):
                trainbus.save(1, tmp_path / "a.pt")

        assert clock.slept == [2.0]


class TestArguments:
    def test_calls(self):
        """A call that there is not is named."""
        with pytest.raises(ValueError, match=r"calls must be out of .*fsync.*, got sync\."):
            FaultyDisk(calls=["sync"])

    @pytest.mark.parametrize("wrong", [{"at": 0}, {"times": -1}, {"seconds": -0.1}])
    def test_numbers(self, wrong):
        """Numbers that could mean nothing are refused."""
        with pytest.raises(ValueError, match=r"counted from 1.*at=2"):
            FaultyDisk(errno.EIO, **wrong)

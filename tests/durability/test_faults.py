"""Every call through the door to the disk, failing in every way, once and for ever."""

from __future__ import annotations

import errno
import logging
import math
import os

import pytest
import torch

import trainbus
from trainbus import Handler
from trainbus.checkpoint import write_job
from trainbus.errors import CheckpointWriteError
from trainbus.testing import FaultyDisk

ERRNOS = [
    errno.ENOSPC,
    errno.EIO,
    errno.EDQUOT,
    errno.EROFS,
    errno.ESTALE,
    errno.EACCES,
    errno.EFBIG,
    errno.EINTR,
]
PASSING = {errno.EIO, errno.ESTALE}  # worth another try
# The road of one small save into a folder that is there: how often it makes each call.
ROAD = {
    "open_folder": 2,
    "names": 1,
    "create": 1,
    "lock": 1,
    "write": 2,
    "fsync": 1,
    "close": 2,
    "rename": 1,
    "fsync_folder": 2,
}
POINTS = [(call, at) for call, count in ROAD.items() for at in range(1, count + 1)]
# What fails here does not keep a file from being durable: looking for leftovers, closing the folder.
HARMLESS = {("open_folder", 1), ("names", 1), ("close", 2)}
WAIT = 60.0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(write_job, "PAUSES", (0.0, 0.0))


@pytest.fixture
def handler():
    """Give a run of a module of zeros; what its saves do at exit is the test's."""
    module = torch.nn.Linear(3, 3)
    torch.nn.init.zeros_(module.weight)
    handler = Handler(module, torch.optim.SGD(module.parameters()))
    yield handler
    handler.close(WAIT)


def save(handler, path, value):
    torch.nn.init.constant_(handler.module.weight, value)
    return handler.save_async(path)


def value(path):
    return float(trainbus.load(path)["module"]["weight"][0, 0])


class TestRoad:
    def test_is_the_one_that_is_failed(self, handler, tmp_path):
        """The table of calls is that of a real save, so that no point of it goes untested."""
        with FaultyDisk() as disk:
            save(handler, tmp_path / "a.pt", 1.0).result(WAIT)

        assert {call: disk.made.count(call) for call in set(disk.made)} == ROAD


@pytest.mark.parametrize("number", ERRNOS, ids=errno.errorcode.get)
@pytest.mark.parametrize(("call", "at"), POINTS, ids=[f"{call}-{at}" for call, at in POINTS])
class TestFailure:
    def test_once(self, handler, tmp_path, caplog, call, at, number):
        """What may pass costs a second try and a warning; all else is the typed error at the next event."""
        path = tmp_path / "a.pt"
        trainbus.save({"module": {"weight": torch.zeros(1, 1)}}, path)
        with FaultyDisk(number, calls=[call], at=at), caplog.at_level(logging.WARNING, "trainbus"):
            pending = save(handler, path, 1.0)
            if (call, at) in HARMLESS or number in PASSING:
                handler.flush()
                assert pending.result(0) is not None
                assert value(path) == 1.0
                tries = [one for one in caplog.records if "was written at try 2" in one.getMessage()]
                assert len(tries) == ((call, at) not in HARMLESS)
            else:
                assert_raised(handler, pending, path, number)
                assert value(path) == (1.0 if (call, at) == ("fsync_folder", 2) else 0.0)

        assert os.listdir(tmp_path) == ["a.pt"]
        save(handler, path, 2.0).result(WAIT)
        assert value(path) == 2.0

    def test_for_ever(self, handler, tmp_path, call, at, number):
        """A disk that stays broken is the typed error at the next event, after which training goes on."""
        path = tmp_path / "a.pt"
        trainbus.save({"module": {"weight": torch.zeros(1, 1)}}, path)
        with FaultyDisk(number, calls=[call], at=at, times=math.inf) as disk:
            pending = save(handler, path, 1.0)
            if call in ("names",) or (call, at) == ("close", 2):
                handler.flush()
            else:
                assert_raised(handler, pending, path, number)
                assert value(path) == (1.0 if (call, at) == ("fsync_folder", 2) else 0.0)
        assert disk.failed >= 1

        assert os.listdir(tmp_path) == ["a.pt"]
        save(handler, path, 2.0).result(WAIT)
        assert value(path) == 2.0


def assert_raised(handler, pending, path, number):
    with pytest.raises(CheckpointWriteError, match="Cannot write checkpoint") as info:
        handler.flush()
    assert (info.value.errno, info.value.path, info.value.global_step) == (number, str(path), 0)
    assert pending.done()
    handler.flush()  # raised once


class TestTries:
    def test_are_three(self, handler, tmp_path):
        """A disk that fails each sync is given three files, each synced once, and the error says so."""
        with FaultyDisk(errno.EIO, calls=["fsync"], times=math.inf) as disk:
            save(handler, tmp_path / "a.pt", 1.0)
            with pytest.raises(CheckpointWriteError, match=r"\(tried 3 times\)"):
                handler.flush()

        assert disk.made == ["fsync"] * 3
        assert os.listdir(tmp_path) == []

    def test_are_made_on_fresh_files(self, handler, tmp_path):
        """A failed sync is never repeated on the same file: what was written is written anew."""
        made = []
        with FaultyDisk(
            errno.EIO, calls=["create", "write", "fsync"], at=4, before=lambda *c: made.append(c[0])
        ):
            save(handler, tmp_path / "a.pt", 1.0).result(WAIT)

        once = ["create", "write", "write", "fsync"]
        assert made == once + once


class TestWarnOnly:
    def test_goes_on(self, tmp_path, caplog):
        """With on_write_error="warn" a failed save is logged, and nothing is raised."""
        module = torch.nn.Linear(2, 2)
        with Handler(module, on_write_error="warn") as handler:
            with FaultyDisk(errno.EROFS, calls=["create"], times=math.inf):
                handler.save_async(tmp_path / "a.pt")
                handler.flush()

        assert "Cannot write checkpoint" in caplog.text

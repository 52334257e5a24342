"""One save on the writer's thread: how often it is tried, and what comes of it."""

from __future__ import annotations

import errno
import logging

import pytest

from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retries import MOST_SECONDS, MOST_TRIES, PAUSES, is_transient
from trainbus.checkpoint.write_job import WriteJob
from trainbus.errors import CheckpointWriteError, UnsyncedNameError

MANIFEST = Manifest(contents="state")


class Write:
    """Fails as told, then succeeds."""

    def __init__(self, *failures):
        self.failures = list(failures)
        self.calls = 0

    def __call__(self):
        self.calls += 1
        if self.failures:
            raise self.failures.pop(0)
        return MANIFEST


def run(write):
    """Run a job; return what it waited, and how often its memory was released."""
    pauses, released = [], []
    job = WriteJob(PendingSave("a.pt", global_step=7), write, lambda: released.append(1))
    try:
        return job.run(pauses.append), pauses, released
    except BaseException as error:
        error.seen_pauses, error.seen_releases = pauses, released
        raise


class TestTries:
    @pytest.mark.parametrize("number", [errno.EIO, errno.EAGAIN, errno.ESTALE])
    def test_what_may_pass_is_tried_again(self, number, caplog):
        """A failure that may pass is tried again after a pause, and said once."""
        write = Write(OSError(number, "flaky"))
        with caplog.at_level(logging.WARNING, "trainbus"):
            manifest, pauses, released = run(write)

        assert manifest is MANIFEST
        assert pauses == [PAUSES[0]] and released == [1]
        (record,) = caplog.records
        assert "'a.pt' was written at try 2" in record.getMessage()

    def test_end(self):
        """After the last try the error says what the disk said, and how often it was asked."""
        write = Write(*[OSError(errno.EIO, "broken")] * 9)
        with pytest.raises(CheckpointWriteError, match=r"\[Errno 5\].*\(tried 3 times\)") as info:
            run(write)

        assert write.calls == MOST_TRIES
        assert info.value.errno == errno.EIO and info.value.global_step == 7
        assert info.value.seen_pauses == list(PAUSES) and info.value.seen_releases == [1]

    def test_end_in_time(self, monkeypatch):
        """No try begins later than thirty seconds after the first failure."""
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: now.__setitem__(0, now[0] + MOST_SECONDS) or now[0])
        write = Write(*[OSError(errno.EIO, "slow")] * 9)
        with pytest.raises(CheckpointWriteError):
            run(write)

        assert write.calls == 2

    @pytest.mark.parametrize("name", ["EROFS", "EACCES", "EFBIG", "EINTR", "ENOSPC", "EDQUOT"])
    def test_what_will_not_pass_is_tried_once(self, name):
        """A failure that will not pass by itself is reported at once."""
        number = getattr(errno, name)
        write = Write(OSError(number, "no"))
        with pytest.raises(CheckpointWriteError) as info:
            run(write)

        assert write.calls == 1 and info.value.errno == number

    def test_no_disk_is_no_reason(self):
        """What is no error of the disk comes out as it is, untried again."""
        write = Write(KeyError("mine"))
        with pytest.raises(KeyError):
            run(write)

        assert write.calls == 1


class TestUnsyncedName:
    def test_is_said(self):
        """Where only the folder's sync failed, the error says that the new file is there."""
        with pytest.raises(CheckpointWriteError, match="the new file is there, but a power cut may"):
            run(Write(UnsyncedNameError(errno.EROFS, "read-only")))

    def test_is_said_of_an_earlier_try(self):
        """Also where that was tried again, and the tries behind it met something else."""
        write = Write(UnsyncedNameError(errno.EIO, "io"), OSError(errno.EIO, "io"), OSError(errno.EIO, "io"))
        with pytest.raises(CheckpointWriteError, match=r"tried 3 times.* the new file is there") as info:
            run(write)

        assert info.value.is_unsynced


class TestIsTransient:
    def test_is_pure(self):
        """Errors that are none of a disk's are never worth another try."""
        assert not is_transient(ValueError())
        assert not is_transient(OSError("no number"))

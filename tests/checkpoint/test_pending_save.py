from __future__ import annotations

import threading

import pytest

from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.errors import CheckpointSkipped, CheckpointWriteError

MANIFEST = Manifest(contents="object")


class TestPendingSave:
    def test_attributes(self):
        """
        A pending save knows what it was asked for, and a later change of the logs does not reach it.
        """
        logs = {"loss": 0.5}
        pending = PendingSave("a.pt", epoch=2, global_step=30, stream="best", logs=logs)
        logs["loss"] = 9.0

        assert (pending.path, pending.epoch, pending.global_step, pending.stream) == ("a.pt", 2, 30, "best")
        assert pending.logs == {"loss": 0.5}
        assert not pending.done()
        assert repr(pending) == "<PendingSave 'a.pt' of global step 30: unfinished>"

    def test_complete(self):
        """
        Once the file is durable, its manifest is the result.
        """
        pending = PendingSave("a.pt")

        pending.complete(MANIFEST)

        assert pending.done()
        assert pending.result() is MANIFEST
        assert "durable" in repr(pending)

    @pytest.mark.parametrize(
        "error", [CheckpointWriteError("a.pt", 3, OSError(28, "full")), CheckpointSkipped("a.pt", "busy")]
    )
    def test_fail(self, error):
        """
        A failure is raised by result, which marks it as seen.
        """
        pending = PendingSave("a.pt")
        pending.fail(error)
        assert pending.done()
        assert not error.seen

        with pytest.raises(type(error)) as info:
            pending.result()

        assert info.value is error
        assert error.seen
        assert "failed" in repr(pending)

    def test_timeout(self):
        """
        Waiting too long raises TimeoutError and leaves the save as it is.
        """
        pending = PendingSave("a.pt")

        with pytest.raises(TimeoutError, match=r"'a\.pt' is not finished after 0.01 s"):
            pending.result(0.01)

        pending.complete(MANIFEST)
        assert pending.result(0.01) is MANIFEST

    def test_first_outcome_stays(self):
        """
        What has been finished is not finished again.
        """
        pending = PendingSave("a.pt")
        pending.complete(MANIFEST)

        pending.fail(CheckpointSkipped("a.pt", "late"))

        assert pending.result() is MANIFEST

    def test_nothing(self):
        """
        Where nothing is written the save is finished from the start, without a path.
        """
        pending = PendingSave.nothing()

        assert pending.done()
        assert pending.path is None
        assert pending.result() is None

    def test_waiting_threads_are_woken(self):
        """
        Every thread that waits gets the result.
        """
        pending = PendingSave("a.pt")
        results = []
        threads = [threading.Thread(target=lambda: results.append(pending.result(30))) for _ in range(3)]
        for thread in threads:
            thread.start()

        pending.complete(MANIFEST)

        for thread in threads:
            thread.join(30)
        assert results == [MANIFEST] * 3

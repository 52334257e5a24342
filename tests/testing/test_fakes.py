"""The fake handler records saves and reports on them as the real one does."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainbus.callback import Callback
from trainbus.errors import CheckpointSkipped, CheckpointWriteError
from trainbus.testing import EventRecorder, FakeHandler

CHECKPOINT_EVENTS = ("checkpoint_saved", "checkpoint_failed", "checkpoint_skipped")


class Counter(Callback):
    count = 0

    def state_dict(self):
        return {"count": self.count}


@pytest.fixture
def handler():
    return FakeHandler(auto_complete=False)


@pytest.fixture
def events(handler):
    return EventRecorder(handler.bus, only=CHECKPOINT_EVENTS)


class TestSaveAsync:
    def test_recorded(self, handler):
        """
        A save is recorded as it was asked for, where the handler stood.
        """
        handler.epoch, handler.global_step = 3, 40

        pending = handler.save_async(
            Path("runs/a.pt"),
            weights_only=True,
            stream="best",
            logs={"val_loss": 0.5},
            monitor="val_loss",
            mode="min",
            score=0.5,
            removals=["old.pt"],
        )

        (save,) = handler.saves
        assert (save.path, save.weights_only, save.stream) == ("runs/a.pt", True, "best")
        assert (save.monitor, save.mode, save.score, save.removals) == ("val_loss", "min", 0.5, ("old.pt",))
        assert (save.epoch, save.global_step, save.logs) == (3, 40, {"val_loss": 0.5})
        assert save.pending is pending
        assert (pending.path, pending.epoch, pending.global_step, pending.stream) == (
            "runs/a.pt",
            3,
            40,
            "best",
        )

    def test_state_of_callbacks(self, handler):
        """
        The state that the file would hold is that at the request; equal keys get a number.
        """
        first, second = handler.add_callback(Counter()), handler.add_callback(Counter())
        first.count, second.count = 1, 2

        handler.save_async("a.pt")
        first.count = 9

        assert handler.saves[0].callbacks_state == {"Counter": {"count": 1}, "Counter#2": {"count": 2}}

    def test_times(self, handler):
        """
        A save costs nothing and is durable at once, unless the test says otherwise.
        """
        seen = []
        handler.bus.on("checkpoint_saved", lambda seconds: seen.append(seconds))
        first, second = handler.save_async("a.pt"), handler.save_async("b.pt")
        second.times.durable = second.times.requested + 2.5

        for save in handler.saves:
            save.succeed()
        handler.bus.drain()

        assert seen == [0, 2.5]
        assert first.times.durable == first.times.begun == first.times.requested and first.times.lost == 0

    def test_auto_complete(self):
        """
        By default a save is durable at once, and its event is delivered before the next one.
        """
        handler = FakeHandler()
        events = EventRecorder(handler.bus)

        pending = handler.save_async("a.pt")
        before = list(events.names)
        handler.bus.emit("epoch_end")

        assert pending.done()
        assert (before, events.names) == ([], ["checkpoint_saved", "epoch_end"])

    def test_other_ranks(self):
        """
        Other ranks write nothing and get a finished save without a path.
        """
        handler = FakeHandler(rank=1)

        pending = handler.save_async("a.pt")

        assert (pending.done(), pending.path, pending.result(), handler.saves) == (True, None, None, [])


class TestOutcome:
    def test_succeed(self, handler, events):
        """
        A save that succeeds is reported with its manifest, and the pending save gives it.
        """
        handler.epoch, handler.global_step = 3, 40
        pending = handler.save_async("a.pt", logs={"loss": 0.5}, monitor="loss", mode="min", score=0.5)
        in_flight = handler.saves_in_flight
        handler.epoch, handler.global_step = 4, 50

        handler.saves[0].succeed()
        handler.bus.drain()

        (payload,) = events.of("checkpoint_saved")
        manifest = pending.result(timeout=5)
        assert (in_flight, handler.saves_in_flight) == (1, 0)
        assert (payload["save"], payload["path"], payload["manifest"]) == (pending, "a.pt", manifest)
        assert (payload["epoch"], payload["global_step"], payload["logs"]) == (3, 40, {"loss": 0.5})
        assert (manifest.run_id, manifest.contents, manifest.score) == (handler.run_id, "state", 0.5)

    def test_fail(self, handler, events):
        """
        A save that fails is reported with the error that its pending save raises.
        """
        pending = handler.save_async("a.pt", stream="best")

        handler.saves[0].fail(OSError(28, "No space left on device"))
        handler.bus.drain()

        (payload,) = events.of("checkpoint_failed")
        assert (payload["save"], payload["stream"]) == (pending, "best")
        with pytest.raises(
            CheckpointWriteError, match=r"Cannot write checkpoint 'a.pt' .*No space left"
        ) as info:
            pending.result(timeout=5)
        assert info.value is payload["error"]
        assert isinstance(info.value.__cause__, OSError)

    def test_skip(self, handler, events):
        """
        A save that is skipped is reported with the reason.
        """
        pending = handler.save_async("a.pt")

        handler.saves[0].skip("a newer one took its place")
        handler.bus.drain()

        assert events.of("checkpoint_skipped")[0]["reason"] == "a newer one took its place"
        with pytest.raises(CheckpointSkipped, match=r"'a.pt' was not saved: a newer one"):
            pending.result(timeout=5)

    def test_late(self, handler, events):
        """
        A save that has failed may be durable all the same, and stays failed for who waits for it.
        """
        pending = handler.save_async("a.pt")

        handler.saves[0].fail(OSError(110, "no byte was taken for too long"))
        handler.saves[0].succeed()
        handler.bus.drain()

        assert events.names == ["checkpoint_failed", "checkpoint_saved"]
        with pytest.raises(CheckpointWriteError):
            pending.result(timeout=5)

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("succeed", "succeed"),
            ("succeed", "fail"),
            ("succeed", "skip"),
            ("fail", "fail"),
            ("fail", "skip"),
            ("skip", "succeed"),
            ("skip", "fail"),
        ],
    )
    def test_once(self, handler, events, first, second):
        """
        What no save goes through is refused, and nothing is told of it.
        """
        given = {"fail": [OSError(28, "No space left on device")]}
        handler.save_async("a.pt")
        getattr(handler.saves[0], first)(*given.get(first, []))

        with pytest.raises(
            RuntimeError, match=r"Cannot finish the save of 'a.pt' again: .*auto_complete=False"
        ):
            getattr(handler.saves[0], second)(*given.get(second, []))
        handler.bus.drain()
        assert len(events.names) == 1

    def test_completed_by_the_handler(self):
        """
        A handler that lets saves succeed has done so when the test comes to let one fail.
        """
        handler = FakeHandler()
        handler.save_async("a.pt")

        with pytest.raises(RuntimeError, match=r"'a.pt' again: it has succeeded already"):
            handler.saves[0].fail(OSError(28, "No space left on device"))

    @pytest.mark.parametrize("error", ["disk full", OSError, None, KeyboardInterrupt()])
    def test_fail_without_an_error(self, handler, events, error):
        """
        What no writer runs into is refused, and the save stays unfinished.
        """
        handler.save_async("a.pt")

        with pytest.raises(TypeError, match=r"takes the exception .* Pass e\.g\. OSError\(28"):
            handler.saves[0].fail(error)
        handler.bus.drain()
        assert events.names == [] and handler.saves_in_flight == 1

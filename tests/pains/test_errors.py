"""What people suffered from when something went wrong."""

from __future__ import annotations

import errno
import math
import traceback

import pytest
import torch

import trainbus
from trainbus import Callback, EventBus, Handler
from trainbus.errors import CheckpointWriteError
from trainbus.testing import FaultyDisk
from trainbus_callbacks import ModelCheckpoint


class TestExceptionInTraining:
    def test_saving_on_an_exception_swallows_it(self):
        """Receivers of an exception hear of it; it goes its way all the same."""
        heard = []
        with pytest.raises(ZeroDivisionError):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.on("exception", lambda handler: handler.save("rescued.pt"))
                handler.on("exception", lambda error: heard.append(type(error)))
                for _ in handler.epochs(1):
                    _ = 1 / 0

        assert heard == [ZeroDivisionError]
        assert trainbus.verify("rescued.pt").contents == "state"

    def test_a_failing_save_hides_what_went_wrong(self):
        """The exception of the training is raised; what failed meanwhile is a note on it."""
        with pytest.raises(ZeroDivisionError) as info:
            with FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf):
                with Handler(torch.nn.Linear(1, 1)) as handler:
                    handler.save_async("a.pt")
                    _ = 1 / 0

        (note,) = info.value.__notes__
        assert "CheckpointWriteError" in note and "No space left" in note

    def test_ctrl_c_loses_the_save_under_way(self, stuck_disk):
        """A save that is being written when the training is interrupted is finished."""
        with pytest.raises(KeyboardInterrupt):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.save_async("a.pt")
                stuck_disk.go()
                raise KeyboardInterrupt

        assert trainbus.verify("a.pt").contents == "state"


class TestExceptionInReceiver:
    def test_a_failing_logger_ends_the_training(self, train, caplog):
        """A receiver that must not stop the training is logged, with its traceback, and training goes on."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.on("epoch_end", lambda: 1 / 0, on_error="log")
            handler.add_callback(ModelCheckpoint("{epoch}.pt"))
            epochs = list(handler.epochs(2))

        assert epochs == [0, 1]
        assert "ZeroDivisionError" in caplog.text
        assert trainbus.CheckpointFolder(".").latest().manifest.epoch == 1

    def test_one_failing_receiver_keeps_the_others_from_being_called(self):
        """Receivers behind one that is only logged are called."""
        bus, called = EventBus(), []
        bus.on("epoch_end", lambda: 1 / 0, on_error="log")
        bus.on("epoch_end", lambda: called.append(1))

        bus.emit("epoch_end")

        assert called == [1]

    def test_errors_of_callbacks_are_swallowed(self):
        """The error of a callback reaches the loop, and says which receiver of which event raised it."""

        class Broken(Callback):
            def on_epoch_end(self):
                raise KeyError("accuracy")

        with pytest.raises(KeyError, match="accuracy") as info:
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.add_callback(Broken())
                next(epochs := handler.epochs(1))
                next(epochs)

        assert any("Broken.on_epoch_end" in note and "'epoch_end'" in note for note in info.value.__notes__)

    def test_a_type_error_in_the_state_is_hidden_by_a_second_call(self):
        """What a state_dict raises is the cause of the error, with its own traceback, after one call."""
        calls = []

        class Broken(Callback):
            def state_dict(self):
                calls.append(1)
                raise TypeError("unhashable")

        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(Broken())
            with pytest.raises(CheckpointWriteError, match="TypeError: unhashable") as info:
                handler.save("a.pt")

        assert calls == [1]
        assert isinstance(info.value.__cause__, TypeError)
        assert traceback.extract_tb(info.value.__cause__.__traceback__)[-1].name == "state_dict"


class TestFailedSave:
    def test_it_is_raised_only_at_the_end_or_never(self):
        """A save that failed in the background is raised at the next event, with its cause, once."""
        module = torch.nn.Linear(1, 1)
        with FaultyDisk(errno.EROFS, calls=["create"]), Handler(module) as handler:
            handler.save_async("a.pt")
            handler.finish_writing()
            with pytest.raises(CheckpointWriteError, match=r"'a.pt' of global step 0.*Read-only") as info:
                handler.emit("epoch_begin")
            handler.emit("epoch_end")

        assert info.value.__cause__.errno == errno.EROFS

    def test_the_last_save_of_a_script_fails_silently(self):
        """A save that fails after the last event is raised when the handler is left."""
        with pytest.raises(CheckpointWriteError, match="Read-only"):
            with FaultyDisk(errno.EROFS, calls=["create"]), Handler(torch.nn.Linear(1, 1)) as handler:
                handler.save_async("a.pt")

    def test_and_the_exit_code_is_zero(self, in_process):
        """If nobody was told of a failed save, the exit code of the process tells."""

        def script():
            disk = FaultyDisk(errno.EROFS, calls=["create"], times=math.inf)
            disk.__enter__()
            trainbus.save_async({"x": 1}, "a.pt")

        assert in_process(script) == 74

    def test_one_failure_ends_all_saving(self):
        """The save after a failed one is made as if nothing had happened."""
        with Handler(torch.nn.Linear(1, 1), on_write_error="warn") as handler:
            with FaultyDisk(errno.EROFS, calls=["create"]):
                handler.save_async("a.pt")
                handler.flush()
            handler.save_async("b.pt")

        assert trainbus.verify("b.pt").contents == "state"

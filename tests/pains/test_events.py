"""What people suffered from with events and callbacks."""

from __future__ import annotations

import errno
import gc
import os

import pytest
import torch

import trainbus
from trainbus import Callback, EventBus, Handler
from trainbus.errors import SubscriptionError, UnknownEventError
from trainbus.testing import EventRecorder, FakeHandler, FaultyDisk, emit_run
from trainbus_callbacks import KeepLast, ModelCheckpoint


class TestSubscribing:
    def test_a_lambda_nobody_keeps_is_never_called(self):
        """The bus keeps its receivers alive."""
        bus, called = EventBus(), []
        bus.on("epoch_end", lambda epoch: called.append(epoch))
        gc.collect()

        bus.emit("epoch_end", epoch=3)

        assert called == [3]

    def test_nor_is_the_method_of_an_object_nobody_keeps(self):
        """A checkpoint that was only attached saves."""
        handler = FakeHandler()
        ModelCheckpoint("{epoch}.pt").attach(handler.bus)
        gc.collect()

        handler.bus.emit("epoch_end")

        assert [save.path for save in handler.saves] == ["1.pt"]

    def test_receivers_are_called_in_an_order_nobody_knows(self):
        """They are called in the order in which they subscribed."""
        bus, called = EventBus(), []
        for number in range(50):
            bus.on("epoch_end", lambda number=number: called.append(number))

        bus.emit("epoch_end")

        assert called == list(range(50))

    def test_there_is_no_way_to_come_first(self):
        """A lower priority comes first; checkpoints come after those without one."""
        handler, called = FakeHandler(), []
        handler.add_callback(ModelCheckpoint("a.pt"))
        handler.bus.on("epoch_end", lambda: called.append(("second", len(handler.saves))))
        handler.bus.on("epoch_end", lambda: called.append(("first", len(handler.saves))), priority=-1)

        handler.bus.emit("epoch_end")

        assert called == [("first", 0), ("second", 0)]

    def test_a_misspelt_hook_is_never_called(self):
        """A method for an event that there is not is refused when the callback is added."""

        class Report(Callback):
            def on_train_epoch_end(self):
                """Do nothing."""

        with pytest.raises(UnknownEventError, match=r"'on_train_epoch_end'. Did you mean"):
            FakeHandler().add_callback(Report())

    def test_a_hook_with_the_wrong_arguments_fails_hours_later(self):
        """What a receiver wants is checked when it subscribes."""
        with pytest.raises(SubscriptionError, match="'metrics' is no field of the event"):
            EventBus().on("epoch_end", lambda metrics: None)

    def test_a_callback_is_called_twice_for_one_event(self):
        """A callback that is attached already is refused."""
        handler, checkpoint = FakeHandler(), ModelCheckpoint("a.pt")
        handler.add_callback(checkpoint)

        with pytest.raises(SubscriptionError, match="each event would reach it twice"):
            handler.add_callback(checkpoint)


class TestLoops:
    def test_it_only_works_with_the_loop_of_the_framework(self):
        """A loop of one's own emits, and everything that subscribes works as in any other."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("best_{epoch}.pt", monitor="val_loss", save_best_only=True))

        for epoch, loss in enumerate([0.9, 0.5, 0.7]):
            handler.bus.emit("epoch_end", epoch=epoch, logs={"val_loss": loss})

        assert [save.path for save in handler.saves] == ["best_1.pt", "best_2.pt"]

    def test_a_callback_cannot_stop_the_training(self):
        """Any receiver can stop the run, and says why."""
        reasons = []
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.on("epoch_end", lambda handler: handler.stop("good enough"), after=1)
            handler.on("train_end", lambda reason: reasons.append(reason))
            epochs = list(handler.epochs(10))

        assert (epochs, reasons) == ([0, 1], ["good enough"])

    def test_callbacks_can_only_be_tested_by_training(self):
        """A fake training in one line tells a callback all it would hear."""
        handler = FakeHandler()
        recorder = EventRecorder(handler.bus, only=["train_begin", "epoch_end", "train_end"])

        emit_run(handler.bus, epochs=2)

        recorder.assert_trace(["train_begin", "epoch_end", "epoch_end", "train_end"])


class TestSaved:
    def test_saved_is_told_before_the_file_is_there(self, stuck_disk):
        """checkpoint_saved comes when the file is durable, and never before."""
        seen = []
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.on(
                "checkpoint_saved", lambda path, size: seen.append((path, size == os.path.getsize(path)))
            )
            handler.save_async("a.pt")
            handler.emit("epoch_begin")
            before = list(seen)
            stuck_disk.go()
            handler.flush()

        assert (before, seen) == ([], [("a.pt", True)])

    def test_an_upload_takes_half_a_file(self, train):
        """Whoever uploads on checkpoint_saved finds the whole file that the event tells of."""
        uploaded = []

        class Upload(Callback):
            def on_checkpoint_saved(self, path, manifest):
                uploaded.append(trainbus.verify(path) == manifest)

        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"), Upload())

        assert uploaded == [True, True]

    def test_a_mirror_keeps_what_was_removed(self, train):
        """checkpoint_removed tells which file retention took away, so a copy elsewhere can follow."""
        mirror = set()

        class Mirror(Callback):
            def on_checkpoint_saved(self, path):
                mirror.add(path)

            def on_checkpoint_removed(self, path):
                mirror.discard(os.path.relpath(path))

        train([0.5, 0.4, 0.3, 0.2], ModelCheckpoint("{epoch}.pt", keep=KeepLast(2)), Mirror())

        assert mirror == set(os.listdir()) == {"3.pt", "4.pt"}

    def test_nobody_is_told_of_a_save_that_failed(self):
        """checkpoint_failed says which file, and why."""
        heard = []
        with Handler(torch.nn.Linear(1, 1), on_write_error="warn") as handler:
            handler.on("checkpoint_failed", lambda path, error: heard.append((path, error.errno)))
            with FaultyDisk(errno.EROFS, calls=["create"]):
                handler.save_async("a.pt")
                handler.flush()

        assert heard == [("a.pt", errno.EROFS)]

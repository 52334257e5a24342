"""What people suffered from while the best checkpoint was being chosen."""

from __future__ import annotations

import errno
import math
import os
import warnings

import pytest
import torch

import trainbus
from trainbus import CheckpointFolder, Handler
from trainbus.errors import CheckpointWriteError
from trainbus.testing import FakeHandler, FaultyDisk, emit_run
from trainbus_callbacks import ModelCheckpoint


def best_of(path="best.pt"):
    return trainbus.read_manifest(path).score


def weight(path):
    return float(trainbus.load(path)["module"]["weight"])


def best_only(path="best.pt", monitor="val_loss", **options):
    return ModelCheckpoint(path, monitor=monitor, save_best_only=True, **options)


class TestRestart:
    def test_the_best_is_forgotten_and_overwritten_by_a_worse_one(self, train):
        """A run that goes on compares with the best that it has ever saved."""
        train([0.5], best_only(), ModelCheckpoint("last.pt"))

        train([0.5, 0.9], best_only(), ModelCheckpoint("last.pt"), resume=True)

        assert (best_of(), weight("best.pt")) == (0.5, 0.0)

    def test_also_when_only_the_best_is_saved(self, train):
        """The best is known even to a run that goes on from the file of the best itself."""
        train([0.9, 0.5], best_only())

        train([0.9, 0.5, 0.7], best_only(), resume=True)

        assert best_of() == 0.5

    def test_a_run_that_does_not_resume_overwrites_it_without_a_word(self, train):
        """A run that begins anew under the same name says whose files are there and how good the best is."""
        train([0.5], best_only())

        with pytest.warns(RuntimeWarning, match=r"1 checkpoint of another run .* best val_loss is 0.5"):
            train([0.9], best_only())


class TestMetric:
    def test_nothing_is_saved_for_days(self):
        """Saving between epochs by a metric that only epochs have is an error at the end of the first one."""
        handler = FakeHandler()
        handler.add_callback(best_only(save_freq=2))

        with pytest.warns(RuntimeWarning, match="It saves nothing until the metric is there"):
            with pytest.raises(ValueError, match=r"can never save: .*'val_loss' is among the logs of epochs"):
                emit_run(handler.bus, epochs=3, batches=4, logs={"val_loss": 0.5}, batch_logs={"loss": 1.0})

    def test_a_stale_metric_decides(self):
        """Between epochs only the logs of that very batch count, not a value seen before."""
        handler = FakeHandler()
        handler.add_callback(best_only("{global_step}.pt", save_freq=1))
        handler.bus.emit("train_batch_end", global_step=1, logs={"val_loss": 0.5})

        with pytest.warns(RuntimeWarning, match="It saves nothing until the metric is there"):
            handler.bus.emit("train_batch_end", global_step=2, logs={"loss": 1.0})

        assert [save.path for save in handler.saves] == ["1.pt"]

    def test_a_misspelt_monitor(self):
        """A metric that is not there is told at the first epoch's end, with the name that was meant."""
        handler = FakeHandler()
        handler.add_callback(best_only(monitor="val_los", mode="min"))

        with pytest.warns(RuntimeWarning, match=r"'val_los'.*Did you mean 'val_loss'\? Available: val_loss"):
            emit_run(handler.bus, epochs=1, logs={"val_loss": 0.5})

    def test_a_misspelt_monitor_should_stop_the_run(self):
        """Whoever wants an error instead of a warning gets one with Python's own filter."""
        handler = FakeHandler()
        handler.add_callback(best_only(monitor="val_los", mode="min"))

        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with pytest.raises(RuntimeWarning, match="Did you mean 'val_loss'"):
                emit_run(handler.bus, epochs=2, logs={"val_loss": 0.5})

    @pytest.mark.parametrize("first", [math.nan, math.inf, -math.inf])
    def test_nan_in_the_first_epoch_is_the_best_for_ever(self, train, first):
        """What is not finite is never the best; the first finite value is."""
        train([first, 0.5, 0.1], best_only())

        assert best_of() == 0.1

    def test_zero_counts_as_no_metric(self, train):
        """0.0 is a score like any other."""
        train([0.0, 0.5], best_only())

        assert best_of() == 0.0

    def test_none_as_metric(self):
        """None counts as a metric that is not there, with a warning."""
        handler = FakeHandler()
        handler.add_callback(best_only())

        with pytest.warns(
            RuntimeWarning, match=r"'val_loss': its value is None, which is not one real number"
        ):
            emit_run(handler.bus, epochs=2, logs={"val_loss": [None, 0.5]})

        assert [save.score for save in handler.saves] == [0.5]

    def test_the_metric_is_computed_by_a_receiver_added_later(self, train):
        """ModelCheckpoint decides after all others, whenever they were added."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(best_only("{epoch}.pt", monitor="f1", mode="max"))
            handler.on("epoch_end", lambda epoch, handler: handler.log(f1=[0.5, 0.4, 0.6][epoch]))
            for _ in handler.epochs(3):
                pass

        assert sorted(os.listdir()) == ["1.pt", "3.pt"]

    def test_the_direction_is_guessed_wrong_without_a_word(self):
        """Where the direction is a guess from the name, a warning says which and how to set it."""
        with pytest.warns(RuntimeWarning, match=r"takes 'min' for 'val_f1' .*mode='min' or mode='max'"):
            best_only(monitor="val_f1")

    def test_each_tiny_improvement_writes_a_file(self):
        """What is too small to count is rounded away by a metric of one's own."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.on("epoch_end", lambda logs, handler: handler.log(rounded=round(logs["val_loss"], 1)))
            handler.add_callback(best_only("{epoch}.pt", monitor="rounded", mode="min"))
            for epoch in handler.epochs(4):
                handler.log(val_loss=[0.51, 0.50, 0.49, 0.42][epoch])

        assert sorted(os.listdir()) == ["1.pt", "4.pt"]

    def test_the_first_epochs_should_not_count(self):
        """A callback that is added later judges from then on, also in a run that is resumed."""
        for epochs in (3, 5):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.add_callback(ModelCheckpoint("last.pt"))
                handler.resume(".")
                handler.on(
                    "epoch_begin", lambda handler: handler.add_callback(best_only()), after=2, once=True
                )
                for epoch in handler.epochs(epochs):
                    handler.log(val_loss=[0.1, 0.9, 0.5, 0.6, 0.4][epoch])
                assert best_of() == min([0.5, 0.6, 0.4][: epochs - 2])

    def test_two_metrics_share_one_best(self, train):
        """Two callbacks that watch two metrics have a best of their own, also after a restart."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            for name in ("val_loss", "val_acc"):
                handler.add_callback(best_only(f"{name}.pt", monitor=name))
            for epoch in handler.epochs(3):
                handler.log(val_loss=[0.1, 0.2, 0.3][epoch], val_acc=[0.1, 0.2, 0.3][epoch])

        assert (best_of("val_loss.pt"), best_of("val_acc.pt")) == (0.1, 0.3)
        with Handler(torch.nn.Linear(1, 1)) as handler:
            callbacks = [
                handler.add_callback(best_only(f"{name}.pt", monitor=name))
                for name in ("val_loss", "val_acc")
            ]
            handler.resume(".")
            assert [callback.best_score for callback in callbacks] == [0.1, 0.3]


class TestFile:
    def test_the_best_file_holds_the_weights_of_now(self, train):
        """The best file holds the weights of the best epoch, not those that came later."""
        train([0.9, 0.1, 0.5, 0.7], best_only())

        assert (weight("best.pt"), trainbus.read_manifest("best.pt").epoch) == (1.0, 1)

    def test_the_best_path_names_a_file_that_was_never_written(self):
        """A best that could not be written is none: the next is saved, and best_path names what is there."""
        checkpoint = best_only("{epoch}.pt")
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(checkpoint)
            with FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf):
                handler.emit("epoch_end", epoch=0, logs={"val_loss": 0.1})
                with pytest.raises(CheckpointWriteError):
                    handler.flush()
            assert (checkpoint.best_path, checkpoint.best_score) == (None, None)
            handler.emit("epoch_end", epoch=1, logs={"val_loss": 0.2})
            handler.flush()

        assert (checkpoint.best_path, os.listdir()) == ("2.pt", ["2.pt"])

    def test_best_and_last_are_mixed_up(self, train):
        """The newest and the best are asked for by name, and are what they are called."""
        train([0.9, 0.1, 0.5], ModelCheckpoint("{epoch}.pt", monitor="val_loss"))
        folder = CheckpointFolder(".")

        assert os.path.basename(folder.latest().path) == "3.pt"
        assert os.path.basename(folder.best("val_loss", "min").path) == "2.pt"

    def test_a_threshold_does_nothing_unless_only_the_best_is_saved(self, train):
        """Nothing is saved before the metric was once better than the threshold, with any other options."""
        train([0.9, 0.4, 0.6], ModelCheckpoint("{epoch}.pt", monitor="val_loss", initial_value_threshold=0.5))

        assert sorted(os.listdir()) == ["2.pt", "3.pt"]

    def test_the_best_file_is_overwritten_by_the_last(self, train):
        """Two callbacks that would write one file are refused when the training begins."""
        with pytest.raises(ValueError, match=r"'model.pt'"):
            train([0.1, 0.9], ModelCheckpoint("model.pt"), best_only("model.pt"))

"""ModelCheckpoint, told of fake events: when it saves, under which name, what counts as best."""

from __future__ import annotations

import gc
import logging
import math
import os
import subprocess
import sys
import weakref

import pytest

from trainbus import ranks
from trainbus.bus import EventBus
from trainbus.callback import Callback
from trainbus.errors import PayloadError
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import Every, KeepBest, KeepLast, ModelCheckpoint

DISK_FULL = OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def train(checkpoint, val_loss=(), *, epochs=None, handler=None, batches=2, **options):
    """Emit a training with these values of val_loss to a checkpoint; return the handler."""
    handler = handler or FakeHandler()
    handler.add_callback(checkpoint)
    logs = {"val_loss": list(val_loss)} if val_loss else {}
    emit_run(handler.bus, epochs=epochs or len(val_loss), batches=batches, logs=logs, **options)
    return handler


def end_epoch(handler, epoch, /, **logs):
    """Emit the end of one epoch of two batches."""
    handler.epoch, handler.batch, handler.global_step = epoch, 1, 2 * (epoch + 1)
    handler.bus.emit("epoch_end", logs=logs)


def end_batch(handler, global_step, /, **logs):
    """Emit the end of one training batch of one long epoch."""
    handler.batch, handler.global_step = global_step - 1, global_step
    handler.bus.emit("train_batch_end", logs=logs)


def paths(handler):
    return [save.path for save in handler.saves]


def steps(handler):
    return [save.global_step for save in handler.saves]


class TestMemory:
    @pytest.mark.parametrize("weights_only", [False, True])
    def test_is_prepared_once_the_state_has_its_size(self, weights_only):
        """Memory is asked for behind the first optimizer step, once, for saves like this callback's."""
        asked = []

        class Handler(FakeHandler):
            accumulating = True

            def prepare_saves(self, **options):
                asked.append((self.global_step, options))

        handler = Handler()
        handler.add_callback(ModelCheckpoint("a.pt", save_freq=100, save_weights_only=weights_only))
        for step in range(1, 6):
            handler.accumulating = step < 3
            end_batch(handler, step)

        assert asked == [(3, {"weights_only": weights_only, "full_state": False})]


class TestFilePath:
    def test_each_epoch(self):
        """
        By default each epoch is saved, under its 1-based number.
        """
        handler = train(ModelCheckpoint("runs/m{epoch:03d}_{val_loss:.2f}.pt"), [0.5, 0.4])

        assert paths(handler) == ["runs/m001_0.50.pt", "runs/m002_0.40.pt"]

    @pytest.mark.parametrize("path", ["best.pt", "not/there/yet.pt"])
    def test_bare_name_and_missing_folder(self, path):
        """
        A bare file name and a folder that does not exist are passed on as they are.
        """
        assert paths(train(ModelCheckpoint(path), [0.5])) == [path]

    def test_home(self, monkeypatch, tmp_path):
        """
        ``~`` is the user's home.
        """
        monkeypatch.setenv("HOME", str(tmp_path))

        assert paths(train(ModelCheckpoint("~/best.pt"), [0.5])) == [f"{tmp_path}/best.pt"]

    def test_counters(self):
        """
        ``batch`` counts the batches completed in the epoch, ``global_step`` those of the run.
        """
        checkpoint = ModelCheckpoint("m{epoch}_{batch}_{global_step:03d}.pt", save_freq=2)

        handler = train(checkpoint, epochs=2, batches=3)

        assert paths(handler) == ["m1_2_002.pt", "m2_1_004.pt", "m2_3_006.pt"]

    def test_counters_at_epoch_end(self):
        """
        At the end of an epoch all its batches are completed.
        """
        assert paths(train(ModelCheckpoint("m{batch}_{global_step}.pt"), epochs=2, batches=3)) == [
            "m3_3.pt",
            "m3_6.pt",
        ]

    def test_slash_in_metric(self):
        """
        A metric's name is looked up literally, and what it fills in makes no folder.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{val/loss:.3f}.pt"))

        end_epoch(handler, 0, **{"val/loss": 0.25})

        assert paths(handler) == ["m_0.250.pt"]

    def test_epoch_in_logs(self):
        """
        A metric called epoch does not disturb the epoch.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{epoch}.pt"))

        end_epoch(handler, 2, epoch=99, batch=98)

        assert paths(handler) == ["m_3.pt"]

    def test_unknown_field(self):
        """
        A field that is not in the logs is warned of once, with the nearest name, and leaves no trace.
        """
        with pytest.warns(
            RuntimeWarning, match=r"'val_los': it is not among .* Did you mean 'val_loss'"
        ) as caught:
            handler = train(ModelCheckpoint("best_{val_los:.4f}.pt"), [0.5, 0.4, 0.3])

        assert paths(handler) == ["best_epoch1.pt", "best_epoch2.pt", "best_epoch3.pt"]
        assert len(caught) == 1

    def test_unknown_field_between_epochs(self):
        """
        In batch mode the step is added too.
        """
        with pytest.warns(RuntimeWarning, match=r"cannot hold 'val_los'.*'best_epoch1_step2.pt'"):
            handler = train(ModelCheckpoint("best_{val_los:.4f}.pt", save_freq=2), epochs=2)

        assert paths(handler) == ["best_epoch1_step2.pt", "best_epoch2_step4.pt"]

    @pytest.mark.parametrize("value", ["high", None, [1.0, 2.0]])
    def test_unusable_field(self, value):
        """
        A value that is no number is named, and treated as missing.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{grade}.pt"))

        with pytest.warns(RuntimeWarning, match=r"'grade': its value is .* not one real number"):
            end_epoch(handler, 0, grade=value)

        assert paths(handler) == ["m_epoch1.pt"]


class TestMonitor:
    @pytest.mark.parametrize(
        "kind", ["python", "numpy scalar", "numpy 0d", "numpy 1d", "torch 0d", "parameter", "bfloat16"]
    )
    def test_numbers(self, kind):
        """
        The monitored metric may be a number, or a tensor or NumPy value of one element.
        """
        numpy = pytest.importorskip("numpy")
        torch = pytest.importorskip("torch")
        value = {
            "python": 0.5,
            "numpy scalar": numpy.float32(0.5),
            "numpy 0d": numpy.array(0.5),
            "numpy 1d": numpy.array([0.5]),
            "torch 0d": torch.tensor(0.5, requires_grad=True),
            "parameter": torch.nn.Parameter(torch.tensor([0.5])),
            "bfloat16": torch.tensor(0.5, dtype=torch.bfloat16),
        }[kind]
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{val_loss:.2f}.pt", "val_loss"))

        end_epoch(handler, 0, val_loss=value)

        save = handler.saves[0]
        assert save.path == "m_0.50.pt"
        assert save.score == 0.5 and type(save.score) is float

    def test_in_place_metric(self):
        """
        A metric that changes in place after the event changes no score.
        """
        torch = pytest.importorskip("torch")
        metric = torch.tensor(0.5)
        handler = FakeHandler()
        checkpoint = handler.add_callback(ModelCheckpoint("best.pt", "val_loss", save_best_only=True))

        end_epoch(handler, 0, val_loss=metric)
        metric.fill_(0.9)
        end_epoch(handler, 1, val_loss=metric)

        assert (checkpoint.best_score, len(handler.saves)) == (0.5, 1)

    def test_logs_are_copied(self):
        """
        What other receivers do to the logs afterwards does not reach the save.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("best.pt"))
        handler.bus.on("epoch_end", lambda logs: logs.update(val_loss=9.0), priority=101)

        end_epoch(handler, 0, val_loss=0.5)

        assert handler.saves[0].logs == {"val_loss": 0.5}

    def test_last_in_order(self):
        """
        It decides after the others, so that the file holds what they did at this event.
        """

        class Counts(Callback):
            epochs = 0

            def on_epoch_end(self):
                self.epochs += 1

            def state_dict(self):
                return {"epochs": self.epochs}

            def load_state_dict(self, state):
                raise NotImplementedError

        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt"))
        handler.add_callback(Counts())

        end_epoch(handler, 0)

        assert handler.saves[0].callbacks_state["Counts"] == {"epochs": 1}

    def test_request(self):
        """
        A save is asked for with all that the manifest should say.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_acc", save_weights_only=True, name="accuracy")
        handler = FakeHandler()
        handler.add_callback(checkpoint)

        end_epoch(handler, 0, val_acc=0.5, lr=0.1)

        save = handler.saves[0]
        assert (save.weights_only, save.stream, save.logs) == (True, "accuracy", {"val_acc": 0.5, "lr": 0.1})
        assert (save.monitor, save.mode, save.score) == ("val_acc", "max", 0.5)

    def test_request_without_monitor(self):
        """
        Without a monitor there is no mode and no score.
        """
        save = train(ModelCheckpoint("m.pt"), [0.5]).saves[0]

        assert (save.weights_only, save.monitor, save.mode, save.score) == (False, None, None, None)

    @pytest.mark.parametrize("monitor", ["", 3])
    def test_type(self, monitor):
        """
        A monitor is a name.
        """
        with pytest.raises(TypeError, match="monitor must be the name of a metric"):
            ModelCheckpoint("m.pt", monitor)


class TestSaveBestOnly:
    def test_strict_improvement(self):
        """
        Only what is strictly better than ever before is saved.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True)

        handler = train(checkpoint, [0.9, 0.5, 0.5, 0.7, 0.4])

        assert paths(handler) == ["m1.pt", "m2.pt", "m5.pt"]
        assert (checkpoint.best_score, checkpoint.best_path) == (0.4, "m5.pt")

    def test_max(self):
        """
        With mode max more is better.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True, mode="max")

        assert paths(train(checkpoint, [0.5, 0.4, 0.6])) == ["m1.pt", "m3.pt"]

    def test_without_monitor(self):
        """
        It needs to know what is best.
        """
        with pytest.raises(ValueError, match=r"save_best_only=True needs .* monitor='val_loss'"):
            ModelCheckpoint("m.pt", save_best_only=True)

    def test_zero_is_a_score(self):
        """
        0.0 is a value like any other, first and best.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True)

        assert paths(train(checkpoint, [0.0, 0.1, -0.1])) == ["m1.pt", "m3.pt"]
        assert checkpoint.best_score == -0.1

    def test_all_are_saved_without_it(self):
        """
        Without it all are saved, once each, and the best is kept in mind.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss")

        handler = train(checkpoint, [0.5, 0.4, 0.6])

        assert paths(handler) == ["m1.pt", "m2.pt", "m3.pt"]
        assert (checkpoint.best_score, checkpoint.best_path) == (0.4, "m2.pt")

    def test_best_overwritten(self):
        """
        Under one fixed name a worse save takes the best file's place: the path is known no more.
        """
        checkpoint = ModelCheckpoint("last.pt", "val_loss")

        train(checkpoint, [0.4, 0.6])

        assert (checkpoint.best_score, checkpoint.best_path) == (0.4, None)


class TestMode:
    def test_unknown(self):
        """
        An unknown mode is warned of and taken as auto; the warning points at the constructor's call.
        """
        with pytest.warns(RuntimeWarning, match="Unknown mode 'maximum'; 'auto' is used") as caught:
            checkpoint = ModelCheckpoint("m.pt", "val_acc", mode="maximum")

        assert checkpoint.mode == "max"
        assert caught[0].filename == __file__

    def test_guess(self):
        """
        Where auto guesses, it says so.
        """
        with pytest.warns(RuntimeWarning, match=r"takes 'min' for 'val_f1' .* better at its max"):
            assert ModelCheckpoint("m.pt", "val_f1").mode == "min"


class TestMissingMetric:
    def test_all(self):
        """
        Without save_best_only, a save whose metric is missing is made, with a warning.
        """
        with pytest.warns(
            RuntimeWarning, match=r"'val_los': .* Did you mean 'val_loss'.*saves all the same"
        ) as caught:
            handler = train(ModelCheckpoint("m{epoch}.pt", "val_los", mode="min"), [0.5, 0.4])

        assert (paths(handler), len(caught)) == (["m1.pt", "m2.pt"], 1)

    def test_best_only(self):
        """
        With save_best_only nothing is saved, with a warning that names what there is.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_los", save_best_only=True, mode="min")

        with pytest.warns(
            RuntimeWarning, match=r"Did you mean 'val_loss'\? Available: val_loss. It saves nothing"
        ):
            handler = train(checkpoint, [0.5, 0.4])

        assert handler.saves == []

    def test_some_epochs(self):
        """
        Epochs without validation are passed over.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True))

        end_epoch(handler, 0, val_loss=0.5)
        with pytest.warns(RuntimeWarning, match="Available: loss"):
            end_epoch(handler, 1, loss=0.1)
        end_epoch(handler, 2, loss=0.1)
        end_epoch(handler, 3, val_loss=0.4)

        assert paths(handler) == ["m1.pt", "m4.pt"]

    def test_unusable(self):
        """
        A value that cannot be compared counts as missing.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt", "val_loss", save_best_only=True))

        with pytest.warns(
            RuntimeWarning, match=r"'val_loss': its value is 'low', which is not one real number"
        ):
            end_epoch(handler, 0, val_loss="low")

        assert handler.saves == []


class TestNotFinite:
    @pytest.mark.parametrize("first", [math.nan, math.inf, -math.inf])
    def test_best_only(self, first, caplog):
        """
        NaN and infinity are never best; the first finite value is.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True)

        handler = train(checkpoint, [first, 0.5, first, 0.1, first])

        assert paths(handler) == ["m2.pt", "m4.pt"]
        assert checkpoint.best_score == 0.1
        assert [r.message for r in caplog.records if "never counts" in r.message] == [
            f"val_loss is {first}, which never counts as best."
        ]

    def test_all(self):
        """
        Without save_best_only they are saved, and are not best.
        """
        checkpoint = ModelCheckpoint("m{epoch}_{val_loss:.1f}.pt", "val_loss")

        handler = train(checkpoint, [math.nan, 0.5])

        assert paths(handler) == ["m1_nan.pt", "m2_0.5.pt"]
        assert checkpoint.best_path == "m2_0.5.pt"


class TestBools:
    @pytest.mark.parametrize("name", ["save_best_only", "save_weights_only"])
    @pytest.mark.parametrize("value", [0, 1, "False", None])
    def test_type(self, name, value):
        """
        What is no bool is refused, named with its value.
        """
        with pytest.raises(TypeError, match=rf"{name} must be True or False, got {value!r}\."):
            ModelCheckpoint("m.pt", "val_loss", **{name: value})

    def test_order_of_keras(self):
        """
        Arguments in the order that Keras has are refused instead of meaning something else.
        """
        with pytest.raises(TypeError, match=r"Give arguments by name.*Keras has verbose in third place"):
            ModelCheckpoint("m.pt", "val_loss", 0, True)


class TestThreshold:
    def test_all(self):
        """
        Nothing is saved until the metric has once been strictly better; then everything.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", initial_value_threshold=0.5)

        assert paths(train(checkpoint, [0.9, 0.5, 0.4, 0.8, 0.45])) == ["m3.pt", "m4.pt", "m5.pt"]

    def test_best_only(self):
        """
        With save_best_only, then what is better than before.
        """
        checkpoint = ModelCheckpoint(
            "m{epoch}.pt", "val_loss", save_best_only=True, initial_value_threshold=0.5
        )

        assert paths(train(checkpoint, [0.9, 0.6, 0.4, 0.8, 0.45, 0.3])) == ["m3.pt", "m6.pt"]

    def test_metric_missing(self):
        """
        A missing metric opens nothing.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss", initial_value_threshold=0.5)

        with pytest.warns(RuntimeWarning, match="saves nothing until the metric is there"):
            handler = train(checkpoint, epochs=1)

        assert handler.saves == []

    def test_kept_in_state(self):
        """
        A resumed run does not wait for it again.
        """
        first = train(ModelCheckpoint("m{epoch}.pt", "val_loss", initial_value_threshold=0.5), [0.4])
        second = ModelCheckpoint("n{epoch}.pt", "val_loss", initial_value_threshold=0.5)
        state = next(iter(first.saves[0].callbacks_state.values()))
        second.load_state_dict({**state, "best_path": None})

        assert paths(train(second, [0.8])) == ["n1.pt"]

    def test_between_epochs(self):
        """
        Saves between epochs wait for it too, and epochs' metrics count.
        """
        checkpoint = ModelCheckpoint(
            "m{global_step}.pt", "val_loss", save_freq=1, initial_value_threshold=0.5
        )

        assert paths(train(checkpoint, [0.6, 0.4, 0.9])) == ["m5.pt", "m6.pt"]

    def test_epochs_that_are_not_due(self):
        """
        Epochs in which no save is due are looked at too.
        """
        checkpoint = ModelCheckpoint(
            "m{epoch}.pt", "val_loss", save_freq=Every(epochs=2), initial_value_threshold=0.5
        )

        assert paths(train(checkpoint, [0.9, 0.8, 0.3, 0.7, 0.6, 0.7])) == ["m4.pt", "m6.pt"]

    def test_without_monitor(self):
        """
        It needs a metric to compare with.
        """
        with pytest.raises(ValueError, match=r"initial_value_threshold=0.5 needs a metric"):
            ModelCheckpoint("m.pt", initial_value_threshold=0.5)

    @pytest.mark.parametrize("threshold", [math.nan, "0.5", True])
    def test_type(self, threshold):
        """
        It is a number.
        """
        with pytest.raises(ValueError, match="initial_value_threshold must be a number"):
            ModelCheckpoint("m.pt", "val_loss", initial_value_threshold=threshold)


class TestSaveFreq:
    @pytest.mark.parametrize("save_freq", [True, False, 0, -1, 2.0, None, "epochs", "batch", ""])
    def test_refused(self, save_freq):
        """
        What would never save, or means something else than it looks like, is refused.
        """
        with pytest.raises(ValueError, match="save_freq must be 'epoch' or a positive int"):
            ModelCheckpoint("m.pt", save_freq=save_freq)

    @pytest.mark.parametrize(("batches", "expected"), [(6, [4, 8, 12]), (3, [4, 8])])
    def test_counts_over_the_run(self, batches, expected):
        """
        Batches are counted over the run, also when an epoch has fewer; epochs' ends add nothing.
        """
        checkpoint = ModelCheckpoint("m{global_step}.pt", save_freq=4)

        assert (
            steps(train(checkpoint, epochs=12 // batches if batches == 6 else 3, batches=batches)) == expected
        )

    def test_counts_across_a_resume(self):
        """
        A resumed run saves at the same steps.
        """
        checkpoint = ModelCheckpoint("m{global_step}.pt", save_freq=4)

        assert steps(train(checkpoint, epochs=4, batches=3, first_epoch=2)) == [8, 12]

    def test_best_of_batches(self):
        """
        A metric that batches log is judged at the batches that are due.
        """
        checkpoint = ModelCheckpoint("m{global_step}.pt", "loss", save_best_only=True, save_freq=2)

        handler = train(
            checkpoint, epochs=2, batches=4, batch_logs={"loss": [0.1, 0.5, 0.1, 0.6, 0.1, 0.4, 0.1, 0.4]}
        )

        assert (steps(handler), checkpoint.best_score) == ([2, 6], 0.4)

    def test_only_due_batches_are_read(self):
        """
        Logs of batches that are not due are not read, since that would wait for the GPU.
        """

        class Value:
            def __init__(self):
                self.read = 0

            def item(self):
                self.read += 1
                return 0.5

        values = [Value() for _ in range(4)]
        checkpoint = ModelCheckpoint("m.pt", "loss", save_best_only=True, save_freq=2)

        train(checkpoint, epochs=1, batches=4, batch_logs={"loss": values})

        assert [value.read for value in values] == [0, 1, 0, 1]

    def test_metric_of_epochs_is_not_expected(self):
        """
        Where epochs' ends are judged too, batches whose logs lack the metric are saved without a word.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss", save_freq=Every(steps=2) | Every(epochs=1))

        assert steps(train(checkpoint, [0.5, 0.4])) == [2, 2, 4, 4]

    def test_files_that_are_never_judged(self):
        """
        Without save_best_only, files are saved all the same; that none is judged is said once.
        """
        with pytest.warns(
            RuntimeWarning,
            match=r"never learns which file is best: .*'val_loss' is among the logs of epoch",
        ) as caught:
            handler = train(ModelCheckpoint("m.pt", "val_loss", save_freq=2), [0.5, 0.4])

        assert (steps(handler), len(caught)) == ([2, 4], 1)

    def test_files_judged_by_what_nobody_has(self):
        """
        So is a metric that is nowhere, with those there are.
        """
        with pytest.warns(
            RuntimeWarning, match=r"cannot judge by 'val_los'.*Available: val_loss. It saves all the same"
        ) as caught:
            handler = train(ModelCheckpoint("m.pt", "val_los", save_freq=2, mode="min"), [0.5, 0.4])

        assert (steps(handler), len(caught)) == ([2, 4], 1)

    @pytest.mark.parametrize("keep", [KeepBest(1), KeepLast(3) | KeepBest(2)])
    def test_best_of_what_is_never_judged(self, keep):
        """
        To keep the best of files of which none is judged is refused at the first epoch's end.
        """
        checkpoint = ModelCheckpoint("m{global_step}.pt", "val_loss", save_freq=3, keep=keep)

        with pytest.raises(
            ValueError, match=r"can never tell which files keep=.*KeepBest.* epochs only. Use save_freq="
        ):
            train(checkpoint, [0.5, 0.4])

    def test_metric_that_only_epochs_have(self):
        """
        With save_best_only that could never save: an error at the first epoch's end tells the way out.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss", save_best_only=True, save_freq=3)

        with pytest.raises(
            ValueError, match=r"'val_loss' is among the logs of epochs only. Use save_freq=\"epoch\""
        ):
            train(checkpoint, [0.5, 0.4])

    def test_metric_that_nobody_has(self):
        """
        With save_best_only a metric that is nowhere is warned of at the first batch that is due.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_los", save_best_only=True, save_freq=2, mode="min")

        with pytest.warns(
            RuntimeWarning, match=r"cannot judge by 'val_los'.*Available: loss. It saves nothing"
        ) as w:
            train(checkpoint, [0.5, 0.4], batch_logs={"loss": 0.1})

        assert len(w) == 1

    def test_continued_epoch_without_batches(self):
        """
        An epoch of which only the end is left says nothing about what batches log.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt", "loss", save_best_only=True, save_freq=2))

        end_epoch(handler, 0, loss=0.5)

        assert handler.saves == []


class TestMetricsOnADevice:
    class Log:
        """A metric that only waiting for a device would turn into a number."""

        reads = 0

        def numel(self):
            return 1

        def item(self):
            self.reads += 1
            return 0.5

    def test_are_not_read_unless_asked_for(self):
        """A save between epochs reads no metric that neither its name nor its decision needs."""
        loss, accuracy, grad_norm = self.Log(), self.Log(), self.Log()
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("{loss:.1f}.pt", monitor="accuracy", save_freq=1))
        end_batch(handler, 1, loss=loss, accuracy=accuracy, grad_norm=grad_norm)

        assert paths(handler) == ["0.5.pt"]
        assert loss.reads == 1 and accuracy.reads >= 1
        assert grad_norm.reads == 0

    def test_go_with_the_save(self):
        """The save is given all metrics, also those that were not read for its name."""
        grad_norm = self.Log()
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("{global_step}.pt", save_freq=1))
        end_batch(handler, 1, grad_norm=grad_norm)

        assert handler.saves[0].logs["grad_norm"] is grad_norm


class TestAccumulation:
    def test_put_off(self):
        """
        A save that falls into gradient accumulation is made at the first later batch outside of one, with its
        name and metrics.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m{global_step}_{loss:.1f}.pt", "loss", save_freq=4))

        for step in range(1, 12):
            handler.accumulating = step % 3 != 0
            end_batch(handler, step, loss=step / 10)

        assert paths(handler) == ["m6_0.6.pt", "m9_0.9.pt"]
        assert [save.score for save in handler.saves] == [0.6, 0.9]

    def test_until_the_epoch_ends(self):
        """
        At the latest it is made at the epoch's end, and once.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m{global_step}.pt", save_freq=2))
        handler.accumulating = True
        end_batch(handler, 2)

        handler.accumulating = False
        handler.bus.emit("epoch_end", logs={"val_loss": 0.5})
        end_batch(handler, 3)

        assert paths(handler) == ["m2.pt"]
        assert handler.saves[0].logs == {"val_loss": 0.5}


class TestDoubleSaves:
    def test_epoch_mode(self):
        """
        An epoch makes one save.
        """
        assert steps(train(ModelCheckpoint("m.pt", "val_loss"), [0.5, 0.4])) == [2, 4]

    def test_batch_mode(self):
        """
        A batch that ends an epoch makes one save.
        """
        assert steps(train(ModelCheckpoint("m.pt", save_freq=2), [0.5, 0.4])) == [2, 4]

    def test_epoch_again(self):
        """
        An epoch that is trained again, after going back, is saved again.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt"))

        end_epoch(handler, 0)
        end_epoch(handler, 0)

        assert len(handler.saves) == 2


class TestBest:
    def test_changes_when_durable(self):
        """
        The best changes when the file is there, not when it is asked for.
        """
        handler = FakeHandler(auto_complete=False)
        checkpoint = handler.add_callback(ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True))

        end_epoch(handler, 0, val_loss=0.5)
        asked = checkpoint.best_score, checkpoint.best_path
        handler.saves[0].succeed()
        handler.bus.drain()

        assert asked == (None, None)
        assert (checkpoint.best_score, checkpoint.best_path) == (0.5, "m1.pt")

    @pytest.mark.parametrize("outcome", [lambda save: save.fail(DISK_FULL), lambda save: save.skip()])
    def test_rolled_back(self, outcome):
        """
        A save that fails or is skipped leaves the best as it was: what beats that is saved.
        """
        handler = FakeHandler(auto_complete=False)
        checkpoint = handler.add_callback(ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True))
        end_epoch(handler, 0, val_loss=0.9)
        handler.saves[0].succeed()
        end_epoch(handler, 1, val_loss=0.5)
        outcome(handler.saves[1])

        end_epoch(handler, 2, val_loss=0.6)

        assert paths(handler) == ["m1.pt", "m2.pt", "m3.pt"]
        assert (checkpoint.best_score, checkpoint.best_path) == (0.9, "m1.pt")
        assert checkpoint.state_dict()["best_score"] == 0.6

    def test_pending_counts(self):
        """
        Decisions compare with the save in flight, so two of them cannot end in the wrong order.
        """
        handler = FakeHandler(auto_complete=False)
        checkpoint = handler.add_callback(ModelCheckpoint("best.pt", "val_loss", save_best_only=True))

        for epoch, value in enumerate([0.9, 0.5, 0.7]):
            end_epoch(handler, epoch, val_loss=value)
        for save in handler.saves:
            save.succeed()
        handler.bus.drain()

        assert [save.score for save in handler.saves] == [0.9, 0.5]
        assert checkpoint.best_score == 0.5

    @pytest.mark.parametrize("outcome", [lambda save: save.fail(DISK_FULL), lambda save: save.skip()])
    def test_better_one_is_not_written(self, outcome):
        """
        If the better one in flight fails or is skipped, the next one is the best, and a worse one no more.
        """
        handler = FakeHandler(auto_complete=False)
        checkpoint = handler.add_callback(ModelCheckpoint("m{epoch}.pt", "val_loss"))
        for epoch, value in enumerate([0.6, 0.3, 0.4]):
            end_epoch(handler, epoch, val_loss=value)
        handler.saves[0].succeed()
        outcome(handler.saves[1])
        handler.saves[2].succeed()

        end_epoch(handler, 3, val_loss=0.5)
        handler.saves[3].succeed()
        handler.bus.drain()

        assert (checkpoint.best_score, checkpoint.best_path) == (0.4, "m3.pt")

    def test_others_saves(self):
        """
        What becomes of the saves of others is of no concern.
        """
        handler = FakeHandler(auto_complete=False)
        checkpoint = handler.add_callback(ModelCheckpoint("best.pt", "val_loss", save_best_only=True))
        end_epoch(handler, 0, val_loss=0.5)
        handler.save_async("other.pt")

        handler.saves[1].fail(DISK_FULL)
        handler.saves[0].succeed()
        handler.bus.drain()

        assert checkpoint.best_score == 0.5

    def test_request_refused(self):
        """
        If the handler refuses a save, the error is the loop's, and the score is not kept.
        """

        class Refuses(FakeHandler):
            def save_async(self, path, **options):
                raise TypeError("cannot save this state")

        handler = Refuses()
        checkpoint = handler.add_callback(ModelCheckpoint("best.pt", "val_loss", save_best_only=True))

        with pytest.raises(TypeError, match="cannot save this state"):
            end_epoch(handler, 0, val_loss=0.5)

        assert checkpoint.state_dict()["best_score"] is None


class TestState:
    def test_file_counts_itself(self):
        """
        The state in a file already counts that file, and the saves before it.
        """
        handler = train(
            ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True, name="best"),
            [0.9, 0.5, 0.7, 0.4],
            handler=FakeHandler(auto_complete=False),
        )

        assert [save.callbacks_state["best"] for save in handler.saves] == [
            {
                "monitor": "val_loss",
                "mode": "min",
                "best_score": score,
                "best_path": f"m{epoch + 1}.pt",
                "last_epoch_saved": epoch,
                "last_step_saved": 2 * (epoch + 1),
                "threshold_passed": True,
            }
            for score, epoch in [(0.9, 0), (0.5, 1), (0.4, 3)]
        ]

    def test_plain_types(self):
        """
        Whatever the metric was logged as, the state holds plain Python values.
        """
        numpy = pytest.importorskip("numpy")
        handler = FakeHandler()
        checkpoint = handler.add_callback(ModelCheckpoint("m.pt", "val_loss"))

        end_epoch(handler, 0, val_loss=numpy.float64(0.5))

        assert {type(value) for value in checkpoint.state_dict().values()} == {str, float, int, bool}

    def test_resume(self):
        """
        A loaded state goes on: what does not beat its best is not saved.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True)
        checkpoint.load_state_dict(
            {"monitor": "val_loss", "mode": "min", "best_score": 0.5, "last_epoch_saved": 7}
        )

        handler = train(checkpoint, [0.7, 0.4])

        assert paths(handler) == ["m2.pt"]

    def test_missing_keys(self):
        """
        An empty state is that of a run that has saved nothing.
        """
        checkpoint = ModelCheckpoint("m{epoch}.pt", "val_loss", save_best_only=True)

        checkpoint.load_state_dict({})

        assert checkpoint.state_dict() == ModelCheckpoint("x.pt", "val_loss").state_dict()

    @pytest.mark.parametrize(
        "other", [{"monitor": "val_acc"}, {"mode": "max"}, {"monitor": None, "mode": None}]
    )
    def test_other_monitor_or_mode(self, other):
        """
        The best of another metric or direction is refused with a warning.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss", save_best_only=True)

        with pytest.warns(RuntimeWarning, match="its best is not comparable and not taken over"):
            checkpoint.load_state_dict({"monitor": "val_loss", "mode": "min", "best_score": 0.5, **other})

        assert checkpoint.best_score is None

    @pytest.mark.parametrize("score", [math.inf, math.nan])
    def test_no_best_yet(self, score):
        """
        Infinity, with which others say that there is no best yet, is no best.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss", mode="max", save_best_only=True)

        checkpoint.load_state_dict({"best_score": score})

        assert checkpoint.best_score is None

    def test_config_stays(self):
        """
        A loaded state changes no argument.
        """
        checkpoint = ModelCheckpoint("new_{epoch}.pt", "val_loss", save_freq=3)

        checkpoint.load_state_dict({"best_score": 0.5, "filepath": "old.pt", "save_freq": "epoch"})

        assert (checkpoint.filepath, checkpoint.save_freq) == ("new_{epoch}.pt", 3)


class TestStateKey:
    def test_readable(self):
        """
        The key names what was given, without the folder, which may move.
        """
        checkpoint = ModelCheckpoint("runs/best_{epoch}.pt", "val_loss", save_best_only=True)

        assert checkpoint.state_key == (
            "ModelCheckpoint('best_{epoch}.pt', monitor='val_loss', mode='min', save_best_only=True)"
        )
        assert ModelCheckpoint("last.pt").state_key == "ModelCheckpoint('last.pt')"

    def test_name(self):
        """
        A name given is the key.
        """
        assert ModelCheckpoint("last.pt", name="last").state_key == "last"

    def test_different(self):
        """
        Checkpoints that differ have different keys.
        """
        options = [
            {},
            {"monitor": "val_loss"},
            {"monitor": "val_loss", "mode": "max"},
            {"monitor": "val_loss", "save_best_only": True},
            {"monitor": "val_loss", "initial_value_threshold": 0.5},
            {"monitor": "val_acc"},
            {"save_weights_only": True},
            {"save_freq": 5},
            {"filepath": "n.pt"},
        ]
        keys = {ModelCheckpoint(**{"filepath": "m.pt", **one}).state_key for one in options}

        assert len(keys) == len(options)

    def test_equal(self):
        """
        Of two that are equal, each has a state of its own.
        """
        handler = FakeHandler()
        for _ in range(2):
            handler.add_callback(ModelCheckpoint("m.pt"))

        assert list(handler.callbacks) == ["ModelCheckpoint('m.pt')", "ModelCheckpoint('m.pt')#2"]


class TestRanks:
    def test_others_do_nothing(self):
        """
        Only rank 0 decides.
        """
        checkpoint = ModelCheckpoint("m.pt", "val_loss")

        class Refuses(FakeHandler):
            def save_async(self, path, **options):
                raise AssertionError

        train(checkpoint, [0.5, 0.4], handler=Refuses(rank=1))
        train(ModelCheckpoint("m.pt", save_freq=1), [0.5], handler=Refuses(rank=1))

        assert checkpoint.best_score is None

    @pytest.mark.parametrize("event", ["train_begin", "epoch_end"])
    def test_without_handler(self, event):
        """
        An event without a handler is refused: there is nobody to save.
        """
        bus = EventBus()
        ModelCheckpoint("m.pt").attach(bus)

        with pytest.raises(PayloadError, match="ModelCheckpoint needs events that carry a handler"):
            bus.emit(event)


class TestLifetime:
    def test_nobody_refers_to_it(self):
        """
        It works although nobody keeps a reference to it.
        """
        handler = FakeHandler()
        checkpoint = ModelCheckpoint("m.pt")
        checkpoint.attach(handler.bus)
        alive = weakref.ref(checkpoint)
        del checkpoint
        gc.collect()

        end_epoch(handler, 0)

        assert alive() is not None
        assert paths(handler) == ["m.pt"]


class TestMessages:
    def test_epochs(self, caplog, capfd):
        """
        Improvements are logged, with the epoch; nothing is printed.
        """
        caplog.set_level(logging.INFO, "trainbus")

        train(ModelCheckpoint("m.pt", "val_loss"), [0.5231, 0.6, 0.4812])

        assert [record.message for record in caplog.records] == [
            "epoch 1: val_loss is 0.52310, the first",
            "epoch 3: val_loss improved from 0.52310 to 0.48120",
        ]
        assert capfd.readouterr() == ("", "")

    def test_batches(self, caplog):
        """
        Between epochs the step is named; small values keep their digits.
        """
        caplog.set_level(logging.INFO, "trainbus")
        checkpoint = ModelCheckpoint("m.pt", "loss", save_freq=2)

        train(checkpoint, epochs=1, batches=4, batch_logs={"loss": [0, 2e-5, 0, 1.25e-6]})

        assert [record.message for record in caplog.records] == [
            "step 2: loss is 2.00000e-05, the first",
            "step 4: loss improved from 2.00000e-05 to 1.25000e-06",
        ]


def test_import_is_light():
    """Importing the callbacks and the test kit brings neither torch nor NumPy nor tqdm."""
    code = (
        "import sys, trainbus_callbacks, trainbus.testing, trainbus.testing.plugin; "
        "print(sorted({'torch', 'numpy', 'tqdm'} & set(sys.modules)))"
    )

    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )

    assert result.stdout.strip() == "[]"


class TestSeveralRanks:
    @pytest.fixture
    def decided(self, monkeypatch):
        """Put this process among several ranks, and return what they were asked to decide together."""
        asked = []
        monkeypatch.setattr(ranks, "together", lambda: True)
        monkeypatch.setattr(ranks, "decide", lambda call, what: asked.append(what) or call())
        return asked

    def test_counts_are_known(self, decided, tmp_path):
        """Steps and epochs, and names made of them, need no word between the ranks."""
        for save_freq in ("epoch", 2, Every(epochs=1) | Every(steps=3)):
            train(ModelCheckpoint(tmp_path / "{epoch}_{global_step}.pt", save_freq=save_freq), [0.5, 0.4])

        assert decided == []

    @pytest.mark.parametrize(
        "save_freq", [Every(minutes=1e-9), lambda moment: True, Every(steps=2) | Every(minutes=1)]
    )
    def test_time_and_predicates(self, decided, tmp_path, save_freq):
        """Rank 0 is asked where clocks and predicates may differ."""
        train(ModelCheckpoint(tmp_path / "{global_step}.pt", save_freq=save_freq), [0.5, 0.4])

        assert set(decided) == {"ModelCheckpoint's save_freq"}

    @pytest.mark.parametrize(("name", "monitor"), [("a.pt", "val_loss"), ("{val_loss}.pt", None)])
    def test_metrics(self, decided, tmp_path, name, monitor):
        """So where a metric decides, or is in the name."""
        train(ModelCheckpoint(tmp_path / name, monitor), [0.5, 0.4])

        assert set(decided) == {"ModelCheckpoint's decision"} and len(decided) == 2

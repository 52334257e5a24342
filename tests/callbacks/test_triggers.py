"""When to save: pure triggers, and a ModelCheckpoint that asks them."""

from __future__ import annotations

import math

import pytest

from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import Every, ModelCheckpoint, Moment
from trainbus_callbacks.triggers import trigger_of


def moment(*, ends_epoch=False, epoch=0, batch=0, global_step=1, seconds=0.0, **logs):
    return Moment(ends_epoch, epoch, batch, global_step, seconds, logs)


class TestEvery:
    @pytest.mark.parametrize("epoch", range(10))
    def test_epochs(self, epoch):
        """Every fifth epoch is due at its end, counted from 1, and no batch is."""
        assert Every(epochs=5).is_due(moment(ends_epoch=True, epoch=epoch)) == (epoch in (4, 9))
        assert not Every(epochs=5).is_due(moment(epoch=epoch))

    @pytest.mark.parametrize("step", range(1, 9))
    def test_steps(self, step):
        """Every fourth batch of the run is due at its end, and no epoch is."""
        assert Every(steps=4).is_due(moment(global_step=step)) == (step in (4, 8))
        assert not Every(steps=4).is_due(moment(ends_epoch=True, global_step=step))

    @pytest.mark.parametrize(("seconds", "due"), [(0, False), (89.9, False), (90, True), (1e6, True)])
    def test_minutes(self, seconds, due):
        """Minutes are due at the first batch that ends after them."""
        assert Every(minutes=1.5).is_due(moment(seconds=seconds)) == due

    @pytest.mark.parametrize("given", [{}, {"epochs": 1, "steps": 2}, {"steps": 1, "minutes": 1}])
    def test_takes_one(self, given):
        """None and several are refused, with the way to combine them."""
        with pytest.raises(TypeError, match=r"Every takes one of epochs, steps and minutes, got .*with \|"):
            Every(**given)

    @pytest.mark.parametrize(
        ("given", "error"),
        [
            ({"epochs": 0}, ValueError),
            ({"steps": -1}, ValueError),
            ({"minutes": 0.0}, ValueError),
            ({"minutes": float("inf")}, ValueError),
            ({"minutes": float("nan")}, ValueError),
            ({"steps": 2.0}, TypeError),
            ({"epochs": True}, TypeError),
            ({"minutes": "10"}, TypeError),
        ],
    )
    def test_takes_positive_numbers(self, given, error):
        """Anything else is refused, named."""
        with pytest.raises(error, match=f"{next(iter(given))} must be"):
            Every(**given)

    def test_is_readable(self):
        """Its repr is how it is written."""
        assert repr(Every(steps=4) | Every(minutes=10)) == "Every(steps=4) | Every(minutes=10)"


class TestCombination:
    @pytest.mark.parametrize("order", [1, -1])
    def test_each_is_asked(self, order):
        """A predicate is asked at each batch, also where another trigger is due anyway."""
        seen = []
        parts = [Every(steps=2), trigger_of(lambda one: seen.append(one.global_step))][::order]
        trigger = parts[0] | parts[1]
        for step in range(1, 5):
            trigger.is_due(moment(global_step=step))

        assert seen == [1, 2, 3, 4]

    def test_is_due_when_one_is(self):
        """Triggers and predicates combined are due when any of them is, whichever comes first."""

        def at_three(moment):
            return moment.global_step == 3

        for trigger in (Every(steps=2) | at_three, at_three | Every(steps=2)):
            assert [step for step in range(1, 7) if trigger.is_due(moment(global_step=step))] == [2, 3, 4, 6]

    def test_knows_where_it_may_be_due(self):
        """It may be due where one of its parts may."""
        assert not Every(epochs=1).within_epochs and Every(epochs=1).at_epoch_ends
        both = Every(epochs=1) | Every(minutes=1)
        assert both.within_epochs and both.at_epoch_ends
        assert not (Every(steps=1) | Every(minutes=1)).at_epoch_ends


class TestTriggerOf:
    def test_keras_words(self):
        """ "epoch" and a number of batches mean what they do in Keras."""
        assert trigger_of("epoch") == Every(epochs=1)
        assert trigger_of(7) == Every(steps=7)

    @pytest.mark.parametrize("given", [Every, object(), 1.5, "step"])
    def test_nonsense(self, given):
        """What is no frequency is refused, and the message says what there is."""
        with pytest.raises(ValueError, match=r"save_freq must be .*Every\(minutes=…\), a predicate"):
            trigger_of(given)


def saved(freq, *, epochs=2, batches=3, **options):
    """Emit a fake run; return the global steps of its saves."""
    handler = FakeHandler()
    handler.add_callback(ModelCheckpoint("m_{global_step}.pt", save_freq=freq, **options))
    emit_run(handler.bus, epochs=epochs, batches=batches, logs={"val_loss": [0.5, 0.4, 0.3, 0.2][:epochs]})
    return [save.global_step for save in handler.saves]


class TestModelCheckpoint:
    def test_every_other_epoch(self):
        """Every(epochs=2) saves at the end of each other epoch."""
        assert saved(Every(epochs=2), epochs=4) == [6, 12]

    def test_predicate(self):
        """A predicate is asked after each training batch, with where the run stands."""
        assert saved(lambda moment: moment.batch == 1) == [2, 5]

    def test_predicate_of_metrics(self):
        """A predicate may look at the batch's metrics."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt", save_freq=lambda moment: moment.logs["loss"] > 1))
        emit_run(handler.bus, epochs=1, batches=4, batch_logs={"loss": [0.1, 2.0, 0.1, 3.0]})

        assert [save.global_step for save in handler.saves] == [2, 4]

    def test_minutes(self, monkeypatch):
        """Time runs from the begin of training, and anew from each save."""
        now = [0.0]
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{global_step}.pt", save_freq=Every(minutes=1)))
        handler.bus.on("train_batch_begin", lambda: now.__setitem__(0, now[0] + 25))
        emit_run(handler.bus, epochs=1, batches=9)

        assert [save.global_step for save in handler.saves] == [3, 6, 9]

    def test_run_in_which_it_was_never_time(self):
        """A run that ends without a file because none was ever due says so, once."""
        with pytest.warns(RuntimeWarning, match=r"saved nothing in this run of 6 batch"):
            assert saved(Every(steps=7)) == []

    def test_run_that_ends_in_its_first_epoch(self):
        """Where no epoch came to its end, nothing was to be expected and nothing is said."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt"))
        for event in ("train_begin", "epoch_begin", "train_batch_begin", "train_batch_end", "train_end"):
            handler.bus.emit(event)

        assert handler.saves == []

    def test_continued_run_that_had_saved(self):
        """Where the run saved before it was continued, nothing is said if nothing more was due."""
        callback = ModelCheckpoint("m.pt", save_freq=100)
        callback.load_state_dict({"last_epoch_saved": 0, "last_step_saved": 100})
        handler = FakeHandler(resumed=True)
        handler.add_callback(callback)
        emit_run(handler.bus)

        assert handler.saves == []

    def test_due_and_held_back(self):
        """Where it was time and the metric did not allow a save, the frequency is not to blame."""
        with pytest.warns(RuntimeWarning, match=r"saved nothing .* initial_value_threshold=0.1") as warned:
            assert saved(3, monitor="val_loss", mode="min", initial_value_threshold=0.1) == []

        assert len(warned) == 1

    @pytest.mark.parametrize(
        ("mode", "way", "best"), [("min", "below", "0.40000"), ("max", "above", "0.60000")]
    )
    def test_held_back_in_all_epochs(self, mode, way, best):
        """A run in which no epoch passed the threshold says so at its end, with the best value seen."""
        threshold = {"min": 0.1, "max": 0.9}[mode]
        checkpoint = ModelCheckpoint("m.pt", "val_loss", mode=mode, initial_value_threshold=threshold)
        handler = FakeHandler()
        handler.add_callback(checkpoint)

        with pytest.warns(
            RuntimeWarning,
            match=f"never {way} initial_value_threshold={threshold}, and its best value was {best}",
        ):
            emit_run(handler.bus, epochs=4, logs={"val_loss": [0.5, math.nan, 0.4, 0.6]})

        assert handler.saves == []

    @pytest.mark.parametrize("freq", [2, Every(steps=2) | Every(epochs=5)])
    def test_batches_that_nobody_announced(self, freq):
        """Where batches are counted and the loop announces none, it is not the number that is to blame."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt", save_freq=freq))

        with pytest.warns(RuntimeWarning, match=r"none was announced\. Wrap the loader: .* handler\.batches"):
            emit_run(handler.bus, epochs=2, batches=0)

    def test_epochs_alone(self):
        """Where epochs are counted, no batch is asked for."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m.pt", save_freq=Every(epochs=5)))

        with pytest.warns(RuntimeWarning, match=r"save_freq=Every\(epochs=5\) never came to pass"):
            emit_run(handler.bus, epochs=2, batches=0)

    def test_epoch_whose_last_batch_was_saved_is_not_saved_again(self):
        """Where a batch and its epoch's end are both due, one file is written."""
        assert saved(Every(steps=3) | Every(epochs=1)) == [3, 6]

    def test_epoch_is_judged_by_its_own_metrics(self):
        """With a monitor, the end of the epoch is looked at although its last batch was due too."""
        steps = saved(Every(steps=3) | Every(epochs=1), monitor="val_loss", save_best_only=True, mode="min")

        assert steps == [3, 6]

    def test_metric_that_is_nowhere_is_warned_of_at_the_epochs_end(self):
        """A metric that neither batches nor epochs have is warned of once, where epochs are judged too."""
        with pytest.warns(RuntimeWarning, match="cannot judge by 'val_los'") as warned:
            saved(Every(steps=3) | Every(epochs=1), monitor="val_los", save_best_only=True, mode="min")

        assert len(warned) == 1

    @pytest.mark.parametrize(
        ("freq", "part"),
        [("epoch", ""), (5, ", save_freq=5"), (Every(minutes=2), ", save_freq=Every(minutes=2)")],
    )
    def test_state_key(self, freq, part):
        """The key of its state says when it saves, and is the same in the next process."""
        assert ModelCheckpoint("m.pt", save_freq=freq).state_key == f"ModelCheckpoint('m.pt'{part})"

"""EarlyStopping: when it stops, what it says, and what a resumed run makes of it."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from trainbus import Handler
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import EarlyStopping, ModelCheckpoint


def epochs_of(values, *, handler=None, stopping=None, first_epoch=0, **options):
    """Run fake epochs with these values of val_loss; return how many there were."""
    handler = handler or FakeHandler()
    handler.add_callback(stopping or EarlyStopping(**options))
    ended = []
    handler.bus.on("epoch_end", lambda epoch: ended.append(epoch), priority=200)
    values = [None] * first_epoch + list(values)
    emit_run(handler.bus, epochs=len(values), logs={"val_loss": values}, first_epoch=first_epoch)
    return len(ended)


class TestStops:
    @pytest.mark.parametrize(
        ("values", "options", "epochs"),
        [
            ([5, 4, 3, 2, 1], {"patience": 1}, 5),
            ([5, 4, 4, 4, 4], {"patience": 1}, 3),
            ([5, 4, 4, 4, 4], {"patience": 0}, 3),
            ([5, 4, 6, 3, 6, 6, 6], {"patience": 2}, 6),
            ([5.0, 4.95, 4.9, 4.8, 4.8], {"patience": 2, "min_delta": 0.1}, 3),
            ([1, 2, 3, 3, 3], {"patience": 1, "mode": "max"}, 4),
            ([0.9, 0.8, 0.4, 0.5, 0.5], {"patience": 2, "baseline": 0.5}, 5),
            ([5, 4, 3, 2], {"patience": 1, "baseline": 0.1}, 4),
            ([5, 4, 4, 3], {"patience": 1, "baseline": 0.1}, 3),
            ([5, 4, 3, 4, 2], {"patience": 3, "baseline": 0.1}, 4),
            ([0.4, 0.4, 0.4], {"patience": 2, "baseline": 0.5, "min_delta": 0.2}, 2),
            ([0.4, 0.6, 0.7, 0.6], {"patience": 2, "baseline": 0.5, "mode": "max"}, 4),
            ([math.nan, 1, 2, 0], {"patience": 0}, 3),
            ([math.nan, 1, math.nan, 0], {"patience": 1, "baseline": 0.5}, 3),
            ([1, 1, math.nan, 1], {"patience": 1, "start_from_epoch": 2}, 3),
            ([1, 2, 3, 2, 3], {"patience": 1, "start_from_epoch": 2}, 5),
            ([2, math.nan, math.nan, 1], {"patience": 2}, 3),
            ([math.inf, math.inf, 1], {"patience": 2}, 2),
        ],
    )
    def test_when(self, values, options, epochs):
        """It stops after *patience* epochs in a row that are no better than the best by min_delta."""
        assert epochs_of(values, **options) == epochs

    def test_reason(self, caplog):
        """It says in words which metric has not improved on what, in the log and to the handler."""
        handler = FakeHandler()
        with caplog.at_level(logging.INFO, "trainbus"):
            epochs_of([0.5, 0.6], handler=handler, patience=1)

        assert handler.stop_reason == (
            "val_loss has not improved on 0.50000 for 1 epoch(s); it is 0.60000 now."
        )
        assert f"Training stops early: {handler.stop_reason}" in caplog.text

    @pytest.mark.parametrize("values", [[5, 4, 3, 4], [math.nan] * 4])
    def test_reason_below_the_baseline(self, values):
        """While the baseline was never reached, that is what the reason names."""
        handler = FakeHandler()
        epochs_of(values, handler=handler, patience=4, baseline=0.1)

        assert handler.stop_reason.startswith(
            "val_loss has not improved on the baseline 0.10000 for 4 epoch(s)"
        )

    def test_each_rank(self, caplog):
        """Every rank stops, and only rank 0 says so."""
        handler = FakeHandler(rank=1)
        with caplog.at_level(logging.INFO, "trainbus"):
            epochs_of([0.5, 0.6], handler=handler, patience=1)

        assert handler.stopped and not caplog.records

    def test_missing(self):
        """A metric that is not there is waited for, with one warning that names what is."""
        handler = FakeHandler()
        handler.add_callback(EarlyStopping("val_los", mode="min", patience=1))

        with pytest.warns(
            RuntimeWarning, match="'val_los'.*Did you mean 'val_loss'.*Available: 'val_loss'"
        ) as w:
            emit_run(handler.bus, epochs=3, logs={"val_loss": 1.0})

        assert len(w) == 1 and not handler.stopped

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"monitor": ""}, TypeError, "monitor must be the name of a metric.*''"),
            ({"patience": -1}, ValueError, "patience counts epochs.*-1"),
            ({"patience": True}, ValueError, "patience counts epochs.*True"),
            ({"start_from_epoch": 1.5}, ValueError, "start_from_epoch counts epochs.*1.5"),
            ({"min_delta": -0.1}, ValueError, "min_delta must be .* at least 0, got -0.1"),
            ({"baseline": math.nan}, ValueError, "baseline must be a finite number.*nan"),
        ],
    )
    def test_mistakes(self, options, error, words):
        """What could never be judged is refused at construction."""
        with pytest.raises(error, match=words):
            EarlyStopping(**options)


class TestResumed:
    def test_counts_on(self):
        """A resumed run goes on counting where the killed one was."""
        first, second = EarlyStopping(patience=3), EarlyStopping(patience=3)
        epochs_of([5, 6, 6], stopping=first)
        second.load_state_dict(first.state_dict())

        assert epochs_of([6, 6, 6], stopping=second, first_epoch=3) == 1

    def test_stays_stopped(self):
        """A run that was stopped stops again at once when it is resumed, for the same reason."""
        first, second, handler = (
            EarlyStopping(patience=1),
            EarlyStopping(patience=1),
            FakeHandler(resumed=True),
        )
        epochs_of([5, 6], stopping=first)
        second.load_state_dict(first.state_dict())

        assert epochs_of([4, 4, 4], handler=handler, stopping=second, first_epoch=2) == 0
        assert handler.stop_reason == first.stopped_because

    def test_more_patience(self):
        """With more patience than before, the stopped run goes on."""
        first, second = EarlyStopping(patience=1), EarlyStopping(patience=2)
        epochs_of([5, 6], stopping=first)
        second.load_state_dict(first.state_dict())

        emitted = FakeHandler()
        emitted.add_callback(second)
        emitted.bus.emit("train_begin")
        assert not emitted.stopped and second.stopped_because is None
        emitted.bus.emit("epoch_end", epoch=2, logs={"val_loss": 6.0})
        assert emitted.stopped

    def test_baseline_of_now(self):
        """A baseline that was added since counts, whatever the state says of the best."""
        first, second = EarlyStopping(), EarlyStopping(patience=2, baseline=0.5)
        second.load_state_dict(first.state_dict())

        assert epochs_of([0.9, 0.9, 0.4], stopping=second) == 2

    @pytest.mark.parametrize("changed", [{"monitor": "val_acc"}, {"mode": "max"}])
    def test_other_arguments(self, changed):
        """What was seen of another metric, or in another direction, is not taken over, with a warning."""
        first = EarlyStopping(patience=1)
        epochs_of([5, 6], stopping=first)
        second = EarlyStopping(**{"patience": 1, **changed})

        with pytest.warns(RuntimeWarning, match="not comparable and not taken over"):
            second.load_state_dict(first.state_dict())
        assert second.best is None and second.stopped_because is None

    def test_with_a_handler(self, tmp_path):
        """In a real run the state is in the checkpoint of the epoch in which it stopped."""

        def train():
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.add_callback(EarlyStopping("loss", patience=1))
                handler.add_callback(ModelCheckpoint(tmp_path / "last.pt"))
                handler.resume(tmp_path)
                epochs = 0
                for _ in handler.epochs(9):
                    for _ in handler.batches([0]):
                        handler.log(loss=1.0, weight=1)
                    epochs += 1
            return epochs, handler.stop_reason

        first, second = train(), train()

        assert first[0] == 2 and second[0] == 0
        assert first[1] == second[1] is not None

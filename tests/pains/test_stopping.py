"""What people suffered from where a run ends before its last epoch."""

from __future__ import annotations

import csv
import os
import signal

import pytest
import torch

from trainbus import Handler, read_manifest
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import (
    CSVLogger,
    EarlyStopping,
    ModelCheckpoint,
    OnException,
    Preemption,
    TerminateOnNaN,
)

LOSSES = [0.5, 0.6, 0.7, 0.4, 0.3]


class TestEarlyStopping:
    def test_a_stopped_run_trains_on_when_it_is_started_again(self, train):
        """A run that was stopped stays stopped, and says why."""
        train(LOSSES, ModelCheckpoint("last.pt"), EarlyStopping(patience=2))

        handler = train(LOSSES, ModelCheckpoint("last.pt"), EarlyStopping(patience=2), resume=True)

        assert handler.epoch == 3
        assert "val_loss has not improved on 0.50000 for 2 epoch(s)" in handler.stop_reason

    def test_patience_begins_anew_after_a_restart(self, train):
        """Epochs without improvement are counted over the whole run."""
        train(LOSSES[:2], ModelCheckpoint("last.pt"), EarlyStopping(patience=2))

        assert train(LOSSES, ModelCheckpoint("last.pt"), EarlyStopping(patience=2), resume=True).epoch == 3

    def test_small_improvements_never_end(self):
        """What counts as an improvement has a threshold."""
        handler = FakeHandler()
        handler.add_callback(EarlyStopping(patience=2, min_delta=0.1))

        emit_run(handler.bus, epochs=9, logs={"val_loss": [1 - 0.01 * epoch for epoch in range(9)]})

        assert handler.epoch == 2

    def test_the_first_epochs_should_not_count(self):
        """Judging may begin after a warm-up."""
        handler = FakeHandler()
        handler.add_callback(EarlyStopping(patience=1, start_from_epoch=3))

        emit_run(handler.bus, epochs=9, logs={"val_loss": [0.1, 0.9, 0.9, 0.9, 0.8, 0.9, 0.9, 0.9, 0.9]})

        assert handler.epoch == 5


class TestSignals:
    def test_sigterm_ends_the_process_and_saves_nothing(self, in_process):
        """A process that is told to go saves where it stands, and ends as if its training had ended."""

        def script():
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.add_callback(Preemption("preempted.pt"))
                for _ in handler.epochs(9):
                    for batch in handler.batches(range(9)):
                        if (handler.epoch, batch) == (1, 4):
                            os.kill(os.getpid(), signal.SIGTERM)

        assert in_process(script) == 0
        assert read_manifest("preempted.pt").global_step == 9 + 5

    def test_the_signal_saves_in_the_middle_of_a_step(self):
        """A signal sets a flag only: what is saved is the state at the end of the batch."""
        module = torch.nn.Linear(2, 1, bias=False)

        class HalfWay(torch.optim.SGD):
            def step(self, closure=None):
                with torch.no_grad():
                    module.weight[0, 0] = 1.0
                    signal.raise_signal(signal.SIGTERM)
                    module.weight[0, 1] = 1.0

        with Handler(module, optimizer := HalfWay(module.parameters())) as handler:
            handler.add_callback(Preemption("preempted.pt"))
            for _ in handler.epochs(1):
                for _ in handler.batches(range(3)):
                    torch.nn.init.zeros_(module.weight)
                    optimizer.step()

        state = torch.load("preempted.pt", weights_only=True)
        assert state["module"]["weight"].tolist() == [[1.0, 1.0]]
        assert handler.global_step == 1

    def test_a_signal_during_validation_is_missed(self):
        """A signal that comes amid a validation is acted on at the end of that validation batch."""
        seen = []
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(Preemption("preempted.pt"))
            for _ in handler.epochs(1):
                for batch in handler.val_batches(range(100)):
                    seen.append(batch)
                    if batch == 3:
                        signal.raise_signal(signal.SIGTERM)

        assert seen == [0, 1, 2, 3]
        assert os.path.exists("preempted.pt")

    def test_ctrl_c_loses_what_was_trained_since_the_last_checkpoint(self):
        """What Ctrl-C interrupts can be continued at the beginning of that batch."""
        with pytest.raises(KeyboardInterrupt):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.add_callback(OnException("interrupted.pt"))
                for _ in handler.epochs(1):
                    for batch in handler.batches(range(9)):
                        if batch == 5:
                            raise KeyboardInterrupt

        with Handler(torch.nn.Linear(1, 1)) as handler:
            assert handler.resume(".", interrupted=True).global_step == 5


class TestNaN:
    def test_it_trains_on_with_nan_for_days(self):
        """The batch whose loss is not finite is the last, and the reason says which it was."""
        handler = FakeHandler()
        handler.add_callback(TerminateOnNaN())

        emit_run(handler.bus, epochs=2, batches=5, batch_logs={"loss": [1.0, float("nan"), *[1.0] * 8]})

        assert (handler.global_step, handler.stopped) == (2, True)
        assert "loss" in handler.stop_reason


class TestLogs:
    @pytest.mark.parametrize("epochs", [1, 2])
    def test_epochs_stand_twice_in_the_log_after_a_restart(self, train, epochs):
        """Each epoch of the run has one row, however often the run was started."""
        for total in (epochs, 3):
            train(LOSSES[:total], CSVLogger("log.csv"), ModelCheckpoint("last.pt"), resume=True)

        with open("log.csv", newline="") as file:
            assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]

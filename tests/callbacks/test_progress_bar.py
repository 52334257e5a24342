"""The bar counts, shows, prints above itself, and leaves everything as it was."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from trainbus.console import console_lines
from trainbus.errors import MissingExtraError
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import ProgressBar

pytest.importorskip("tqdm")

logger = logging.getLogger("trainbus")
pytestmark = pytest.mark.usefixtures("unconfigured_logging")


class Value:
    """A metric whose readings are counted."""

    def __init__(self):
        self.read = 0

    def item(self):
        self.read += 1
        return 0.125


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, step):
        self.now = 0.0
        self.step = step

    def __call__(self):
        self.now += self.step
        return self.now


def train(handler=None, *, clock=None, epochs=2, batches=3, **options):
    """Emit a training to a bar; return what it wrote, a line for each state of the bar."""
    handler = handler or FakeHandler()
    screen = io.StringIO()
    bar = ProgressBar(clock=clock or Clock(1.0), file=screen, mininterval=0, ncols=120)
    handler.add_callback(bar)
    emit_run(handler.bus, epochs=epochs, batches=batches, **options)
    return screen.getvalue().replace("\r", "\n").split("\n")


class TestBar:
    def test_total_is_learned(self):
        """
        The first epoch counts; from then on the bar knows how many batches there are.
        """
        lines = train()

        assert any(line.startswith("epoch 1/2: 3it [") for line in lines)
        assert any(line.startswith("epoch 2/2: 100%|") and " 3/3 [" in line for line in lines)

    def test_epoch_metrics(self):
        """
        The closed bar of an epoch shows the epoch's metrics.
        """
        lines = train(logs={"val_loss": [0.5, 0.25], "note": "text"})

        assert [line.rpartition(", ")[2] for line in lines if "val_loss" in line] == [
            "val_loss=0.5]",
            "val_loss=0.25]",
        ]

    def test_continued_epoch(self):
        """
        In an epoch that a resumed run continues the bar begins where the run does.
        """
        handler, screen = FakeHandler(resumed=True), io.StringIO()
        handler.add_callback(ProgressBar(file=screen, mininterval=0))
        handler.bus.emit("train_begin", total_epochs=None, resumed=True)
        for batch in (7, 8):
            handler.bus.emit("train_batch_begin", epoch=4, batch=batch)
            handler.bus.emit("train_batch_end", epoch=4, batch=batch)
        first, last = screen.getvalue(), handler.bus.emit("epoch_end", epoch=4) or screen.getvalue()

        assert "epoch 5: 7it" in first
        assert "epoch 5: 9it" in last

    def test_saves_in_flight(self):
        """
        Saves that are not yet durable are shown.
        """
        handler = FakeHandler(auto_complete=False)
        handler.bus.on("train_batch_end", lambda handler: handler.save_async("m.pt"), once=True)

        assert any("saving=1" in line for line in train(handler))

    def test_other_ranks(self):
        """
        Other ranks show nothing.
        """
        assert train(FakeHandler(rank=1), logs={"val_loss": 0.5}) == [""]

    @pytest.mark.parametrize("event", ["train_end", "exception"])
    def test_closed_by_the_end(self, event):
        """
        Whatever ends the run closes the bar.
        """
        handler, screen = FakeHandler(), io.StringIO()
        handler.add_callback(ProgressBar(file=screen))
        handler.bus.emit("train_begin", total_epochs=1, resumed=False)
        handler.bus.emit("train_batch_begin")

        handler.bus.emit(event)

        assert screen.getvalue().endswith("\n")
        assert logger.handlers == []


class TestReading:
    @pytest.mark.parametrize(("step", "reads"), [(0.2, 2), (0.5, 6)])
    def test_bounded(self, step, reads):
        """
        Metrics of batches are read at most once in the given time: the first, then by the clock.
        """
        value = Value()

        train(clock=Clock(step), epochs=1, batches=6, batch_logs={"loss": value})

        assert value.read == reads

    def test_epoch_end(self):
        """
        Those of an epoch are always read.
        """
        value = Value()

        train(clock=Clock(0.0), epochs=3, logs={"loss": value})

        assert value.read == 3


class TestLogLines:
    def test_above_the_bar(self, capsys):
        """
        What trainbus logs while it runs is printed in whole lines; before and after, as before.
        """
        handler = FakeHandler()
        handler.bus.on("epoch_end", lambda: logger.info("saved best.pt"))

        lines = train(handler, epochs=1)
        logger.info("too late")

        assert "saved best.pt" in lines
        assert not any("too late" in line for line in lines)
        assert (logger.handlers, logger.level) == ([], logging.NOTSET)

    def test_configured_by_the_user(self):
        """
        Where the user has configured logging, nothing is added.
        """
        mine = logging.StreamHandler(io.StringIO())
        handler = FakeHandler()
        seen = []
        handler.bus.on("epoch_end", lambda: seen.append([*logger.handlers]))
        logger.addHandler(mine)
        try:
            train(handler, epochs=1)
        finally:
            logger.removeHandler(mine)

        assert seen == [[mine]]

    def test_within_console_lines(self):
        """
        Within a context that prints lines already, they go above the bar, and afterwards there again.
        """
        printed = []
        handler = FakeHandler()
        handler.bus.on("epoch_end", lambda: logger.info("saved best.pt"))

        with console_lines(printed.append):
            lines = train(handler, epochs=1)
            logger.info("done")

        assert lines.count("saved best.pt") == 1
        assert printed == ["done"]


def test_without_tqdm(monkeypatch):
    """Without tqdm the error names what to install."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)

    with pytest.raises(MissingExtraError, match=r'pip install "trainbus\[cli\]"'):
        ProgressBar()

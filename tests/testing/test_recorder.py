"""The recorder keeps what was emitted, in order, and shows where that differs from what was expected."""

from __future__ import annotations

import pytest

from trainbus.bus import EventBus
from trainbus.errors import UnknownEventError
from trainbus.testing import EventRecorder, FakeHandler


class TestEventRecorder:
    def test_order(self):
        """
        Events are recorded in the order in which they were emitted, also those emitted by receivers.
        """
        bus = EventBus()
        bus.on("epoch_begin", lambda: bus.emit("val_begin"), priority=-1000)
        recorder = EventRecorder(bus)

        bus.emit("epoch_begin", epoch=3)
        bus.emit("epoch_end", epoch=3, logs={"loss": 0.5})

        assert recorder.names == ["epoch_begin", "val_begin", "epoch_end"]
        assert recorder.of("epoch_end") == [
            {"handler": None, "epoch": 3, "batch": 0, "global_step": 0, "logs": {"loss": 0.5}}
        ]

    def test_logs_are_copied(self):
        """
        Logs that are changed later are recorded as they were.
        """
        bus, logs = EventBus(), {"loss": 0.5}
        recorder = EventRecorder(bus)

        bus.emit("epoch_end", logs=logs)
        logs["loss"] = 0.9

        assert recorder.of("epoch_end")[0]["logs"] == {"loss": 0.5}

    def test_only(self):
        """
        It can be told which events to record; a misspelt one is an error.
        """
        bus = EventBus()
        recorder = EventRecorder(bus, only=["epoch_end"])

        bus.emit("epoch_begin")
        bus.emit("epoch_end")

        assert recorder.names == ["epoch_end"]
        with pytest.raises(UnknownEventError, match="Did you mean 'epoch_end'"):
            EventRecorder(bus, only=["epoch_ned"])

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            (
                "epch_end",
                r"does not record 'epch_end'. Did you mean 'epoch_end'\? It records epoch_end, val_end\.",
            ),
            ("epoch_begin", r"does not record 'epoch_begin'\..* in only="),
        ],
    )
    def test_not_recorded(self, name, words):
        """
        Asked for what it does not record it says so, for an empty list would be taken for an answer.
        """
        recorder = EventRecorder(EventBus(), only=["epoch_end", "val_end"])

        with pytest.raises(UnknownEventError, match=words):
            recorder.of(name)
        assert recorder.of("epoch_end") == []

    def test_of_a_handler(self):
        """
        It takes a bus, and says where one is.
        """
        with pytest.raises(
            TypeError, match=r"EventRecorder takes an EventBus, got .* Pass its bus: handler\.bus\."
        ):
            EventRecorder(FakeHandler())

    def test_declared(self):
        """
        Events that users declared are recorded too.
        """
        bus = EventBus()
        bus.declare("gan_step", ["d_loss"])
        recorder = EventRecorder(bus)

        bus.emit("gan_step", d_loss=0.5)

        assert recorder.of("gan_step")[0]["d_loss"] == 0.5


class TestAssertTrace:
    @pytest.fixture
    def recorder(self):
        bus = EventBus()
        recorder = EventRecorder(bus)
        bus.emit("epoch_begin", epoch=1)
        bus.emit("epoch_end", epoch=1, logs={"loss": 1.0})
        return recorder

    def test_equal(self, recorder):
        """
        Names alone compare the order; named fields compare the payload, by equality.
        """
        recorder.assert_trace(["epoch_begin", "epoch_end"])
        recorder.assert_trace(["epoch_begin", ("epoch_end", {"epoch": 1, "logs": {"loss": 1}})])

    @pytest.mark.parametrize(
        ("expected", "lines"),
        [
            (["epoch_begin"], ["+ epoch_end"]),
            (["train_begin", "epoch_begin", "epoch_end"], ["- train_begin"]),
            (["epoch_end", "epoch_begin"], ["+ epoch_begin", "- epoch_begin"]),
            (["epoch_begin", ("epoch_end", {"epoch": 2})], ["- epoch_end epoch=2", "+ epoch_end epoch=1"]),
            (["epoch_begin", ("epoch_end", {"size": 2})], ["- epoch_end size=2", "+ epoch_end"]),
        ],
    )
    def test_different(self, recorder, expected, lines):
        """
        A difference is shown line by line.
        """
        with pytest.raises(AssertionError, match="differ from the expected") as info:
            recorder.assert_trace(expected)

        shown = str(info.value).split("\n")
        assert set(lines) <= set(shown)

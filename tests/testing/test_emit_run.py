"""A fake training emits what a real one does, in order, with the right counters."""

from __future__ import annotations

import pytest

from trainbus.bus import EventBus
from trainbus.testing import EventRecorder, FakeHandler, emit_run


def batch(epoch, index, step):
    begin = {"epoch": epoch, "batch": index, "global_step": step - 1}
    return [("train_batch_begin", begin), ("train_batch_end", {**begin, "global_step": step})]


class TestEmitRun:
    @pytest.mark.parametrize("bus", [EventBus(), FakeHandler().bus])
    def test_order_and_counters(self, bus):
        """
        The events of two epochs with validation, with and without a handler.
        """
        recorder = EventRecorder(bus)

        emit_run(bus, epochs=2, batches=2, val_batches=1)

        validation = [
            "val_begin",
            ("val_batch_begin", {"batch": 0}),
            ("val_batch_end", {"batch": 0}),
            "val_end",
        ]
        recorder.assert_trace(
            [
                ("train_begin", {"total_epochs": 2, "resumed": False, "epoch": 0, "global_step": 0}),
                ("epoch_begin", {"epoch": 0, "global_step": 0}),
                *batch(0, 0, 1),
                *batch(0, 1, 2),
                *validation,
                ("epoch_end", {"epoch": 0, "batch": 1, "global_step": 2}),
                ("epoch_begin", {"epoch": 1, "batch": 0, "global_step": 2}),
                *batch(1, 0, 3),
                *batch(1, 1, 4),
                *validation,
                ("epoch_end", {"epoch": 1, "batch": 1, "global_step": 4}),
                ("train_end", {"reason": None}),
            ]
        )

    def test_handler_moves_along(self):
        """
        At each event a fake handler stands where the event says.
        """
        handler = FakeHandler()
        seen = []

        @handler.bus.on("train_batch_end")
        def compare(epoch, batch, global_step):
            assert (handler.epoch, handler.batch, handler.global_step) == (epoch, batch, global_step)
            seen.append(handler.total_epochs)

        emit_run(handler.bus, epochs=2, batches=2)

        assert seen == [2] * 4

    def test_logs(self):
        """
        Metrics are constants, lists or functions; validation brings those named val_.
        """
        bus = EventBus()
        recorder = EventRecorder(bus)

        emit_run(
            bus,
            batches=2,
            val_batches=1,
            logs={"lr": 0.1, "val_loss": [0.5, 0.4], "loss": lambda epoch: epoch / 2},
            batch_logs={"loss": (4, 3, 2, 1), "step": lambda step: step, "lr": 0.1},
        )

        assert [payload["logs"] for payload in recorder.of("epoch_end")] == [
            {"lr": 0.1, "val_loss": 0.5, "loss": 0.0},
            {"lr": 0.1, "val_loss": 0.4, "loss": 0.5},
        ]
        assert [payload["logs"] for payload in recorder.of("val_end")] == [
            {"val_loss": 0.5},
            {"val_loss": 0.4},
        ]
        assert [payload["logs"] for payload in recorder.of("train_batch_end")] == [
            {"loss": 5 - step, "step": step, "lr": 0.1} for step in (1, 2, 3, 4)
        ]

    @pytest.mark.parametrize("event", ["train_batch_end", "val_end", "epoch_end"])
    def test_logs_are_read_only(self, event):
        """
        A receiver that changes the logs is told in the test what it would be told in a training.
        """
        bus = EventBus()
        bus.on(event, lambda logs: logs.update(f1=1.0))

        with pytest.raises(
            TypeError, match=r"Cannot call logs\.update\(\): .*Record a metric with handler.log"
        ):
            emit_run(bus, val_batches=1, logs={"val_loss": 1.0}, batch_logs={"loss": 1.0})

    def test_list_too_short(self):
        """
        A list with too few values is an error that tells how many are needed.
        """
        with pytest.raises(ValueError, match=r"logs\['val_loss'\] has 1 values, and number 2 is needed"):
            emit_run(EventBus(), epochs=2, logs={"val_loss": [0.5]})

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"epochs": -1}, ValueError, "epochs must be an int of at least 0, got -1"),
            ({"epochs": True}, ValueError, "epochs must be an int of at least 0, got True"),
            ({"batches": 1.5}, ValueError, "batches must be an int of at least 0, got 1.5"),
            ({"val_batches": -1}, ValueError, "val_batches must be an int"),
            ({"first_epoch": None}, ValueError, "first_epoch must be an int"),
            ({"logs": [0.1, 0.2]}, TypeError, r"logs must be a dict of metrics by name, got \[0.1, 0.2\]"),
            ({"batch_logs": lambda step: 1.0}, TypeError, "batch_logs must be a dict .*, got <function"),
            (
                {"logs": {"loss": [3, 2, 1]}},
                ValueError,
                r"logs\['loss'\] has 3 values, and there are 2 epochs",
            ),
            (
                {"batch_logs": {"loss": (1,) * 7}},
                ValueError,
                r"batch_logs\['loss'\] has 7 values, and there are 6 training batches",
            ),
        ],
    )
    def test_mistakes(self, options, error, words):
        """
        What no run is made of is refused before anything is emitted.
        """
        bus = EventBus()
        recorder = EventRecorder(bus)

        with pytest.raises(error, match=words):
            emit_run(bus, **options)
        assert recorder.names == []

    @pytest.mark.parametrize(
        ("bus", "words"), [(FakeHandler(), r"its bus: handler\.bus\."), (None, "got None. Pass a bus.")]
    )
    def test_no_bus(self, bus, words):
        """
        It emits on a bus, and says where one is.
        """
        with pytest.raises(TypeError, match=f"emit_run takes an EventBus, .*{words}"):
            emit_run(bus)

    def test_continued(self):
        """
        A run that continues another begins at its epoch, with the steps before it counted.
        """
        handler = FakeHandler(resumed=True)
        recorder = EventRecorder(handler.bus, only=["train_begin", "epoch_begin", "epoch_end"])

        emit_run(handler.bus, epochs=3, batches=5, first_epoch=2, logs={"loss": [3, 2, 1]})

        recorder.assert_trace(
            [
                ("train_begin", {"resumed": True, "epoch": 2, "global_step": 10}),
                ("epoch_begin", {"epoch": 2}),
                ("epoch_end", {"epoch": 2, "global_step": 15, "logs": {"loss": 1}}),
            ]
        )

    @pytest.mark.parametrize(
        ("event", "last"),
        [
            ("train_begin", "train_begin"),
            ("train_batch_end", "train_batch_end"),
            ("val_batch_end", "val_batch_end"),
            ("epoch_end", "epoch_end"),
        ],
    )
    def test_stopped(self, event, last):
        """
        After a stop no further batch follows, nor the end of a broken epoch; the reason is told.
        """
        handler = FakeHandler()
        handler.bus.on(event, lambda handler: handler.stop("enough"), once=True)
        recorder = EventRecorder(handler.bus)

        emit_run(handler.bus, epochs=3, batches=2, val_batches=2)

        assert recorder.names[-2:] == [last, "train_end"]
        assert recorder.of("train_end")[0]["reason"] == "enough"

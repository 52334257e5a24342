"""A whole fake training: the events of a run, in order, without a model or data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainbus.bus import EventBus
from trainbus.loop.read_only import ReadOnlyLogs
from trainbus.testing.arguments import require_bus, require_count, require_metrics
from trainbus.testing.fakes import FakeHandler

__all__ = ["emit_run"]


def emit_run(
    bus: EventBus,
    epochs: int = 2,
    batches: int = 3,
    val_batches: int = 0,
    logs: Mapping[str, Any] | None = None,
    batch_logs: Mapping[str, Any] | None = None,
    *,
    first_epoch: int = 0,
) -> None:
    """
    Emit what a training emits, from ``train_begin`` to ``train_end``.

    If the bus's handler is a `FakeHandler`, its counters move along, and `FakeHandler.stop` ends the
    run as it does a real one: before the next batch, and without an ``epoch_end``.

    Args:
        bus: Where to emit; on the calling thread.

        epochs: The run's total.

        batches: Training batches in each epoch.

        val_batches: Validation batches in each epoch; 0: no validation.

        logs:
            Metrics of each epoch by name: a list or tuple with a value for each epoch, a function of the
            epoch (0-based), or the value itself. ``val_end`` brings those whose names begin with ``val_``.
            Receivers get them read-only, as in a training.

        batch_logs:
            The same for training batches, by ``global_step``: a list's first value is that of step 1.

        first_epoch: Where a run that continues another begins; 0-based.

    Raises:
        TypeError: If *bus* is none, or metrics are not given by name.
        ValueError: If a count is none, or a list has too few or too many values.
    """
    require_bus(bus, "emit_run")
    counts = {"epochs": epochs, "batches": batches, "val_batches": val_batches, "first_epoch": first_epoch}
    for name, count in counts.items():
        require_count(name, count)
    require_metrics("logs", logs or {}, epochs, "epochs")
    require_metrics("batch_logs", batch_logs or {}, epochs * batches, "training batches")
    run = _FakeRun(bus, batches, val_batches, logs or {}, batch_logs or {})
    run.at(first_epoch, 0, first_epoch * batches, total_epochs=epochs)
    run.emit("train_begin", total_epochs=epochs, resumed=run.resumed)
    for epoch in range(first_epoch, epochs):
        if run.stopped or not run.epoch(epoch):
            break
    run.emit("train_end", reason=run.stop_reason)


class _FakeRun:
    def __init__(
        self,
        bus: EventBus,
        batches: int,
        val_batches: int,
        logs: Mapping[str, Any],
        batch_logs: Mapping[str, Any],
    ) -> None:
        self._bus = bus
        self._handler = bus.handler if isinstance(bus.handler, FakeHandler) else None
        self._batches = batches
        self._val_batches = val_batches
        self._logs = logs
        self._batch_logs = batch_logs
        self._position = {"epoch": 0, "batch": 0, "global_step": 0}

    @property
    def stopped(self) -> bool:
        return self._handler is not None and self._handler.stopped

    @property
    def stop_reason(self) -> str | None:
        return self._handler.stop_reason if self._handler is not None else None

    @property
    def resumed(self) -> bool:
        return self._handler is not None and self._handler.resumed

    def at(self, epoch: int, batch: int, global_step: int, **others: Any) -> None:
        """Move the counters."""
        self._position = {"epoch": epoch, "batch": batch, "global_step": global_step}
        if self._handler is not None:
            for name, value in {**self._position, **others}.items():
                setattr(self._handler, name, value)

    def emit(self, name: str, **payload: Any) -> None:
        self._bus.emit(name, **{**self._position, **payload})

    def epoch(self, epoch: int) -> bool:
        """Emit one epoch; return False if it was stopped."""
        before = epoch * self._batches
        self.at(epoch, 0, before)
        self.emit("epoch_begin")
        for batch in range(self._batches):
            if self.stopped:
                return False
            self.at(epoch, batch, before + batch)
            self.emit("train_batch_begin")
            step = before + batch + 1
            self.at(epoch, batch, step)
            self.emit("train_batch_end", logs=ReadOnlyLogs(_at(self._batch_logs, step, step - 1)))
        logs = _at(self._logs, epoch, epoch)
        if not self._validation(logs):
            return False
        self.emit("epoch_end", logs=ReadOnlyLogs(logs))
        return True

    def _validation(self, logs: Mapping[str, Any]) -> bool:
        if self._val_batches == 0:
            return True
        self.emit("val_begin")
        for batch in range(self._val_batches):
            if self.stopped:
                return False
            self.emit("val_batch_begin", batch=batch)
            self.emit("val_batch_end", batch=batch)
        validated = {name: logs[name] for name in logs if name.startswith("val_")}
        self.emit("val_end", logs=ReadOnlyLogs(validated))
        return True


def _at(metrics: Mapping[str, Any], number: int, index: int) -> dict[str, Any]:
    """Return the metrics' values: functions are called with *number*, lists are read at *index*."""
    values = {}
    for name, metric in metrics.items():
        if callable(metric):
            values[name] = metric(number)
        elif isinstance(metric, list | tuple):
            if index >= len(metric):
                raise ValueError(
                    f"logs[{name!r}] has {len(metric)} values, and number {index + 1} is needed. Give one "
                    "for each epoch (batch_logs: for each training batch), a constant or a function."
                )
            values[name] = metric[index]
        else:
            values[name] = metric
    return values

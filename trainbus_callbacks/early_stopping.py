"""EarlyStopping: end a run whose metric has stopped improving, and keep it ended after a resume."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping
from typing import Any

from trainbus.callback import Callback
from trainbus.errors import did_you_mean
from trainbus_callbacks.arguments import require_count
from trainbus_callbacks.best_score import is_comparable, resolve_mode
from trainbus_callbacks.scalars import as_float, describe

__all__ = ["EarlyStopping"]

_log = logging.getLogger("trainbus")


class EarlyStopping(Callback):
    """
    Stop the run once a metric has not improved for *patience* epochs.

    Judges at ``epoch_end``, where the logs are those of all ranks, so every rank decides the same.
    What it has seen is saved with the run: a resumed run goes on counting, and one that was stopped
    stops again at once and says why, unless *patience* has been raised. NaN never improves anything.

    Args:
        monitor: The metric's name in the logs.
        patience: Epochs without improvement after which the run stops, never with its first; 0 does what 1
            does.
        min_delta: By how much a value must be better than the best one to count, in the metric's unit.
        mode: ``"min"``, ``"max"``, or ``"auto"``, which goes by the name as `ModelCheckpoint` does.
        baseline: What an improvement must be better than, too, for the epochs to be counted anew. A run
            that improves goes on; one that does not is stopped unless it has come past this. None: nothing.
        start_from_epoch: How many epochs to let pass before judging.

    Attributes:
        best: The best value so far; None before the first.
        waited: Epochs since then; with a *baseline* since the last that was better than this, too.
        stopped_because: A sentence once it has stopped the run, else None.

    Raises:
        TypeError: If *monitor* is no name.
        ValueError: If a number is out of its range.
    """

    priority = 60  # before ModelCheckpoint, so that a file holds what was decided at its event

    def __init__(
        self,
        monitor: str = "val_loss",
        *,
        patience: int = 0,
        min_delta: float = 0.0,
        mode: str = "auto",
        baseline: float | None = None,
        start_from_epoch: int = 0,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise TypeError(f"monitor must be the name of a metric, e.g. 'val_loss', got {monitor!r}.")
        require_count("patience", patience, "epochs", least=0)
        require_count("start_from_epoch", start_from_epoch, "epochs", least=0)
        if not (math.isfinite(min_delta) and min_delta >= 0):
            raise ValueError(
                f"min_delta must be a finite number of at least 0, got {min_delta!r}. "
                "Its direction comes from mode."
            )
        if baseline is not None and not math.isfinite(baseline):
            raise ValueError(f"baseline must be a finite number or None, got {baseline!r}.")
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.mode = resolve_mode(monitor, mode)
        self.baseline = baseline
        self.best: float | None = None
        self.waited = 0
        self.stopped_because: str | None = None
        self._start_from_epoch = start_from_epoch
        self._has_warned = False

    @property
    def state_key(self) -> str:
        """Name and monitor, so that two of them keep their states apart."""
        return f"EarlyStopping({self.monitor})"

    def on_train_begin(self, handler: Any) -> None:
        """Stop a continued run that had been stopped, unless there is patience left now."""
        if self.stopped_because is None:
            return
        if self.waited >= self.patience:
            self._stop(handler, self.stopped_because)
        else:
            self.stopped_because = None

    def on_epoch_end(self, handler: Any, epoch: int, logs: Mapping[str, Any]) -> None:
        """Judge the epoch. Waits for the device that computes the metric."""
        if epoch < self._start_from_epoch:
            return
        value = as_float(logs[self.monitor]) if self.monitor in logs else None
        if value is None:
            self._warn_once(logs)
            return
        self.waited += 1
        if self._is_better(value, self.best):
            self.best = value
            if self.baseline is None or self._is_better(value, self.baseline):
                self.waited = 0
        elif self.waited >= self.patience and epoch > 0:
            self._stop(
                handler,
                f"{self.monitor} has not improved on {self._bar()} for {self.waited} epoch(s); it is "
                f"{describe(value)} now.",
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what has been seen, and whether the run was stopped."""
        return {
            "monitor": self.monitor,
            "mode": self.mode,
            "best": self.best,
            "waited": self.waited,
            "stopped_because": self.stopped_because,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Go on from *state*. Missing keys leave what is there.

        Warns:
            RuntimeWarning: If it is of another monitor or mode; then nothing is taken.
        """
        if not is_comparable(state, self.monitor, self.mode, owner=self.state_key, what="what it has seen"):
            return
        self.best = state.get("best", self.best)
        self.waited = state.get("waited", self.waited)
        self.stopped_because = state.get("stopped_because")

    def _is_better(self, value: float, than: float | None) -> bool:
        if math.isnan(value):
            return False
        if than is None:
            return math.isfinite(value)
        if self.mode == "min":
            return value < than - self.min_delta
        return value > than + self.min_delta

    def _bar(self) -> str:
        if self.baseline is not None and (self.best is None or not self._is_better(self.best, self.baseline)):
            return f"the baseline {describe(self.baseline)}"
        return "nothing before" if self.best is None else describe(self.best)

    def _stop(self, handler: Any, reason: str) -> None:
        self.stopped_because = reason
        if handler.rank == 0:
            _log.info("Training stops early: %s", reason)
        handler.stop(reason)

    def _warn_once(self, logs: Mapping[str, Any]) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        known = ", ".join(map(repr, logs)) or "none"
        warnings.warn(
            f"EarlyStopping cannot judge this epoch by {self.monitor!r}: there is no such number in the "
            f"logs.{did_you_mean(self.monitor, logs)} Available: {known}. It waits for it.",
            RuntimeWarning,
            stacklevel=3,
        )

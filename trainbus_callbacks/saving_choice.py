"""What a `ModelCheckpoint` decides where it may save: whether, under which name, and if it is the best."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainbus import ranks
from trainbus.checkpoint.retention import Retention
from trainbus_callbacks.best_score import ScoreLedger
from trainbus_callbacks.naming import COUNTERS, NameTemplate
from trainbus_callbacks.saving_advice import SavingAdvice
from trainbus_callbacks.scalars import as_float, floats_of
from trainbus_callbacks.triggers import Moment, Trigger

__all__ = ["Choice", "Chooser"]


@dataclass(frozen=True)
class Choice:
    """
    What rank 0 has decided, for all ranks.

    Attributes:
        path: The file to save, or None: nothing is saved.
        score: The monitored metric, if there is one.
        is_best: It is better than before.
        threshold_passed: As of the ledger.
    """

    path: str | None
    score: float | None
    is_best: bool
    threshold_passed: bool


class Chooser:
    """
    Decides, on the training thread. Reads of the metrics those alone that it needs.

    Args:
        template: Makes the file's name.
        ledger: Knows the best score so far.
        advice: Tells of what is missing for a decision.
        monitor: The metric to judge by.
        best_only: Save nothing but what is better than before.
        trigger: Says when saves are due.
        keep: Which files stay.
    """

    def __init__(
        self,
        template: NameTemplate,
        ledger: ScoreLedger,
        advice: SavingAdvice,
        *,
        monitor: str | None,
        best_only: bool,
        trigger: Trigger,
        keep: Retention | None,
    ) -> None:
        self._template = template
        self._ledger = ledger
        self._advice = advice
        self._monitor = monitor
        self._best_only = best_only
        self._trigger = trigger
        self._keep = keep
        self._batches_hold_metric: bool | None = None  # None: no batch was seen yet

    def note_batch(self, logs: Mapping[str, Any]) -> None:
        """Take note of what a batch has logged. Reads no value."""
        self._batches_hold_metric = self._batches_hold_metric or self._monitor in logs

    def note_epoch(self, logs: Mapping[str, Any]) -> None:
        """
        Take note of an epoch's metrics, also where no save is due. Collective where saves fall within epochs.

        Raises:
            ValueError: If nothing can ever be judged, because batches lack the metric.
        """
        if self._monitor is None:
            return
        if self._trigger.within_epochs:
            self._check_batches_hold_metric(logs)
        if not self._ledger.threshold_passed:  # reading may wait for a device
            self._ledger.gate(as_float(logs.get(self._monitor)))

    def choose(self, handler: Any, moment: Moment) -> Choice:
        """
        Return what is to be done at *moment*, on every rank the same. Collective, unless counts decide.

        Args:
            handler: Whose state it is.
            moment: With the metrics.
        """

        def decide() -> Choice:
            return self._decide(handler, moment)

        # Metrics of batches differ from rank to rank, and a name may be made of them.
        counted = self._monitor is None and set(self._template.fields) <= set(COUNTERS)
        choice = decide() if counted else ranks.decide(decide, "ModelCheckpoint's decision")
        self._ledger.threshold_passed = choice.threshold_passed
        return choice

    def _decide(self, handler: Any, moment: Moment) -> Choice:
        logs = moment.logs
        # What nobody asks for is not read: reading a tensor waits for the device it is on.
        asked = {self._monitor, *self._template.fields}
        floats, unusable = floats_of({name: logs[name] for name in logs if name in asked})
        score = floats.get(self._monitor) if self._monitor is not None else None
        wanted = self._wants(score)
        self._advice.of_metric(score, logs, unusable, saves=wanted, expected=self._expects_metric(moment))
        if not wanted:
            return Choice(None, score, False, self._ledger.threshold_passed)
        name = self._template.fill(
            epoch=moment.epoch + 1,
            batch=moment.batch + 1,
            global_step=moment.global_step,
            logs=floats,
            known=logs,
            batch_mode=self._trigger.within_epochs,
        )
        self._advice.of_missing_fields(name, logs, unusable)
        self._advice.of_other_runs(handler)
        is_best = score is not None and self._ledger.improves(score)
        return Choice(name.path, score, is_best, self._ledger.threshold_passed)

    @property
    def _needs_scores_to(self) -> str | None:
        """What could never be done without the metric; None: there are saves all the same."""
        if self._best_only:
            return "save"
        if self._keep is not None and self._keep.needs_scores:
            return f"tell which files keep={self._keep!r} means"
        return None

    def _expects_metric(self, moment: Moment) -> bool:
        """Tell whether the metric should be there: that of an epoch is not in each batch."""
        if moment.ends_epoch:
            return self._best_only or self._trigger.at_epoch_ends
        return self._needs_scores_to is not None and not self._trigger.at_epoch_ends

    def _check_batches_hold_metric(self, logs: Mapping[str, Any]) -> None:
        """Refuse or tell at an epoch's end that nothing is ever judged, because batches lack the metric."""
        if self._trigger.at_epoch_ends:
            return
        if self._needs_scores_to is None and self._ledger.threshold is not None:
            return  # the metric is there to be waited for, and epochs' ends do

        def check() -> None:
            if self._batches_hold_metric is not False:
                return
            if self._monitor in logs:
                self._advice.of_metric_of_epochs(self._needs_scores_to)
            elif self._needs_scores_to is None:
                self._advice.of_metric(None, logs, {}, saves=True, expected=True)

        ranks.decide(check, "ModelCheckpoint's check of its metric")  # a rank may have logged it, another not

    def _wants(self, score: float | None) -> bool:
        if not self._ledger.gate(score):
            return False
        return not self._best_only or (score is not None and self._ledger.improves(score))

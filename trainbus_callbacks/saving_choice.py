"""What a `ModelCheckpoint` decides where it may save: whether, under which name, and if it is the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainbus import ranks
from trainbus_callbacks.best_score import ScoreLedger
from trainbus_callbacks.naming import COUNTERS, NameTemplate
from trainbus_callbacks.saving_advice import SavingAdvice
from trainbus_callbacks.scalars import floats_of
from trainbus_callbacks.triggers import Moment

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
        within_epochs: Whether saves fall within epochs, for names that would be used twice in one.
    """

    def __init__(
        self,
        template: NameTemplate,
        ledger: ScoreLedger,
        advice: SavingAdvice,
        *,
        monitor: str | None,
        best_only: bool,
        within_epochs: bool,
    ) -> None:
        self._template = template
        self._ledger = ledger
        self._advice = advice
        self._monitor = monitor
        self._best_only = best_only
        self._within_epochs = within_epochs

    def choose(self, handler: Any, moment: Moment, *, expects_metric: bool) -> Choice:
        """
        Return what is to be done at *moment*, on every rank the same. Collective, unless counts decide.

        Args:
            handler: Whose state it is.
            moment: With the metrics.
            expects_metric: Whether the monitored one should be among them.
        """

        def decide() -> Choice:
            return self._decide(handler, moment, expects_metric)

        # Metrics of batches differ from rank to rank, and a name may be made of them.
        counted = self._monitor is None and set(self._template.fields) <= set(COUNTERS)
        choice = decide() if counted else ranks.decide(decide, "ModelCheckpoint's decision")
        self._ledger.threshold_passed = choice.threshold_passed
        return choice

    def _decide(self, handler: Any, moment: Moment, expects_metric: bool) -> Choice:
        logs = moment.logs
        # What nobody asks for is not read: reading a tensor waits for the device it is on.
        asked = {self._monitor, *self._template.fields}
        floats, unusable = floats_of({name: logs[name] for name in logs if name in asked})
        score = floats.get(self._monitor) if self._monitor is not None else None
        wanted = self._wants(score)
        self._advice.of_metric(score, logs, unusable, saves=wanted, expected=expects_metric)
        if not wanted:
            return Choice(None, score, False, self._ledger.threshold_passed)
        name = self._template.fill(
            epoch=moment.epoch + 1,
            batch=moment.batch + 1,
            global_step=moment.global_step,
            logs=floats,
            known=logs,
            batch_mode=self._within_epochs,
        )
        self._advice.of_missing_fields(name, logs, unusable)
        self._advice.of_other_runs(handler)
        is_best = score is not None and self._ledger.improves(score)
        return Choice(name.path, score, is_best, self._ledger.threshold_passed)

    def _wants(self, score: float | None) -> bool:
        if not self._ledger.gate(score):
            return False
        return not self._best_only or (score is not None and self._ledger.improves(score))

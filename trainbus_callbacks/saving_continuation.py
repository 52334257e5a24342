"""What a `ModelCheckpoint` takes over from the runs that it continues: the best, and its file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from trainbus import ranks
from trainbus.checkpoint.retention import KeepNamed, Retention
from trainbus_callbacks.best_score import ScoreLedger, Standing
from trainbus_callbacks.earlier_runs import best_there, reconcile
from trainbus_callbacks.naming import NameTemplate
from trainbus_callbacks.saving_advice import SavingAdvice
from trainbus_callbacks.scalars import as_float

__all__ = ["Continuation"]


class Continuation:
    """
    Continues a ledger from a loaded state and the files that are there. Training thread.

    Args:
        template: Says where the files lie.
        ledger: Continues.
        advice: Tells of what is found.
        monitor: The metric that files are judged by.
    """

    def __init__(
        self, template: NameTemplate, ledger: ScoreLedger, advice: SavingAdvice, *, monitor: str | None
    ) -> None:
        self._template = template
        self._ledger = ledger
        self._advice = advice
        self._monitor = monitor
        self._was_loaded = False  # and no training has begun since
        self._has_begun = False  # training, in this process
        self._continues = False  # from a state that was loaded

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from *state*, as far as the file of the best bears it out. Reads that file's manifest."""
        best_score = as_float(state.get("best_score"))
        standing = Standing(
            best_score if best_score is not None and math.isfinite(best_score) else None,
            state.get("best_path"),
            state.get("last_epoch_saved"),
            state.get("last_step_saved"),
        )
        if ranks.rank() == 0:
            standing = reconcile(standing, self._monitor, self._template)
        self._ledger.restore(standing, threshold_passed=bool(state.get("threshold_passed")))
        self._was_loaded = self._continues = True

    def look_for_better(self, handler: Any, stream: str, others: list[str]) -> None:
        """
        Count a better file than the loaded state knows of. Reads the folder, once for each load.

        A callback whose arguments were changed before the resume has no state, and its files are those of
        another stream: they are found by their names.

        Args:
            handler: Whose training begins.
            stream: What the callback saves as.
            others: What the other callbacks save as.
        """
        was_loaded, self._was_loaded = self._was_loaded, False
        is_new, self._has_begun = not self._has_begun, True
        if not was_loaded and not (handler.resumed and is_new):
            return
        if self._monitor is None or handler.rank != 0:
            return
        try:
            found = best_there(
                self._template,
                stream,
                handler.left_at,
                self._monitor,
                self._ledger.mode,
                others=None if was_loaded else others,
            )
        except OSError as error:
            self._advice.of_unread_folder(error)
            return
        if self._ledger.overtake(found, threshold_passed=was_loaded):
            self._advice.of_best_there(found)

    def kept(self, keep: Retention | None) -> Retention | None:
        """Return what stays: after a load the best file too, since what the run left may look better."""
        best = self._ledger.expected.best_path
        if keep is None or best is None or not self._continues:
            return keep
        return keep | KeepNamed(os.path.basename(best))

"""What a `ModelCheckpoint` tells its user: of the best, of metrics and names that lack something."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal

from trainbus_callbacks.best_score import Standing
from trainbus_callbacks.earlier_runs import warning_of_other_runs
from trainbus_callbacks.naming import FilledName, NameTemplate
from trainbus_callbacks.scalars import describe, why_no_number

__all__ = ["SavingAdvice"]

logger = logging.getLogger("trainbus")


class SavingAdvice:
    """
    The words of one `ModelCheckpoint`, each warning once. Training thread.

    Args:
        owner: Returns how the callback is called.
        template: Of its file names.
        monitor: The metric it judges by.
        mode: ``"min"`` or ``"max"``.
    """

    def __init__(
        self,
        owner: Callable[[], str],
        template: NameTemplate,
        monitor: str | None,
        mode: Literal["min", "max"],
    ) -> None:
        self._owner = owner
        self._template = template
        self._monitor = monitor
        self._mode = mode
        self._said: set[str] = set()

    def of_metric(
        self,
        score: float | None,
        logs: Mapping[str, Any],
        unusable: Mapping[str, Any],
        *,
        saves: bool,
        expected: bool,
    ) -> None:
        """
        Tell of a monitored metric that is not there, or is no number to judge by.

        Args:
            score: Its value; None: it has none.
            logs: Where it was looked for.
            unusable: Those of *logs* that are no numbers.
            saves: Whether there is a save all the same.
            expected: Whether it should be there: the metric of an epoch is not in each batch.
        """
        if self._monitor is None:
            return
        if score is not None:
            if not math.isfinite(score) and self._is_new(f"not finite {self._monitor}"):
                logger.warning("%s is %s, which never counts as best.", self._monitor, score)
            return
        if (expected or self._monitor in unusable) and self._is_new(f"metric {self._monitor}"):
            _warn(
                f"{self._owner()} cannot judge by {why_no_number(self._monitor, logs, unusable)} "
                f"{'It saves all the same.' if saves else 'It saves nothing until the metric is there.'}"
            )

    def of_metric_of_epochs(self, needed_to: str | None) -> None:
        """
        Tell that saves fall at the end of batches, and the metric is there at the end of epochs alone.

        Args:
            needed_to: What can never be done without it; None: there are saves all the same.

        Raises:
            ValueError: If it is needed.
        """
        if needed_to is not None:
            raise ValueError(
                f"{self._owner()} can never {needed_to}: it decides at the end of batches, and "
                f'{self._monitor!r} is among the logs of epochs only. Use save_freq="epoch", or log it in '
                "each batch."
            )
        if self._is_new(f"metric {self._monitor} of epochs"):
            _warn(
                f"{self._owner()} never learns which file is best: it decides at the end of batches, and "
                f"{self._monitor!r} is among the logs of epochs only. It saves all the same. Use "
                'save_freq="epoch", or log it in each batch.'
            )

    def of_best(self, where: str, before: float | None, best: float) -> None:
        """Tell of a new best, each time."""
        if before is None:
            logger.info("%s: %s is %s, the first", where, self._monitor, describe(best))
        else:
            logger.info(
                "%s: %s improved from %s to %s", where, self._monitor, describe(before), describe(best)
            )

    def of_best_there(self, standing: Standing) -> None:
        """Tell of a file that is better than the loaded state knows of."""
        assert standing.best_score is not None
        score = describe(standing.best_score)
        logger.info("%r is there and is the best: %s %s", standing.best_path, self._monitor, score)

    def of_unread_folder(self, error: OSError) -> None:
        """Tell that nobody knows if there is a better file than the loaded state knows of."""
        logger.warning(
            "Cannot look into %r for a better file than the loaded best: %s.", self._template.folder, error
        )

    def of_missing_fields(
        self, name: FilledName, logs: Mapping[str, Any], unusable: Mapping[str, Any]
    ) -> None:
        """Tell of metrics that a file name should hold and cannot."""
        for field in name.missing:
            if self._is_new(f"field {field}"):
                why = why_no_number(field, logs, unusable)
                _warn(
                    f"The file name {self._template.last!r} cannot hold {why} "
                    f"It goes without: {os.path.basename(name.path)!r}."
                )

    def of_other_runs(self, handler: Any) -> None:
        """Tell of files of another run that stand where those of this one will. Reads their manifests."""
        if not self._is_new("other runs") or handler.rank != 0 or handler.resumed:
            return
        message = warning_of_other_runs(self._template, handler.run_id, self._monitor, self._mode)
        if message is not None:
            _warn(message)

    def of_no_save(self, save_freq: object, global_step: int, *, counts_batches: bool) -> None:
        """Tell that *save_freq*, which may count batches, never came to pass in a run of so many batches."""
        if not self._is_new("never due"):
            return
        if counts_batches and global_step == 0:
            _warn(
                f"{self._owner()} saved nothing in this run: save_freq={save_freq!r} counts training "
                "batches, and none was announced. Wrap the loader: "
                "for batch in handler.batches(loader)."
            )
        else:
            _warn(
                f"{self._owner()} saved nothing in this run of {global_step} batch(es): "
                f"save_freq={save_freq!r} never came to pass. Choose a smaller one, or add one with |, "
                "e.g. | Every(epochs=1)."
            )

    def of_threshold(self, threshold: float | None, best: float) -> None:
        """Tell that *threshold* held back all saves of a run, and how good the *best* epoch or batch was."""
        if self._is_new("never let through"):
            _warn(
                f"{self._owner()} saved nothing in this run: {self._monitor!r} was never "
                f"{'below' if self._mode == 'min' else 'above'} initial_value_threshold={threshold!r}, and "
                f"its best value was {describe(best)}. Give a threshold that is reached, or none."
            )

    def _is_new(self, what: str) -> bool:
        new = what not in self._said
        self._said.add(what)
        return new


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)

"""What became of a run's saves: counted, logged, and a failed one raised."""

from __future__ import annotations

import logging
import math
import os
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from trainbus import ranks
from trainbus.bus import EventBus
from trainbus.checkpoint.stats import CheckpointStats, LostTime
from trainbus.errors import CheckpointError

__all__ = ["SaveReports", "weak_post"]

logger = logging.getLogger("trainbus")

OVERLAP_WORTH = 0.01  # of a run's time spent copying, from which on another way is recommended


class SaveReports:
    """
    The run's own receivers of ``checkpoint_*``, on the training thread.

    Of several ranks each counts, and raises, and rank 0 alone logs.
    The one that raises a failed save is the last in order, so that everybody has heard of it.

    Attributes:
        stats: Sums over the saves whose events were delivered.
    """

    def __init__(self, bus: EventBus, raises: bool) -> None:
        self.stats = CheckpointStats()
        self._begun = time.monotonic()
        self._raises = raises
        first, last = -math.inf, math.inf
        subscriptions = [
            bus.on("checkpoint_saved", self._on_saved, priority=first),
            bus.on("checkpoint_skipped", self._on_skipped, priority=first),
            bus.on("checkpoint_failed", self._on_failed, priority=last),
        ]
        self.undo: list[Callable[[], Any]] = [subscription.cancel for subscription in subscriptions]

    def stats_with(self, lost: LostTime) -> CheckpointStats:
        """Return the sums together with what the saves cost the training thread."""
        return replace(
            self.stats,
            seconds_lost=lost.total,
            seconds_waiting=lost.waiting,
            seconds_copying=lost.copying,
            seconds_fenced=lost.fenced,
        )

    def log_summary(self, lost: LostTime) -> None:
        """Log the sums, and the knob that would have lowered them if it is worth turning."""
        stats = self.stats_with(lost)
        if ranks.rank() != 0 or not stats.saves + stats.skipped + stats.failed:
            return
        logger.info("%s", stats.summary())
        training = time.monotonic() - self._begun
        if lost.overlappable > OVERLAP_WORTH * training:
            logger.info(
                "Copying weights at once took %.2f s, %.1f %% of the run. Handler(snapshot='overlap') copies "
                "them during the next batch, if only Optimizer.step changes them.",
                lost.overlappable,
                100 * lost.overlappable / training,
            )

    def _on_saved(self, path: str, size: int, seconds: float) -> None:
        self.stats.saves += 1
        self.stats.bytes += size
        self.stats.seconds_to_durable += seconds
        if ranks.rank() != 0:
            return
        name, megabytes, digits = os.path.basename(path), size / 1e6, 1 if seconds >= 0.1 else 2
        logger.info("saved %s (%.1f MB, %.*f s in the background)", name, megabytes, digits, seconds)

    def _on_skipped(self, path: str, reason: str) -> None:
        self.stats.skipped += 1
        if ranks.rank() == 0:
            logger.warning("%s was not saved: %s.", path, reason)

    def _on_failed(self, error: CheckpointError) -> None:
        self.stats.failed += 1
        self.tell(error)

    def tell(self, error: CheckpointError) -> None:
        """Raise *error*, or log it where failed saves are only warned of; nothing if somebody has seen it."""
        if error.seen:
            return
        error.seen = True
        if self._raises:
            raise error
        if ranks.rank() == 0:
            logger.error("%s", error)


class _Poster(Protocol):
    def post(self, name: str, /, **fields: Any) -> None: ...


def weak_post(poster: _Poster) -> Callable[..., None]:
    """
    Return ``poster.post`` for a thread that outlives the run: it does not keep the poster alive.

    A bus keeps its handler, and that the model; an idle writer must not keep all of them.
    """
    reference = weakref.ref(poster)

    def post(name: str, **fields: Any) -> None:
        living = reference()
        if living is not None:
            living.post(name, **fields)

    return post

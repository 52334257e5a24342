"""Where a run stands: what a `Handler` tells of itself, read-only."""

from __future__ import annotations

from trainbus import ranks
from trainbus.checkpoint.saver import Saver
from trainbus.loop.generators import Loop
from trainbus.loop.moments import Moments
from trainbus.save_requests import SaveRequests

__all__ = ["RunPosition"]


class RunPosition:
    """The part of `Handler` that changes nothing."""

    _moments: Moments
    _loop: Loop
    _saver: Saver
    _saves: SaveRequests

    @property
    def rank(self) -> int:
        """This process's rank: of the process group, else ``RANK`` of the environment, else 0."""
        return ranks.rank()

    @property
    def epoch(self) -> int:
        """The epoch under way, or the next one; 0-based."""
        return self._moments.progress.epoch

    @property
    def batch(self) -> int:
        """Index of the training batch at hand or the last one, in its epoch; 0-based, also after a resume."""
        return self._moments.progress.batch

    @property
    def global_step(self) -> int:
        """Training batches completed over the whole run, those before a resume included."""
        return self._moments.progress.global_step

    @property
    def total_epochs(self) -> int | None:
        """What `epochs` was asked for; None before, and under `steps`."""
        return self._moments.progress.total_epochs

    @property
    def total_batches(self) -> int | None:
        """Length of the training loader opened last; None before, and for one without a length."""
        return self._loop.total_batches

    @property
    def accumulating(self) -> bool:
        """True in a batch whose gradients no optimizer has used yet: `save_async` would wait for the step."""
        return self._moments.accumulating

    @property
    def is_stepping(self) -> bool:
        """
        True while one of its optimizers is inside of ``step``.

        It stays so until the next batch if an exception left a step: the weights may be half-updated.
        Optimizers that are none of torch's go unseen.
        """
        return self._moments.progress.is_stepping()

    @property
    def saves_in_flight(self) -> int:
        """Saves asked for and not yet durable, skipped or failed."""
        return len(self._saver.writer.unfinished) + self._saves.postponed

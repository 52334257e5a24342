"""When a `ModelCheckpoint` saves: its trigger is asked, and a save that cannot be made yet is remembered."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from trainbus import ranks
from trainbus_callbacks.triggers import Moment, Trigger

__all__ = ["Schedule"]


class Schedule:
    """
    Asks a trigger at each batch and epoch, on the training thread.

    Args:
        trigger: Says when.

    Attributes:
        is_due: Whether a save is due. It stays so until it is taken, because none is made while gradients
            accumulate.
        was_due: Whether one ever was, in this process.
    """

    def __init__(self, trigger: Trigger) -> None:
        self.is_due = False
        self.was_due = False
        self._trigger = trigger
        self._since: float | None = None  # by time.monotonic()

    def begin(self) -> None:
        """Count the minutes from now."""
        self._since = time.monotonic()

    def ask(
        self, *, ends_epoch: bool, epoch: int, batch: int, global_step: int, logs: Mapping[str, Any]
    ) -> Moment:
        """Ask whether a save is due, and return the moment. Collective, unless counts decide."""
        if self._since is None:
            self.begin()
        moment = Moment(ends_epoch, epoch, batch, global_step, self._seconds(), logs)

        def is_due() -> bool:
            return self._trigger.is_due(moment)

        if is_due() if self._trigger.is_counted else ranks.decide(is_due, "ModelCheckpoint's save_freq"):
            self.is_due = self.was_due = True
            self.begin()
        return moment

    def take(self) -> bool:
        """Return whether a save is due, and count it as made."""
        due, self.is_due = self.is_due, False
        return due

    def _seconds(self) -> float:
        assert self._since is not None
        return time.monotonic() - self._since

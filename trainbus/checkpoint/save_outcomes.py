"""
How what became of a save is told: first the event, then the handle that the asker holds.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trainbus.checkpoint import interpreter_exit
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.errors import CheckpointError, CheckpointSkipped, CheckpointWriteError

if TYPE_CHECKING:
    from trainbus.checkpoint.manifest import Manifest

__all__ = ["SaveOutcomes"]

_log = logging.getLogger("trainbus")


class SaveOutcomes:
    """
    Tells of saves that are over and of removed files. For any thread.

    Args:
        report: Called with an event's name and fields. What it raises is logged: a save must be finished
            even if nobody could be told.
        settle: Called with a save and what finishes its handle, to do that and make room at once.
    """

    def __init__(
        self, report: Callable[..., None], settle: Callable[[PendingSave, Callable[[], None]], None]
    ) -> None:
        self._report = report
        self._settle = settle

    def saved(self, pending: PendingSave, manifest: Manifest) -> None:
        """Its file is durable. May follow on `failed`, of a write that nobody waited for any more."""
        times = pending.times
        assert times.durable is not None
        seconds = times.durable - times.requested
        self._tell("checkpoint_saved", pending, manifest=manifest, size=manifest.size, seconds=seconds)
        self._settle(pending, lambda: pending.complete(manifest))

    def skipped(self, pending: PendingSave, reason: str) -> None:
        """It will not be written, by the asker's own rule."""
        self._tell("checkpoint_skipped", pending, reason=reason)
        self._settle(pending, lambda: pending.fail(CheckpointSkipped(pending.path or "", reason)))

    def failed(self, pending: PendingSave, error: BaseException) -> None:
        """It could not be written because of *error*; nothing happens if it is finished already."""
        if pending.done():
            return
        failure = error
        if not isinstance(failure, CheckpointError):
            failure = CheckpointWriteError(pending.path or "", pending.global_step, error)
            failure.__cause__ = error
        interpreter_exit.remember(failure)
        self._tell("checkpoint_failed", pending, error=failure)
        self._settle(pending, lambda: pending.fail(failure))

    def removed(self, path: str, pending: PendingSave) -> None:
        """A file is gone, which *pending* made superfluous."""
        fields = {"path": path, "stream": pending.stream, **_moment(pending)}
        self._call_report("checkpoint_removed", fields)

    def _tell(self, event: str, pending: PendingSave, **fields: Any) -> None:
        known = {"save": pending, "path": pending.path, "stream": pending.stream, **_moment(pending)}
        self._call_report(event, known | fields)

    def _call_report(self, event: str, fields: dict[str, Any]) -> None:
        try:
            self._report(event, **fields)
        except BaseException:
            _log.exception("Reporting %s of %r failed.", event, fields["path"])


def _moment(pending: PendingSave) -> dict[str, Any]:
    return {"epoch": pending.epoch, "global_step": pending.global_step, "logs": pending.logs}

"""One entry of the writer's queue: a save with what it entails."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retries import MOST_SECONDS, MOST_TRIES, PAUSES, is_transient
from trainbus.errors import CheckpointWriteError, UnsyncedNameError

if TYPE_CHECKING:
    from trainbus.checkpoint.manifest import Manifest

__all__ = ["WriteJob", "absolute"]

_log = logging.getLogger("trainbus")


@dataclass(eq=False)
class WriteJob:
    """
    What the writer thread does in one go.

    Attributes:
        pending: The save.
        write: Makes its file durable; may be called again after it failed.
        release: Gives the snapshot's memory back.
        removals: Files to remove afterwards: as given, for the report, and absolute, because the
            script may change its working directory.
        find_removals: Called once the file is durable, for more files to remove.
        begun: ``time.monotonic()`` when the thread took it up; 0 before.
    """

    pending: PendingSave
    write: Callable[[], Manifest]
    release: Callable[[], None] = lambda: None
    removals: list[tuple[str, str]] = field(default_factory=list)
    find_removals: Callable[[], Sequence[str]] = tuple
    begun: float = 0.0

    def run(self, pause: Callable[[float], Any] = time.sleep) -> Manifest:
        """
        Write the file, several times if need be, then release the memory. Returns when it is durable.

        Args:
            pause: Called with the seconds to wait before another try.

        Raises:
            CheckpointWriteError: The disk refused; the cause is what the last try met.
            BaseException: Whatever else kept it from being written.
        """
        try:
            return self._try(pause)
        finally:
            self.release()

    def _try(self, pause: Callable[[float], Any]) -> Manifest:
        failures: list[OSError] = []
        since = 0.0
        while True:
            try:
                manifest = self.write()
            except OSError as error:
                failures.append(error)
                since = since or time.monotonic()
                given_up = len(failures) == MOST_TRIES or time.monotonic() - since > MOST_SECONDS
                if given_up or not is_transient(error):
                    raise self._failure(failures) from error
                pause(PAUSES[len(failures) - 1])
                continue
            if failures:
                self._say_that_it_took(failures)
            return manifest

    def _failure(self, failures: list[OSError]) -> CheckpointWriteError:
        pending = self.pending
        # The file of such a try is in its place, whatever those behind it met.
        is_unsynced = any(isinstance(one, UnsyncedNameError) for one in failures)
        return CheckpointWriteError(
            pending.path or "",
            pending.global_step,
            failures[-1],
            tries=len(failures),
            is_unsynced=is_unsynced,
        )

    def _say_that_it_took(self, failures: list[OSError]) -> None:
        _log.warning(
            "%r was written at try %d; before that the disk refused: %s. It may be failing.",
            self.pending.path,
            len(failures) + 1,
            "; ".join(str(failure) for failure in failures),
        )

    def all_removals(self) -> list[tuple[str, str]]:
        """Return what is to be removed now that the file is durable."""
        try:
            return [*self.removals, *absolute(self.find_removals())]
        except Exception:
            _log.exception("Cannot find out which old checkpoints are superfluous; they stay.")
            return self.removals


def absolute(paths: Sequence[str]) -> list[tuple[str, str]]:
    """Return each path as given and as it is from the root."""
    return [(path, os.path.abspath(os.path.expanduser(path))) for path in paths]

"""The name templates that a run keeps other processes, and other handlers, from saving under."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from trainbus import ranks
from trainbus.checkpoint.template_lock import TemplateLock, lock_path
from trainbus.claims import claim
from trainbus.errors import CheckpointLockedError, CheckpointWriteError

if TYPE_CHECKING:
    from trainbus.handler import Handler

__all__ = ["ReservedNames"]


class ReservedNames:
    """
    Those of one run, until they are released. Training thread.

    Args:
        handler: The run.
    """

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._paths: set[str] = set()  # of the locks, on all ranks
        self._locks: list[TemplateLock] = []

    def reserve(self, folder: str, template: str, *, together: bool) -> None:
        """
        Do what `Handler.reserve` does; an `OSError` comes as CheckpointWriteError.

        Args:
            folder: Where the files go.
            template: Of their names.
            together: Whether all ranks call this, of which rank 0 takes the lock.
        """
        path = lock_path(folder, template)
        if path in self._paths:
            return
        claim(path, self._handler)

        def lock() -> None:
            self._locks.append(self._lock(folder, template))

        if together:
            ranks.decide(lock, "handler.reserve")
        else:
            lock()
        self._paths.add(path)

    def release(self) -> None:
        """Let others save under them."""
        self._paths.clear()
        while self._locks:
            self._locks.pop().release()

    def _lock(self, folder: str, template: str) -> TemplateLock:
        try:
            return TemplateLock(folder, template)
        except CheckpointLockedError:
            raise
        except OSError as error:
            where = os.path.join(folder, template)
            raise CheckpointWriteError(where, self._handler.global_step, error) from error

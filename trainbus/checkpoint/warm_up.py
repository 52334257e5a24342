"""The memory of the first snapshot, made in the background before that one needs it."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

from trainbus.checkpoint.staging_copy import Stager

__all__ = ["WarmUp"]


class WarmUp:
    """
    Has the system give a stager its memory ahead of time. The thread that takes the snapshots.

    Args:
        stager: On whose thread it is done.
    """

    def __init__(self, stager: Stager) -> None:
        self._stager = stager
        self._forget()
        _ALL.add(self)

    def _forget(self) -> None:
        self._stop = threading.Event()
        self._is_over = threading.Event()
        self._is_over.set()

    def begin(self, state: Any) -> None:
        """Plan a snapshot of such a *state*, and go on without waiting for its memory."""
        # First: where no thread can be had, no snapshot must wait for it.
        self._stager.thread.start()
        buffer = self._stager.buffer_for(state)
        if buffer is None:
            return
        self._stop.clear()
        self._is_over.clear()

        def touch() -> None:
            try:
                buffer.touch(self._stop)
                self._stager.lock(buffer, self._stop)
            finally:
                self._stager.give_back(buffer)
                self._is_over.set()

        self._stager.thread.call(touch)

    def end(self) -> None:
        """Let a snapshot have the memory now, with what there is of it."""
        self._stop.set()
        self._is_over.wait()


_ALL: weakref.WeakSet[WarmUp] = weakref.WeakSet()


def _forget_in_child() -> None:
    for warm_up in list(_ALL):
        warm_up._forget()


os.register_at_fork(after_in_child=_forget_in_child)

"""
How the writer thread does what it was asked for: one file is written, others are removed.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from trainbus.checkpoint.save_outcomes import SaveOutcomes
from trainbus.checkpoint.write_job import WriteJob

__all__ = ["JobRunner", "give_way"]

_log = logging.getLogger("trainbus")
_NICENESS = 10


class JobRunner:
    """
    Carries out jobs on the thread that calls it, and tells what became of them. None of them raises.

    Args:
        outcomes: Is told.
        pause: Called with the seconds to wait before a failed write is tried again.
    """

    def __init__(self, outcomes: SaveOutcomes, pause: Callable[[float], Any]) -> None:
        self._outcomes = outcomes
        self._pause = pause

    def carry_out(self, job: WriteJob) -> None:
        """Write the job's file, and once it is durable remove what it makes superfluous."""
        if self._write(job):
            for given, path in job.all_removals():
                self._remove_file(job, given, path)

    def _write(self, job: WriteJob) -> bool:
        pending = job.pending
        try:
            manifest = job.run(self._pause)
        except BaseException as error:
            # Also what is meant to end the thread: somebody may be waiting for this save.
            self._outcomes.failed(pending, error)
            return False
        was_given_up = pending.done()
        if was_given_up:
            _log.warning("%r was written after all; it was reported as failed.", pending.path)
        pending.times.durable = time.monotonic()
        self._outcomes.saved(pending, manifest)
        return not was_given_up

    def _remove_file(self, job: WriteJob, given: str, path: str) -> None:
        # Not above: this module has to be importable where what a file format needs is not.
        from trainbus.checkpoint.commit import remove

        try:
            remove(path)
        except OSError as error:
            _log.warning("Cannot remove the old checkpoint %r: %s. It stays where it is.", path, error)
            return
        self._outcomes.removed(given, job.pending)


def give_way() -> None:
    """Let the calling thread have what time the training leaves, while it uses every core."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)

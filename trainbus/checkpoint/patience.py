"""
How long a writer thread may do nothing before it is warned of, and before it is given up.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

from trainbus.checkpoint.write_job import WriteJob

__all__ = ["Patience"]

_log = logging.getLogger("trainbus")
_WORTH_A_WORD = 30.0  # seconds without progress


class Patience:
    """
    Looks at the job that a thread is busy with. Under its owner's lock.

    Args:
        seconds: Without progress, after which a job counts as stuck.
        last_progress: Returns the ``time.monotonic()`` at which the disk last took something.
    """

    def __init__(self, seconds: float, last_progress: Callable[[], float]) -> None:
        if not seconds > 0:
            raise ValueError(f"write_timeout must be more than 0 seconds, got {seconds!r}.")
        self._seconds = seconds
        self._last_progress = last_progress
        self._warned_of: WriteJob | None = None

    def is_over(self, job: WriteJob) -> bool:
        """Return whether *job* is stuck; warn once of one that might be."""
        silent = self._silence(job)
        if silent >= _WORTH_A_WORD and self._warned_of is not job:
            self._warned_of = job
            _log.warning("%s. Training waits for it at the next save.", self._describe(job))
        return silent >= self._seconds

    def verdict(self, job: WriteJob) -> TimeoutError:
        """Return what saves fail with because *job* is stuck."""
        return TimeoutError(errno.ETIMEDOUT, self._describe(job))

    def _silence(self, job: WriteJob) -> float:
        return time.monotonic() - max(job.begun, self._last_progress())

    def _describe(self, job: WriteJob) -> str:
        path, seconds, silent = job.pending.path, time.monotonic() - job.begun, self._silence(job)
        return f"{path!r} has been in writing for {seconds:.0f} s, the last {silent:.0f} without progress"

"""What became of one save: the handle that the asker holds and the writer completes."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trainbus.checkpoint.stats import SaveTimes
from trainbus.errors import CheckpointError, CheckpointSkipped

if TYPE_CHECKING:
    from trainbus.checkpoint.manifest import Manifest

__all__ = ["PendingSave"]


class PendingSave:
    """
    A save that was asked for. Safe to use from several threads.

    Attributes:
        path: The file, or None where nothing is written (ranks other than 0).
        absolute_path: The same from the root, by the working directory at the request.
        epoch: 0-based epoch in which it was asked for.
        global_step: Training batches completed over the run by then.
        stream: Key of the callback that asked, or empty.
        logs: Metrics at that moment. Those that a GPU was still computing are in it once the
            writer has read them, which is before the save is durable.
        times: What it cost the training thread, and when it was asked for, written and durable.
    """

    def __init__(
        self,
        path: str | None,
        *,
        epoch: int = 0,
        global_step: int = 0,
        stream: str = "",
        logs: Mapping[str, float] | None = None,
    ) -> None:
        self.path = path
        self.absolute_path = None if path is None else os.path.abspath(os.path.expanduser(path))
        self.epoch = epoch
        self.global_step = global_step
        self.stream = stream
        self.logs: Mapping[str, float] = dict(logs or {})
        self.times = SaveTimes(requested=time.monotonic())
        self._manifest: Manifest | None = None
        self._error: CheckpointError | None = None
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._finished = threading.Event()

    @classmethod
    def nothing(cls) -> PendingSave:
        """Return a save that is finished and wrote nothing: what ranks other than 0 get."""
        save = cls(None)
        save.finish_elsewhere()
        return save

    def __repr__(self) -> str:
        state = "unfinished" if not self.done() else "failed" if self._error else "durable"
        return f"<PendingSave {self.path!r} of global step {self.global_step}: {state}>"

    def done(self) -> bool:
        """Return whether the save is durable, failed or skipped. Never blocks."""
        return self._finished.is_set()

    def result(self, timeout: float | None = None) -> Manifest | None:
        """
        Wait until the save is finished.

        Args:
            timeout: Seconds to wait at most; None: as long as it takes.

        Returns:
            The file's manifest once it is durable, or None where nothing is written.

        Raises:
            CheckpointWriteError: It could not be written.
            CheckpointSkipped: It was not carried out.
            TimeoutError: It is not finished yet.
        """
        if not self._finished.wait(timeout):
            raise TimeoutError(f"Checkpoint {self.path!r} is not finished after {timeout} s. Wait longer.")
        if self._error is not None:
            self._error.seen = True
            raise self._error
        return self._manifest

    def complete(self, manifest: Manifest) -> None:
        """Say that the file is durable. Ignored when the save is finished already."""
        self._finish(manifest, None)

    def fail(self, error: CheckpointError) -> None:
        """Say why there will be no file. Ignored when the save is finished already."""
        self._finish(None, error)

    def finish_elsewhere(self) -> None:
        """Say that nothing is written here: another process does."""
        self._finish(None, None)

    def give_up_in_child(self) -> None:
        """After a fork: let nobody in the child wait for what only the parent can finish."""
        self._begin()
        self.fail(CheckpointSkipped(self.path or "", "only the process that asked for it writes it"))

    def _finish(self, manifest: Manifest | None, error: CheckpointError | None) -> None:
        with self._lock:
            if not self._finished.is_set():
                self._manifest, self._error = manifest, error
                self._finished.set()

"""History: what happens in a run, line by line in a file, for `trainbus report` and whoever reads JSON."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping
from typing import Any

from trainbus.callback import Callback
from trainbus_callbacks.arguments import require_count
from trainbus_callbacks.history_file import Begin, End, Metrics, Record, Removal, SaveRecord, encode
from trainbus_callbacks.scalars import floats_of

__all__ = ["History"]

logger = logging.getLogger("trainbus")


class History(Callback):
    """
    Append what happens to a file of JSON lines, on rank 0: what `trainbus report` draws.

    Metrics of epochs and of every so many batches, each save with what it cost, failed and skipped ones,
    removed files, where processes began and ended. Lines are only ever added, each in one go as it
    happens, so that a kill loses nothing that was written; a resumed run adds to the same file, and the
    report leaves out what the killed one had done beyond the point where it continues. Nothing is synced:
    after a power cut the last lines may be missing.

    A file that cannot be written is warned of once, and training goes on.

    Args:
        path: The file, best ``history.jsonl`` in the folder of the checkpoints, where `trainbus report`
            looks for it. Missing folders are made, ``~`` is expanded.
        every: Write a batch's metrics after so many training batches; None: those of epochs only.
            Writing waits for the device that computes the metrics.

    Raises:
        ValueError: If *every* is no count.
    """

    priority = 40  # after those that add metrics

    def __init__(self, path: str | os.PathLike[str], *, every: int | None = 50) -> None:
        require_count("every", every, "training batches", least=1, or_none=True)
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self.every = every
        self._error: str | None = None
        self._ends_whole = False  # whether the file ends with a whole line, as far as we know
        self._warned = False

    def on_train_begin(
        self,
        handler: Any,
        epoch: int,
        global_step: int,
        resumed: bool = False,
        total_epochs: int | None = None,
    ) -> None:
        """Say which run begins, and where."""
        self._error = None
        self._write(
            handler,
            Begin(
                time=time.time(),
                run_id=handler.run_id,
                parents=tuple(handler.lineage),
                resumed=bool(resumed),
                epoch=epoch,
                global_step=global_step,
                total_epochs=total_epochs,
            ),
        )

    def on_train_batch_end(self, handler: Any, epoch: int, global_step: int, logs: Mapping[str, Any]) -> None:
        """Write the batch's metrics if it is time to."""
        if self.every is not None and global_step % self.every == 0 and handler.rank == 0:
            self._write_metrics(handler, "batch", epoch, global_step, logs)

    def on_epoch_end(self, handler: Any, epoch: int, global_step: int, logs: Mapping[str, Any]) -> None:
        """Write the epoch's metrics."""
        if handler.rank == 0:
            self._write_metrics(handler, "epoch", epoch, global_step, logs)

    def on_checkpoint_saved(self, handler: Any, save: Any, manifest: Any) -> None:
        """Write what was saved and what it cost."""
        facts = {
            name: getattr(manifest, name)
            for name in ("run_id", "sequence", "contents", "monitor", "mode", "score", "interrupted", "size")
        }
        self._write_save(handler, "saved", save, **facts)

    def on_checkpoint_failed(self, handler: Any, save: Any, error: BaseException) -> None:
        """Write what was not saved, and why."""
        self._write_save(handler, "failed", save, reason=str(error))

    def on_checkpoint_skipped(self, handler: Any, save: Any, reason: str) -> None:
        """Write what was not saved, and why."""
        self._write_save(handler, "skipped", save, reason=reason)

    def on_checkpoint_removed(self, handler: Any, path: str, stream: str = "") -> None:
        """Write what was removed."""
        self._write(handler, Removal(time=time.time(), file=self._relative(path), stream=stream))

    def on_exception(self, error: BaseException) -> None:
        """Remember it for the end."""
        self._error = f"{type(error).__name__}: {error}".rstrip(": ")

    def on_train_end(self, handler: Any, epoch: int, global_step: int, reason: str | None = None) -> None:
        """Write where the run ended, and why if before its time."""
        why = self._error or reason
        self._write(handler, End(time=time.time(), epoch=epoch, global_step=global_step, reason=why))

    def _write_metrics(
        self, handler: Any, scope: str, epoch: int, global_step: int, logs: Mapping[str, Any]
    ) -> None:
        floats = floats_of(logs)[0]
        if floats:
            self._write(
                handler,
                Metrics(time=time.time(), scope=scope, epoch=epoch, global_step=global_step, logs=floats),
            )

    def _write_save(self, handler: Any, outcome: str, save: Any, **facts: Any) -> None:
        if handler.rank != 0:  # where saves have no path
            return
        times, now = save.times, time.time()
        # The clocks of durations and of dates are two; the one may be set while the other goes on.
        ahead = now - time.monotonic()
        moments: dict[str, Any] = {
            name: None if (moment := getattr(times, name)) is None else ahead + moment
            for name in ("requested", "taken", "begun", "durable", "fenced_at")
        }
        self._write(
            handler,
            SaveRecord(
                time=now,
                outcome=outcome,
                file=self._relative(save.path),
                stream=save.stream,
                epoch=save.epoch,
                global_step=save.global_step,
                logs=floats_of(save.logs)[0],
                waiting=times.waiting,
                copying=times.copying,
                fenced=times.fenced,
                **moments,
                **facts,
            ),
        )

    def _relative(self, path: str) -> str:
        # So that the folder may be moved.
        return os.path.relpath(os.path.abspath(os.path.expanduser(path)), os.path.dirname(self.path))

    def _write(self, handler: Any, record: Record) -> None:
        if handler.rank != 0:
            return
        try:
            self._append(encode(record))
        except OSError as error:
            self._ends_whole = False
            if not self._warned:
                self._warned = True
                logger.warning(
                    "Cannot write %r: %s. Training goes on, and the report of this run will have gaps.",
                    self.path,
                    error,
                )

    def _append(self, line: bytes) -> None:
        """Add a line; what an earlier writer left unfinished stays a line of its own."""
        if not self._ends_whole:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
        fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not self._ends_whole and not _ends_with_a_line(fd):
                line = b"\n" + line
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, "the disk took only a part of a line")
            self._ends_whole = True
        finally:
            os.close(fd)


def _ends_with_a_line(fd: int) -> bool:
    size = os.fstat(fd).st_size
    return size == 0 or os.pread(fd, 1, size - 1) == b"\n"

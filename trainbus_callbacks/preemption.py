"""Preemption: a cluster wants its machine back, and the run ends with a checkpoint of this very moment."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

from trainbus import ranks
from trainbus_callbacks.naming import require_counters
from trainbus_callbacks.saving_callback import SavingCallback
from trainbus_callbacks.signal_flag import SignalFlag

__all__ = ["Preemption"]

_log = logging.getLogger("trainbus")


class Preemption(SavingCallback):
    """
    Save, see the file on the disk and stop when the process is told to go: SIGTERM, or Slurm's SIGUSR1.

    The signal sets a flag only. It is acted on at the end of the batch at hand, also of a validation batch;
    while gradients accumulate the run goes on to the next optimizer step. The handler stops with the reason,
    the loops end, ``train_end`` follows, and the same script continues there when it is started again.

    Everything happens on the training thread, which waits for the file up to the end of the grace period. If
    the disk is slower the log says so and the writer goes on; the files there are stay as they are.

    In a run of several processes it is enough that one gets the signal: behind that batch all know of it, at
    the end of the next one all save, and stop. Not amid a validation, but behind it. Rank 0 writes.

    Args:
        filepath: A template such as ``"runs/preempted.pt"``; its fields are ``epoch`` (1-based), ``batch``
            (completed in this epoch) and ``global_step``.
        signals: Which to listen to, on the main thread. Their earlier handlers are called too, and are back
            after the run, and in forked children at once.
        grace_seconds: How long to wait for the file to be on the disk. Less than the cluster gives, by the
            time of a batch.

    Attributes:
        received: The signal that ended the run, or None; a job script may want to be queued again then.

    Raises:
        TypeError: If *filepath* is no path.
        ValueError: If *filepath* has other fields, a signal cannot be caught, or there is no time.
    """

    priority = 110  # after ModelCheckpoint, whose save of this event is the better known

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        *,
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGUSR1),
        grace_seconds: float = 30.0,
    ) -> None:
        if not grace_seconds > 0:
            raise ValueError(f"grace_seconds must be a positive number, got {grace_seconds!r}.")
        super().__init__(filepath)
        require_counters(self._template, "the signal")
        self.received: signal.Signals | None = None
        self._passed_on: signal.Signals | None = None
        self._signal = SignalFlag(signals)
        self._grace_seconds = grace_seconds

    @property
    def state_key(self) -> str:
        """Name and file name, so that two of them keep their files apart."""
        return f"Preemption({self._template.last!r})"

    def on_train_begin(self, handler: Any) -> None:
        """Listen to the signals."""
        self.refuse_name_of_another(handler)
        self.received = self._passed_on = None
        self._signal.listen("Preemption")

    def on_train_batch_end(self, handler: Any, epoch: int) -> None:
        """Save and stop if the signal came, on this rank or another."""
        self._pass_on(handler)
        self._obey(handler, epoch)

    on_epoch_end = on_train_batch_end

    def on_val_batch_end(self, handler: Any, epoch: int) -> None:
        """Save and stop if the signal came; ranks may validate different numbers of batches, so they wait."""
        self._pass_on(handler)
        if not ranks.together():
            self._obey(handler, epoch)

    def on_train_end(self) -> None:
        """Leave the signals to whom they belonged; say if one came too late to be acted on."""
        self._signal.leave()
        late = self._signal.take() or self._passed_on
        if late is not None and self.received is None:
            _log.warning(
                "%s came too late: training has ended, and no further checkpoint is saved.", late.name
            )

    def _pass_on(self, handler: Any) -> None:
        came = self._signal.take()
        if came is not None and self.received is None:
            self._passed_on = came
            handler.tell(self.state_key, int(came))

    def _obey(self, handler: Any, epoch: int) -> None:
        heard = handler.heard(self.state_key)
        if not heard or self.received is not None:
            return
        self.received, self._passed_on = signal.Signals(heard[0]), None
        handler.stop(f"{self.received.name} came.")
        self._save(handler, epoch, self.received)

    def _save(self, handler: Any, epoch: int, received: signal.Signals) -> None:
        counters = {"epoch": epoch + 1, "batch": handler.batch + 1, "global_step": handler.global_step}
        path = self._template.fill(**counters, logs={}).path
        if handler.rank == 0:
            _log.info("%s came. Saving %s.", received.name, path)
        deadline = time.monotonic() + self._grace_seconds
        try:
            # First those under way, or a writer that skips when it is busy would skip this one.
            handler.finish_writing(timeout=self._grace_seconds)
            handler.save_async(path, stream=self.state_key)
            handler.finish_writing(timeout=max(0.0, deadline - time.monotonic()))
        except TimeoutError as error:
            _log.error(
                "The checkpoint of this moment is not on the disk within grace_seconds=%g: %s "
                "If the process is killed now, the next run continues from an earlier one.",
                self._grace_seconds,
                error,
            )

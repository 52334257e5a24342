"""SaveOnRequest: one save now, asked for from outside of the process, and training goes on."""

from __future__ import annotations

import logging
import os
import signal
import time
from typing import Any

from trainbus import ranks
from trainbus_callbacks.naming import require_counters
from trainbus_callbacks.saving_callback import SavingCallback
from trainbus_callbacks.signal_flag import SignalFlag

__all__ = ["SaveOnRequest"]

_log = logging.getLogger("trainbus")


class SaveOnRequest(SavingCallback):
    """
    Save once when somebody touches a file or sends a signal: ``touch runs/save-now``, ``kill -USR2 PID``.

    A request is only noted when it comes. It is answered on the training thread at the end of the batch at
    hand, also of a validation batch, while gradients accumulate at the next optimizer step; requests that
    come before the answer are one. A save that was skipped because the writer was busy is asked for again.

    In a run of several processes rank 0 looks for the file, each takes the signal, and all save at the end
    of the next batch, not amid a validation. Rank 0 writes.

    Args:
        filepath: A template such as ``"runs/asked_{global_step}.pt"``; its fields are ``epoch``
            (1-based), ``batch`` (completed in this epoch) and ``global_step``.
        request_file: Touch it to ask; it is removed when the request is taken. By default ``save-now`` in
            the folder of *filepath*. One that cannot be removed is warned of once and asks for nothing.
        signum: The signal that asks; None: no signal. Its earlier handler is called too, and is back after
            the run, and in forked children at once.
        seconds_between_looks: How often to look for the file at most.

    Raises:
        TypeError: If *filepath* is no path.
        ValueError: If *filepath* has other fields, or a number is negative.
    """

    priority = 100  # after what changes the state at the same event

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        *,
        request_file: str | os.PathLike[str] | None = None,
        signum: int | None = signal.SIGUSR2,
        seconds_between_looks: float = 1.0,
    ) -> None:
        super().__init__(filepath)
        require_counters(self._template, "the request")
        if not seconds_between_looks >= 0:
            raise ValueError(
                f"seconds_between_looks must be a number of at least 0, got {seconds_between_looks!r}."
            )
        default = os.path.join(self._template.folder, "save-now")
        self.request_file = os.path.expanduser(os.fspath(request_file or default))
        self._signal = SignalFlag(() if signum is None else (signum,))
        self._seconds_between_looks = seconds_between_looks
        self._last_look = -float("inf")  # by time.monotonic()
        self._requested = False
        self._passed_on = False  # and not answered yet
        self._has_warned = False

    @property
    def state_key(self) -> str:
        """Name and file name, so that two of them keep their files apart."""
        return f"SaveOnRequest({self._template.last!r})"

    def on_train_begin(self, handler: Any) -> None:
        """Listen to the signal, if this is the main thread: only there can Python receive one."""
        self.refuse_name_of_another(handler)
        self._signal.listen(f"SaveOnRequest, so touch {self.request_file!r} instead")

    def on_train_batch_end(self, handler: Any, epoch: int) -> None:
        """Save if it was asked for, on this rank or another."""
        self._pass_on(handler)
        self._answer(handler, epoch)

    on_epoch_end = on_train_batch_end

    def on_val_batch_end(self, handler: Any, epoch: int) -> None:
        """Save if it was asked for; ranks may validate different numbers of batches, so they wait."""
        self._pass_on(handler)
        if not ranks.together():
            self._answer(handler, epoch)

    def on_checkpoint_skipped(self, stream: str) -> None:
        """Ask again at the next event."""
        if stream == self.state_key:
            self._requested = True

    def on_train_end(self) -> None:
        """Leave the signal to whom it belonged; say if a request comes too late."""
        self._signal.leave()
        if self._signal.take() or self._requested or self._passed_on:
            _log.warning("The save that was asked for came too late: training has ended.")
            self._requested = self._passed_on = False

    def _pass_on(self, handler: Any) -> None:
        signalled = self._signal.take() is not None
        if handler.rank == 0:
            self._look_for_file()
        if signalled or self._requested:
            self._requested = False
            self._passed_on = True
            handler.tell(self.state_key, True)

    def _answer(self, handler: Any, epoch: int) -> None:
        if not handler.heard(self.state_key):
            return
        self._passed_on = False
        counters = {"epoch": epoch + 1, "batch": handler.batch + 1, "global_step": handler.global_step}
        path = self._template.fill(**counters, logs={}).path
        if handler.rank == 0:
            _log.info("A save was asked for: %s", path)
        handler.save_async(path, stream=self.state_key)

    def _look_for_file(self) -> None:
        now = time.monotonic()
        if now - self._last_look < self._seconds_between_looks:
            return
        self._last_look = now
        try:
            os.unlink(self.request_file)
            self._requested = True
        except FileNotFoundError:
            pass
        except OSError as error:
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        _log.warning(
            "Cannot take the request file %r: %s. Training goes on, and it is looked for again. Mend that, "
            "ask by a signal, or give SaveOnRequest another request_file.",
            self.request_file,
            error.strerror,
        )

"""OnException: what was trained since the last checkpoint is not lost with an error or Ctrl-C."""

from __future__ import annotations

import logging
import os
from typing import Any

from trainbus.errors import CheckpointError
from trainbus_callbacks.naming import require_counters
from trainbus_callbacks.saving_callback import SavingCallback

__all__ = ["OnException"]

_log = logging.getLogger("trainbus")


class OnException(SavingCallback):
    """
    Save the run when an exception or Ctrl-C ends it amid an epoch.

    The file is marked as interrupted: `Handler.resume` passes it over unless it is called with
    ``interrupted=True``, because the same batch may raise again. It stands at the beginning of the batch
    that was interrupted, random numbers included, which are kept at each batch for that (about 50
    microseconds); if an optimizer had stepped in that batch, it counts and the file stands behind it.
    What the forward pass of the interrupted batch changed, such as the running means of a BatchNorm, is
    not taken back.

    Nothing is saved if an optimizer of the handler was left inside of ``step``: the weights may be
    half-updated, and the checkpoints there are stay the newest. Optimizers that are none of torch's cannot
    be seen inside of theirs.

    It needs ``with handler:`` around the loop, whose exit waits for the file. A failure of this save is a
    note on the exception that ended the run. Rank 0 writes.

    Args:
        filepath: A template such as ``"runs/interrupted.pt"``; its fields are ``epoch`` (1-based),
            ``batch`` (the one at hand or the last one, 1-based) and ``global_step``.

    Raises:
        TypeError: If *filepath* is no path.
        ValueError: If *filepath* has other fields.
    """

    priority = 100  # after what undoes its changes at the same event

    def __init__(self, filepath: str | os.PathLike[str]) -> None:
        super().__init__(filepath)
        require_counters(self._template, "the exception")
        self._is_training = False
        self._ended_by: BaseException | None = None

    @property
    def state_key(self) -> str:
        """Name and file name, so that two of them keep their files apart."""
        return f"OnException({self._template.last!r})"

    def on_train_begin(self, handler: Any) -> None:
        """Have the random state kept in which each batch begins."""
        self.refuse_name_of_another(handler)
        self._is_training, self._ended_by = True, None
        handler.keep_batch_starts()

    def on_train_end(self) -> None:
        """Leave what comes after the training alone: the run is saved."""
        self._is_training = False

    def on_exception(self, handler: Any, epoch: int, batch: int, error: BaseException) -> None:
        """Ask for the save; the exit of the handler waits for it."""
        if not self._is_training:
            return
        what = type(error).__name__
        if handler.is_stepping:
            _log.error(
                "Nothing is saved on %s: an optimizer was inside of its step, so the weights may be "
                "half-updated. Resume from the newest checkpoint there is.",
                what,
            )
            return
        counters = {"epoch": epoch + 1, "batch": batch + 1, "global_step": handler.global_step}
        path = self._template.fill(**counters, logs={}).path
        _log.info("Saving on %s: %s. resume(interrupted=True) takes it.", what, path)
        self._ended_by = error
        handler.save_async(path, stream=self.state_key, interrupted=True)

    def on_checkpoint_failed(self, stream: str, error: CheckpointError) -> None:
        """Tell of the own failure in a note, so that it takes nobody's place."""
        if stream == self.state_key and self._ended_by is not None:
            error.seen = True
            self._ended_by.add_note(f"Moreover, the run was not saved: {error}")

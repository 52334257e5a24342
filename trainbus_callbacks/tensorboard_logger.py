"""TensorBoardLogger: the metrics of a run as curves in TensorBoard."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainbus.callback import Callback
from trainbus.errors import MissingExtraError
from trainbus_callbacks.arguments import require_count
from trainbus_callbacks.scalars import floats_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["TensorBoardLogger"]


class TensorBoardLogger(Callback):
    """
    Write the metrics of epochs, and of every so many batches, to TensorBoard's event files; on rank 0.

    Both have the global step as their axis: an epoch's under their own names, a batch's as
    ``batch/<name>``. A resumed run hides what a killed one had written behind the point where it
    continues. TensorBoard's own thread writes; after an epoch everything before it is in the file.

    Args:
        log_dir: The folder of this run, of the working directory at this moment if it is relative; ``~`` is
            expanded. Use one for each run.
        every: Write a batch's metrics after so many training batches; None: those of epochs only.
            Writing waits for the device that computes the metrics.

    Attributes:
        writer: The ``SummaryWriter`` between ``train_begin`` and ``train_end`` on rank 0, for pictures
            and histograms of your own; else None.

    Raises:
        MissingExtraError: If tensorboard is not installed.
        ValueError: If *every* is no count.
    """

    priority = 40  # after those that add metrics

    def __init__(self, log_dir: str | os.PathLike[str], *, every: int | None = 50) -> None:
        require_count("every", every, "training batches", least=1, or_none=True)
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingExtraError(
                "TensorBoardLogger needs tensorboard, which is not installed. "
                'Run: pip install "trainbus[tensorboard]"'
            )
        self.log_dir = os.fspath(log_dir)
        if "://" not in self.log_dir:  # what has one is no path on this machine
            self.log_dir = os.path.abspath(os.path.expanduser(self.log_dir))
        self.every = every
        self.writer: SummaryWriter | None = None

    def on_train_begin(self, handler: Any, resumed: bool) -> None:
        """Open the event file."""
        if handler.rank != 0:
            return
        # Here and not above: it takes a second, and imports torch.
        from torch.utils.tensorboard import SummaryWriter

        self._close()
        # Steps count completed batches, so what stands at the next one was written by a run that is lost.
        purge_step = (handler.global_step or handler.epoch) + 1 if resumed else None
        self.writer = SummaryWriter(self.log_dir, purge_step=purge_step)

    def on_train_batch_end(self, global_step: int, logs: Mapping[str, Any]) -> None:
        """Write the batch's metrics if it is time to."""
        if self.writer is not None and self.every is not None and global_step % self.every == 0:
            self._write("batch/", logs, global_step)

    def on_epoch_end(self, epoch: int, global_step: int, logs: Mapping[str, Any]) -> None:
        """Write the epoch's metrics, and have all that was written in the file."""
        if self.writer is not None:
            self._write("", logs, global_step or epoch + 1)  # a loop that emits epochs alone stays at step 0
            self.writer.flush()

    def on_train_end(self) -> None:
        """Close the event file."""
        self._close()

    def _write(self, prefix: str, logs: Mapping[str, Any], global_step: int) -> None:
        assert self.writer is not None
        for name, value in floats_of(logs)[0].items():
            self.writer.add_scalar(prefix + name, value, global_step)

    def _close(self) -> None:
        writer, self.writer = self.writer, None
        if writer is not None:
            writer.close()

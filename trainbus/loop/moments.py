"""What happens at each moment of a training: counters move, metrics are kept, the event is emitted.

The generators come here, and loops written by hand through `Handler.emit`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from trainbus.loop.metrics import Logs, Metrics, as_scalar, batch_size
from trainbus.loop.optimizer_steps import OptimizerSteps
from trainbus.loop.progress import Progress
from trainbus.state import rng
from trainbus.state.data_position import DataPositions

if TYPE_CHECKING:
    from trainbus.handler import Handler

__all__ = ["Moments"]

T = TypeVar("T")


class Moments:
    """
    The state of a run's loop, one method for each event that moves it. Training thread.

    The handler is only asked for: its bus, whether it was resumed and why it was stopped, to
    take postponed saves, to wait for what is being copied, to finish writing, and to meet the other ranks.

    Attributes:
        progress: The counters.
        optimizer_steps: What sees the optimizers step.
        metrics: What was logged in this epoch.
        positions: Where the loaders stand.
        training: ``train_begin`` was emitted and ``train_end`` was not.
        trained: ``train_end`` was emitted: a validation from now on is no part of the run.
        epoch_goes_on: The epoch that is about to end is not finished: a longer run continues it.
        by_event: The methods by the name of their event.
    """

    def __init__(self, handler: Handler) -> None:
        self.progress = Progress()
        self.optimizer_steps = OptimizerSteps(None, self.progress)
        self.by_event: dict[str, Callable[..., None]] = {
            "train_begin": self.begin_training,
            "train_end": self.end_training,
            "epoch_begin": self.begin_epoch,
            "epoch_end": self.end_epoch,
            "train_batch_begin": self.open_batch,
            "train_batch_end": self.complete_batch,
            "val_begin": self.begin_validation,
            "val_end": self.end_validation,
            "val_batch_begin": self.open_val_batch,
            "val_batch_end": self.complete_val_batch,
        }
        self._handler = handler
        self._keeps_batch_starts = False
        self._rng_to_restore: Any = None  # a checkpoint's, until the loop is where it stood
        self.reset()

    def reset(self) -> None:
        """Forget what is going on, because a checkpoint is about to be loaded."""
        self.metrics = Metrics()
        self.positions = DataPositions()
        self.training = self.trained = self.epoch_goes_on = False
        self._validating = False
        self._between_steps = False  # in train_batch_end, with the next batch to follow
        self._data: Any = None  # the batch at hand, for the default weight of log()
        self._val_batch: int | None = None  # index of the validation batch at hand
        self._val_data: Any = None
        self._training_logs = Logs()  # of the training batch around a validation
        self._epoch_logs: Logs | None = None  # of the epoch_end being emitted
        self._held_rng: Any = None  # random state from just before the validation under way
        self._rng_at_break: Any = None  # random state from when the body was left, until that is settled
        self._rng_at_batch: Any = None  # random state from before the batch at hand was fetched
        self._redo_validation = False  # the loaded checkpoint was taken in a validation

    def watch(self, optimizers: Any) -> None:
        """See the steps of these optimizers (one, a dict, or None) from now on, of no others."""
        self.optimizer_steps.stop()
        self.optimizer_steps = OptimizerSteps(optimizers, self.progress)

    # -- training

    def begin_training(self, **payload: Any) -> None:
        """Emit ``train_begin`` and restore what a loaded checkpoint left to be restored."""
        self.training, self.trained, self._held_rng = True, False, None
        self.progress.total_epochs = payload.setdefault("total_epochs", self.progress.total_epochs)
        payload.setdefault("resumed", self._handler.resumed)
        self._emit("train_begin", **payload)
        self._handler.meet("train_begin")
        # Receivers of train_begin may draw random numbers; the run that was killed drew none here.
        self.restore_rng()
        if not self.progress.in_body:
            self._rng_to_restore = None

    def end_training(self, **payload: Any) -> None:
        """Wait for pending saves, then emit ``train_end``."""
        self._handler.take_postponed_saves()
        self._handler.finish_writing()
        self.training, self.trained = False, True
        payload.setdefault("reason", self._handler.stop_reason)
        self._emit("train_end", **payload)

    def begin_epoch(self, **payload: Any) -> None:
        """Count from zero in a new epoch and emit ``epoch_begin``."""
        self.progress.epoch = payload.setdefault("epoch", self.progress.epoch)
        self.progress.begin_epoch()
        self.metrics.begin_epoch()
        self.positions.new_epoch()
        self._emit("epoch_begin", **payload)
        self.progress.in_body = True

    def end_epoch(self, **payload: Any) -> None:
        """Emit ``epoch_end`` with the epoch's logs over all ranks; then the next epoch is due."""
        progress = self.progress
        progress.epoch = payload.setdefault("epoch", progress.epoch)
        self._handler.fence()
        self._handler.take_postponed_saves()
        self._handler.meet(f"the end of epoch {progress.epoch + 1}")
        self._epoch_logs = payload["logs"] = self.metrics.epoch_logs().joined(payload.get("logs"))
        progress.epoch_complete = not self.epoch_goes_on
        try:
            self._emit("epoch_end", **payload)
            self._handler.meet(f"epoch_end of epoch {progress.epoch + 1}")
        finally:
            self._epoch_logs = None
            if progress.epoch_complete:
                progress.end_epoch()
                self.metrics.begin_epoch()

    def keep_batch_starts(self) -> None:
        """Keep the random state from before each batch, for checkpoints after which that batch repeats."""
        self._keeps_batch_starts = True

    def fetch_batch(self) -> None:
        """A batch is about to be fetched, which may draw random numbers."""
        if self._keeps_batch_starts:
            self._rng_at_batch = rng.capture()

    def open_batch(self, data: Any = None, **payload: Any) -> None:
        """Hand a batch to the body: ``train_batch_begin``."""
        self.progress.batches = payload.setdefault("batch", self.progress.batches)
        self.progress.open_batch()
        self._rng_to_restore = self._rng_at_break = None
        self.metrics.begin_training_batch()
        self._data = data
        self._emit("train_batch_begin", **payload)

    def complete_batch(self, *, ends_pass: bool = False, **payload: Any) -> None:
        """Count the batch and emit ``train_batch_end``; with *ends_pass* its loader was left."""
        progress = self.progress
        if not progress.batch_open:  # a loop by hand that emits ends only
            self.metrics.begin_batch()
            progress.in_batch = True
            progress.batch = progress.batches = payload.get("batch", progress.batches)
        if self.optimizer_steps.are_replayed:
            progress.note_stepped()
        progress.complete_batch()
        progress.global_step = payload.setdefault("global_step", progress.global_step)
        payload.setdefault("batch", progress.batch)
        payload["logs"] = self.metrics.batch_logs.joined(payload.get("logs"))
        self.positions.advanced("train")
        if ends_pass:
            self.positions.closed("train")
        # After a pass that was left, anything may come before the next step.
        self._between_steps = not ends_pass
        try:
            self._emit("train_batch_end", **payload)
            if not self.accumulating:
                self._handler.take_postponed_saves()
            self._handler.meet(f"the end of step {progress.global_step}")
        finally:
            self._between_steps = False
            self._data = self._rng_at_break = self._rng_at_batch = None
            progress.leave_batch()

    def leave_batch(self) -> None:
        """Let go of a batch that was left without a step: it does not count."""
        self.progress.leave_batch()
        self.positions.closed("train")
        self._data = self._rng_at_break = self._rng_at_batch = None

    def note_break(self) -> None:
        """Keep the random state of this moment: the batch left now is completed by a later call."""
        self._rng_at_break = rng.capture()

    @property
    def accumulating(self) -> bool:
        """True in a batch whose gradients no optimizer has used yet."""
        progress = self.progress
        return progress.in_batch and not progress.stepped and self._gradients_pending()

    @property
    def must_wait(self) -> bool:
        """
        True where a save that can wait does: until gradients are used, or a validation is over.

        Of a validation in the body of a training batch, that is: the batch counts already, so a run
        that loads the file would not come there again.
        """
        return self.accumulating or (self._validating and self.progress.batch_open)

    @property
    def optimizers_before_step(self) -> Sequence[Any]:
        """The optimizers of which only a forward and a backward pass come before the next step; or none."""
        return self.optimizer_steps.optimizers if self._between_steps else ()

    @property
    def amid_accumulation(self) -> bool:
        """True between two batches if the last one's gradients were not used: no checkpoint holds them."""
        progress = self.progress
        return progress.batches > 0 and not progress.last_stepped and self._gradients_pending()

    def _gradients_pending(self) -> bool:
        has_gradients = self.optimizer_steps.has_gradients
        if self.progress.batch_open:  # the body may step yet
            return self.progress.ever_stepped or has_gradients()
        return not self.progress.steps_stay_away and has_gradients()

    # -- validation

    def hold_rng(self, hold: bool = True) -> None:
        """
        Keep the random state of this moment for saves until ``val_end``, or with False no longer.

        A validation is done again as a whole by the run that such a save is loaded into. One in
        the body of a training batch is not, so nothing is held there; nor is one behind the training, so
        what is held for one that was stopped stays.
        """
        if self.trained:
            return
        if not hold:
            self._held_rng = None
        elif not self.progress.batch_open:
            if self._redo_validation and self.training:
                # All devices; the loaders' positions restore the CPU's alone.
                self.restore_rng()
            self._handler.take_postponed_saves()
            self._held_rng = rng.capture()

    def open_validation(self, loader: Iterable[T]) -> Iterator[T] | None:
        """Return the batches of a validation; None if it was over when the loaded checkpoint was taken."""
        self.hold_rng()  # the iterator that is made next may draw
        if not self.training:
            # Nothing is continued before or after the training, and the places of its loaders stay.
            return DataPositions().open(loader, "val")
        iterator = self.positions.open(loader, "val", restore_rng=self.restore_rng)
        if self.positions.finished("val"):
            self.hold_rng(False)
            return None
        return iterator

    def begin_validation(self, **payload: Any) -> None:
        """Emit ``val_begin``."""
        # Weights may be exchanged for a validation, as for averaged ones.
        self._handler.fence()
        if self._held_rng is None:
            self.hold_rng()
        self._validating = True
        if self.training:
            self._redo_validation = False
        self._training_logs = self.metrics.begin_validation()
        self._emit("val_begin", **payload)

    def end_validation(self, **payload: Any) -> None:
        """Emit ``val_end`` with this rank's means, named ``val_...``."""
        if not self.trained:  # else a run that was stopped amid a validation would seem to have ended it
            self.positions.closed("val")
        self.hold_rng(False)
        logs = self.metrics.end_validation(
            self._training_logs, within_batch=self.progress.batch_open, counts=not self.trained
        )
        payload["logs"] = logs.joined(payload.get("logs"))
        try:
            self._emit("val_end", **payload)
        finally:
            self._validating = False

    def drop_validation(self) -> None:
        """Forget a validation that was cut short; saves go on holding the state before it."""
        self._validating = False
        self._val_batch = self._val_data = None
        self.metrics.drop_validation(self._training_logs)

    def open_val_batch(self, batch: int = 0, data: Any = None, **payload: Any) -> None:
        """Hand a validation batch to the body: ``val_batch_begin``."""
        self._val_batch, self._val_data = batch, data
        if self.training:
            self._rng_to_restore = None
        self.metrics.begin_batch()
        self._emit("val_batch_begin", batch=batch, **payload)

    def complete_val_batch(self, **payload: Any) -> None:
        """Emit ``val_batch_end``."""
        payload.setdefault("batch", self._val_batch or 0)
        payload["logs"] = self.metrics.batch_logs.joined(payload.get("logs"))
        if not self.trained:
            self.positions.advanced("val")
        try:
            self._emit("val_batch_end", **payload)
        finally:
            self._val_batch = self._val_data = None

    # -- logging

    def log(self, scalars: Mapping[str, Any], weight: Any) -> None:
        """Add metrics to the batch at hand, or outside of one to the epoch."""
        if self._val_batch is not None:
            self._log_each(self.metrics.log_validation, scalars, weight, self._val_data)
        elif self.progress.in_batch and not self._validating:
            self._log_each(self.metrics.log_batch, scalars, weight, self._data)
        else:
            for name, value in scalars.items():
                self.metrics.log_epoch(name, value)
                if self._epoch_logs is not None:
                    self._epoch_logs.put(name, value)

    def _log_each(
        self,
        log: Callable[[str, Any, Any], None],
        scalars: Mapping[str, Any],
        weight: Any,
        batch: Any,
    ) -> None:
        weight = batch_size(batch) if weight is None else as_scalar("weight", weight)
        for name, value in scalars.items():
            log(name, value, weight)

    # -- checkpoints

    def collect(self) -> dict[str, Any]:
        """Return ``progress``, ``rng`` and ``data`` of a checkpoint taken now."""
        progress = self.progress
        metrics = Metrics() if progress.epoch_complete else self.metrics
        repeats = progress.batch_in_body_repeats
        return {
            "progress": {
                **progress.state_dict(),
                "in_validation": self._held_rng is not None and (self.training or self.trained),
                "metrics": metrics.state_dict(before_batch=repeats),
            },
            "rng": self._held_rng
            or (self._rng_at_batch if repeats else None)
            or self._rng_at_break
            or rng.capture(),
            "data": self.positions.state_dict(
                completed=int(progress.batch_in_body_counts),
                in_hand=int(repeats),
                rng_is_before=repeats and self._held_rng is None and self._rng_at_batch is not None,
            ),
        }

    def restore(self, state: Mapping[str, Any], wanted: Collection[str]) -> None:
        """Stand where a checkpoint stood, as far as *wanted* says."""
        if "rng" in wanted:
            rng.restore(state["rng"])
        if "progress" in wanted:
            self.reset()
            self.progress.load_state_dict(state["progress"])
            self.metrics.load_state_dict(state["progress"]["metrics"])
            self._redo_validation = state["progress"]["in_validation"]
            # Again where the loop continues, because the script may draw random numbers until then.
            self._rng_to_restore = state["rng"] if "rng" in wanted else None
        if "data" in wanted:
            self.positions.load_state_dict(state["data"])

    def restore_rng(self) -> None:
        """Restore a loaded checkpoint's random state, until the loop is where the checkpoint was taken."""
        if self._rng_to_restore is not None:
            rng.restore(self._rng_to_restore)

    def _emit(self, name: str, **payload: Any) -> None:
        self._handler.bus.emit(name, self._handler, **payload)

"""The loops of a training as generators: they hand out epochs and batches, and emit what happens.

The rule of this file: events are emitted only while a generator is being advanced, never
while it is being closed, because an exception raised in a closing generator is discarded by
the interpreter. A body left by ``break`` is therefore only marked, and the next call into
the handler (`Loop.settle`) finishes what it left open.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from trainbus.errors import TrainbusError
from trainbus.loop.metrics import Logs, Metrics
from trainbus.loop.optimizer_steps import OptimizerSteps
from trainbus.loop.progress import Progress
from trainbus.state import rng
from trainbus.state.data_position import DataPositions

if TYPE_CHECKING:
    from trainbus.handler import Handler

__all__ = ["Loop"]

T = TypeVar("T")

_END = object()


class Loop:
    """
    The state machine behind `Handler.epochs`, `batches`, `val_batches` and `steps`.

    Everything runs on the training thread. The handler is only asked for: its bus, whether it
    was stopped or resumed, to take postponed saves, and to finish writing.

    Attributes:
        progress: The counters.
        optimizer_steps: What sees the optimizers step.
        metrics: What was logged in this epoch.
        positions: Where the loaders stand.
        total_batches: Length of the training loader opened last; None when unknown.
        training: ``train_begin`` was emitted and ``train_end`` was not.
        points: What `Handler.emit` calls for the events that move the counters.
    """

    def __init__(self, handler: Handler, optimizers: Any) -> None:
        self.handler = handler
        self.progress = Progress()
        self.optimizer_steps = OptimizerSteps(optimizers, self.progress)
        self.metrics = Metrics()
        self.positions = DataPositions()
        self.training = False
        self.total_batches: int | None = None
        self.points: dict[str, Callable[..., None]] = {
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
        self._validating = False
        self._cut_short = False  # stop() ended this epoch before its batches or validation did
        self._target: int | None = None  # global step at which steps() ends
        self._data: Any = None  # the batch that the body holds, for the default weight of log()
        self._left_batches = self._left_validation = False  # left by break, not yet settled
        self._training_logs = Logs()  # logs of the train batch around a validation
        self._val_batch: int | None = None  # index of the open validation batch
        self._val_data: Any = None
        self._logs: Logs | None = None  # of the epoch_end being emitted
        self._held_rng: Any = None  # random state from just before the validation under way
        self._rng_to_restore: Any = None  # a checkpoint's, until the loop is where it stood
        self._inner: weakref.ref[Generator[Any, None, None]] | None = None  # the batches() handed out last
        self._round = 0  # counts loads; a generator from before one must not go on

    # -- the generators

    def epochs(self, n: int) -> Iterator[int]:
        """Hand out the epochs up to the run's total *n*."""
        _require_count("epochs", n)
        return self._epochs(n)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Hand out the training batches of one pass over *loader*."""
        generator = self._batches(loader)
        # Weak: a break must drop the last reference, so that the generator learns of it.
        self._inner = weakref.ref(generator)
        return generator

    def val_batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Hand out the validation batches of one pass over *loader*."""
        return self._val_batches(loader)

    def steps(self, n: int, loader: Iterable[T]) -> Iterator[T]:
        """Hand out training batches, round and round *loader*, up to the run's total *n*."""
        _require_count("steps", n)
        return self._steps(n, loader)

    def _epochs(self, n: int) -> Iterator[int]:
        self._target = None
        mine = self._begin_training(n)
        while self.progress.epoch < n and not self.handler.stopped:
            self._begin_epoch_unless_continued()
            yield self.progress.epoch
            self._require_same_round(mine, "epochs")
            self._close_inner()
            if self._cut_short:
                break
            self.end_epoch()
        self.end_training()

    def _steps(self, n: int, loader: Iterable[T]) -> Iterator[T]:
        self._target = n
        mine = self._begin_training(None)
        while self.progress.global_step < n and not self.handler.stopped:
            self._begin_epoch_unless_continued()
            before = self.progress.global_step, self.progress.batches
            yield from self._batches(loader)
            self._require_same_round(mine, "steps")
            if self._cut_short:
                break
            if before == (self.progress.global_step, 0):
                raise TrainbusError(
                    f"Cannot train for {n} steps: the loader {loader!r} gave no batch in a whole pass. "
                    "Give steps() something that can be iterated over again and again."
                )
            self.end_epoch()
        self.end_training()

    def _batches(self, loader: Iterable[T]) -> Generator[T, None, None]:
        self.settle()
        if not self.progress.epoch_begun:
            raise TrainbusError(
                "batches() was called outside of an epoch. Put it into the body of "
                "`for epoch in handler.epochs(n):`."
            )
        if self._cut_short:
            return
        mine = self._round
        self.total_batches = _length(loader)
        iterator = self.positions.open(loader, "train", restore_rng=self._restore_rng)
        while not self._at_target():
            if self.handler.stopped and not self._amid_accumulation():
                self._cut_short = not self._all_handed_out()
                break
            batch: Any = next(iterator, _END)
            if batch is _END:
                self.positions.closed("train")
                break
            self.open_batch(batch)
            try:
                yield batch
            except GeneratorExit:
                self._left_batches = self._round == mine
                raise
            self._require_same_round(mine, "batches")
            self.complete_batch()

    def _val_batches(self, loader: Iterable[T]) -> Iterator[T]:
        self.settle()
        if self._cut_short:
            return
        mine = self._round
        self.begin_validation()
        index = 0
        for batch in self.positions.open(loader, "val"):
            if self.handler.stopped:
                self._cut_validation_short()
                return
            self.open_val_batch(index, batch)
            try:
                yield batch
            except GeneratorExit:
                self._left_validation = self._round == mine
                raise
            self._require_same_round(mine, "val_batches")
            self.complete_val_batch()
            index += 1
        self.positions.closed("val")
        self.end_validation()

    # -- what happens at each point; hand-written loops come here through Handler.emit

    def begin_training(self, **payload: Any) -> None:
        """Emit ``train_begin`` and restore what a loaded checkpoint left to be restored."""
        self.training = True
        self._cut_short = False
        payload.setdefault("total_epochs", self.progress.total_epochs)
        self._emit("train_begin", resumed=self.handler.resumed, **payload)
        # Receivers of train_begin may draw random numbers; the run that was killed drew none here.
        self._restore_rng(keep=self.progress.epoch_begun)

    def end_training(self, **payload: Any) -> None:
        """Wait for pending saves, then emit ``train_end``."""
        self.handler.take_postponed_saves()
        self.handler.finish_writing()
        self.training = False
        payload.setdefault("reason", self.handler.stop_reason)
        self._emit("train_end", **payload)

    def begin_epoch(self, **payload: Any) -> None:
        """Count from zero in a new epoch and emit ``epoch_begin``."""
        self.progress.epoch = payload.setdefault("epoch", self.progress.epoch)
        self.progress.begin_epoch()
        self.metrics.begin_epoch()
        self.positions.new_epoch()
        self._emit("epoch_begin", **payload)

    def end_epoch(self, **payload: Any) -> None:
        """Emit ``epoch_end`` with the epoch's logs over all ranks; then the next epoch is due."""
        progress = self.progress
        progress.epoch = payload.setdefault("epoch", progress.epoch)
        self.handler.take_postponed_saves()
        self._logs = payload["logs"] = _joined(self.metrics.epoch_logs(), payload.get("logs"))
        # The last pass of steps() may end before its loader does: that epoch goes on in a longer run.
        progress.epoch_complete = not self._at_target() or self.positions.finished("train")
        try:
            self._emit("epoch_end", **payload)
        finally:
            self._logs = None
            if progress.epoch_complete:
                progress.end_epoch()
                self.metrics.begin_epoch()

    def open_batch(self, data: Any = None, **payload: Any) -> None:
        """Hand a batch to the body: ``train_batch_begin``."""
        self.progress.batches = payload.setdefault("batch", self.progress.batches)
        self.progress.open_batch()
        self.metrics.begin_batch()
        self._data = data
        self._emit("train_batch_begin", **payload)

    def complete_batch(self, **payload: Any) -> None:
        """Count the batch and emit ``train_batch_end``."""
        progress = self.progress
        if not progress.batch_open:  # a hand-written loop that emits ends only
            self.metrics.begin_batch()
            progress.in_batch = True
            progress.batch = progress.batches = payload.get("batch", progress.batches)
        progress.complete_batch()
        progress.global_step = payload.setdefault("global_step", progress.global_step)
        payload.setdefault("batch", progress.batch)
        payload["logs"] = _joined(self.metrics.batch_logs, payload.get("logs"))
        self._data = None
        self.positions.advanced("train")
        try:
            self._emit("train_batch_end", **payload)
            if progress.stepped:
                self.handler.take_postponed_saves()
        finally:
            progress.leave_batch()

    def begin_validation(self, **payload: Any) -> None:
        """Emit ``val_begin``. A save from here to ``val_end`` lets the whole validation be done again."""
        if not self.progress.batch_open:
            self.handler.take_postponed_saves()
            self._held_rng = rng.capture()
        self._validating = True
        self._training_logs = self.metrics.begin_validation()
        self._emit("val_begin", **payload)

    def end_validation(self, **payload: Any) -> None:
        """Emit ``val_end`` with this rank's means, named ``val_…``."""
        logs = self.metrics.end_validation(self._training_logs, within_batch=self.progress.batch_open)
        payload["logs"] = _joined(logs, payload.get("logs"))
        self._validating = False
        self._held_rng = None
        self._emit("val_end", **payload)

    def open_val_batch(self, batch: int = 0, data: Any = None, **payload: Any) -> None:
        """Hand a validation batch to the body: ``val_batch_begin``."""
        self._val_batch, self._val_data = batch, data
        self.metrics.begin_batch()
        self._emit("val_batch_begin", batch=batch, **payload)

    def complete_val_batch(self, **payload: Any) -> None:
        """Emit ``val_batch_end``."""
        payload.setdefault("batch", self._val_batch or 0)
        self._val_batch = self._val_data = None
        payload["logs"] = _joined(self.metrics.batch_logs, payload.get("logs"))
        self.positions.advanced("val")
        self._emit("val_batch_end", **payload)

    @property
    def accumulating(self) -> bool:
        """True in a batch whose gradients no optimizer has used yet."""
        progress = self.progress
        return progress.in_batch and not progress.stepped and self._gradients_pending()

    # -- logging

    def log(self, scalars: Mapping[str, Any], weight: float | None) -> None:
        """Add metrics to the batch at hand, or outside of one to the epoch."""
        self.settle()
        if self._val_batch is not None:
            self._log_each(self.metrics.log_validation, scalars, weight, self._val_data)
        elif self.progress.batch_open and not self._validating:
            self._log_each(self.metrics.log_batch, scalars, weight, self._data)
        else:
            for name, value in scalars.items():
                self.metrics.log_epoch(name, value)
                if self._logs is not None:
                    self._logs.put(name, value)

    def _log_each(
        self,
        log: Callable[[str, Any, float], None],
        scalars: Mapping[str, Any],
        weight: float | None,
        batch: Any,
    ) -> None:
        if weight is None:
            weight = batch_size(batch)
        for name, value in scalars.items():
            log(name, value, weight)

    # -- leaving, settling, loading

    def settle(self) -> None:
        """Finish what a ``break`` left open. A training batch counts if an optimizer stepped in it."""
        if self._left_validation:
            self._left_validation = False
            self.complete_val_batch()
            self.positions.closed("val")
            self.end_validation()
        if self._left_batches:
            self._left_batches = False
            if self.progress.stepped:
                self.complete_batch()
            else:
                self.progress.leave_batch()
            self.positions.closed("train")

    def reset(self) -> None:
        """Forget the loops under way, because a checkpoint is about to be loaded."""
        self._round += 1
        self._left_batches = self._left_validation = False
        self.training = self._validating = self._cut_short = False
        self._val_batch = self._val_data = self._inner = self._data = self._logs = None
        self.metrics = Metrics()
        self.positions = DataPositions()

    def collect(self) -> dict[str, Any]:
        """Return ``progress``, ``rng`` and ``data`` of a checkpoint taken now."""
        progress = self.progress
        metrics = Metrics() if progress.epoch_complete else self.metrics
        return {
            "progress": {**progress.state_dict(), "metrics": metrics.state_dict()},
            # A validation under way is done again as a whole, so the file holds the state before it.
            "rng": self._held_rng or rng.capture(),
            "data": self.positions.state_dict(completed=1 if progress.batch_in_body_counts else 0),
        }

    def restore(self, state: Mapping[str, Any], wanted: Collection[str]) -> None:
        """Stand where a checkpoint stood, as far as *wanted* says."""
        if "rng" in wanted:
            rng.restore(state["rng"])
        if "progress" in wanted:
            self.reset()
            self.progress.load_state_dict(state["progress"])
            self.metrics.load_state_dict(state["progress"]["metrics"])
            # Again where the loop continues, because the script may draw random numbers until then.
            self._rng_to_restore = state["rng"] if "rng" in wanted else None
        if "data" in wanted:
            self.positions.load_state_dict(state["data"])

    # -- inside

    def _begin_training(self, total_epochs: int | None) -> int:
        self.settle()
        self.progress.total_epochs = total_epochs
        self.begin_training()
        return self._round

    def _begin_epoch_unless_continued(self) -> None:
        # A continued epoch's epoch_begin was emitted by the run that was interrupted.
        if not self.progress.epoch_begun:
            self.begin_epoch()

    def _restore_rng(self, *, keep: bool = False) -> None:
        if self._rng_to_restore is not None:
            rng.restore(self._rng_to_restore)
        if not keep:
            self._rng_to_restore = None

    def _close_inner(self) -> None:
        inner = self._inner() if self._inner is not None else None
        if inner is not None:
            inner.close()
        self.settle()

    def _cut_validation_short(self) -> None:
        self._cut_short = True
        self._validating = False
        self.metrics.drop_validation(self._training_logs)

    def _amid_accumulation(self) -> bool:
        # Stopping here would lose gradients that no checkpoint holds.
        progress = self.progress
        return progress.batches > 0 and not progress.last_stepped and self._gradients_pending()

    def _gradients_pending(self) -> bool:
        return self.progress.ever_stepped or self.optimizer_steps.has_gradients()

    def _at_target(self) -> bool:
        return self._target is not None and self.progress.global_step >= self._target

    def _all_handed_out(self) -> bool:
        return self.total_batches is not None and self.positions.consumed("train") >= self.total_batches

    def _require_same_round(self, mine: int, what: str) -> None:
        if mine != self._round:
            raise TrainbusError(
                f"Cannot continue this {what}() loop: a checkpoint was loaded into its handler meanwhile, "
                "which moved the counters. Start a new loop, or load with only=('module', ...)."
            )

    def _emit(self, name: str, **payload: Any) -> None:
        self.handler.bus.emit(name, self.handler, **payload)


def batch_size(batch: Any) -> float:
    """Return the first dimension of the first tensor in *batch* (nested), or 1 without one."""
    tensor = _first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.ndim else 1


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((t for t in map(_first_tensor, batch) if t is not None), None)
    return None


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _joined(logs: Logs, given: Mapping[str, Any] | None) -> Logs:
    for name, value in (given or {}).items():
        logs.put(name, value)
    return logs


def _require_count(what: str, n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"{what}(n) needs the run's total as an int of at least 0, got {n!r}.")

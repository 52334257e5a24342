"""The loops of a training as generators: they hand out epochs and batches.

The rule of this file: events are emitted only while a generator is being advanced, never
while it is being closed, because an exception raised in a closing generator is discarded by
the interpreter. A body left by ``break`` is therefore only marked, and the next call into
the handler (`Loop.settle`) finishes what it left open.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from trainbus.errors import TrainbusError
from trainbus.loop.moments import Moments
from trainbus.state.sampler_epochs import SamplerEpochs

if TYPE_CHECKING:
    from trainbus.handler import Handler

__all__ = ["Loop"]

T = TypeVar("T")

_END = object()


class Loop:
    """
    What `Handler.epochs`, `batches`, `val_batches` and `steps` hand out. Training thread.

    Attributes:
        total_batches: Length of the training loader opened last; None when unknown.
    """

    def __init__(self, handler: Handler, moments: Moments) -> None:
        self.total_batches: int | None = None
        self._handler = handler
        self._moments = moments
        self._progress = moments.progress
        self._sampler_epochs = SamplerEpochs()
        self._target: int | None = None  # global step at which steps() ends
        self._inner: weakref.ref[Generator[Any, None, None]] | None = None  # the batches() handed out last
        self._validations = weakref.WeakSet[Generator[Any, None, None]]()  # the val_batches() handed out
        self._round = 0  # counts loads; a generator from before one must not go on
        self._pass = 0  # counts batches(); one must not go on after another was begun
        self.reset()

    def reset(self) -> None:
        """Let the generators handed out so far end, because a checkpoint is about to be loaded."""
        self._round += 1
        self._left_batches = self._left_validation = False  # left by break, not yet settled
        self._cut_short = False  # stop() ended this epoch before its batches or validation did
        self._rest: tuple[Any, Iterator[Any]] | None = None  # a loader not used up, and its iterator

    def close(self) -> None:
        """Let go of the loader that is not used up, whose workers would go on."""
        self._rest = None

    def settle(self) -> None:
        """Finish what a ``break`` left open. A training batch counts if an optimizer stepped in it."""
        moments = self._moments
        if self._left_validation:
            self._left_validation = False
            moments.complete_val_batch()
            moments.end_validation()
        if self._left_batches:
            self._left_batches = False
            if self._progress.stepped:
                moments.complete_batch(ends_pass=True)
            else:
                moments.leave_batch()

    def interrupt(self) -> None:
        """
        Leave what is open as it is, because an exception ended the loop: it has closed the generators too.

        The batch at hand stays open, so that a checkpoint stands before it, and a validation is done again.
        """
        self._left_batches = False
        if self._left_validation:
            self._left_validation = False
            self._moments.drop_validation()

    # -- what users call

    def epochs(self, n: int) -> Iterator[int]:
        """Hand out the epochs up to the run's total *n*."""
        _require_count("epochs", n)
        return self._epochs(n)

    def steps(self, n: int, loader: Iterable[T]) -> Iterator[T]:
        """Hand out training batches, round and round *loader*, up to the run's total *n*."""
        _require_count("steps", n)
        return self._steps(n, loader)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Hand out the training batches of one pass over *loader*."""
        generator = self._batches(loader)
        # Weak: a break must drop the last reference, so that the generator learns of it.
        self._inner = weakref.ref(generator)
        return generator

    def val_batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Hand out the validation batches of one pass over *loader*."""
        generator = self._val_batches(loader)
        self._validations.add(generator)
        return generator

    # -- the generators

    def _epochs(self, n: int) -> Iterator[int]:
        mine = self._begin_training(total_epochs=n, target=None)
        while self._progress.epoch < n and not self._handler.stopped:
            self._begin_epoch_unless_continued()
            yield self._progress.epoch
            self._require_same_round(mine, "epochs")
            self._close_inner()
            if self._cut_short:
                break
            self._moments.end_epoch()
        self._moments.end_training()

    def _steps(self, n: int, loader: Iterable[T]) -> Iterator[T]:
        mine = self._begin_training(total_epochs=None, target=n)
        while self._progress.global_step < n and not self._handler.stopped:
            self._begin_epoch_unless_continued()
            before = self._progress.global_step, self._progress.batches
            yield from self._batches(loader)
            self._require_same_round(mine, "steps")
            if self._cut_short:
                break
            if before == (self._progress.global_step, 0):
                raise TrainbusError(
                    f"Cannot train for {n} steps: the loader {loader!r} gave no batch in a whole pass. "
                    "Give steps() something that can be iterated over again and again."
                )
            self._moments.end_epoch()
        self._moments.end_training()

    def _batches(self, loader: Iterable[T]) -> Generator[T, None, None]:
        # One that a variable keeps alive was left by break, or else it will find out.
        self._left_batches = self._left_batches or self._progress.batch_open
        self._end_held_validations()
        if not self._progress.epoch_begun:
            raise TrainbusError(
                "batches() was called outside of an epoch. Put it into the body of "
                "`for epoch in handler.epochs(n):`."
            )
        if self._cut_short:
            return
        self._pass += 1
        mine, this_pass, moments = self._round, self._pass, self._moments
        self.total_batches = _length(loader)
        iterator = self._rest_of(loader)
        if iterator is None:
            self._sampler_epochs.tell(loader, self._progress.epoch)
            iterator = moments.positions.open(loader, "train", restore_rng=moments.restore_rng)
        try:
            while not self._is_over():
                moments.fetch_batch()
                batch: Any = next(iterator, _END)
                if batch is _END:
                    moments.positions.closed("train")
                    return
                moments.open_batch(batch)
                try:
                    yield batch
                except GeneratorExit:
                    self._left_batches = (self._round, self._pass) == (mine, this_pass)
                    moments.note_break()
                    raise
                self._require_same_round(mine, "batches")
                self._require_same_pass(this_pass)
                self._end_held_validations()
                moments.complete_batch()
        finally:
            # Behind the loop, weights may be changed without a step.
            self._handler.fence()
        self._rest = loader, iterator

    def _val_batches(self, loader: Iterable[T]) -> Generator[T, None, None]:
        self._end_held_validations()
        mine, moments = self._round, self._moments
        # Whoever tests a run that was stopped wants all batches.
        if self._cut_short and moments.training:
            return
        iterator = moments.open_validation(loader)
        if iterator is None:
            return
        moments.begin_validation()
        for index, batch in enumerate(iterator):
            if self._handler.stopped and moments.training:
                self._cut_short = True
                moments.drop_validation()
                return
            moments.open_val_batch(index, batch)
            try:
                yield batch
            except GeneratorExit:
                self._left_validation = self._round == mine
                raise
            self._require_same_round(mine, "val_batches")
            moments.complete_val_batch()
        moments.end_validation()

    # -- inside

    def _begin_training(self, *, total_epochs: int | None, target: int | None) -> int:
        self.settle()
        self._cut_short, self._target = False, target
        self._moments.epoch_goes_on = False
        self._moments.begin_training(total_epochs=total_epochs)
        return self._round

    def _begin_epoch_unless_continued(self) -> None:
        # A continued epoch's epoch_begin was emitted by the run that was interrupted.
        if not self._progress.epoch_begun:
            self._rest = None
            self._moments.begin_epoch()

    def _close_inner(self) -> None:
        inner = self._inner() if self._inner is not None else None
        if inner is not None:
            inner.close()
        self._end_held_validations()

    def _end_held_validations(self) -> None:
        """Finish what a ``break`` left open; also a validation that a variable, or tqdm, keeps alive."""
        for one in list(self._validations):
            if inspect.getgeneratorstate(one) == inspect.GEN_SUSPENDED:
                one.close()
        self.settle()

    def _is_over(self) -> bool:
        """Tell whether batches() must end although its loader may have more."""
        moments = self._moments
        if self._target is not None and self._progress.global_step >= self._target:
            # The epoch goes on in a run with more steps, unless this was its last batch.
            moments.epoch_goes_on = not self._all_handed_out()
            return True
        # While gradients accumulate, stopping would lose them: no checkpoint holds them.
        if self._handler.stopped and not moments.amid_accumulation:
            self._cut_short = not self._all_handed_out()
            return True
        return False

    def _rest_of(self, loader: Any) -> Iterator[Any] | None:
        """Return what an earlier loop over *loader* in this epoch left when its target or a stop ended it."""
        rest, self._rest = self._rest, None
        return rest[1] if rest is not None and rest[0] is loader else None

    def _all_handed_out(self) -> bool:
        consumed = self._moments.positions.consumed("train")
        return self.total_batches is not None and consumed >= self.total_batches

    def _require_same_pass(self, mine: int) -> None:
        if mine != self._pass:
            raise TrainbusError(
                "Cannot continue this batches() loop: another one was begun before it ended, and each batch "
                "counts once. To train on two loaders together, give batches() one iterable of pairs."
            )

    def _require_same_round(self, mine: int, what: str) -> None:
        if mine != self._round:
            raise TrainbusError(
                f"Cannot continue this {what}() loop: a checkpoint was loaded into its handler meanwhile, "
                "which moved the counters. Start a new loop, or load with only=('module', ...)."
            )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


def _require_count(what: str, n: Any) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise ValueError(f"{what}(n) needs the run's total as an int of at least 0, got {n!r}.")

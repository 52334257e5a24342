"""ModelCheckpoint: asks at the right moments whether to save, and the handler to do it. Never writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from trainbus import ranks
from trainbus.checkpoint.retention import Retention
from trainbus.errors import PayloadError
from trainbus_callbacks.arguments import checked_keep, require_bools
from trainbus_callbacks.best_score import ScoreLedger, check_monitor, is_comparable, resolve_mode
from trainbus_callbacks.saving_advice import SavingAdvice
from trainbus_callbacks.saving_callback import SavingCallback
from trainbus_callbacks.saving_choice import Choice, Chooser
from trainbus_callbacks.saving_continuation import Continuation
from trainbus_callbacks.saving_schedule import Schedule
from trainbus_callbacks.triggers import Moment, Trigger, in_short, trigger_of

__all__ = ["ModelCheckpoint"]


class ModelCheckpoint(SavingCallback):
    """
    Save at the end of epochs, or every so many batches; all, or only what is better than before.

    Called behind all that change the state at an event (priority 100), on the training thread, so that the
    file holds what they did. It asks `handler.save_async` and goes on: only a copy of the state is waited
    for, and an earlier save if ``max_pending`` are unfinished. With several ranks all save together: rank 0
    writes, or each its part where the state is divided. Where a metric, the time or a
    predicate decides, rank 0 does, and tells the others in one message; counts of steps and epochs need none.

    Args:
        filepath: A template such as ``"runs/best_{epoch:03d}_{val_loss:.4f}.pt"``. Fields are ``epoch``
            (1-based), ``batch`` (completed in this epoch), ``global_step`` and each metric of the logs.

        monitor: The metric that tells which file is best.

        save_best_only:
            Save only if *monitor* is strictly better than ever before. NaN and inf never are.

        save_weights_only: Save the module's ``state_dict()`` alone. Such a file cannot be resumed from.

        mode:
            ``"min"`` or ``"max"``: which *monitor* is better. ``"auto"``: ``"max"`` if its name contains
            ``acc`` or starts with ``fmeasure``, else ``"min"``; warns where that is a guess.

        save_freq:
            ``"epoch"``, or a number of training batches, counted over the whole run. *monitor* is then
            looked for in the logs of the batch. Or `Every(epochs=5)`, `Every(steps=1000)`,
            `Every(minutes=10)`, a predicate that takes a `Moment` and is asked after each training
            batch, or several of these with ``|``.

        initial_value_threshold:
            Save nothing until *monitor* has once been strictly better than this. (In Keras the option
            of this name is an initial best, and without *save_best_only* it does nothing.)

        keep:
            Which of this callback's files stay once a new one is durable: `KeepLast(3)`, `KeepBest(2)`,
            `KeepEvery(epochs=10)`, or several with ``|``; by default all. The best file and the
            newest always stay, and links and copies.

        name: What the state is saved under; by default `state_key` is made of the arguments.

        shared: Let other processes save under the same *filepath* at the same time. By default the
            second one fails when its training begins, and names the first.

        full_state: Save one whole file, also where the state is divided among ranks (FSDP2).

    Attributes:
        mode: ``"min"`` or ``"max"``.

    Raises:
        TypeError: If *filepath*, *monitor* or a bool is of no use by its type.
        ValueError: If an argument is out of its range, or two contradict each other.
    """

    priority = 100

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str | None = None,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str | int | Trigger | Callable[[Moment], bool] = "epoch",
        initial_value_threshold: float | None = None,
        *,
        keep: Retention | None = None,
        name: str | None = None,
        shared: bool = False,
        full_state: bool = False,
    ) -> None:
        super().__init__(filepath)
        self._trigger = trigger_of(save_freq)
        require_bools(save_best_only=save_best_only, save_weights_only=save_weights_only)
        check_monitor(monitor, save_best_only, initial_value_threshold)
        self.filepath = os.fspath(filepath)
        self.monitor = monitor
        self.save_best_only = save_best_only
        self.save_weights_only = save_weights_only
        self.mode = resolve_mode(monitor, mode)
        self.save_freq = save_freq
        self.initial_value_threshold = initial_value_threshold
        self.keep = checked_keep(keep, monitor, self._template)
        self._name = name
        self._shared = shared
        self.full_state = full_state
        self._ledger = ScoreLedger(self.mode, initial_value_threshold)
        self._saw_epoch_end = False
        self._prepared = False
        self._schedule = Schedule(self._trigger)
        self._advice = SavingAdvice(lambda: self.state_key, self._template, monitor, self.mode)
        self._continuation = Continuation(self._template, self._ledger, self._advice, monitor=monitor)
        self._chooser = Chooser(
            self._template,
            self._ledger,
            self._advice,
            monitor=monitor,
            best_only=save_best_only,
            trigger=self._trigger,
            keep=self.keep,
        )

    @property
    def best_score(self) -> float | None:
        """The best score that is safely on disk; None before the first."""
        return self._ledger.durable.best_score

    @property
    def best_path(self) -> str | None:
        """The file that holds `best_score`; None also if a later save has replaced that file."""
        return self._ledger.durable.best_path

    @property
    def state_key(self) -> str:
        """*name*, or the arguments that are not at their defaults, without the folder."""
        if self._name is not None:
            return self._name
        options = {
            "monitor": self.monitor,
            "mode": self.mode if self.monitor else None,
            "save_best_only": self.save_best_only or None,
            "save_weights_only": self.save_weights_only or None,
            "save_freq": in_short(self._trigger),
            "initial_value_threshold": self.initial_value_threshold,
            "full_state": self.full_state or None,
        }
        given = [f"{option}={value!r}" for option, value in options.items() if value is not None]
        return f"ModelCheckpoint({', '.join([repr(self._template.last), *given])})"

    # -- events

    def on_train_begin(self, handler: Any) -> None:
        """
        Refuse a name that another callback saves under, and warn of another run's files.

        After a resume, look for a better file than the loaded state knows of, or any if none was loaded.
        """
        if _takes_part(handler):
            self._schedule.begin()
            self.refuse_name_of_another(handler)
            self._reserve(handler)
            self._advice.of_other_runs(handler)
            others = [key for key, one in handler.callbacks.items() if one is not self]
            self._continuation.look_for_better(handler, self._key_in(handler), others)

    def on_train_batch_end(
        self, handler: Any, epoch: int, batch: int, global_step: int, logs: Mapping[str, Any]
    ) -> None:
        """Save if by `save_freq` it is time to."""
        if not _takes_part(handler):
            return
        if not self._prepared and not handler.accumulating:
            # An optimizer has stepped, so the state has its size.
            self._prepared = True
            handler.prepare_saves(weights_only=self.save_weights_only, full_state=self.full_state)
        if not self._trigger.within_epochs:
            return
        self._chooser.note_batch(logs)
        moment = self._schedule.ask(
            ends_epoch=False, epoch=epoch, batch=batch, global_step=global_step, logs=logs
        )
        if not handler.accumulating and self._schedule.take():
            self._consider(handler, moment)

    def on_epoch_end(
        self, handler: Any, epoch: int, batch: int, global_step: int, logs: Mapping[str, Any]
    ) -> None:
        """Save if by `save_freq` it is time to, or if a save waited for gradient accumulation to end."""
        if not _takes_part(handler):
            return
        self._saw_epoch_end = True
        self._chooser.note_epoch(logs)
        waited = self._schedule.is_due
        moment = self._schedule.ask(
            ends_epoch=True, epoch=epoch, batch=batch, global_step=global_step, logs=logs
        )
        if self._schedule.take() and (waited or not self._has_just_saved(moment)):
            self._consider(handler, moment)

    def on_train_end(self, handler: Any) -> None:
        """Warn if nothing was saved in a run of one epoch or more, by `save_freq` or the threshold."""
        if not _takes_part(handler) or handler.rank != 0 or not self._saw_epoch_end:
            return
        if self._ledger.expected.last_step_saved is not None:
            return
        if not self._schedule.was_due:
            self._advice.of_no_save(
                self.save_freq, handler.global_step, counts_batches=self._trigger.within_epochs
            )
        elif not self._ledger.threshold_passed and self._ledger.best_held_back is not None:
            self._advice.of_threshold(self.initial_value_threshold, self._ledger.best_held_back)

    def on_checkpoint_saved(self, save: Any) -> None:
        """Count the file as there."""
        self._ledger.settle(save, durable=True)

    def on_checkpoint_failed(self, save: Any, error: Exception) -> None:
        """Go back to what was best before, unless the file is there in spite of the failure."""
        self._ledger.settle(save, durable=getattr(error, "is_unsynced", False))

    def on_checkpoint_skipped(self, save: Any) -> None:
        """Go back to what was best before."""
        self._ledger.settle(save, durable=False)

    # -- state

    def state_dict(self) -> dict[str, Any]:
        """Return the state as it will be once all saves asked for are durable, in plain types."""
        return {
            "monitor": self.monitor,
            "mode": self._judged_by,
            **asdict(self._ledger.expected),
            "threshold_passed": self._ledger.threshold_passed,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Continue from *state*, as far as the file of the best bears it out. Reads that file's manifest.

        Missing keys are taken as nothing saved yet.

        Warns:
            RuntimeWarning: If *state* is of another monitor or mode (nothing is taken), or its best
                file is lost.
        """
        if is_comparable(state, self.monitor, self._judged_by, owner=self.state_key, what="its best"):
            self._continuation.load(state)

    # -- inside

    @property
    def _judged_by(self) -> str | None:
        return self.mode if self.monitor is not None else None

    def _key_in(self, handler: Any) -> str:
        """Its key in *handler*, by which its files are told from those of another of the same name."""
        return next((key for key, one in handler.callbacks.items() if one is self), self.state_key)

    def _has_just_saved(self, moment: Moment) -> bool:
        """Whether the last batch of an epoch was saved already, and the epoch's metrics change nothing."""
        last = self._ledger.expected
        return (
            self._trigger.within_epochs
            and self.monitor is None
            # Both: a loop that emits epochs alone stays at step 0.
            and (last.last_epoch_saved, last.last_step_saved) == (moment.epoch, moment.global_step)
        )

    def _consider(self, handler: Any, moment: Moment) -> None:
        """Save if the metric of *moment* allows it."""
        choice = self._chooser.choose(handler, moment)
        if choice.path is not None:
            self._reserve(handler)
            self._save(handler, choice.path, choice, moment)

    def _reserve(self, handler: Any) -> None:
        if not self._shared:
            handler.reserve(self._template.folder, self._template.last)

    def _save(self, handler: Any, path: str, choice: Choice, moment: Moment) -> None:
        before = self._ledger.expected.best_score
        # Proposed first: the state that goes into the file already counts the file.
        proposal = self._ledger.propose(
            path, choice.score, epoch=moment.epoch, global_step=moment.global_step
        )
        try:
            proposal.save = handler.save_async(
                path,
                weights_only=self.save_weights_only,
                stream=self._key_in(handler),
                logs=moment.logs,
                monitor=self.monitor,
                mode=self._judged_by,
                score=choice.score,
                keep=self._continuation.kept(self.keep),
                full_state=self.full_state,
            )
        except BaseException:
            self._ledger.withdraw(proposal)
            raise
        if choice.is_best and choice.score is not None and handler.rank == 0:
            step, epoch = f"step {moment.global_step}", f"epoch {moment.epoch + 1}"
            self._advice.of_best(step if self._trigger.within_epochs else epoch, before, choice.score)


def _takes_part(handler: Any) -> bool:
    if handler is None:
        raise PayloadError(
            "ModelCheckpoint needs events that carry a handler, and this one has none. Set bus.handler, "
            "or emit it with handler=...; trainbus.testing.FakeHandler is one for tests."
        )
    return bool(handler.rank == 0 or ranks.together())

"""When to save. Pure: where the run stands and how much time has passed are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Every", "Moment", "Trigger", "in_short", "trigger_of"]


@dataclass(frozen=True)
class Moment:
    """
    Where a run stands when it is asked whether to save.

    Attributes:
        ends_epoch: True at the end of an epoch, False at that of a training batch.
        epoch: 0-based.
        batch: Of the training batch at hand or the last one, in its epoch; 0-based.
        global_step: Training batches completed over the run.
        seconds: Of wall-clock time since the asker was last told to save; before the first time since
            training began in this process.
        logs: The metrics of the batch, or of the epoch. Reading one may wait for its device.
    """

    ends_epoch: bool
    epoch: int
    batch: int
    global_step: int
    seconds: float
    logs: Mapping[str, Any] = field(default_factory=dict, repr=False)


class Trigger:
    """
    Says at the end of each training batch and of each epoch whether to save. Combine some with ``|``.

    Attributes:
        within_epochs: Whether it may say yes at the end of a batch.
        at_epoch_ends: Whether it may say yes at the end of an epoch.
        is_counted: Whether it goes by counts of epochs and steps alone, which all ranks know; by default not,
            and rank 0 is asked.
    """

    within_epochs: bool = True
    at_epoch_ends: bool = False
    is_counted: bool = False

    def is_due(self, moment: Moment) -> bool:
        """Return whether to save at *moment*."""
        raise NotImplementedError

    def __or__(self, other: Trigger | Callable[[Moment], bool]) -> Trigger:
        return _AnyOf((self, trigger_of(other)))

    def __ror__(self, other: Callable[[Moment], bool]) -> Trigger:
        return _AnyOf((trigger_of(other), self))


@dataclass(frozen=True)
class Every(Trigger):
    """
    Save every so many epochs, steps or minutes; exactly one of them is given.

    Args:
        epochs: Counted from the run's first; due at an epoch's end.
        steps: Training batches, counted over the whole run, also across a resume.
        minutes: Of wall-clock time since the last save; due at the first batch's end after them.

    Raises:
        TypeError: None is given, or several, or it is no number (epochs and steps: no int).
        ValueError: It is not positive.
    """

    epochs: int | None = None
    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise TypeError(
                f"Every takes one of epochs, steps and minutes, got {', '.join(given) or 'none'}. "
                "Combine several with |, e.g. Every(epochs=1) | Every(minutes=10)."
            )
        ((name, value),) = given.items()
        if isinstance(value, bool) or not isinstance(value, int if name != "minutes" else int | float):
            kind = "a number" if name == "minutes" else "an int"
            raise TypeError(f"{name} must be {kind}, got {value!r}.")
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value!r}.")

    def __repr__(self) -> str:
        given = [f"{name}={value!r}" for name, value in vars(self).items() if value is not None]
        return f"Every({given[0]})"

    @property
    def within_epochs(self) -> bool:  # type: ignore[override]
        """Whether it may say yes at the end of a batch."""
        return self.epochs is None

    @property
    def at_epoch_ends(self) -> bool:  # type: ignore[override]
        """Whether it may say yes at the end of an epoch."""
        return self.epochs is not None

    @property
    def is_counted(self) -> bool:  # type: ignore[override]
        """Whether all ranks know it without being told."""
        return self.minutes is None

    def is_due(self, moment: Moment) -> bool:
        """Return whether to save at *moment*."""
        if self.epochs is not None:
            return moment.ends_epoch and (moment.epoch + 1) % self.epochs == 0
        if moment.ends_epoch:
            return False  # its last batch was asked before
        if self.steps is not None:
            return moment.global_step % self.steps == 0
        assert self.minutes is not None
        return moment.seconds >= 60 * self.minutes


@dataclass(frozen=True)
class _When(Trigger):
    """A predicate, asked at the end of each training batch."""

    predicate: Callable[[Moment], bool]

    def is_due(self, moment: Moment) -> bool:
        return not moment.ends_epoch and bool(self.predicate(moment))

    def __repr__(self) -> str:
        return getattr(self.predicate, "__qualname__", type(self.predicate).__qualname__)


@dataclass(frozen=True)
class _AnyOf(Trigger):
    """Due when one of several is."""

    parts: tuple[Trigger, ...]

    @property
    def within_epochs(self) -> bool:  # type: ignore[override]
        return any(part.within_epochs for part in self.parts)

    @property
    def at_epoch_ends(self) -> bool:  # type: ignore[override]
        return any(part.at_epoch_ends for part in self.parts)

    @property
    def is_counted(self) -> bool:  # type: ignore[override]
        return all(part.is_counted for part in self.parts)

    def is_due(self, moment: Moment) -> bool:
        due = [part.is_due(moment) for part in self.parts]  # each is asked, because one may keep count
        return any(due)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))


def trigger_of(save_freq: Any) -> Trigger:
    """
    Return what ``save_freq`` means: ``"epoch"``, a number of training batches, a trigger, a predicate.

    Raises:
        ValueError: It is none of these. A bool is none.
    """
    if isinstance(save_freq, Trigger):
        return save_freq
    if save_freq == "epoch":
        return Every(epochs=1)
    if type(save_freq) is int and save_freq > 0:
        return Every(steps=save_freq)
    if callable(save_freq) and not isinstance(save_freq, type):
        return _When(save_freq)
    raise ValueError(
        f"save_freq must be 'epoch' or a positive int (batches from one save to the next), got "
        f"{save_freq!r}. Or Every(epochs=…), Every(steps=…), Every(minutes=…), a predicate of a Moment, or "
        "several with |."
    )


def in_short(trigger: Trigger) -> Trigger | int | None:
    """Return a trigger as it is written in a state key: a number of batches alone, and nothing for epochs."""
    if trigger == Every(epochs=1):
        return None
    return trigger.steps if isinstance(trigger, Every) and trigger.steps is not None else trigger

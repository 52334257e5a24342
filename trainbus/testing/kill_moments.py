"""At which moments assert_resumes_exactly kills a run: those that tell most, or those asked for. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from trainbus.errors import UnknownEventError, did_you_mean
from trainbus.events import EVENTS

__all__ = ["Moment", "check_comes", "check_names", "named", "telling_moments"]

Moment = tuple[str, int]
"""An event's name, and which of its name it is, from 1 on."""

_KINDS = ("train_batch_end", "val_batch_end", "epoch_end", "checkpoint_saved")


def named(moment: Moment) -> str:
    """Return a moment as messages show it."""
    return f"{moment[0]} number {moment[1]}"


def telling_moments(names: Sequence[str]) -> list[Moment]:
    """
    Return one moment of each kind that a run comes to after its first save, from the middle of those.

    Args:
        names: Of the events of the run, in order.

    Raises:
        AssertionError: Nothing was saved.
    """
    if not names:
        raise AssertionError(
            "train_fn emitted no event, so it cannot be killed at one. Train with a trainbus Handler: its "
            "fit, its generators, or handler.emit in a loop of your own."
        )
    if "checkpoint_saved" not in names:
        raise AssertionError(
            "train_fn saved nothing, so there is nothing to resume from. Add a ModelCheckpoint whose "
            "filepath lies in the folder that train_fn is given."
        )
    by_kind: dict[str, list[int]] = {}
    for index in range(names.index("checkpoint_saved"), len(names)):
        if names[index] in _KINDS and not _ends_last_batch(names, index):
            by_kind.setdefault(names[index], []).append(index)
    middles = sorted(indices[(len(indices) - 1) // 2] for indices in by_kind.values())
    return [(names[index], names[: index + 1].count(names[index])) for index in middles]


def check_names(moments: Sequence[Moment]) -> None:
    """Raise UnknownEventError for a moment of an event that there is not."""
    for name, _ in moments:
        if name not in EVENTS:
            raise UnknownEventError(
                f"Cannot kill at unknown event {name!r}.{did_you_mean(name, EVENTS)} Known events: "
                f"{', '.join(EVENTS)}. Name one of them in kill_at."
            )


def check_comes(moment: Moment, names: Sequence[str]) -> None:
    """Raise ValueError for a moment that a run with events of these *names* does not come to."""
    name, number = moment
    if not 1 <= number <= names.count(name):
        raise ValueError(
            f"Cannot kill at {moment!r}: the undisturbed run had {names.count(name)} events of that name. "
            "They are counted from 1 on in kill_at; name one of them."
        )


def _ends_last_batch(names: Sequence[str], index: int) -> bool:
    # What is left of such an epoch is its validation and its end, which are kinds of their own.
    following = next((name for name in names[index + 1 :] if not name.startswith("checkpoint_")), None)
    return names[index] == "train_batch_end" and following != "train_batch_begin"

"""Checks of the arguments of callbacks."""

from __future__ import annotations

import warnings
from typing import Any

from trainbus.checkpoint.retention import Retention
from trainbus_callbacks.naming import NameTemplate

__all__ = ["checked_keep", "require_bools", "require_count"]


def require_bools(**arguments: object) -> None:
    """
    Refuse what is no bool, such as an argument that is one place too far to the left.

    Raises:
        TypeError: Naming the first of *arguments* that is none.
    """
    for name, value in arguments.items():
        if not isinstance(value, bool):
            raise TypeError(
                f"{name} must be True or False, got {value!r}. Give arguments by name, e.g. {name}=True: "
                "Keras has verbose in third place, trainbus has no such argument."
            )


def require_count(name: str, value: object, counted: str, *, least: int, or_none: bool = False) -> None:
    """
    Refuse what does not count anything.

    Args:
        name: Of the argument.
        value: What was given for it.
        counted: What it counts, e.g. ``"epochs"``.
        least: The smallest number allowed.
        or_none: Allow None.

    Raises:
        ValueError: If *value* is no int of at least *least*. A bool is none.
    """
    if or_none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        rule = f"an int of at least {least}{' or None' * or_none}"
        raise ValueError(f"{name} counts {counted} and must be {rule}, got {value!r}.")


def checked_keep(keep: Any, monitor: str | None, template: NameTemplate) -> Retention | None:
    """
    Return *keep*, which tells the files under *template* that stay; None: all do.

    Raises:
        TypeError: It is no `Retention`.
        ValueError: It judges by a metric and there is no *monitor*.

    Warns:
        RuntimeWarning: All files have one name.
    """
    if keep is None:
        return None
    if not isinstance(keep, Retention):
        raise TypeError(
            f"keep must be KeepLast(3), KeepBest(2), KeepEvery(epochs=10) or several with |, got {keep!r}."
        )
    if keep.needs_scores and monitor is None:
        raise ValueError(f"keep={keep!r} needs a metric to judge by. Name it, e.g. monitor='val_loss'.")
    if not template.fields:
        warnings.warn(
            f"keep={keep!r} has nothing to choose from: each save under {template.last!r} replaces the one "
            "before. Put a field into the name, e.g. {epoch}.",
            RuntimeWarning,
            stacklevel=3,
        )
    return keep

"""Checks of what tests give to `trainbus.testing`, so that a mistake there is told where it was made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainbus.bus import EventBus

__all__ = ["require_bus", "require_count", "require_metrics"]


def require_bus(bus: object, who: str) -> None:
    """Raise TypeError if *bus*, which *who* was given, is none."""
    if not isinstance(bus, EventBus):
        has_one = isinstance(getattr(bus, "bus", None), EventBus)
        raise TypeError(
            f"{who} takes an EventBus, got {bus!r}. Pass {'its bus: handler.bus' if has_one else 'a bus'}."
        )


def require_count(name: str, value: object) -> None:
    """Raise ValueError if *value*, given for the argument *name*, counts nothing. A bool does not."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name} must be an int of at least 0, got {value!r}.")


def require_metrics(name: str, metrics: Any, count: int, counted: str) -> None:
    """
    Refuse what no metrics are, and lists with more values than will ever be read.

    Args:
        name: Of the argument.
        metrics: What was given for it.
        count: How many values a list may have.
        counted: What those are for.

    Raises:
        TypeError: If *metrics* is no mapping.
        ValueError: If a list is too long.
    """
    if not isinstance(metrics, Mapping):
        raise TypeError(
            f"{name} must be a dict of metrics by name, got {metrics!r}. "
            f"Pass e.g. {name}={{'loss': [0.2, 0.1]}}; a value may be a list, a function or a constant."
        )
    for metric, values in metrics.items():
        if isinstance(values, list | tuple) and len(values) > count:
            raise ValueError(
                f"{name}[{metric!r}] has {len(values)} values, and there are {count} {counted}. "
                "Leave out those that are too many, or emit more."
            )

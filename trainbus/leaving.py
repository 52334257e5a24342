"""Errors that come up while a handler is left: none masks another, none is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from trainbus.bus import EventBus

__all__ = ["note_failures", "raise_held_back"]


def note_failures(error: BaseException, bus: EventBus, *steps: Callable[[], Any]) -> None:
    """Take the *steps*, each also if one before failed; what fails becomes a note on *error*."""
    for step in steps:
        try:
            step()
        except Exception as late:
            _add_note(error, late)
    for held_back in bus.take_held_back():
        _add_note(error, held_back)


def raise_held_back(bus: EventBus) -> None:
    """Deliver what was posted and raise the first error held back, with the others as notes on it."""
    try:
        bus.drain()
    except Exception as first:
        for other in bus.take_held_back():
            _add_note(first, other)
        raise


def _add_note(error: BaseException, other: Exception) -> None:
    more = "; ".join([str(other), *getattr(other, "__notes__", ())])
    error.add_note(f"Moreover, while leaving the handler: {type(other).__name__}: {more}")

"""Errors that come up while a handler is left: none masks another, none is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from trainbus.bus import EventBus
from trainbus.errors import CheckpointError

__all__ = ["announce_and_leave", "note_failures", "raise_held_back"]


def announce_and_leave(error: BaseException, handler: Any, steps: Sequence[Callable[[], Any]]) -> None:
    """Emit ``exception`` if *error* is one to be told of, then take the *steps*; see `note_failures`."""

    def announce() -> None:
        handler.bus.emit("exception", handler, error=error)

    told = [announce] if isinstance(error, (Exception, KeyboardInterrupt)) else []
    note_failures(error, handler.bus, *told, *steps)


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
    if isinstance(error, SystemExit) and isinstance(other, CheckpointError):
        # Nobody is shown the notes of this one: the exit code has to tell.
        other.seen = False
    more = "; ".join([str(other), *getattr(other, "__notes__", ())])
    error.add_note(f"Moreover, while leaving the handler: {type(other).__name__}: {more}")

"""EventRecorder: what was emitted on a bus, in order, and a comparison that shows where it differs."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from trainbus.bus import EventBus
from trainbus.errors import UnknownEventError, did_you_mean
from trainbus.testing.arguments import require_bus

__all__ = ["EventRecorder", "RecordedEvent"]

Expected = str | tuple[str, Mapping[str, Any]]


class RecordedEvent(NamedTuple):
    """
    One event.

    Attributes:
        name: The event's name.
        payload: Its fields. ``logs`` is a copy, so that it stays what it was.
    """

    name: str
    payload: dict[str, Any]


class EventRecorder:
    """
    Records the events of a bus from now on, before any other receiver sees them.

    Reading ``logs`` to copy it may wait for a GPU.

    Args:
        bus: The bus.
        only: The names of the events to record; by default all that the bus knows now.

    Attributes:
        events: What was recorded, in order.
    """

    def __init__(self, bus: EventBus, only: Iterable[str] | None = None) -> None:
        require_bus(bus, "EventRecorder")
        self.events: list[RecordedEvent] = []
        self._recorded = tuple(bus.events if only is None else only)
        for name in self._recorded:
            bus.on(name, self._receiver(name), priority=-math.inf)

    @property
    def names(self) -> list[str]:
        """The events' names, in order."""
        return [event.name for event in self.events]

    def of(self, name: str) -> list[dict[str, Any]]:
        """
        Return the payloads of the events of this name, in order.

        Raises:
            UnknownEventError: If events of this name are not recorded.
        """
        if name not in self._recorded:
            raise UnknownEventError(
                f"This recorder does not record {name!r}.{did_you_mean(name, self._recorded)} It records "
                f"{', '.join(self._recorded) or 'nothing'}. Name what it should record in only=, and declare "
                "events of your own before it is made."
            )
        return [event.payload for event in self.events if event.name == name]

    def assert_trace(self, expected: Sequence[Expected]) -> None:
        """
        Compare what was recorded with *expected*.

        Args:
            expected: For each event its name, or ``(name, fields)`` where each of the fields named must be
                equal to the one recorded.

        Raises:
            AssertionError: With a line-by-line difference (``-`` expected, ``+`` recorded).
        """
        wanted = [_line(*_name_and_fields(one)) for one in expected]
        recorded = []
        for i, (name, payload) in enumerate(self.events):
            # Shown with the fields that the expectation at its place names.
            fields = _name_and_fields(expected[i])[1] if i < len(expected) else {}
            recorded.append(_line(name, _as_expected(payload, fields)))
        if wanted != recorded:
            difference = "\n".join(difflib.ndiff(wanted, recorded))
            raise AssertionError(
                f"The recorded events differ from the expected (- expected, + recorded):\n{difference}"
            )

    def _receiver(self, name: str) -> Any:
        def record(**payload: Any) -> None:
            if isinstance(payload.get("logs"), Mapping):
                payload["logs"] = dict(payload["logs"])
            self.events.append(RecordedEvent(name, payload))

        return record


def _name_and_fields(expected: Expected) -> tuple[str, Mapping[str, Any]]:
    return (expected, {}) if isinstance(expected, str) else expected


def _as_expected(payload: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload's values of *fields*; equal ones as the expectation writes them (1 for 1.0)."""
    return {
        key: wanted if payload[key] == wanted else payload[key]
        for key, wanted in fields.items()
        if key in payload
    }


def _line(name: str, fields: Mapping[str, Any]) -> str:
    return " ".join([name, *(f"{key}={value!r}" for key, value in fields.items())])

"""
Fixtures for pytest, asked for by ``pytest_plugins = ["trainbus.testing.plugin"]``. Imports no torch.

The three belong together: `recorder` records the events of `bus`, which is that of `fake_handler`.
"""

from __future__ import annotations

import pytest

from trainbus.bus import EventBus
from trainbus.testing.fakes import FakeHandler
from trainbus.testing.recorder import EventRecorder

__all__ = ["bus", "fake_handler", "recorder"]


@pytest.fixture
def fake_handler() -> FakeHandler:
    """A handler whose saves are recorded and succeed at once."""
    return FakeHandler()


@pytest.fixture
def bus(fake_handler: FakeHandler) -> EventBus:
    """The bus of `fake_handler`."""
    return fake_handler.bus


@pytest.fixture
def recorder(bus: EventBus) -> EventRecorder:
    """Everything that is emitted on `bus`, in order."""
    return EventRecorder(bus)

"""
For tests of what subscribes to events: fakes, a recorder and a whole fake training. Imports no torch.

The fixtures are in `trainbus.testing.plugin`: ``pytest_plugins = ["trainbus.testing.plugin"]``.
"""

from __future__ import annotations

from trainbus.testing.emit_run import emit_run
from trainbus.testing.fakes import FakeHandler, FakeSave
from trainbus.testing.faults import FaultyDisk
from trainbus.testing.recorder import EventRecorder

__all__ = ["EventRecorder", "FakeHandler", "FakeSave", "FaultyDisk", "emit_run"]

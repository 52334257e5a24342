"""
For tests of what subscribes to events, and of trainings. Importing it imports no torch.

The fixtures are in `trainbus.testing.plugin`: ``pytest_plugins = ["trainbus.testing.plugin"]``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainbus.testing.emit_run import emit_run
from trainbus.testing.fakes import FakeHandler, FakeSave
from trainbus.testing.faults import FaultyDisk
from trainbus.testing.recorder import EventRecorder

if TYPE_CHECKING:
    from trainbus.testing.resume import assert_resumes_exactly as assert_resumes_exactly

__all__ = ["EventRecorder", "FakeHandler", "FakeSave", "FaultyDisk", "assert_resumes_exactly", "emit_run"]


def __getattr__(name: str) -> Any:
    if name != "assert_resumes_exactly":  # the only one that needs torch
        raise AttributeError(f"module 'trainbus.testing' has no attribute {name!r}")
    from trainbus.testing.resume import assert_resumes_exactly

    return assert_resumes_exactly

"""
Checkpoints that do not stop the GPU, and an event bus for PyTorch training loops.

Names are loaded when they are first used, so ``import trainbus`` takes milliseconds
and imports neither torch nor NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainbus.bus import EventBus as EventBus
    from trainbus.bus import Subscription as Subscription
    from trainbus.callback import Callback as Callback
    from trainbus.checkpoint.folder import CheckpointFile as CheckpointFile
    from trainbus.checkpoint.folder import CheckpointFolder as CheckpointFolder
    from trainbus.checkpoint.manifest import Manifest as Manifest
    from trainbus.checkpoint.pending_save import PendingSave as PendingSave
    from trainbus.checkpoint.sharded_format import read_manifest as read_manifest
    from trainbus.errors import CheckpointCorruptError as CheckpointCorruptError
    from trainbus.errors import CheckpointError as CheckpointError
    from trainbus.errors import CheckpointLockedError as CheckpointLockedError
    from trainbus.errors import CheckpointSkipped as CheckpointSkipped
    from trainbus.errors import CheckpointWriteError as CheckpointWriteError
    from trainbus.errors import RankError as RankError
    from trainbus.errors import RankFailedError as RankFailedError
    from trainbus.errors import SnapshotChangedError as SnapshotChangedError
    from trainbus.errors import TrainbusError as TrainbusError
    from trainbus.errors import UnsavableStateError as UnsavableStateError
    from trainbus.errors import UntrustedPickleError as UntrustedPickleError
    from trainbus.handler import Handler as Handler
    from trainbus.save_load import load as load
    from trainbus.save_load import save as save
    from trainbus.save_load import save_async as save_async
    from trainbus.save_load import verify as verify

__version__ = "0.1.0"

_HOME = {
    "Callback": "callback",
    "CheckpointCorruptError": "errors",
    "CheckpointError": "errors",
    "CheckpointFile": "checkpoint.folder",
    "CheckpointFolder": "checkpoint.folder",
    "CheckpointLockedError": "errors",
    "CheckpointSkipped": "errors",
    "CheckpointWriteError": "errors",
    "EventBus": "bus",
    "Handler": "handler",
    "Manifest": "checkpoint.manifest",
    "PendingSave": "checkpoint.pending_save",
    "RankError": "errors",
    "RankFailedError": "errors",
    "SnapshotChangedError": "errors",
    "Subscription": "bus",
    "TrainbusError": "errors",
    "UnsavableStateError": "errors",
    "UntrustedPickleError": "errors",
    "load": "save_load",
    "read_manifest": "checkpoint.sharded_format",
    "save": "save_load",
    "save_async": "save_load",
    "verify": "save_load",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainbus' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"trainbus.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

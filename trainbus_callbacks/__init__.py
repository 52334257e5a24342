"""
Subscribers for trainbus: one callback a file.

Names are loaded when they are first used, so the import is fast and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainbus.checkpoint.retention import KeepBest as KeepBest
    from trainbus.checkpoint.retention import KeepEvery as KeepEvery
    from trainbus.checkpoint.retention import KeepLast as KeepLast
    from trainbus.checkpoint.retention import Retention as Retention
    from trainbus_callbacks.csv_logger import CSVLogger as CSVLogger
    from trainbus_callbacks.early_stopping import EarlyStopping as EarlyStopping
    from trainbus_callbacks.ema import EMA as EMA
    from trainbus_callbacks.history import History as History
    from trainbus_callbacks.history_file import RunHistory as RunHistory
    from trainbus_callbacks.history_file import read_history as read_history
    from trainbus_callbacks.learning_rate_monitor import LearningRateMonitor as LearningRateMonitor
    from trainbus_callbacks.on_exception import OnException as OnException
    from trainbus_callbacks.preemption import Preemption as Preemption
    from trainbus_callbacks.progress_bar import ProgressBar as ProgressBar
    from trainbus_callbacks.save_on_request import SaveOnRequest as SaveOnRequest
    from trainbus_callbacks.saving import ModelCheckpoint as ModelCheckpoint
    from trainbus_callbacks.tensorboard_logger import TensorBoardLogger as TensorBoardLogger
    from trainbus_callbacks.terminate_on_nan import TerminateOnNaN as TerminateOnNaN
    from trainbus_callbacks.triggers import Every as Every
    from trainbus_callbacks.triggers import Moment as Moment
    from trainbus_callbacks.triggers import Trigger as Trigger

_HOME = {
    "CSVLogger": "trainbus_callbacks.csv_logger",
    "EMA": "trainbus_callbacks.ema",
    "EarlyStopping": "trainbus_callbacks.early_stopping",
    "Every": "trainbus_callbacks.triggers",
    "History": "trainbus_callbacks.history",
    "KeepBest": "trainbus.checkpoint.retention",
    "KeepEvery": "trainbus.checkpoint.retention",
    "KeepLast": "trainbus.checkpoint.retention",
    "LearningRateMonitor": "trainbus_callbacks.learning_rate_monitor",
    "ModelCheckpoint": "trainbus_callbacks.saving",
    "Moment": "trainbus_callbacks.triggers",
    "OnException": "trainbus_callbacks.on_exception",
    "Preemption": "trainbus_callbacks.preemption",
    "ProgressBar": "trainbus_callbacks.progress_bar",
    "Retention": "trainbus.checkpoint.retention",
    "RunHistory": "trainbus_callbacks.history_file",
    "SaveOnRequest": "trainbus_callbacks.save_on_request",
    "TensorBoardLogger": "trainbus_callbacks.tensorboard_logger",
    "TerminateOnNaN": "trainbus_callbacks.terminate_on_nan",
    "Trigger": "trainbus_callbacks.triggers",
    "read_history": "trainbus_callbacks.history_file",
}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'trainbus_callbacks' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

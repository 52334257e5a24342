"""Subscribers for trainbus: one callback a file."""

from __future__ import annotations

from trainbus.checkpoint.retention import KeepBest, KeepEvery, KeepLast, Retention
from trainbus_callbacks.csv_logger import CSVLogger
from trainbus_callbacks.early_stopping import EarlyStopping
from trainbus_callbacks.learning_rate_monitor import LearningRateMonitor
from trainbus_callbacks.progress_bar import ProgressBar
from trainbus_callbacks.save_on_request import SaveOnRequest
from trainbus_callbacks.saving import ModelCheckpoint
from trainbus_callbacks.tensorboard_logger import TensorBoardLogger
from trainbus_callbacks.terminate_on_nan import TerminateOnNaN
from trainbus_callbacks.triggers import Every, Moment, Trigger

__all__ = [
    "CSVLogger",
    "EarlyStopping",
    "Every",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "LearningRateMonitor",
    "ModelCheckpoint",
    "Moment",
    "ProgressBar",
    "Retention",
    "SaveOnRequest",
    "TensorBoardLogger",
    "TerminateOnNaN",
    "Trigger",
]

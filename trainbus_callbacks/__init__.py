"""Subscribers for trainbus: one callback a file."""

from __future__ import annotations

from trainbus.checkpoint.retention import KeepBest, KeepEvery, KeepLast, Retention
from trainbus_callbacks.progress_bar import ProgressBar
from trainbus_callbacks.saving import ModelCheckpoint
from trainbus_callbacks.triggers import Every, Moment, Trigger

__all__ = [
    "Every",
    "KeepBest",
    "KeepEvery",
    "KeepLast",
    "ModelCheckpoint",
    "Moment",
    "ProgressBar",
    "Retention",
    "Trigger",
]

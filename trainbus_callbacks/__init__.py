"""Subscribers for trainbus: one callback a file."""

from __future__ import annotations

from trainbus_callbacks.progress_bar import ProgressBar
from trainbus_callbacks.saving import ModelCheckpoint

__all__ = ["ModelCheckpoint", "ProgressBar"]

"""Subscribers for trainbus: one callback a file."""

from __future__ import annotations

from trainbus_callbacks.progress_bar import ProgressBar
from trainbus_callbacks.saving import ModelCheckpoint
from trainbus_callbacks.triggers import Every, Moment, Trigger

__all__ = ["Every", "ModelCheckpoint", "Moment", "ProgressBar", "Trigger"]

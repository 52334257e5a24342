"""The state of a GradScaler, taken without waiting for the device that its scale is on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["scaler_numbers", "scaler_state"]


def scaler_state(scaler: torch.amp.GradScaler) -> Any:
    """
    Return ``scaler.state_dict()``; its numbers on a CUDA device as tensors.

    Calling it would wait for everything the device has been given so far, because it returns
    them as Python numbers.
    """
    scale, growth = getattr(scaler, "_scale", None), getattr(scaler, "_growth_tracker", None)
    if not (_is_on_device(scale) and _is_on_device(growth)):
        return scaler.state_dict()
    return {
        "scale": scale,
        "growth_factor": scaler.get_growth_factor(),
        "backoff_factor": scaler.get_backoff_factor(),
        "growth_interval": scaler.get_growth_interval(),
        "_growth_tracker": growth,
    }


def scaler_numbers(state: Any) -> Any:
    """Return what ``load_state_dict`` of a GradScaler takes: numbers, no tensors."""
    if not isinstance(state, Mapping):
        return state
    return {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _is_on_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_cuda

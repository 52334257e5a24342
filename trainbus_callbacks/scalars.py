"""Metrics as plain Python floats, whatever they were logged as. Imports neither torch nor NumPy."""

from __future__ import annotations

import math
import numbers
import reprlib
from collections.abc import Mapping
from typing import Any

from trainbus.errors import did_you_mean

__all__ = ["as_float", "describe", "floats_of", "why_no_number"]


def as_float(value: Any) -> float | None:
    """
    Return *value* as a Python float, or None if it is no single real number.

    Takes numbers, NumPy scalars, and tensors and arrays of one element. Waits for the
    device that a tensor is on.
    """
    if not isinstance(value, numbers.Real):
        item = getattr(value, "item", None)
        if not callable(item) or _element_count(value) != 1:
            return None
        value = item()
    try:
        return float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        return math.copysign(math.inf, value)


def floats_of(logs: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Any]]:
    """Return a copy of *logs* as floats, and those of its values that cannot be one."""
    floats, unusable = {}, {}
    for name, value in logs.items():
        number = as_float(value)
        if number is None:
            unusable[name] = value
        else:
            floats[name] = number
    return floats, unusable


def describe(value: float) -> str:
    """Return *value* with five significant places behind the point, as messages show it."""
    plain = value == 0 or not math.isfinite(value) or 1e-3 <= abs(value) < 1e7
    return f"{value:.5f}" if plain else f"{value:.5e}"


def _element_count(value: Any) -> int:
    numel = getattr(value, "numel", None)
    return int(numel() if callable(numel) else getattr(value, "size", 1))


def why_no_number(name: str, logs: Mapping[str, Any], unusable: Mapping[str, Any]) -> str:
    """Return a clause that names a metric and says why there is no number, as far as *unusable* tells."""
    if name in unusable:
        return f"{name!r}: its value is {reprlib.repr(unusable[name])}, which is not one real number."
    known = ", ".join(one if one.isprintable() else repr(one) for one in logs) or "none"
    return f"{name!r}: it is not among the logs.{did_you_mean(name, logs)} Available: {known}."

"""How many kinds of states may take turns without being planned anew each time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

__all__ = ["KINDS_KEPT", "keep_kinds"]

T = TypeVar("T")

KINDS_KEPT = 4
"""Such as all of a run and its weights, which are saved in turns."""


def keep_kinds(latest: T, kept: Iterable[T]) -> list[T]:
    """Return what is kept from now on, the latest first: it and the last few others that were in use."""
    return [latest, *(one for one in kept if one is not latest)][:KINDS_KEPT]

"""Which process of a distributed run this is. The only collectives of trainbus are here.

Works without ``torch.distributed``; imports no torch of its own accord.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType
from typing import Any

__all__ = ["gather", "rank", "world_size"]


def rank() -> int:
    """Return this process's rank: from the process group, else from ``RANK``, else 0."""
    group = _process_group()
    return int(group.get_rank()) if group else _from_environment("RANK", 0)


def world_size() -> int:
    """Return the number of processes: from the process group, else from ``WORLD_SIZE``, else 1."""
    group = _process_group()
    return int(group.get_world_size()) if group else _from_environment("WORLD_SIZE", 1)


def gather(value: Any) -> list[Any]:
    """
    Return every rank's *value*, in order of rank; ``[value]`` without a process group.

    Collective: every rank calls it, on its training thread. Blocks until all have come.

    Args:
        value: Anything that can be pickled; small, because every rank gets all of them.
    """
    group = _process_group()
    if group is None:
        return [value]
    values: list[Any] = [None] * group.get_world_size()
    group.all_gather_object(values, value)
    return values


def _process_group() -> ModuleType | None:
    # A process group can only exist if somebody has imported the module already.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _from_environment(name: str, default: int) -> int:
    # Launchers set these before the process group exists; two ranks must not both think they are 0.
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default

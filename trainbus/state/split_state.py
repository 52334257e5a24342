"""Wrappers whose state is not whole on any rank, so that a file written by rank 0 would hold a part of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["refuse_split_state"]


def refuse_split_state(module: Any, optimizer: Any) -> None:
    """
    Refuse what splits its state over the ranks in a way that cannot be put together again.

    Raises:
        TypeError: *module* (or one of several, or inside of one) is FSDP1's, or *optimizer* a
            ZeroRedundancyOptimizer.
    """
    for one in _each(module):
        inside = one.modules() if callable(getattr(one, "modules", None)) else [one]
        if any(_is_a(part, "torch.distributed.fsdp", "FullyShardedDataParallel") for part in inside):
            raise TypeError(
                f"Cannot save a {type(one).__name__} of FSDP1 (FullyShardedDataParallel): its parameters are "
                "in pieces on all ranks. Use FSDP2, torch.distributed.fsdp.fully_shard(module), or "
                "DistributedDataParallel if the model fits on each device."
            )
    for one in _each(optimizer):
        if _is_a(one, "torch.distributed.optim", "ZeroRedundancyOptimizer"):
            raise TypeError(
                "Cannot save a ZeroRedundancyOptimizer: each rank holds the state of its own share of the "
                "parameters only. Use a plain optimizer with DistributedDataParallel, or FSDP2, "
                "torch.distributed.fsdp.fully_shard(module), which splits the optimizer's state as well."
            )


def _each(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, Mapping) else [part]


def _is_a(thing: Any, module: str, name: str) -> bool:
    # Nobody can have made one without importing it, which takes long.
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(thing, kind)

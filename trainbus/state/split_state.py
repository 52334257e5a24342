"""State that is not whole on any rank: where it is, and what of it cannot be put together again."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["divided_like", "is_divided", "refuse_split_state"]


def is_divided(module: Any) -> bool:
    """Tell whether *module*, or one of several, went through ``fully_shard`` or has a `DTensor` in it."""
    return any(
        _is_a(part, "torch.distributed.fsdp", "FSDPModule")
        or any(_is_a(one, "torch.distributed.tensor", "DTensor") for one in part.parameters(recurse=False))
        for one in _each(module)
        if callable(getattr(one, "modules", None))
        for part in one.modules()
    )


def divided_like(value: Any, like: Any) -> Any:
    """Return a whole tensor divided among ranks as *like* is, which has its shape; all else as it is."""
    tensor = sys.modules.get("torch.distributed.tensor")
    if (
        tensor is None
        or not isinstance(like, tensor.DTensor)
        or isinstance(value, tensor.DTensor)
        or getattr(value, "shape", None) != like.shape
    ):
        return value
    # Each rank has the whole: nobody has to send it anything.
    return tensor.distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


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

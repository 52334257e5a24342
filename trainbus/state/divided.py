"""Modules whose parameters are divided among ranks, where their state is collected and restored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import FSDPModule

from trainbus.state.collect import Parts, each_of
from trainbus.state.named_optimizer import NamedOptimizer
from trainbus.state.split_state import divided_like

__all__ = ["DividedModule", "divided_parts"]


class DividedModule:
    """
    Stands for a module, whose state it gives by the names that ``torch.distributed.checkpoint`` uses.

    Args:
        module: With parameters of any kind.

    Attributes:
        kind: The module's class, for messages.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.kind = type(module).__name__
        self._module = module

    def state_dict(self) -> dict[str, Any]:
        """Return the live state, each rank its part."""
        return get_model_state_dict(self._module)

    def load_state_dict(self, saved: Mapping[str, Any], strict: bool = True) -> Any:
        """Load this rank's part, or out of whole tensors what belongs to it."""
        # Not by torch's full_state_dict=True, which lets names be missing.
        own = self.state_dict()
        parts = {name: divided_like(one, own.get(name)) for name, one in saved.items()}
        return set_model_state_dict(self._module, parts, options=StateDictOptions(strict=strict))


def divided_parts(parts: Parts) -> Parts:
    """Return *parts* with what stands for the modules and optimizers in their places. Training thread."""
    for module in _modules(parts.module):
        # Between a forward and a backward pass it has other parameters than its optimizer.
        if isinstance(module, FSDPModule):
            module.reshard()
    return replace(
        parts,
        module=each_of(parts.module, _divided_module),
        optimizer=each_of(parts.optimizer, lambda one: _named_optimizer(one, parts.module)),
    )


def _modules(module: Any) -> Iterable[Any]:
    several = module.values() if isinstance(module, Mapping) else [module]
    return [part for one in several if isinstance(one, torch.nn.Module) for part in one.modules()]


def _divided_module(module: Any) -> Any:
    return DividedModule(module) if isinstance(module, torch.nn.Module) else module


def _named_optimizer(optimizer: Any, module: Any) -> Any:
    return NamedOptimizer(optimizer, module) if isinstance(optimizer, torch.optim.Optimizer) else optimizer

"""An optimizer's state by the names of its parameters, as ``torch.distributed.checkpoint`` has it.

The numbers that `torch.optim.Optimizer.state_dict` gives them say nothing to another division among ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainbus.state.optimizer_types import (
    dtype_of,
    load_exactly,
    names_of_parameters,
    type_now,
    types_saved,
)
from trainbus.state.split_state import divided_like

__all__ = ["NamedOptimizer", "is_by_name"]


def is_by_name(saved: Any) -> bool:
    """Tell whether *saved* is an optimizer's state by names."""
    groups = saved.get("param_groups") if isinstance(saved, Mapping) else None
    return isinstance(groups, list) and any(
        isinstance(name, str) for group in groups for name in group["params"]
    )


class NamedOptimizer:
    """
    Stands for an optimizer of torch where its state is collected and restored.

    Args:
        optimizer: The optimizer.
        module: Whose parameters it has, or a dict of such modules by name.
        types: Of its parameters where a state comes from, as far as known; see `types_saved`.

    Attributes:
        kind: The optimizer's class, for messages.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        module: Any,
        types: Mapping[torch.Tensor, torch.dtype] | None = None,
    ) -> None:
        self.kind = type(optimizer).__name__
        self._optimizer = optimizer
        self._module = module
        self._types = types or {}
        names = names_of_parameters(module)
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        self._names = [names.get(one, f"parameter {number}") for number, one in enumerate(parameters)]
        self._parameters = dict(zip(self._names, parameters, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Return the live state; an optimizer that has made no step has none."""
        own = self._optimizer.state_dict()
        groups = [
            {**group, "params": [self._names[number] for number in group["params"]]}
            for group in own["param_groups"]
        ]
        return {
            "state": {self._names[number]: one for number, one in own["state"].items()},
            "param_groups": groups,
        }

    def load_state_dict(self, saved: Any) -> None:
        """
        Load a state by names or by numbers. Whole tensors of divided parameters are divided likewise.

        Raises:
            ValueError: *saved* is of other parameters.
        """
        groups = saved["param_groups"]
        order = [name for group in groups for name in group["params"]]
        if not is_by_name(saved):
            if len(order) != len(self._names):
                raise ValueError(
                    f"it has {len(self._names)} parameters, and the checkpoint those of {len(order)}"
                )
            name_of = dict(zip(order, self._names, strict=True))
        else:
            name_of = {name: name for name in order}
        if strange := set(name_of.values()) ^ set(self._names):
            raise ValueError(f"{min(strange)!r} is not both in it and in the checkpoint")
        number_of = {name: number for number, name in enumerate(self._names)}
        group_of = {name_of[name]: group for group in groups for name in group["params"]}
        state = {
            number_of[name_of[name]]: self._divided(name_of[name], one)
            for name, one in saved["state"].items()
        }
        own = self._optimizer.state_dict()["param_groups"]
        loaded = [
            {**group_of[self._names[group["params"][0]]], "params": group["params"]}
            if group["params"]
            else group
            for group in own
        ]
        load_exactly(self._optimizer, {"state": state, "param_groups": loaded}, self._types)

    def room_for(self, outline: Mapping[str, Any], module: Any = None) -> dict[str, Any]:
        """
        Return a state with tensors to read a checkpoint's into, those of this optimizer or new ones.

        Args:
            outline: The checkpoint's state, with anything that has a ``shape`` in its tensors' place. What
                is not of its parameter's shape is left out, unless this optimizer has it.
            module: The same of the module's state.
        """
        types = types_saved(self._module, module)
        there = self.state_dict()["state"]
        room: dict[str, Any] = {}
        for name, described in outline["state"].items():
            if name not in self._parameters or not isinstance(described, Mapping):
                continue
            parameter, own = self._parameters[name], there.get(name, {})
            room[name] = {}
            for key, one in described.items():
                if isinstance(own.get(key), torch.Tensor):
                    room[name][key] = own[key]
                elif (dtype := dtype_of(one)) and one.shape and tuple(one.shape) == tuple(parameter.shape):
                    dtype = type_now(dtype, parameter, types)
                    room[name][key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        return {"state": room}

    def _divided(self, name: str, state: Any) -> Any:
        if not isinstance(state, Mapping):
            return state
        return {key: divided_like(value, self._parameters[name]) for key, value in state.items()}

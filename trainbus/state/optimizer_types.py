"""An optimizer's state in the types it was saved in. Torch loads it in those of the parameters.

That cast would lose bits of a state that is kept in float32 beside bfloat16 parameters, and make a mask of
bools a tensor of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch

from trainbus.state.other_kinds import refuse_other_options

__all__ = ["ExactOptimizer", "dtype_of", "load_exactly", "names_of_parameters", "type_now", "types_saved"]

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")


class ExactOptimizer:
    """
    Stands for an optimizer of torch where its state is restored, by the numbers of its parameters.

    Args:
        optimizer: The optimizer.
        types: Those of its parameters where the state comes from; see `types_saved`.

    Attributes:
        kind: The optimizer's class, for messages.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, types: Mapping[torch.Tensor, torch.dtype]) -> None:
        self.kind = type(optimizer).__name__
        self._optimizer = optimizer
        self._types = types

    def load_state_dict(self, saved: Any) -> None:
        """Load a state by numbers, see `load_exactly`."""
        load_exactly(self._optimizer, saved, self._types)


def load_exactly(
    optimizer: torch.optim.Optimizer, saved: Any, types: Mapping[torch.Tensor, torch.dtype]
) -> None:
    """
    Do ``optimizer.load_state_dict(saved)`` and leave each tensor of the state the type it has in *saved*.

    What has its parameter's type there follows it, if the parameter has another type now. Devices, and
    where ``"step"`` lives, are up to torch.

    Args:
        optimizer: The optimizer.
        saved: Its state by numbers, as of ``state_dict()``.
        types: Those of the parameters where *saved* comes from, as far as known.

    Raises:
        ValueError: *saved* is of another kind of optimizer. This one stays as it was.
    """
    if not hasattr(optimizer, "_optimizer_load_state_dict_pre_hooks"):  # a wrapper that calls no __init__
        optimizer.load_state_dict(saved)
        return
    given: list[Mapping[str, Any]] = []
    before = {"state": optimizer.state, "param_groups": optimizer.param_groups}

    def note(_: Any, state: Any) -> None:
        given.append(state)

    def put_back(_: Any) -> None:
        try:
            _require_same_kind(optimizer, given[-1], before["param_groups"])
        except ValueError:
            vars(optimizer).update(before)
            raise
        _put_back(optimizer, given[-1], types)

    # Next to the cast: an optimizer and its own hooks may change the state before it, or behind it.
    hooks = [
        optimizer.register_load_state_dict_pre_hook(note),
        optimizer.register_load_state_dict_post_hook(put_back, prepend=True),
    ]
    try:
        optimizer.load_state_dict(saved)
    finally:
        for hook in hooks:
            hook.remove()


def types_saved(module: Any, saved: Any) -> dict[torch.Tensor, torch.dtype]:
    """
    Return the types that a module's parameters have in its saved state, or in an outline of that.

    Args:
        module: The module, or a dict of several.
        saved: Its state; what is not in it is left out.
    """
    if not isinstance(saved, Mapping):
        return {}
    if isinstance(module, Mapping):
        each = (types_saved(one, saved.get(name)) for name, one in module.items())
        return {parameter: dtype for types in each for parameter, dtype in types.items()}
    if not isinstance(module, torch.nn.Module):
        return {}
    types = {_without_wrappers(name): dtype_of(one) for name, one in saved.items()}
    named = ((parameter, types.get(name)) for parameter, name in names_of_parameters(module).items())
    return {parameter: dtype for parameter, dtype in named if dtype is not None}


def dtype_of(value: Any) -> torch.dtype | None:
    """Return the type of a tensor or of what an outline has in its place; None of anything else."""
    return getattr(torch, str(getattr(value, "dtype", None)).removeprefix("torch."), None)


def type_now(
    saved: torch.dtype, parameter: torch.Tensor, types: Mapping[torch.Tensor, torch.dtype]
) -> torch.dtype:
    """Return the type that a parameter's state of type *saved* has in this run."""
    return parameter.dtype if saved == types.get(parameter) else saved


def names_of_parameters(module: Any) -> dict[Any, str]:
    """Return the names of a module's parameters, or of several modules' in a dict, without wrappers."""
    if isinstance(module, Mapping):
        return {
            one: f"{key}.{name}"
            for key, part in module.items()
            for one, name in names_of_parameters(part).items()
        }
    return {parameter: _without_wrappers(name) for name, parameter in module.named_parameters()}


def _without_wrappers(name: str) -> str:
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _require_same_kind(optimizer: torch.optim.Optimizer, saved: Any, before: Any) -> None:
    for own, group, loaded in zip(before, saved["param_groups"], optimizer.param_groups, strict=True):
        refuse_other_options(group, own, (own.keys() & optimizer.defaults.keys()) - loaded.keys())


def _put_back(
    optimizer: torch.optim.Optimizer, saved: Any, types: Mapping[torch.Tensor, torch.dtype]
) -> None:
    numbers = chain.from_iterable(group["params"] for group in saved["param_groups"])
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for number, parameter in zip(numbers, parameters, strict=True):
        if number in saved["state"]:
            own = _typed(optimizer.state[parameter], saved["state"][number], parameter, types)
            optimizer.state[parameter] = own


def _typed(
    loaded: Any, saved: Any, parameter: torch.Tensor, types: Mapping[torch.Tensor, torch.dtype]
) -> Any:
    """Return *loaded*, which came out of *saved*, in the types of that."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        exact = type_now(saved.dtype, parameter, types)
        return loaded if loaded.dtype == exact else saved.to(loaded.device, exact)
    if isinstance(saved, dict) and isinstance(loaded, dict):
        for key, value in saved.items():
            if key != "step" and key in loaded:
                loaded[key] = _typed(loaded[key], value, parameter, types)
    elif isinstance(saved, list | tuple) and isinstance(loaded, list | tuple) and len(saved) == len(loaded):
        each = zip(loaded, saved, strict=True)
        return type(loaded)([_typed(one, value, parameter, types) for one, value in each])
    return loaded

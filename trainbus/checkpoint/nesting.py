"""A nested state: its tensors found, named, exchanged for others; its plain values compared."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["differ", "path_to", "tensors_in", "with_tensors"]

_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)
# Most of what is no tensor: these need no call of their own.
_VALUES = frozenset((int, float, bool, str, type(None)))


def tensors_in(state: Any) -> list[torch.Tensor]:
    """
    Return each tensor of *state* once, in the order of the first place it is found at.

    Args:
        state: Tensors in dict, OrderedDict, Counter, list, tuple and set, nested.

    Raises:
        TypeError: Another kind of container, whose tensors would go unnoticed.
    """
    found: dict[int, torch.Tensor] = {}
    _find_tensors(state, found)
    return list(found.values())


def with_tensors(state: Any, replacements: dict[int, torch.Tensor]) -> Any:
    """Return the same nesting in fresh containers, each tensor exchanged for that under its ``id``."""
    if isinstance(state, torch.Tensor):
        return replacements[id(state)]
    kind = type(state)
    if kind in _SEQUENCES:
        return kind([item if type(item) in _VALUES else with_tensors(item, replacements) for item in state])
    if kind not in _MAPPINGS:
        return state
    copy: dict[Any, Any] = kind()
    for key, item in state.items():
        copy[key] = (
            replacements[id(item)] if isinstance(item, torch.Tensor) else with_tensors(item, replacements)
        )
    if hasattr(state, "__dict__"):
        # A module's state dict carries its `_metadata` there.
        copy.__dict__.update(with_tensors(state.__dict__, replacements))
    return copy


def path_to(state: Any, tensor: torch.Tensor) -> str:
    """Return where *tensor* is found first, written as code, e.g. ``state['module']['weight']``."""
    return "state" + next(_paths(state, tensor), "")


def _find_tensors(state: Any, found: dict[int, torch.Tensor]) -> None:
    if isinstance(state, torch.Tensor):
        found[id(state)] = state
    elif type(state) in _MAPPINGS:
        for item in state.values():
            if isinstance(item, torch.Tensor):
                found[id(item)] = item
            elif type(item) not in _VALUES:
                _find_tensors(item, found)
        if hasattr(state, "__dict__"):
            _find_tensors(state.__dict__, found)
    elif type(state) in _SEQUENCES:
        for item in state:
            if type(item) not in _VALUES:
                _find_tensors(item, found)
    elif isinstance(state, dict | list | tuple | set | frozenset) and not isinstance(state, torch.Size):
        raise TypeError(
            f"Cannot copy a {type(state).__qualname__}: of containers only dict, OrderedDict, Counter, "
            "list, tuple and set can be. Turn it into one of these first."
        )


def _paths(state: Any, tensor: torch.Tensor) -> Iterator[str]:
    if state is tensor:
        yield ""
    elif type(state) in _MAPPINGS:
        for key, item in state.items():
            yield from (f"[{key!r}]{rest}" for rest in _paths(item, tensor))
    elif type(state) in (list, tuple):
        for index, item in enumerate(state):
            yield from (f"[{index}]{rest}" for rest in _paths(item, tensor))


def differ(one: Any, other: Any) -> bool:
    """Tell whether two plain values, or lists or tuples of them, are not the same; NaN is NaN here."""
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(map(differ, one, other))
    return bool(one != other) and not (one != one and other != other)

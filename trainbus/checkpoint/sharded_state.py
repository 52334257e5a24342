"""A nested state as the flat one that ``torch.distributed.checkpoint`` takes, and back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from trainbus.checkpoint.nesting import tensors_in

__all__ = ["STRUCTURE", "FlatState", "flatten", "local_part", "names_in", "part_of", "unflatten"]

STRUCTURE = "trainbus.structure"
"""The name under which the nesting and all that is no tensor is kept."""

_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set}
_Path = tuple[str | int, ...]


@dataclass
class FlatState:
    """
    A nested state, taken apart.

    ``torch.distributed.checkpoint`` would do that by itself, and lose what its names cannot say: keys
    that are no strings, empty containers, tuples and sets. So the structure goes along as one value.
    The names are those it would give, and plain values are there under them too, so that its own
    ``load`` reads what is written here.

    Attributes:
        tensors: By name, those that are divided among ranks or may be: `DTensor` and strided ones.
        values: By name, what is no tensor.
        paths: By name, the keys from the top; an int is an index of a list.
        structure: Nested tuples that say what is where, for `unflatten`. Holds the values too.
        others: Tensors of other layouts, as sparse ones, which nobody divides; the structure names them
            by their index.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, _Path] = field(default_factory=dict)
    structure: Any = None
    others: list[torch.Tensor] = field(default_factory=list)


def flatten(state: Any) -> FlatState:
    """
    Take *state* apart: tensors and plain values in dict, OrderedDict, Counter, list, tuple and set.

    Raises:
        TypeError: Another kind of container, whose tensors would go unnoticed.
    """
    flat = FlatState()
    flat.structure = _node(state, (), flat)
    if flat.structure[0] == "value":
        _add_values(state, (), flat)
    return flat


def unflatten(structure: Any, tensors: Mapping[str, Any], others: Sequence[Any] = ()) -> Any:
    """
    Put a state together again.

    Args:
        structure: As `flatten` made it, read from a file perhaps.
        tensors: By name, what to put in the tensors' places; as many as the structure names.
        others: The same for tensors of other layouts.

    Raises:
        ValueError, TypeError, KeyError, RecursionError: *structure* is none, or names what is not there.
    """
    tag, content, *rest = structure
    if tag == "value":
        return content
    if tag == "tensor":
        return tensors[content]
    if tag == "other":
        return others[content]
    if tag == "list":
        (nodes,) = rest
        return _SEQUENCES[content]([unflatten(node, tensors, others) for node in nodes])
    if tag != "dict":
        raise ValueError(f"{tag!r} is no kind of node")
    items, attributes = rest
    mapping = _MAPPINGS[content]()
    for key, node in items:
        mapping[key] = unflatten(node, tensors, others)
    if attributes:
        mapping.__dict__.update(attributes)
    return mapping


def names_in(structure: Any) -> Iterator[str]:
    """Give the names of the tensors in a structure, in its order."""
    tag, content, *rest = structure
    if tag == "tensor":
        yield content
    elif tag == "list":
        for node in rest[0]:
            yield from names_in(node)
    elif tag == "dict":
        for _, node in rest[0]:
            yield from names_in(node)


def part_of(structure: Any, keys: Collection[str]) -> Any:
    """Return the structure of a dict with only those of its top-level keys."""
    tag, kind, *rest = structure
    if tag == "value":
        return tag, {key: value for key, value in kind.items() if key in keys}
    items, attributes = rest
    return tag, kind, [(key, node) for key, node in items if key in keys], attributes


def local_part(tensor: DTensor) -> torch.Tensor | None:
    """
    Return this rank's part of *tensor*, or None if it has none or another rank writes the same.

    Of replicas only the first is written. Needs no other rank: where this one stands in the tensor's mesh
    says which replica it has.
    """
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return None
    for placement, at in zip(tensor.placements, coordinate, strict=True):
        if at and placement.is_replicate():
            return None
    part = tensor.to_local()
    # Where there are fewer rows than ranks, some have none.
    return part if part.numel() or not tensor.numel() else None


def _node(value: Any, path: _Path, flat: FlatState) -> Any:
    node = _describe(value, path, flat)
    for child, step in _children(node):
        if child[0] == "value":  # nothing but values from here on
            _add_values(child[1], (*path, step), flat)
    return node


def _describe(value: Any, path: _Path, flat: FlatState) -> Any:
    if isinstance(value, torch.Tensor):
        if not isinstance(value, DTensor) and not _is_strided(value):
            flat.others.append(value)
            return "other", len(flat.others) - 1
        name = _new_name(path, flat)
        flat.tensors[name] = value
        return "tensor", name
    kind = type(value)
    if kind in _MAPPINGS.values():
        items = [(key, _node(item, (*path, str(key)), flat)) for key, item in value.items()]
        if all(node[0] == "value" for _, node in items):
            return "value", value
        # A module's state dict carries its `_metadata` there.
        return "dict", kind.__name__, items, dict(getattr(value, "__dict__", {}))
    if kind in _SEQUENCES.values():
        nodes = [_node(item, (*path, index), flat) for index, item in enumerate(value)]
        if all(node[0] == "value" for node in nodes):
            return "value", value
        return "list", kind.__name__, nodes
    tensors_in(value)  # refuses containers of other kinds
    return "value", value


def _children(node: Any) -> Iterator[tuple[Any, str | int]]:
    if node[0] == "dict":
        yield from ((child, str(key)) for key, child in node[2])
    elif node[0] == "list":
        yield from ((child, index) for index, child in enumerate(node[2]))


def _add_values(value: Any, path: _Path, flat: FlatState) -> None:
    """Name plain values as ``torch.distributed.checkpoint`` does: lists as one unless a dict is in them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _add_values(item, (*path, str(key)), flat)
    elif type(value) is list and _holds_mapping(value):
        for index, item in enumerate(value):
            _add_values(item, (*path, index), flat)
    else:
        flat.values[_new_name(path, flat)] = value


def _holds_mapping(values: list[Any]) -> bool:
    return any(isinstance(one, Mapping) or (type(one) is list and _holds_mapping(one)) for one in values)


def _new_name(path: _Path, flat: FlatState) -> str:
    first = name = ".".join(map(str, path)) or "state"
    number = 1
    while name in flat.paths:
        number += 1
        name = f"{first}#{number}"
    flat.paths[name] = path or (name,)
    return name


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_nested

"""What to store in place of a value that could not be loaded again: a clause for the error message."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import fractions
import functools
import os
import re
import sys
import types
import uuid
from collections import Counter, OrderedDict
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["describe", "describe_array", "describe_key", "describe_scalar"]


def describe(value: Any) -> str:
    """Name the type of *value* and say what to store in its place."""
    return f"{_name(value)}: {_remedy(value)}"


def describe_key(key: Any) -> str:
    """Name the type of a dict's key or a set's member and say what to use in its place."""
    return f"{_name(key)} as a key or member of a set: use a Python number, a string or a tuple of them"


def _name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _remedy(value: Any) -> str:
    for kinds, remedy in _REMEDIES:
        if isinstance(value, kinds):
            return remedy
    if isinstance(value, tuple):
        return "store value._asdict()" if hasattr(value, "_fields") else "store tuple(value)"
    if type(value).__name__ == "DTensor":
        return "make the Handler after fully_shard(module); elsewhere store value.full_tensor()"
    if isinstance(value, torch.Tensor):
        return "store value.as_subclass(torch.Tensor), or the plain tensors it is made of"
    if "numpy" in {base.__module__.partition(".")[0] for base in type(value).__mro__}:
        return _remedy_numpy(value)
    if callable(getattr(value, "state_dict", None)):
        return "store value.state_dict()"
    if hasattr(value, "__dataclass_fields__"):
        return "store dataclasses.asdict(value)"
    for kind in (dict, list, set, str, bytes, int, float, complex):
        if isinstance(value, kind):
            return f"store {kind.__name__}(value)"
    return "store what it is made of: numbers, strings, lists, dicts, tensors"


def _remedy_numpy(value: Any) -> str:
    numpy = sys.modules["numpy"]
    if isinstance(value, numpy.ma.MaskedArray):
        return "store value.data and value.mask"
    if isinstance(value, numpy.ndarray):
        return "store numpy.asarray(value)"
    if isinstance(value, numpy.generic):
        return "store value.item()"
    if isinstance(value, numpy.dtype):
        return "store str(value)"
    if isinstance(value, numpy.random.Generator):
        return "store value.bit_generator.state"
    if isinstance(value, numpy.random.RandomState):
        return "store value.get_state()"
    return "store value.state" if hasattr(value, "state") else "store what it is made of"


def describe_array(dtype: Any) -> str:
    """Say what to store in place of a NumPy array whose *dtype* no tensor has."""
    remedies = {
        "M": "store value.astype('int64') and its unit",
        "m": "store value.astype('int64') and its unit",
        "O": "store value.tolist()",
        "f": "store value.astype('float64')",
        "c": "store value.astype('complex128')",
    }
    fallback = "store value.tolist()" if dtype.names is None else "store one array for each field"
    return f"a NumPy array of dtype {dtype.name}: {remedies.get(dtype.kind, fallback)}"


def describe_scalar(value: Any) -> str:
    """Say what to store in place of a NumPy scalar that is no Python number or string."""
    remedies = {"M": "store str(value)", "m": "store value.astype('int64') and its unit"}
    remedies |= {"f": "store float(value)", "c": "store complex(value)"}
    return f"numpy.{type(value).__name__}: {remedies.get(value.dtype.kind, 'store value.tolist()')}"


_Types = type | tuple[type, ...]
# The first that fits counts: an IntEnum is an int as well, a datetime a date.
_REMEDIES: Iterable[tuple[_Types, str]] = (
    (enum.Enum, "store value.name, or value.value"),
    (os.PathLike, "store str(value)"),
    (datetime.timedelta, "store value.total_seconds()"),
    ((datetime.date, datetime.time), "store value.isoformat()"),
    ((decimal.Decimal, fractions.Fraction, uuid.UUID), "store str(value)"),
    (frozenset, "store set(value)"),
    (collections.deque, "store list(value)"),
    ((range, slice), "store (value.start, value.stop, value.step)"),
    (re.Pattern, "store value.pattern"),
    (memoryview, "store value.tobytes()"),
    ((types.SimpleNamespace, types.ModuleType), "store dict(vars(value))"),
    (types.MappingProxyType, "store dict(value)"),
    (functools.partial, "store its arguments, and name the function in the code"),
    ((types.FunctionType, types.BuiltinFunctionType, types.MethodType), "store its name"),
    (type, "store its name"),
    (
        (torch.nn.UninitializedParameter, torch.nn.UninitializedBuffer),
        "run one batch through the module first",
    ),
    (torch.nn.Module, "store value.state_dict()"),
    (torch.Generator, "store value.get_state()"),
    ((torch.UntypedStorage, torch.TypedStorage), "store a tensor that uses it"),
    (torch.memory_format, "store str(value)"),
    (OrderedDict, "store OrderedDict(value)"),
    (Counter, "store Counter(value)"),
)

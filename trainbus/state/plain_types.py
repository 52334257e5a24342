"""What ``torch.load(weights_only=True)`` loads: convert to it, give NumPy back, refuse the rest by path."""

from __future__ import annotations

import functools
import os
import reprlib
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import torch

from trainbus.errors import CheckpointCorruptError, UnsavableStateError
from trainbus.state.remedies import describe, describe_array, describe_key, describe_scalar

__all__ = ["NUMPY_KEY", "find_problems", "from_plain", "to_plain"]

# Reserved keys of the root, present only where the state holds NumPy values.
NUMPY_KEY = "trainbus.numpy"
WRAPPED_KEY = "trainbus.wrapped"

MAX_DEPTH = 200  # pickle needs several stack frames a level, and Python allows a thousand in all
MAX_LISTED = 20
MAX_INT_BITS = 2039  # pickle protocol 2 writes longer ones with an opcode that weights_only refuses

_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_ALWAYS_PLAIN = frozenset(
    (
        type(None),
        bool,
        float,
        complex,
        str,
        torch.dtype,
        torch.device,
        torch.layout,
        torch.qscheme,
        torch.Size,
    )
)
_ARRAY_KINDS = {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8), "c": (8, 16)}
_SCALAR_KINDS = frozenset("biufcSU")


def to_plain(state: Any, *, divided: bool = False) -> Any:
    """
    Convert *state* to what plain ``torch.load(weights_only=True)`` gives back.

    Args:
        state:
            Nested containers of plain values. They are copied, `bytearray` and NumPy arrays too;
            tensors (any device, shape, dtype) are taken by reference and not touched.
        divided: Take each `DTensor` as a tensor: it goes to a sharded checkpoint, or is made whole.

    Returns:
        The same nesting in fresh containers. NumPy arrays have become tensors and NumPy scalars
        numbers; where there are any, the root (wrapped in a dict if it is none) has a key
        ``"trainbus.numpy"`` that lists their paths for `from_plain`.

    Raises:
        UnsavableStateError: For everything else, with the path and a remedy for each value.
    """
    walk = _Walk(divided)
    plain = walk.convert_root(state)
    if walk.problems:
        listed = walk.problems[:MAX_LISTED]
        if more := len(walk.problems) - len(listed):
            listed.append((f"... and {more} more", "these come first, each needs a remedy like theirs"))
        raise UnsavableStateError(listed)
    return plain


def find_problems(state: Any, *, divided: bool = False) -> list[tuple[str, str]]:
    """
    Return all that `to_plain` would refuse in *state*, as ``(path, remedy)``.

    The path is written as code, e.g. ``state['extra']['when']``. Costs as much as `to_plain`.
    """
    walk = _Walk(divided)
    walk.convert_root(state)
    return walk.problems


def from_plain(plain: Any, path: str | os.PathLike[str]) -> Any:
    """
    Undo `to_plain`: give NumPy values back where *plain* lists them.

    Args:
        plain: What was loaded. Its containers are changed and belong to the result.
        path: The file it came from, for the message.

    Raises:
        CheckpointCorruptError: If the list of NumPy values does not fit the rest.
    """
    if type(plain) not in (dict, OrderedDict) or NUMPY_KEY not in plain:
        return plain
    entry = listed = plain.pop(NUMPY_KEY)
    try:
        root = plain["value"] if plain.pop(WRAPPED_KEY, False) else plain
        for entry in listed:
            keys, kind, dtype = entry
            root = _replaced(root, keys, kind, dtype)
    except Exception as error:
        # The list may hold anything, and NumPy may raise anything about it.
        reason = f"{reprlib.repr(entry)} under {NUMPY_KEY!r} does not fit the rest of its state"
        raise CheckpointCorruptError(path, f"{reason} ({type(error).__name__}: {error})") from error
    return root


def _replaced(value: Any, path: list[Any], kind: str, dtype: str) -> Any:
    if not path:
        return _to_numpy(value, kind, dtype)
    inner = _replaced(value[path[0]], path[1:], kind, dtype)
    if type(value) is tuple:
        return (*value[: path[0]], inner, *value[path[0] + 1 :])
    value[path[0]] = inner
    return value


def _to_numpy(value: Any, kind: str, dtype: str) -> Any:
    import numpy as np

    if kind == "array":
        # A copy, because the loaded tensor may lie in a file or share its storage.
        return np.array(value.cpu().numpy(), dtype=np.dtype(dtype))
    return np.dtype(dtype).type(value)


class _Walk:
    """One pass over a state: the converted copy, and what was found on the way."""

    def __init__(self, divided: bool) -> None:
        self.problems: list[tuple[str, str]] = []
        self._numpy: list[list[Any]] = []
        self._path: list[Any] = []
        self._open: set[int] = set()  # the containers being walked, by id
        self._too_deep = False
        self._convert_type: dict[type, Callable[[Any], Any]] = {
            int: self._int,
            bytes: self._bytes,
            bytearray: bytearray,
            torch.Tensor: self._tensor,
            torch.nn.Parameter: self._tensor,
            dict: functools.partial(self._container, self._mapping),
            Counter: functools.partial(self._container, self._mapping),
            OrderedDict: functools.partial(self._container, self._ordered_dict),
            list: functools.partial(self._container, self._sequence),
            tuple: functools.partial(self._container, self._sequence),
            set: self._set,
        }
        if divided and "torch.distributed.tensor" in sys.modules:
            self._convert_type[sys.modules["torch.distributed.tensor"].DTensor] = self._tensor

    def convert_root(self, state: Any) -> Any:
        is_dict = type(state) in (dict, OrderedDict)
        if is_dict and NUMPY_KEY in state:
            self.problems.append((f"state[{NUMPY_KEY!r}]", "trainbus uses this key itself: use another"))
        plain = self._convert(state)
        if not self._numpy:
            return plain
        if not is_dict:
            plain = {"value": plain, WRAPPED_KEY: True}
        plain[NUMPY_KEY] = self._numpy
        return plain

    def _convert(self, value: Any) -> Any:
        kind = type(value)
        if kind in _ALWAYS_PLAIN:
            return value
        convert = self._convert_type.get(kind)
        return convert(value) if convert is not None else self._other(value)

    def _child(self, key: Any, value: Any) -> Any:
        # Most values of a state are tensors and plain numbers: they need no path and no call.
        if type(value) in _ALWAYS_PLAIN or (type(value) in _TENSORS and not value.__dict__):
            return value
        self._path.append(key)
        converted = self._convert(value)
        self._path.pop()
        return converted

    def _container(self, convert: Callable[[Any], Any], value: Any) -> Any:
        if id(value) in self._open:
            return self._problem("it contains itself: break the cycle")
        if self._too_deep:
            return None
        if len(self._path) > MAX_DEPTH:
            self._too_deep = True
            return self._problem(f"nested more than {MAX_DEPTH} deep: store it flat")
        self._open.add(id(value))
        converted = convert(value)
        self._open.discard(id(value))
        return converted

    def _mapping(self, value: dict[Any, Any]) -> dict[Any, Any]:
        converted = type(value)()
        for key, item in value.items():
            if type(key) is not str:
                self._key(key)
            converted[key] = self._child(key, item)
        return converted

    def _ordered_dict(self, value: OrderedDict[Any, Any]) -> dict[Any, Any]:
        converted = self._mapping(value)
        for name, item in vars(value).items():  # nn.Module.state_dict() leaves its _metadata there
            setattr(converted, name, self._attribute(name, item))
        return converted

    def _sequence(self, value: Any) -> Any:
        return type(value)([self._child(index, item) for index, item in enumerate(value)])

    def _set(self, value: set[Any]) -> set[Any]:
        for item in value:
            self._key(item)
        return set(value)

    def _attribute(self, name: str, value: Any) -> Any:
        # NumPy values of attributes would need paths of their own; nobody has asked for them.
        listed = len(self._numpy)
        self._path.append(_Attribute(name))
        converted = self._convert(value)
        if len(self._numpy) > listed:
            del self._numpy[listed:]
            self._problem("NumPy inside an attribute: store a tensor or a Python number")
        self._path.pop()
        return converted

    def _tensor(self, value: torch.Tensor) -> torch.Tensor:
        for name, item in value.__dict__.items():
            self._attribute(name, item)
        return value

    def _int(self, value: int) -> int:
        if value.bit_length() > MAX_INT_BITS:
            self._problem(f"an int of more than {MAX_INT_BITS} bits: store hex(value)")
        return value

    def _bytes(self, value: bytes) -> bytes:
        if not value:  # torch.save writes it as a call of bytes(), which is not loaded
            self._problem("empty bytes: store None, or a bytearray")
        return value

    def _other(self, value: Any) -> Any:
        numpy = sys.modules.get("numpy")
        if numpy is not None and type(value) is numpy.ndarray:
            return self._array(numpy, value)
        if numpy is not None and isinstance(value, numpy.generic) and type(value) is value.dtype.type:
            return self._scalar(value)
        return self._problem(describe(value))

    def _array(self, numpy: Any, value: Any) -> Any:
        dtype = value.dtype
        if dtype.itemsize not in _ARRAY_KINDS.get(dtype.kind, ()):
            return self._problem(describe_array(dtype))
        self._numpy.append([list(self._path), "array", dtype.str])
        return torch.from_numpy(numpy.array(value, dtype=dtype.newbyteorder("="), order="C"))

    def _scalar(self, value: Any) -> Any:
        kind = value.dtype.kind
        if kind not in _SCALAR_KINDS or (kind in "fc" and value.dtype.itemsize not in _ARRAY_KINDS[kind]):
            return self._problem(describe_scalar(value))
        self._numpy.append([list(self._path), "scalar", value.dtype.str])
        if kind in "US":  # item() would strip trailing zeros
            return "".join(value) if kind == "U" else self._bytes(bytes(value))
        return value.item()

    def _key(self, key: Any) -> None:
        self._path.append(key)
        if type(key) is tuple:
            for item in key:
                self._key(item)
        elif type(key) in (int, bytes):
            self._convert(key)
        elif type(key) not in _ALWAYS_PLAIN:
            self._problem(describe_key(key))
        self._path.pop()

    def _problem(self, remedy: str) -> None:
        parts = (f".{key}" if type(key) is _Attribute else f"[{key!r}]" for key in self._path)
        self.problems.append(("state" + "".join(parts), remedy))


class _Attribute(str):
    """A step of a path that is an attribute and no key."""

    __slots__ = ()

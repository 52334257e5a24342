"""``trainbus diff``: where two checkpoints differ, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import typer

from trainbus.checkpoint.load import load_checkpoint
from trainbus.checkpoint.nesting import differ
from trainbus.cli.text import printable
from trainbus.errors import TrainbusError

__all__ = ["Difference", "differences", "relative_difference", "run"]

_LONGEST = 40  # characters of a value


@dataclass(frozen=True)
class Difference:
    """
    One thing that two files do not have in common.

    Attributes:
        name: Its keys from the top, joined by dots.
        kind: ``"only in A"``, ``"only in B"``, ``"type"``, ``"shape"``, ``"dtype"`` or ``"value"``.
        a, b: What each has, in words; None where it has nothing.
        relative: Of tensors that differ in values: see `relative_difference`.
        count: In how many values.
    """

    name: str
    kind: str
    a: str | None = None
    b: str | None = None
    relative: float | None = None
    count: int | None = None


def run(a: str, b: str, *, as_json: bool) -> int:
    """
    Print a line for each difference, the places in A's order, or that there is none.

    Both files are verified, and loaded to the host's memory one after the other.

    Args:
        a, b: Checkpoints, or any files of ``torch.save`` with tensors and plain values.
        as_json: Print one object for each instead.

    Returns:
        The exit code: 0 if they are equal, 1 if not.

    Raises:
        typer.BadParameter: One of them cannot be loaded.
    """
    found = False
    for one in differences(_load(a), _load(b)):
        found = True
        print(json.dumps(_jsonable(one)) if as_json else _line(one), flush=True)
    if not found and not as_json:
        print("equal: the same names, and the same bits in each.")
    return int(found)


def differences(a: Any, b: Any, name: str = "") -> Iterator[Difference]:
    """Give what differs between two nested values of tensors and plain values."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        yield from _between_tensors(a, b, name)
    elif isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in [*a, *(key for key in b if key not in a)]:
            place = f"{name}.{key}" if name else str(key)
            if key not in b:
                yield Difference(place, "only in A", a=_words(a[key]))
            elif key not in a:
                yield Difference(place, "only in B", b=_words(b[key]))
            else:
                yield from differences(a[key], b[key], place)
    elif type(a) is not type(b):
        yield Difference(name, "type", _words(a), _words(b))
    elif isinstance(a, list | tuple) and len(a) == len(b) and not (_is_plain(a) and _is_plain(b)):
        for index, (one, other) in enumerate(zip(a, b, strict=True)):
            yield from differences(one, other, f"{name}.{index}" if name else str(index))
    elif differ(a, b):
        yield Difference(name, "value", _words(a), _words(b))


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> tuple[float, int]:
    """
    Return how far two tensors of one shape and dtype are apart, and in how many values.

    The greatest ``|a - b| / max(|a|, |b|)`` of all pairs that are not the same bits, reckoned in float64
    (complex128): 0 for 0.0 and -0.0, at most 2, and infinite where one alone is NaN or infinite.
    """
    one, other = (tensor.detach().to_dense().contiguous().reshape(-1) for tensor in (a, b))
    if not one.numel():
        return 0.0, 0
    unequal = (one.view(torch.uint8) != other.view(torch.uint8)).view(one.numel(), -1).any(1)
    count = int(unequal.sum())
    if not count:
        return 0.0, 0
    wide = torch.complex128 if one.is_complex() else torch.float64
    one, other = one[unequal].to(wide), other[unequal].to(wide)
    apart = (one - other).abs() / torch.maximum(one.abs(), other.abs())
    both_nan = one.isnan() & other.isnan()
    alike = both_nan | (one == other)
    apart = torch.where(alike, 0.0, apart.nan_to_num(nan=math.inf))
    return float(apart.max()), count


def _between_tensors(a: torch.Tensor, b: torch.Tensor, name: str) -> Iterator[Difference]:
    for kind, mine, theirs in (("shape", a.shape, b.shape), ("dtype", a.dtype, b.dtype)):
        if mine != theirs:
            yield Difference(name, kind, _words(a), _words(b))
            return
    relative, count = relative_difference(a, b)
    if count:
        yield Difference(name, "value", _words(a), _words(b), relative, count)


def _is_plain(values: list[Any] | tuple[Any, ...]) -> bool:
    return not any(isinstance(one, torch.Tensor | Mapping | list | tuple) for one in values)


def _words(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return f"{len(value)} names"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _line(one: Difference) -> str:
    name = printable(one.name or "the whole")
    if one.count is not None and one.relative is not None:
        return f"{name}  differs in {one.count:,} values, relatively by at most {one.relative:.3g}  ({one.a})"
    if one.kind.startswith("only"):
        return f"{name}  {one.kind}  ({printable(one.a or one.b or '')})"
    return f"{name}  {one.kind}: {printable(one.a or '')} in A, {printable(one.b or '')} in B"


def _jsonable(one: Difference) -> dict[str, Any]:
    relative = one.relative
    return {**asdict(one), "relative": str(relative) if relative == math.inf else relative}


def _load(path: str) -> Any:
    try:
        return load_checkpoint(path)[0]
    except (TrainbusError, OSError) as error:
        raise typer.BadParameter(str(error)) from error

"""Where two runs differ: state by state, file by file, value by value, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.nesting import differ

__all__ = ["checkpoints_below", "file_differences", "state_differences", "value_differences"]

# Where the loaders stood on the way says nothing of the result; what comes of it is compared.
_LEFT_OUT = "data"
_OF_MANIFESTS = ("contents", "epoch", "global_step", "monitor", "mode", "score", "logs")
_NUMBERS = (bool, int, float, complex)


def checkpoints_below(folder: str) -> dict[str, CheckpointFile]:
    """Return the checkpoints in *folder* and the folders in it by relative path, in the order of the run."""
    found = [
        (os.path.relpath(file.path, folder), file)
        for place, _, _ in os.walk(folder)
        for file in CheckpointFolder(place)
    ]
    return dict(sorted(found, key=lambda one: (one[1].manifest.sequence, one[0])))


def file_differences(expected: str, actual: str, ignore: Collection[str]) -> Iterator[str]:
    """
    Tell where the checkpoints of two folders differ: those there are, then each value, oldest file first.

    Args:
        expected: The folder of the run that is right.
        actual: The other one's.
        ignore: Names (keys) that are not compared, wherever in a state they stand.

    Raises:
        CheckpointCorruptError: If a file is damaged.
    """
    theirs, mine = checkpoints_below(expected), checkpoints_below(actual)
    yield from (f"{name} is missing" for name in theirs if name not in mine)
    yield from (f"{name} should not be there" for name in mine if name not in theirs)
    for name in (one for one in theirs if one in mine):
        yield from _manifest_differences(name, theirs[name].manifest, mine[name].manifest, ignore)
        for difference in state_differences(theirs[name].path, mine[name].path, ignore):
            yield f"{name}: {difference}"


def state_differences(expected: str, actual: str, ignore: Collection[str]) -> Iterator[str]:
    """Tell where the states in two files differ, a line for each value; see `file_differences`."""
    (theirs, manifest), (mine, _) = load_file(expected), load_file(actual)
    if manifest is not None and manifest.contents == "state":
        theirs, mine = ({key: state[key] for key in state if key != _LEFT_OUT} for state in (theirs, mine))
    yield from value_differences(theirs, mine, "state", ignore)


def value_differences(expected: Any, actual: Any, place: str, ignore: Collection[str]) -> Iterator[str]:
    """
    Tell where two nested values differ, a line for each.

    Args:
        expected: The value that is right.
        actual: The other one.
        place: What to call it, e.g. ``"state"``; the lines name ``state['module']['weight']``.
        ignore: See `file_differences`.
    """
    if type(expected) is not type(actual):
        yield f"{place} is {_short(actual)} instead of {_short(expected)}"
    elif isinstance(expected, Mapping):
        yield from _mapping_differences(expected, actual, place, ignore)
    elif isinstance(expected, list | tuple) and not _are_numbers(expected, actual):
        if len(expected) != len(actual):
            yield f"{place} has {len(actual)} items instead of {len(expected)}"
            return
        for index, pair in enumerate(zip(expected, actual, strict=True)):
            yield from value_differences(*pair, f"{place}[{index}]", ignore)
    elif isinstance(expected, torch.Tensor):
        yield from _tensor_differences(expected, actual, place)
    elif differ(expected, actual):
        yield f"{place} is {_short(actual)} instead of {_short(expected)}"


def _are_numbers(*sequences: Sequence[Any]) -> bool:
    return all(isinstance(one, _NUMBERS) for sequence in sequences for one in sequence)


def _mapping_differences(
    expected: Mapping[Any, Any], actual: Mapping[Any, Any], place: str, ignore: Collection[str]
) -> Iterator[str]:
    for key in [*expected, *(key for key in actual if key not in expected)]:
        if key in ignore:
            continue
        if key not in actual:
            yield f"{place}[{key!r}] is missing"
        elif key not in expected:
            yield f"{place}[{key!r}] should not be there"
        else:
            yield from value_differences(expected[key], actual[key], f"{place}[{key!r}]", ignore)


def _tensor_differences(expected: torch.Tensor, actual: torch.Tensor, place: str) -> Iterator[str]:
    if (expected.dtype, expected.shape) != (actual.dtype, actual.shape):
        yield (
            f"{place} is {actual.dtype} of shape {tuple(actual.shape)} instead of "
            f"{expected.dtype} of shape {tuple(expected.shape)}"
        )
        return
    one, other = (tensor.detach().to_dense().reshape(-1) for tensor in (expected, actual))
    # Bits are compared, so that NaN equals itself and 0.0 is not -0.0.
    unequal = one.view(torch.uint8) != other.view(torch.uint8)
    if not unequal.any():
        return
    count = int(unequal.view(one.numel(), -1).any(1).sum())
    wide = torch.complex128 if one.is_complex() else torch.float64
    apart = (one.to(wide) - other.to(wide)).abs().nan_to_num(0.0).max().item()
    yield f"{place} differs in {count} of {one.numel()} values, by at most {apart:.3g}"


def _manifest_differences(
    name: str, expected: Manifest, actual: Manifest, ignore: Collection[str]
) -> Iterator[str]:
    for field in _OF_MANIFESTS:
        theirs, mine = getattr(expected, field), getattr(actual, field)
        yield from value_differences(theirs, mine, f"{name}: manifest.{field}", ignore)


def _short(value: Any) -> str:
    if value is None or isinstance(value, (*_NUMBERS, str, list, tuple)):
        text = repr(value)
        return text if len(text) <= 80 else f"{text[:77]}..."
    return f"of type {type(value).__name__}"

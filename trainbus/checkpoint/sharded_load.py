"""From a sharded checkpoint back to a state: checked first, and nothing in it is imported or run."""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load

from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.outline import TensorOutline
from trainbus.checkpoint.sharded_contents import ShardedContents, open_contents
from trainbus.checkpoint.sharded_format import METADATA
from trainbus.checkpoint.sharded_state import flatten, names_in, part_of
from trainbus.errors import CheckpointCorruptError, RankFailedError, StateMismatchError

__all__ = ["ALIGNMENT", "load_into", "load_sharded", "read_sharded_outline", "size_of"]

ALIGNMENT = 64
"""Bytes at whose multiples `size_of` has tensors begin; enough for every type."""


def load_sharded(
    path: str | os.PathLike[str],
    *,
    map_location: str | torch.device | None = "cpu",
    verify: bool = True,
    allocate: Callable[[torch.Size, torch.dtype], torch.Tensor] | None = None,
) -> tuple[Any, Manifest]:
    """
    Load all of a sharded checkpoint into one process, each tensor whole. Needs no process group.

    Blocks while the files are read, twice with *verify*. Nothing in them is imported or run.

    Args:
        path: The folder; ``~`` is understood.
        map_location: Where the tensors go, one after the other.
        verify: Compare all files with their digests first. The metadata always is, because it is a
            pickle.
        allocate: Makes the tensors on the CPU that are read into; by default ``torch.empty``.

    Returns:
        The state as it was saved, and the manifest.

    Raises:
        CheckpointCorruptError: It is damaged, or no sharded checkpoint of ours.
        OSError: It cannot be read.
    """
    contents = open_contents(path, lambda files: files.digests if verify else (METADATA,))
    sizes = contents.tensors()
    make = allocate or (lambda size, dtype: torch.empty(size, dtype=dtype, device="cpu"))
    tensors = {name: make(one.size, one.properties.dtype) for name, one in sizes.items()}
    _read_into(tensors, contents, None)
    if map_location is not None:
        tensors = {name: tensor.to(map_location) for name, tensor in tensors.items()}
    return contents.state_of(contents.structure, tensors), contents.files.manifest


def size_of(path: str | os.PathLike[str]) -> int:
    """
    Return how many bytes the tensors of a sharded checkpoint take, each whole and at a multiple of
    `ALIGNMENT`. Reads its metadata only.

    Raises:
        CheckpointCorruptError: The metadata is damaged.
    """
    contents = open_contents(path, lambda files: (METADATA,))
    sizes = (math.prod(one.size) * one.properties.dtype.itemsize for one in contents.tensors().values())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def read_sharded_outline(path: str | os.PathLike[str]) -> Any:
    """
    Return what is in a sharded checkpoint, with a `TensorOutline` in each tensor's place.

    Reads the metadata and the plain values, no tensor.

    Raises:
        CheckpointCorruptError: The metadata is damaged.
    """
    contents = open_contents(path, lambda files: (METADATA,))
    outlines: dict[str, Any] = {
        name: TensorOutline(
            str(one.properties.dtype).removeprefix("torch."),
            tuple(one.size),
            math.prod(one.size) * one.properties.dtype.itemsize,
            name,
            (0, ()),
        )
        for name, one in contents.tensors().items()
    }
    return contents.state_of(contents.structure, outlines)


def load_into(
    path: str | os.PathLike[str],
    target: Mapping[str, Any],
    *,
    group: dist.ProcessGroup,
    keys: Collection[str] | None = None,
    verify: bool = True,
) -> tuple[dict[str, Any], Manifest]:
    """
    Read a sharded checkpoint into the tensors of *target*, which may be divided among ranks in any way.

    Collective: every rank calls it, on its training thread, with its own part of *target*. Blocks until
    all have read. With *verify* each file is compared with its digest by one of the ranks first, and what
    one finds is raised on all, before any tensor has changed.

    Args:
        path: The folder, on a disk that all ranks share.
        target: A state with the checkpoint's structure, as `collect_sharded` returns it. Its tensors are
            written into, in place.
        group: A gloo group of the ranks that call.
        keys: The top-level keys to load; None: all. What the checkpoint has under them and *target* has
            not is made anew, on the CPU, unless it was divided among ranks.
        verify: Compare the files with their digests first.

    Returns:
        The checkpoint's state under those keys, with the tensors of *target* in it; and the manifest.

    Raises:
        CheckpointCorruptError: It is damaged.
        StateMismatchError: *target* has a tensor that the checkpoint has not, or of another shape, or none
            for one that was divided among ranks.
        RankFailedError: A rank could not read it, or did not come.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    problem: tuple[str, ...] | None = None
    try:
        # Each rank checks its share, and each the metadata that it unpickles.
        contents = open_contents(
            path, lambda files: {METADATA, *(sorted(files.digests)[rank::ranks] if verify else ())}
        )
        structure = contents.structure if keys is None else part_of(contents.structure, keys)
        wanted = {key: value for key, value in target.items() if keys is None or key in keys}
        tensors = _targets(path, flatten(wanted).tensors, contents, structure)
    except CheckpointCorruptError as error:
        problem = "damaged", error.reason, error.instead or ""
    except StateMismatchError as error:
        problem = "mismatch", str(error)
    except Exception as error:
        problem = "failed", f"{type(error).__name__}: {error}"
    _agree(path, problem, group)
    _read_into(tensors, contents, group)
    state: dict[str, Any] = contents.state_of(structure, tensors, only=keys)
    return state, contents.files.manifest


class _Reader(FileSystemReader):
    """Torch's reader, of metadata that was read already."""

    def __init__(self, contents: ShardedContents) -> None:
        super().__init__(contents.path)
        self._metadata = contents.metadata

    def read_metadata(self) -> Metadata:  # without **kwargs, torch looks for no other
        """Return what was read."""
        return self._metadata


class _Planner(DefaultLoadPlanner):
    """Torch's planner, for flat states; unpickles nothing."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        """Refuse: torch would load any object."""
        raise CheckpointException(f"{read_item.dest_index.fqn} is no tensor", {})


def _targets(
    path: str | os.PathLike[str],
    have: Mapping[str, torch.Tensor],
    contents: ShardedContents,
    structure: Any,
) -> dict[str, torch.Tensor]:
    """Return the tensors to read into: those there are, and new ones for what is small."""
    saved = contents.tensors()
    missing = sorted(have.keys() - saved.keys())
    if missing:
        raise StateMismatchError(
            f"Cannot load {os.fspath(path)!r}: it has no {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if missing[5:] else "")
            + ", which this run has. Load only the keys it has, or build the model that it was saved from."
        )
    for name, tensor in have.items():
        if tensor.shape != saved[name].size:
            raise StateMismatchError(
                f"Cannot load {name} from {os.fspath(path)!r}: it has shape {tuple(saved[name].size)} there "
                f"and {tuple(tensor.shape)} in this run."
            )
    tensors = dict(have)
    for name in names_in(structure):
        if name in have:
            continue
        one = saved[name]
        if len(one.chunks) > 1:
            raise StateMismatchError(
                f"Cannot load {name} from {os.fspath(path)!r}: it is divided among ranks, and this run has "
                "no tensor to read it into. Build the model and optimizer it was saved from."
            )
        tensors[name] = torch.empty(one.size, dtype=one.properties.dtype, device="cpu")
    return tensors


def _agree(path: str | os.PathLike[str], problem: tuple[str, ...] | None, group: dist.ProcessGroup) -> None:
    """Raise on every rank what the first that has a problem would raise."""
    problems: list[tuple[str, ...] | None] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(problems, problem, group=group)
    except RuntimeError as error:
        raise RankFailedError(None, str(error)) from error
    for rank, found in enumerate(problems):
        if found is None:
            continue
        kind, reason, *more = found
        if kind == "damaged":
            raise CheckpointCorruptError(path, reason, instead="".join(more) or None)
        raise StateMismatchError(reason) if kind == "mismatch" else RankFailedError(rank, reason)


def _read_into(
    tensors: dict[str, torch.Tensor], contents: ShardedContents, group: dist.ProcessGroup | None
) -> None:
    """Read *tensors* in place; by this process alone without a *group*."""
    with warnings.catch_warnings(), torch.no_grad():
        if group is None:
            # Which is what is meant, and torch warns of it.
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(
                dict(tensors),
                storage_reader=_Reader(contents),
                planner=_Planner(),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:
            rank, (cause, _) = min(
                error.failures.items(), key=lambda failure: failure[0], default=(0, (error, None))
            )
            if isinstance(cause, MemoryError | torch.OutOfMemoryError | Warning):
                raise cause from error
            if isinstance(cause, OSError):
                raise RankFailedError(rank, str(cause), cause.errno) from error
            raise CheckpointCorruptError(contents.path, f"it cannot be read ({cause})") from error
        except RuntimeError as error:
            raise RankFailedError(None, str(error)) from error

"""From a sharded checkpoint back to a state: checked first, and nothing in it is imported or run."""

from __future__ import annotations

import io
import math
import os
import pickle
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.outline import TensorOutline
from trainbus.checkpoint.sharded_format import METADATA, ShardedFiles, read_sharded, where_it_stands
from trainbus.checkpoint.sharded_state import STRUCTURE, flatten, names_in, part_of, unflatten
from trainbus.checkpoint.verify import check_shards
from trainbus.errors import CheckpointCorruptError, RankFailedError, StateMismatchError

__all__ = ["ALIGNMENT", "load_into", "load_sharded", "read_sharded_outline", "size_of"]

ALIGNMENT = 64
"""Bytes at whose multiples `size_of` has tensors begin; enough for every type."""

_METADATA_CLASSES = {
    *((dcp_metadata.__name__, name) for name in dcp_metadata.__all__),
    (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (dcp_filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


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
    contents = _open(path, lambda files: files.digests if verify else (METADATA,))
    sizes = contents.tensors()
    make = allocate or (lambda size, dtype: torch.empty(size, dtype=dtype))
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
    contents = _open(path, lambda files: (METADATA,))
    sizes = (math.prod(one.size) * one.properties.dtype.itemsize for one in contents.tensors().values())
    return sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)


def read_sharded_outline(path: str | os.PathLike[str]) -> Any:
    """
    Return what is in a sharded checkpoint, with a `TensorOutline` in each tensor's place.

    Reads the metadata and the plain values, no tensor.

    Raises:
        CheckpointCorruptError: The metadata is damaged.
    """
    contents = _open(path, lambda files: (METADATA,))
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
        contents = _open(
            path, lambda files: {METADATA, *(sorted(files.digests)[rank::ranks] if verify else ())}
        )
        structure = contents.structure if keys is None else part_of(contents.structure, keys)
        wanted = {key: value for key, value in target.items() if keys is None or key in keys}
        tensors = _targets(path, flatten(wanted).tensors, contents, structure)
    except CheckpointCorruptError as error:
        problem = "damaged", error.reason
    except StateMismatchError as error:
        problem = "mismatch", str(error)
    except Exception as error:
        problem = "failed", f"{type(error).__name__}: {error}"
    _agree(path, problem, group)
    _read_into(tensors, contents, group)
    state: dict[str, Any] = contents.state_of(structure, tensors, only=keys)
    return state, contents.files.manifest


@dataclass
class _Contents:
    """
    A checkpoint whose metadata is known to be ours.

    Attributes:
        structure: As `flatten` made it on rank 0.
        others: The tensors that it has by index.
    """

    path: str
    files: ShardedFiles
    metadata: Metadata
    structure: Any
    others: list[torch.Tensor]

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return what is known of each tensor, by name."""
        found = self.metadata.state_dict_metadata
        return {name: one for name, one in found.items() if isinstance(one, TensorStorageMetadata)}

    def state_of(
        self, structure: Any, tensors: Mapping[str, Any], only: Collection[str] | None = None
    ) -> Any:
        """Put a state together; of tensors that only other ranks than 0 had, the names say where they go."""
        try:
            state = unflatten(structure, tensors, self.others)
            known = set(names_in(self.structure))
            for name, keys in (self.metadata.planner_data or {}).items():
                if name in tensors and name not in known and (only is None or keys[0] in only):
                    set_element(state, keys, tensors[name])
        except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
            raise CheckpointCorruptError(self.path, f"its structure is none ({error})") from error
        return state


class _Reader(FileSystemReader):
    """Torch's reader, of metadata that was read already."""

    def __init__(self, contents: _Contents) -> None:
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


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that metadata is made of, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of those, or a dtype."""
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _open(path: str | os.PathLike[str], to_check: Callable[[ShardedFiles], Collection[str]]) -> _Contents:
    path = where_it_stands(path)
    files = read_sharded(path)
    check_shards(path, files, to_check(files))
    with open(os.path.join(path, METADATA), "rb") as file:
        content = file.read()
    try:
        return _contents_of(path, files, content)
    except (CheckpointCorruptError, OSError):
        raise
    except Exception as error:  # whatever a pickle that nobody wrote can bring about
        raise CheckpointCorruptError(path, f"its {METADATA} is not what trainbus writes ({error})") from error


def _contents_of(path: str, files: ShardedFiles, content: bytes) -> _Contents:
    metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    places = metadata.storage_data
    strange = {place.relative_path for place in places.values()} - set(files.digests)
    if strange:
        raise CheckpointCorruptError(
            path, f"its {METADATA} names {min(strange, key=str)!r}, which is none of its files"
        )
    contents = _Contents(path, files, metadata, *_read_structure(path, places[MetadataIndex(STRUCTURE)]))
    for name, one in contents.tensors().items():
        # What no piece covers would be whatever was in memory.
        if sum(math.prod(chunk.sizes) for chunk in one.chunks) != math.prod(one.size):
            raise CheckpointCorruptError(path, f"its pieces of {name} do not make up the whole")
    return contents


def _read_structure(path: str, place: Any) -> tuple[Any, list[torch.Tensor]]:
    with open(os.path.join(path, place.relative_path), "rb") as file:
        file.seek(place.offset)
        content = io.BytesIO(file.read(place.length))
    try:
        with torch.sparse.check_sparse_tensor_invariants(True):  # type: ignore[no-untyped-call]
            structure, others = torch.load(content, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointCorruptError(path, f"its structure cannot be read ({error})") from error
    return structure, others


def _targets(
    path: str | os.PathLike[str],
    have: Mapping[str, torch.Tensor],
    contents: _Contents,
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
        tensors[name] = torch.empty(one.size, dtype=one.properties.dtype)
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
        kind, reason = found
        if kind == "damaged":
            raise CheckpointCorruptError(path, reason)
        raise StateMismatchError(reason) if kind == "mismatch" else RankFailedError(rank, reason)


def _read_into(
    tensors: dict[str, torch.Tensor], contents: _Contents, group: dist.ProcessGroup | None
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
            if isinstance(cause, MemoryError | torch.OutOfMemoryError):
                raise cause from error
            if isinstance(cause, OSError):
                raise RankFailedError(rank, str(cause), cause.errno) from error
            raise CheckpointCorruptError(contents.path, f"it cannot be read ({cause})") from error
        except RuntimeError as error:
            raise RankFailedError(None, str(error)) from error

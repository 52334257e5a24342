"""What is in a sharded checkpoint, by its metadata and structure; nothing in them is imported or run."""

from __future__ import annotations

import io
import math
import os
import pickle
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem as dcp_filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from trainbus.checkpoint.sharded_format import METADATA, ShardedFiles, read_sharded, where_it_stands
from trainbus.checkpoint.sharded_state import STRUCTURE, names_in, unflatten
from trainbus.checkpoint.unpickling import raise_if_no_damage, unpickle
from trainbus.checkpoint.verify import check_shards
from trainbus.errors import CheckpointCorruptError

__all__ = ["ShardedContents", "open_contents"]

_METADATA_CLASSES = {
    *((dcp_metadata.__name__, name) for name in dcp_metadata.__all__),
    (dcp_metadata.__name__, "_MEM_FORMAT_ENCODING"),
    (dcp_filesystem.__name__, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}


@dataclass
class ShardedContents:
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


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes that metadata is made of, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """Return one of those, or a dtype."""
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def open_contents(
    path: str | os.PathLike[str], to_check: Callable[[ShardedFiles], Collection[str]]
) -> ShardedContents:
    """
    Read the metadata and the structure of a sharded checkpoint, and no tensor.

    Args:
        path: The folder; ``~`` is understood.
        to_check: Returns the files to compare with their digests first, the metadata among them.

    Raises:
        CheckpointCorruptError: It is damaged, or no sharded checkpoint of ours.
        OSError: It cannot be read.
    """
    path = where_it_stands(path)
    files = read_sharded(path)
    check_shards(path, files, to_check(files))
    with open(os.path.join(path, METADATA), "rb") as file:
        content = file.read()
    try:
        return _contents_of(path, files, content)
    except (CheckpointCorruptError, OSError, MemoryError):
        raise
    except Exception as error:  # whatever a pickle that nobody wrote can bring about
        raise CheckpointCorruptError(path, f"its {METADATA} is not what trainbus writes ({error})") from error


def _contents_of(path: str, files: ShardedFiles, content: bytes) -> ShardedContents:
    metadata = _MetadataUnpickler(io.BytesIO(content)).load()
    places = metadata.storage_data
    strange = {place.relative_path for place in places.values()} - set(files.digests)
    if strange:
        raise CheckpointCorruptError(
            path, f"its {METADATA} names {min(strange, key=str)!r}, which is none of its files"
        )
    structure = _read_structure(path, places[MetadataIndex(STRUCTURE)])
    contents = ShardedContents(path, files, metadata, *structure)
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
        structure, others = unpickle(content)
    except Exception as error:
        raise_if_no_damage(error, verified=place.length)
        raise CheckpointCorruptError(path, f"its structure cannot be read ({error})") from error
    return structure, others

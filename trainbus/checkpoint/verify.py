"""Whether a checkpoint is bit for bit what was written. Needs no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import BinaryIO

import xxhash

from trainbus.checkpoint.digest import hash_bytes
from trainbus.checkpoint.file_format import Ending, open_regular, read_ending
from trainbus.checkpoint.folder import refuse_folder_of_checkpoints
from trainbus.checkpoint.manifest import NO_DIGEST, Manifest
from trainbus.checkpoint.sharded_format import ShardedFiles, read_sharded, where_it_stands
from trainbus.errors import CheckpointCorruptError

__all__ = ["check_digest", "check_shards", "damaged_shards", "verify_checkpoint", "verify_file"]


def verify_checkpoint(path: str | os.PathLike[str]) -> Manifest:
    """
    Check every bit of a file, or of a sharded checkpoint's folder. Blocks for as long as reading it takes.

    Raises:
        CheckpointCorruptError: It is damaged, or has no manifest to be checked against; of a folder
            the reason names the damaged files.
        OSError: It cannot be opened.
    """
    path = where_it_stands(path)
    if not os.path.isdir(path):
        return verify_file(path)
    refuse_folder_of_checkpoints(path)
    files = read_sharded(path)
    check_shards(path, files, files.digests)
    size = files.described + sum(os.path.getsize(os.path.join(path, name)) for name in files.digests)
    if size != files.manifest.size:
        raise CheckpointCorruptError(path, f"it has {size} bytes and should have {files.manifest.size}")
    return files.manifest


def check_shards(path: str | os.PathLike[str], files: ShardedFiles, names: Iterable[str]) -> None:
    """
    Compare some files of a sharded checkpoint with their digests. Blocks while they are read.

    Raises:
        CheckpointCorruptError: One is damaged or missing.
    """
    damaged = damaged_shards(path, files, names)
    if damaged:
        have = "does not have the digest it was" if len(damaged) == 1 else "do not have the digests they were"
        raise CheckpointCorruptError(path, f"{', '.join(damaged)} {have} written with")


def damaged_shards(path: str | os.PathLike[str], files: ShardedFiles, names: Iterable[str]) -> list[str]:
    """Return which of a sharded checkpoint's files *names* are damaged or missing. Blocks while reading."""
    folder = os.path.expanduser(path)
    return [name for name in names if _digest_of(os.path.join(folder, name)) != files.digests[name]]


def _digest_of(path: str) -> str | None:
    hasher = xxhash.xxh3_128()
    try:
        with open_regular(path) as file:
            hash_bytes(hasher, file.fileno(), os.fstat(file.fileno()).st_size)
    except (FileNotFoundError, CheckpointCorruptError):
        return None
    return hasher.hexdigest()


def verify_file(path: str | os.PathLike[str]) -> Manifest:
    """
    Check every bit of a file against its digest. Blocks for as long as reading it takes.

    Raises:
        CheckpointCorruptError: It is damaged, or has no manifest to be checked against.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        ending = read_ending(file, path)
        if ending is None:
            raise CheckpointCorruptError(path, "it has no manifest, so there is nothing to check it against")
        check_digest(file, path, ending)
    return ending.manifest


def check_digest(file: BinaryIO, path: str | os.PathLike[str], ending: Ending) -> None:
    """
    Read all of *file* and compare it with its digest. Blocks for as long as reading takes.

    Raises:
        CheckpointCorruptError: Any bit differs from what was written.
    """
    hasher = xxhash.xxh3_128()
    hash_bytes(hasher, file.fileno(), ending.digest_at)
    hasher.update(NO_DIGEST.encode())
    file.seek(ending.digest_at + len(NO_DIGEST))
    hasher.update(file.read())
    if hasher.hexdigest() != ending.manifest.digest:
        raise CheckpointCorruptError(path, "its bytes do not have the digest they were written with")

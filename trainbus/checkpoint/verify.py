"""Whether a file is bit for bit what was written. Needs no torch."""

from __future__ import annotations

import os
from typing import BinaryIO

import xxhash

from trainbus.checkpoint.file_format import NO_DIGEST, Ending, Manifest, open_regular, read_ending
from trainbus.errors import CheckpointCorruptError

__all__ = ["check_digest", "verify_file"]

_READ_AT_A_TIME = 512 << 10  # stays in the cache of a core until it is hashed


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
    chunk = memoryview(bytearray(min(_READ_AT_A_TIME, ending.digest_at)))
    file.seek(0)
    left = ending.digest_at
    while left and (count := file.readinto(chunk[:left])):  # type: ignore[attr-defined]
        hasher.update(chunk[:count])
        left -= count
    hasher.update(NO_DIGEST.encode())
    hasher.update(file.read()[len(NO_DIGEST) :])
    if hasher.hexdigest() != ending.manifest.digest:
        raise CheckpointCorruptError(path, "its bytes do not have the digest they were written with")

"""
What a checkpoint that several ranks wrote says of itself. Needs no torch.

It is a folder as ``torch.distributed.checkpoint`` writes it, with two files more: a list of the
xxh3-128 of each file, in the format of ``xxh128sum``, and the manifest. The manifest's digest is that
of the list followed by the manifest itself, with its own 32 hex digits taken as ``0``. So the manifest
stays small however many ranks there are, and covers every byte.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import xxhash

from trainbus.checkpoint import file_format
from trainbus.checkpoint.file_format import WHAT_TO_NAME, open_regular, parse_manifest, seal_alone
from trainbus.checkpoint.manifest import MAX_MANIFEST_BYTES, NO_DIGEST, Manifest
from trainbus.checkpoint.temporary import REPLACED
from trainbus.errors import CheckpointCorruptError

__all__ = [
    "DIGESTS",
    "MANIFEST",
    "METADATA",
    "ShardedFiles",
    "is_sharded",
    "read_manifest",
    "read_sharded",
    "seal_folder",
    "where_it_stands",
]

MANIFEST = "manifest.json"
DIGESTS = "digests.xxh128"
METADATA = ".metadata"
"""Where ``torch.distributed.checkpoint`` keeps which piece of which tensor is where: a pickle."""

_MOST_BYTES = 256 << 20  # of the list, which has some 50 a file
_LINE = re.compile(r"(?P<digest>[0-9a-f]{32})  (?P<name>\.metadata|__\d{1,9}_\d{1,9}\.distcp)")


@dataclass(frozen=True)
class ShardedFiles:
    """
    The manifest of a sharded checkpoint, and the digest of each file beside it, by name.

    Attributes:
        described: Bytes of the manifest and the list; the rest of its ``size`` is that of the files.
    """

    manifest: Manifest
    digests: Mapping[str, str]
    described: int


def is_sharded(path: str | os.PathLike[str]) -> bool:
    """Tell whether *path* is a folder that is a checkpoint, be it in order or not."""
    return os.path.lexists(os.path.join(os.path.expanduser(path), DIGESTS))


def where_it_stands(path: str | os.PathLike[str]) -> str:
    """
    Return *path*, ``~`` expanded, or where the checkpoint of that name is while another takes its place.

    That is so only where two folders cannot change places in one step and a crash came between two.
    """
    path = os.path.expanduser(os.fspath(path))
    if not os.path.lexists(path):
        folder, name = os.path.split(path.rstrip(os.sep))
        with contextlib.suppress(OSError):
            for entry in os.listdir(folder or os.curdir):
                moved = REPLACED.fullmatch(entry)
                if moved is not None and moved["name"] == name:
                    return os.path.join(folder, entry)
    return path


def seal_folder(manifest: Manifest, digests: Mapping[str, str], size: int) -> tuple[Manifest, bytes, bytes]:
    """
    Return the manifest with size and digest, the content of the list, and that of the manifest's file.

    Args:
        manifest: Its ``size`` and ``digest`` are ignored.
        digests: The xxh3-128 of each file, by name.
        size: Bytes of those files.
    """
    listed = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode("ascii")
    final, text = seal_alone(manifest, size + len(listed), xxhash.xxh3_128(listed))
    return final, listed, text


def read_sharded(path: str | os.PathLike[str]) -> ShardedFiles:
    """
    Read the manifest and the list of a sharded checkpoint, and check them; no other file is opened.

    Raises:
        CheckpointCorruptError: One of the two is damaged or missing.
        OSError: One cannot be read.
    """
    path = os.path.expanduser(os.fspath(path))
    listed, text = _read(path, DIGESTS, _MOST_BYTES), _read(path, MANIFEST, 2 * MAX_MANIFEST_BYTES)
    parsed = parse_manifest(text, path)
    if parsed is None:
        raise CheckpointCorruptError(path, f"its {MANIFEST} is no manifest")
    manifest, digest_at = parsed
    hasher = xxhash.xxh3_128(listed)
    hasher.update(text[:digest_at] + NO_DIGEST.encode() + text[digest_at + len(NO_DIGEST) :])
    if hasher.hexdigest() != manifest.digest:
        raise CheckpointCorruptError(
            path, f"its {MANIFEST} and {DIGESTS} do not have the digest they were written with"
        )
    lines = [_LINE.fullmatch(line) for line in listed.decode("ascii", "replace").splitlines()]
    digests = {line["name"]: line["digest"] for line in lines if line is not None}
    if len(digests) != len(lines) or METADATA not in digests:
        raise CheckpointCorruptError(path, f"its {DIGESTS} is no list of the files of a checkpoint")
    return ShardedFiles(manifest, digests, len(listed) + len(text))


def read_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """
    Read what a checkpoint says of itself, from a few kilobytes of it; its digest is not checked.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Returns:
        The manifest, or None for a file without one, such as ``torch.save`` writes.

    Raises:
        CheckpointCorruptError: It is damaged, or no checkpoint at all.
        OSError: It cannot be read.
    """
    path = where_it_stands(path)
    return read_sharded(path).manifest if is_sharded(path) else file_format.read_manifest(path)


def _read(folder: str, name: str, most: int) -> bytes:
    try:
        with open_regular(os.path.join(folder, name)) as file:
            content = file.read(most + 1)
    except FileNotFoundError as error:
        if not os.path.isdir(folder):
            raise
        # One of ours that lost one of the two has the other; torch.distributed.checkpoint writes neither.
        known = any(os.path.lexists(os.path.join(folder, one)) for one in (DIGESTS, MANIFEST))
        instead = None if known else WHAT_TO_NAME
        raise CheckpointCorruptError(folder, f"it is a folder without {name}", instead=instead) from error
    if len(content) > most:
        raise CheckpointCorruptError(folder, f"its {name} has more than {most} bytes")
    return content

"""``trainbus verify``: whether checkpoints are what was written, one line each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from trainbus.checkpoint.file_format import read_manifest
from trainbus.checkpoint.folder import is_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import is_sharded, read_sharded
from trainbus.checkpoint.verify import damaged_shards, verify_checkpoint
from trainbus.cli.text import printable
from trainbus.errors import CheckpointCorruptError, TrainbusError

__all__ = ["run"]


def run(paths: Sequence[str], *, as_json: bool) -> int:
    """
    Print one line for each checkpoint, in plain words or as JSON.

    Args:
        paths: Files and folders of sharded checkpoints; of another folder, the checkpoints directly in it.
        as_json: An object with ``path``, ``ok``, and ``reason`` and ``parts`` or the manifest's own.

    Returns:
        The exit code: 0 if all are whole, 1 if any is damaged, cannot be read or has nothing to be
        checked against, or there is none.
    """
    outcomes = []
    for path in paths:
        for found in _found_at(path):
            outcomes.append(found["ok"])
            print(json.dumps(found) if as_json else _line(found), flush=True)
    return 0 if outcomes and all(outcomes) else 1


def _found_at(path: str) -> Iterator[dict[str, Any]]:
    if not os.path.isdir(path) or is_sharded(path):
        yield _check(path)
        return
    try:
        inside = sorted(_checkpoints_in(path))
    except OSError as error:
        yield _damaged(path, error.strerror or str(error))
        return
    if not inside:
        print(f"No checkpoints in {printable(path)}.", file=sys.stderr)
    yield from map(_check, inside)


def _checkpoints_in(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_sharded(entry.path) or (is_file(entry) and not _is_something_else(entry.path)):
                yield entry.path


def _is_something_else(path: str) -> bool:
    """Tell a file that nobody would take for one of ours: no zip at all, or one without a manifest."""
    try:
        return read_manifest(path) is None
    except CheckpointCorruptError:
        with open(path, "rb") as file:
            return file.read(4) != b"PK\x03\x04"
    except OSError:
        return False


def _check(path: str) -> dict[str, Any]:
    try:
        manifest = verify_checkpoint(path)
    except CheckpointCorruptError as error:
        return _damaged(path, error.reason, _parts(path))
    except OSError as error:
        return _damaged(path, error.strerror or str(error))
    return {"path": path, "ok": True, **_facts(manifest)}


def _damaged(path: str, reason: str, parts: Sequence[str] = ()) -> dict[str, Any]:
    return {"path": path, "ok": False, "reason": reason, "parts": list(parts)}


def _parts(path: str) -> list[str]:
    from trainbus.checkpoint.damage import damaged_parts

    try:
        if is_sharded(path):
            files = read_sharded(path)
            return damaged_shards(path, files, files.digests)
        return damaged_parts(path)
    except (TrainbusError, OSError):
        return []


def _facts(manifest: Manifest) -> dict[str, Any]:
    return {
        "size": manifest.size,
        "digest": manifest.digest,
        "contents": manifest.contents,
        "epoch": manifest.epoch,
        "global_step": manifest.global_step,
    }


def _line(found: dict[str, Any]) -> str:
    path = printable(found["path"])
    if found["ok"]:
        place = (
            f", epoch {found['epoch'] + 1}, step {found['global_step']}"
            if found["contents"] != "object"
            else ""
        )
        return f"ok       {path}  ({found['size'] / 1e6:,.1f} MB{place})"
    parts = f"; damaged: {', '.join(found['parts'])}" if found["parts"] else ""
    return f"damaged  {path}  ({printable(found['reason'] + parts)})"

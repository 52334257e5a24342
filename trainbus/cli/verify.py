"""``trainbus verify``: whether checkpoints are what was written, one line each."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

from trainbus.checkpoint.file_format import read_manifest
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import is_sharded, read_sharded
from trainbus.checkpoint.verify import damaged_shards, verify_checkpoint
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
        checked against.
    """
    worst = 0
    for path in _files(paths):
        found = _check(path)
        worst |= not found["ok"]
        print(json.dumps(found) if as_json else _line(found), flush=True)
    return int(worst)


def _files(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if os.path.isdir(path) and not is_sharded(path):
            yield from sorted(_checkpoints_in(path))
        else:
            yield path


def _checkpoints_in(folder: str) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if is_sharded(entry.path) or (entry.is_file() and not _is_something_else(entry.path)):
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
        return {"path": path, "ok": False, "reason": error.reason, "parts": _parts(path)}
    except OSError as error:
        return {"path": path, "ok": False, "reason": error.strerror or str(error), "parts": []}
    return {"path": path, "ok": True, **_facts(manifest)}


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
    if found["ok"]:
        place = (
            f", epoch {found['epoch'] + 1}, step {found['global_step']}"
            if found["contents"] != "object"
            else ""
        )
        return f"ok       {found['path']}  ({found['size'] / 1e6:,.1f} MB{place})"
    parts = f"; damaged: {', '.join(found['parts'])}" if found["parts"] else ""
    return f"damaged  {found['path']}  ({found['reason']}{parts})"

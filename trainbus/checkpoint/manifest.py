"""
What a checkpoint says of itself, and how that becomes ASCII JSON and comes back. Needs no torch.

The text begins with ``format``, ``size`` and ``digest``, so that the digest has a place that is known
without trusting anything behind it.
"""

from __future__ import annotations

import json
import math
import os
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, NoReturn

from trainbus.errors import CheckpointCorruptError

__all__ = [
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "NO_DIGEST",
    "Manifest",
    "decode_manifest",
    "encode_manifest",
    "fit_manifest",
]

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 60_000
NO_DIGEST = "0" * 32
"""What stands in the digest's place while it is computed."""

_LARGEST_INT = 2**63 - 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """
    What one checkpoint file says of itself.

    Attributes:
        format: Version of the file format.
        size: Bytes of the whole file, this manifest included.
        digest: xxh3-128 of the whole file as 32 lower-case hex digits.
        name: What the file or folder is called, as it was written; copies and links may be called otherwise.
        contents: ``"state"`` (all that a handler resumes from), ``"weights"`` or ``"object"``.
        run_id: The run that wrote it; ``parents`` are those it was resumed from, oldest first.
        left_at: Where each of ``parents`` was left for the next one: epoch and global step of the file that
            was loaded. Empty in files of before there was this field.
        stream: Key of the callback that asked for it, or empty.
        sequence: Counts the checkpoints of a folder; the newest has the greatest.
        epoch: 0-based epoch in which it was asked for.
        global_step: Training batches completed over the run when it was asked for.
        logs: Metrics at that moment; ``logs_left_out`` counts those there was no room for.
        monitor: The metric it was judged by, with ``mode`` and ``score``; all None without one.
        created: Seconds since 1970.
        config: The user's own JSON. Non-finite floats in it come back as strings.
        durability: ``"full"``: file and folder are synced; ``"file"``: where folders cannot be, the file.
        interrupted: True when an exception ended the run amid a batch; `Handler.resume` passes such a file
            over unless it is asked not to.
        versions: Version by package name.
    """

    format: int = FORMAT_VERSION
    size: int = 0
    digest: str = NO_DIGEST
    name: str = ""
    contents: str
    run_id: str = ""
    parents: tuple[str, ...] = ()
    left_at: tuple[tuple[int, int], ...] = ()
    stream: str = ""
    sequence: int = 0
    epoch: int = 0
    global_step: int = 0
    logs: dict[str, float] = field(default_factory=dict)
    logs_left_out: int = 0
    monitor: str | None = None
    mode: str | None = None
    score: float | None = None
    created: float = 0.0
    config: Any = None
    durability: str = "full"
    interrupted: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def position(self) -> tuple[int, int]:
        """Where the run stood: epoch and global step. Those of one run come in order."""
        return self.epoch, self.global_step

    def left_from_here(self) -> dict[str, tuple[int, int]]:
        """Return by ``run_id`` where a run that goes on from this file leaves its run and the parents."""
        left_at = dict.fromkeys((*self.parents, self.run_id), self.position)
        known = zip(self.parents, self.left_at, strict=False)  # none in older files
        return left_at | {run: min(one, self.position) for run, one in known if run != self.run_id}


def fit_manifest(manifest: Manifest) -> Manifest:
    """
    Return *manifest*, if need be with fewer logs, so that it fits into a zip comment.

    Raises:
        ValueError: It does not fit even with nothing but the monitored metric.
        TypeError: ``config`` is not JSON.
    """
    if _encoded_length(manifest) <= MAX_MANIFEST_BYTES:
        return manifest
    kept = {name: value for name, value in manifest.logs.items() if name == manifest.monitor}
    left_out = manifest.logs_left_out + len(manifest.logs) - len(kept)
    smaller = replace(manifest, logs=kept, logs_left_out=left_out)
    length = _encoded_length(smaller)
    if length > MAX_MANIFEST_BYTES:
        raise ValueError(
            f"Cannot describe the checkpoint: its manifest takes {length} bytes, the limit is "
            f"{MAX_MANIFEST_BYTES}. Make `config` smaller ({len(json.dumps(_plain_json(manifest.config)))} "
            "bytes of it) and put what is large into the state instead."
        )
    return smaller


def _encoded_length(manifest: Manifest) -> int:
    return len(encode_manifest(replace(manifest, size=_LARGEST_INT)))


def encode_manifest(manifest: Manifest) -> bytes:
    """
    Return *manifest* as text.

    Raises:
        TypeError: ``config`` is not JSON.
    """
    values = {entry.name: getattr(manifest, entry.name) for entry in fields(manifest)}
    values["logs"] = {name: float(value) for name, value in manifest.logs.items()}
    try:
        return json.dumps(_plain_json(values), separators=(",", ":"), allow_nan=False).encode("ascii")
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(
            f"Cannot write config {reprlib.repr(manifest.config)} into a manifest: {error}. It takes "
            "None, bool, int, float, str, and lists and dicts of them."
        ) from error


def _plain_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _plain_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_json(item) for item in value]
    return value


def decode_manifest(text: bytes, path: str | os.PathLike[str]) -> Manifest:
    """
    Return what a text says, which begins as a manifest does. *path* is for the messages.

    Raises:
        CheckpointCorruptError: It is damaged, or of another format.
    """
    try:
        values = json.loads(text.decode("ascii"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise CheckpointCorruptError(path, f"its manifest is no valid JSON ({error})") from error
    version = values["format"]
    if version != FORMAT_VERSION:
        raise CheckpointCorruptError(
            path, f"it says it has format {version!r}, and this version of trainbus reads {FORMAT_VERSION}"
        )
    decoded = {}
    for name, decode in _DECODERS.items():
        if name not in values:
            continue
        try:
            decoded[name] = decode(values[name])
        except (TypeError, ValueError, OverflowError) as error:
            reason = f"its manifest says {name} is {reprlib.repr(values[name])}"
            raise CheckpointCorruptError(path, reason) from error
    if "contents" not in decoded:
        raise CheckpointCorruptError(path, "its manifest does not say what it contains")
    return Manifest(**decoded)


def _refuse(value: object) -> NoReturn:
    raise ValueError(f"{value!r} is not allowed here")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else _refuse(value)


def _count(value: Any) -> int:
    return value if type(value) is int and 0 <= value <= _LARGEST_INT else _refuse(value)


def _flag(value: Any) -> bool:
    return value if isinstance(value, bool) else _refuse(value)


def _number(value: Any) -> float:
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    return float(value) if type(value) in (int, float) else _refuse(value)


def _contents(value: Any) -> str:
    return str(value) if value in ("state", "weights", "object") else _refuse(value)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(_text(item) for item in value) if isinstance(value, list) else _refuse(value)


def _position(value: Any) -> tuple[int, int]:
    epoch, global_step = value if isinstance(value, list) else _refuse(value)
    return _count(epoch), _count(global_step)


def _positions(value: Any) -> tuple[tuple[int, int], ...]:
    return tuple(_position(item) for item in value) if isinstance(value, list) else _refuse(value)


def _table(decode: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def decode_table(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            _refuse(value)
        return {name: decode(item) for name, item in value.items()}

    return decode_table


def _optional(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else decode(value)


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "format": _count,
    "size": _count,
    "digest": _text,
    "name": _text,
    "contents": _contents,
    "run_id": _text,
    "parents": _texts,
    "left_at": _positions,
    "stream": _text,
    "sequence": _count,
    "epoch": _count,
    "global_step": _count,
    "logs": _table(_number),
    "logs_left_out": _count,
    "monitor": _optional(_text),
    "mode": _optional(_text),
    "score": _optional(_number),
    "created": _number,
    "config": lambda value: value,
    "durability": _text,
    "interrupted": _flag,
    "versions": _table(_text),
}

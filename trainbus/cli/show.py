"""``trainbus show``: what a file says of itself, and the tree of what is in it. Needs no torch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

import typer

from trainbus.checkpoint.folder import refuse_folder_of_checkpoints
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.outline import Opaque, TensorOutline, read_outline
from trainbus.checkpoint.sharded_format import is_sharded, read_manifest
from trainbus.cli.text import printable
from trainbus.errors import CheckpointCorruptError

__all__ = ["run"]

_MOST_LINES = 100_000  # a few bytes of a pickle can stand for any number of lines
_DEEPEST = 100
_LONGEST = 60  # characters of a value


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One thing in a file: its keys from the top, itself, and the place of the first that is the same."""

    keys: tuple[Any, ...]
    value: Any
    same_as: str | None = None

    @property
    def place(self) -> str:
        return ".".join(printable(str(key)) for key in self.keys)


def run(file: str, *, as_json: bool) -> None:
    """
    Print the manifest, then a line for each name, indented by its depth; of what has no names, itself.

    Reads the end of the file, its directory and the names; the digest is not checked (`trainbus verify`
    does), and nothing in the file is imported or run. Of a sharded checkpoint its metadata is read, which
    takes torch.

    Args:
        file: A checkpoint, or any file of ``torch.save``.
        as_json: Print one object instead: ``manifest``, and ``entries`` with ``name`` and ``dtype``,
            ``shape``, ``bytes``, ``same_as`` of tensors, ``value`` or ``type`` of others.

    Raises:
        typer.BadParameter: It cannot be read as such a file.
    """
    try:
        if os.path.isdir(os.path.expanduser(file)):
            refuse_folder_of_checkpoints(file)
        manifest, state = read_manifest(file), _outline(file)
    except CheckpointCorruptError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        raise typer.BadParameter(f"{file!r} cannot be read: {error.strerror}.") from error
    entries = list(itertools.islice(_marked(_walk(state, ())), _MOST_LINES + 1))
    if as_json:
        print(json.dumps({"manifest": _facts(manifest), "entries": [_json(one) for one in entries]}))
        return
    for line in _header(manifest):
        print(line)
    for entry in entries[:_MOST_LINES]:
        print(_line(entry))
    if len(entries) > _MOST_LINES:
        print(f"... and more than these {_MOST_LINES:,} lines")


def _outline(path: str) -> Any:
    if not is_sharded(path):
        return read_outline(path)
    from trainbus.checkpoint.sharded_load import read_sharded_outline

    return read_sharded_outline(path)


def _walk(value: Any, keys: tuple[Any, ...], around: frozenset[int] = frozenset()) -> Iterator[_Entry]:
    """
    Give what is in *value*, each container before its items; one that holds itself is not entered.

    The whole has no name and is given only where nothing in it is.
    """
    children = _children(value)
    if keys or children is None or not value:
        yield _Entry(keys, value)
    if children is None or id(value) in around or len(keys) >= _DEEPEST:
        return
    for key, child in children:
        yield from _walk(child, (*keys, key), around | {id(value)})


def _children(value: Any) -> Iterator[tuple[Any, Any]] | None:
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, list | tuple) and not all(map(_is_plain, value)):
        return enumerate(value)
    return None


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _is_name(value: Any) -> bool:
    """Tell what a pickle only names, such as ``torch.float32``, a class or a function."""
    return isinstance(value, type) and issubclass(value, Opaque)


def _marked(entries: Iterator[_Entry]) -> Iterator[_Entry]:
    """Name the first of several tensors that are one and the same."""
    first: dict[Any, str] = {}
    for entry in entries:
        one = entry.value
        if isinstance(one, TensorOutline) and one.storage and one.nbytes:
            place = first.setdefault((one.storage, one.view, one.shape, one.dtype), entry.place)
            yield entry if place == entry.place else dataclasses.replace(entry, same_as=place)
        else:
            yield entry


def _line(entry: _Entry) -> str:
    if not entry.keys:
        return _words(entry)
    indent = "  " * (len(entry.keys) - 1)
    return f"{indent}{printable(str(entry.keys[-1]))}  {_words(entry)}".rstrip()


def _words(entry: _Entry) -> str:
    value = entry.value
    if isinstance(value, TensorOutline):
        layout = "" if value.layout == "strided" else f" {value.layout}"
        text = f"{printable(value.dtype)}{layout} {list(value.shape)}"
        return f"{text}  = {entry.same_as}" if entry.same_as else f"{text}  {_size(value.nbytes)}"
    if isinstance(value, Opaque):
        return f"an object of {printable(value.name)}"
    if _is_name(value):
        return printable(value.name)
    if isinstance(value, Mapping):
        size = _total(value)
        return f"({_size(size)})" if size else "" if value else "{}"
    if isinstance(value, list | tuple):
        # Only of plain values: others may hold each other, and be endless when written down.
        short = repr(value) if len(value) <= _LONGEST and all(map(_is_plain, value)) else ""
        return printable(short) if 0 < len(short) <= _LONGEST else f"{type(value).__name__} of {len(value)}"
    return printable(_shortened(value))


def _total(value: Any) -> int:
    """Return the bytes of the tensors in *value*, those with several names once."""
    tensors = itertools.islice(_marked(_walk(value, ("",))), _MOST_LINES)
    return sum(
        one.value.nbytes for one in tensors if isinstance(one.value, TensorOutline) and not one.same_as
    )


def _json(entry: _Entry) -> dict[str, Any]:
    value, name = entry.value, [key if isinstance(key, int) else str(key) for key in entry.keys]
    if isinstance(value, TensorOutline):
        facts: dict[str, Any] = {"dtype": value.dtype, "shape": value.shape, "bytes": value.nbytes}
        return {"name": name, **facts, "same_as": entry.same_as}
    if _is_plain(value) and not isinstance(value, bytes | complex):
        finite = not isinstance(value, float) or math.isfinite(value)
        return {"name": name, "value": value if finite else str(value)}
    kind = value.name if isinstance(value, Opaque) or _is_name(value) else type(value).__name__
    return {"name": name, "type": kind}


def _facts(manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    facts = dataclasses.asdict(manifest)
    logs = {name: one if math.isfinite(one) else str(one) for name, one in manifest.logs.items()}
    score = manifest.score
    return {**facts, "logs": logs, "score": score if score is None or math.isfinite(score) else str(score)}


def _header(manifest: Manifest | None) -> Iterator[str]:
    if manifest is None:
        yield "no manifest: this file was not written by trainbus"
        return
    if manifest.contents != "object":
        yield f"epoch {manifest.epoch + 1}, global step {manifest.global_step}"
    created = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest.created))
    yield f"{manifest.contents}, {_size(manifest.size)}, written {created}"
    if manifest.logs:
        yield "  ".join(f"{printable(name)}={value:.6g}" for name, value in manifest.logs.items())
    if manifest.monitor is not None:
        yield f"judged by {printable(manifest.monitor)} ({manifest.mode}): {manifest.score}"
    if manifest.interrupted:
        yield "interrupted: resume(interrupted=True) takes it"
    for name in ("run_id", "stream", "config", "versions", "durability", "digest"):
        value = getattr(manifest, name)
        if value not in (None, "", {}):
            yield f"{name}: {printable(value if isinstance(value, str) else json.dumps(value))}"
    yield ""


def _shortened(value: Any) -> str:
    text = repr(value[: _LONGEST + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _size(nbytes: int) -> str:
    for unit, length in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= length:
            return f"{nbytes / length:,.1f} {unit}"
    return f"{nbytes} B"

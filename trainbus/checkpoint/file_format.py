"""
What a checkpoint file says of itself. Needs no torch.

A checkpoint is a plain ``torch.save`` zip whose comment is the manifest: ASCII JSON that
begins with ``format``, ``size`` and ``digest``. The digest is the xxh3-128 of the whole
file, comment included, with its own 32 hex digits taken as ``0``.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import stat
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, BinaryIO, NamedTuple, NoReturn

import xxhash

from trainbus.errors import CheckpointCorruptError

__all__ = [
    "END_RECORD_BYTES",
    "FORMAT_VERSION",
    "MAX_MANIFEST_BYTES",
    "NO_DIGEST",
    "Ending",
    "Manifest",
    "ends_in_manifest",
    "fit_manifest",
    "open_regular",
    "parse_manifest",
    "read_ending",
    "read_manifest",
    "seal",
    "seal_alone",
]

FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 60_000
END_RECORD_BYTES = 22
"""Size of a zip's end-of-central-directory record, which the comment follows."""

_SIGNATURE = b"PK\x05\x06"
_LARGEST_COMMENT = 65_535
# What torch's zip reader reads at once, and by how much it goes back for the next block.
_BLOCK_BYTES = 4096
_BLOCK_STEP = _BLOCK_BYTES - 3
_LARGEST_INT = 2**63 - 1
NO_DIGEST = "0" * 32
"""What stands in the digest's place while it is computed."""
# Fixed, so that the digest's place is known without trusting anything behind it.
_HEAD = re.compile(rb'\{"format":\d{1,19},"size":\d{1,19},"digest":"(?P<digest>[0-9a-f]{32})",')
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """
    What one checkpoint file says of itself.

    Attributes:
        format: Version of the file format.
        size: Bytes of the whole file, this manifest included.
        digest: xxh3-128 of the whole file as 32 lower-case hex digits.
        contents: ``"state"`` (all that a handler resumes from), ``"weights"`` or ``"object"``.
        run_id: The run that wrote it; ``parents`` are those it was resumed from, oldest first.
        stream: Key of the callback that asked for it, or empty.
        sequence: Counts the checkpoints of a folder; the newest has the greatest.
        epoch: 0-based epoch in which it was asked for.
        global_step: Training batches completed over the run when it was asked for.
        logs: Metrics at that moment; ``logs_left_out`` counts those there was no room for.
        monitor: The metric it was judged by, with ``mode`` and ``score``; all None without one.
        created: Seconds since 1970.
        config: The user's own JSON. Non-finite floats in it come back as strings.
        durability: ``"full"``: synced file and folder.
        interrupted: True when the run was cut off inside a step: not for resuming.
        versions: Version by package name.
    """

    format: int = FORMAT_VERSION
    size: int = 0
    digest: str = NO_DIGEST
    contents: str
    run_id: str = ""
    parents: tuple[str, ...] = ()
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


class Ending(NamedTuple):
    """The end of a checkpoint file: its manifest, and at which byte of the file its digest begins."""

    manifest: Manifest
    digest_at: int


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


def seal(
    manifest: Manifest, end_record: bytes, before: int, hasher: xxhash.xxh3_128
) -> tuple[Manifest, bytes]:
    """
    Return the manifest with size and digest, and the last bytes of the file that hold it.

    Args:
        manifest: Its ``size`` and ``digest`` are ignored.
        end_record: The last 22 bytes that ``torch.save`` wrote.
        before: Bytes of the file before that record.
        hasher: Has been fed those bytes; used up by this.

    Raises:
        ValueError: *end_record* does not end a zip with an empty comment, or the
            manifest is too long.
    """
    if len(end_record) != END_RECORD_BYTES or end_record[:4] != _SIGNATURE or end_record[20:] != b"\0\0":
        raise ValueError(
            f"Cannot add a manifest to what ends in {end_record!r}: it is no zip file with an empty "
            "comment. Write it with torch.save in its default format."
        )
    fitted, comment = _sized(manifest, before + END_RECORD_BYTES, lambda text: _padded(text, before))
    record = end_record[:20] + len(comment).to_bytes(2, "little")
    hasher.update(record + comment)
    final = replace(fitted, digest=hasher.hexdigest())
    return final, record + _encode(final).ljust(len(comment))


def seal_alone(manifest: Manifest, before: int, hasher: xxhash.xxh3_128) -> tuple[Manifest, bytes]:
    """
    Return the manifest with size and digest, and the content of a file of its own that holds it.

    Args:
        manifest: Its ``size`` and ``digest`` are ignored.
        before: Bytes of all that it speaks of beside itself.
        hasher: Has been fed what its digest is to cover beside itself; used up by this.
    """
    fitted, text = _sized(manifest, before, lambda text: text + b"\n")
    hasher.update(text)
    final = replace(fitted, digest=hasher.hexdigest())
    return final, _encode(final) + b"\n"


def _sized(manifest: Manifest, before: int, pad: Callable[[bytes], bytes]) -> tuple[Manifest, bytes]:
    """Return the manifest with its size, which is its own length and *before*, and its padded text."""
    fitted = replace(fit_manifest(manifest), size=0, digest=NO_DIGEST)
    text = pad(_encode(fitted))
    # The size counts its own digits. Each round can only lengthen it, so this ends.
    while (size := before + len(text)) != fitted.size:
        fitted = replace(fitted, size=size)
        text = pad(_encode(fitted))
    return fitted, text


def parse_manifest(text: bytes, path: str | os.PathLike[str]) -> tuple[Manifest, int] | None:
    """
    Read a manifest that is in no zip; the digest is not checked. *path* is for the messages.

    Returns:
        It and at which byte of *text* its digest begins; None for what does not begin like one.

    Raises:
        CheckpointCorruptError: It is damaged.
    """
    head = _HEAD.match(text)
    return None if head is None else (_decode(text, path), head.start("digest"))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """
    Open *path* for reading if it is a regular file, and never wait for a pipe's other end.

    Raises:
        CheckpointCorruptError: It is a folder, a pipe or a device.
        OSError: It cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(os.path.expanduser(path), flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointCorruptError(path, "it is not a regular file")
    return open(fd, "rb")


def read_manifest(path: str | os.PathLike[str]) -> Manifest | None:
    """
    Read what the file says of itself, from its last few kilobytes; the digest is not checked.

    Returns:
        The manifest, or None for a zip without one, such as ``torch.save`` writes.

    Raises:
        CheckpointCorruptError: The file is damaged, or no zip at all.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        ending = read_ending(file, path)
    return None if ending is None else ending.manifest


def ends_in_manifest(path: str | os.PathLike[str]) -> bool:
    """
    Tell whether the end of a file is a manifest, be it in order or not.

    Raises:
        CheckpointCorruptError: It is no regular file.
        OSError: It cannot be read.
    """
    with open_regular(path) as file:
        comment = _read_comment(file, os.fstat(file.fileno()).st_size)
    return comment is not None and _HEAD.match(comment) is not None


def read_ending(file: BinaryIO, path: str | os.PathLike[str]) -> Ending | None:
    """Do what `read_manifest` does, with an open *file*; *path* is for the messages."""
    size = os.fstat(file.fileno()).st_size
    comment = _read_comment(file, size)
    if comment is None:
        raise CheckpointCorruptError(path, "it does not end as a zip file does")
    if not comment:
        return None
    head = _HEAD.match(comment)
    if head is None:
        raise CheckpointCorruptError(path, "the comment at its end is no manifest")
    manifest = _decode(comment, path)
    if manifest.size != size:
        raise CheckpointCorruptError(path, f"it has {size} bytes and should have {manifest.size}")
    return Ending(manifest, size - len(comment) + head.start("digest"))


def _read_comment(file: BinaryIO, size: int) -> bytes | None:
    # Nearly every manifest fits the first try, which is one page of the disk's cache.
    for length in (4096, END_RECORD_BYTES + _LARGEST_COMMENT):
        file.seek(max(0, size - length))
        tail = file.read(length)
        at = tail.rfind(_SIGNATURE)
        while at >= 0:
            # The signature may also turn up by chance in the record's own fields.
            start = at + END_RECORD_BYTES
            if start + int.from_bytes(tail[start - 2 : start], "little") == len(tail):
                return tail[start:]
            at = tail.rfind(_SIGNATURE, 0, at + 3)
    return None


def _padded(comment: bytes, before: int) -> bytes:
    """
    Return *comment* with as many spaces behind it as plain ``torch.load`` needs.

    The zip reader in torch looks for the end record in blocks, from the file's end on, and fails
    if it comes to one that would begin in front of the file. Where the comment is most of a small
    file, its length therefore has to be such that a block begins in the bytes *before* the record.
    """
    beyond = before + END_RECORD_BYTES + len(comment) - _BLOCK_BYTES
    begin = beyond % _BLOCK_STEP
    return comment if beyond <= 0 or begin <= before else comment + b" " * (_BLOCK_STEP - begin)


def _encoded_length(manifest: Manifest) -> int:
    return len(_encode(replace(manifest, size=_LARGEST_INT)))


def _encode(manifest: Manifest) -> bytes:
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


def _decode(comment: bytes, path: str | os.PathLike[str]) -> Manifest:
    try:
        values = json.loads(comment.decode("ascii"), parse_constant=_refuse)
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
    "contents": _contents,
    "run_id": _text,
    "parents": _texts,
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

"""
Where in a checkpoint file its manifest stands, and how the file is sealed with it. Needs no torch.

A checkpoint is a plain ``torch.save`` zip whose comment is the manifest. The digest in it is the
xxh3-128 of the whole file, comment included, with its own 32 hex digits taken as ``0``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from trainbus.checkpoint.manifest import NO_DIGEST, Manifest, decode_manifest, encode_manifest, fit_manifest
from trainbus.errors import CheckpointCorruptError

if TYPE_CHECKING:
    from trainbus.checkpoint.hasher import Hasher

__all__ = [
    "END_RECORD_BYTES",
    "WHAT_TO_NAME",
    "WITHOUT_PICKLE",
    "Ending",
    "ends_in_manifest",
    "is_legacy",
    "open_regular",
    "parse_manifest",
    "read_ending",
    "read_manifest",
    "seal",
    "seal_alone",
]

END_RECORD_BYTES = 22
"""Size of a zip's end-of-central-directory record, which the comment follows."""

WHAT_TO_NAME = (
    "Name a file of trainbus.save or torch.save, or the folder of a sharded checkpoint of trainbus."
)
"""What is said where something else was given."""

WITHOUT_PICKLE = "it is no checkpoint but a zip without the pickle of torch.save"
"""What is said of another zip, such as one of NumPy or Keras."""

_SIGNATURE = b"PK\x05\x06"
_ZIP_START = b"PK\x03\x04"
_LEGACY_NUMBER = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # pickled first by torch before 1.6
_HEAD_BYTES = 32
_LARGEST_COMMENT = 65_535
# What torch's zip reader reads at once, and by how much it goes back for the next block.
_BLOCK_BYTES = 4096
_BLOCK_STEP = _BLOCK_BYTES - 3
# Fixed, so that the digest's place is known without trusting anything behind it.
_HEAD = re.compile(rb'\{"format":\d{1,19},"size":\d{1,19},"digest":"(?P<digest>[0-9a-f]{32})",')


class Ending(NamedTuple):
    """The end of a checkpoint file: its manifest, and at which byte of the file its digest begins."""

    manifest: Manifest
    digest_at: int


def seal(manifest: Manifest, end_record: bytes, before: int, hasher: Hasher) -> tuple[Manifest, bytes]:
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
    return final, record + encode_manifest(final).ljust(len(comment))


def seal_alone(manifest: Manifest, before: int, hasher: Hasher) -> tuple[Manifest, bytes]:
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
    return final, encode_manifest(final) + b"\n"


def _sized(manifest: Manifest, before: int, pad: Callable[[bytes], bytes]) -> tuple[Manifest, bytes]:
    """Return the manifest with its size, which is its own length and *before*, and its padded text."""
    fitted = replace(fit_manifest(manifest), size=0, digest=NO_DIGEST)
    text = pad(encode_manifest(fitted))
    # The size counts its own digits. Each round can only lengthen it, so this ends.
    while (size := before + len(text)) != fitted.size:
        fitted = replace(fitted, size=size)
        text = pad(encode_manifest(fitted))
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
    return None if head is None else (decode_manifest(text, path), head.start("digest"))


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """
    Open *path* for reading if it is a regular file, and never wait for a pipe's other end.

    Raises:
        CheckpointCorruptError: It is a folder, a pipe or a device.
        OSError: It cannot be opened.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    fd = os.open(os.path.expanduser(path), flags)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        what = "it is a folder and" if stat.S_ISDIR(mode) else "it is"
        raise CheckpointCorruptError(path, f"{what} not a regular file", instead=WHAT_TO_NAME)
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
        raise _without_end(file, path)
    if not comment:
        return None
    head = _HEAD.match(comment)
    if head is None:
        raise CheckpointCorruptError(path, "the comment at its end is no manifest")
    manifest = decode_manifest(comment, path)
    if manifest.size != size:
        raise CheckpointCorruptError(path, f"it has {size} bytes and should have {manifest.size}")
    return Ending(manifest, size - len(comment) + head.start("digest"))


def is_legacy(file: BinaryIO) -> bool:
    """Tell whether an open file begins as those of torch before 1.6, which are no zips."""
    file.seek(0)
    return _LEGACY_NUMBER in file.read(_HEAD_BYTES)


def _without_end(file: BinaryIO, path: str | os.PathLike[str]) -> CheckpointCorruptError:
    """Tell a checkpoint that lost its end, or all its bytes in a power cut, from what never was one."""
    if is_legacy(file):
        return CheckpointCorruptError(
            path,
            "it has the format of torch before 1.6 and not that of a zip",
            instead="trainbus.load reads it, and "
            f"trainbus.save(trainbus.load({os.fspath(path)!r}), 'new.pt') writes it anew.",
        )
    file.seek(0)
    head = file.read(_HEAD_BYTES).rstrip(b"\0")
    if not head or head[: len(_ZIP_START)] == _ZIP_START[: len(head)]:
        return CheckpointCorruptError(path, "it does not end as a zip file does")
    return CheckpointCorruptError(
        path, "it is no checkpoint, as trainbus.save and torch.save write zip files", instead=WHAT_TO_NAME
    )


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

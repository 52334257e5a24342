"""
The bytes of a zip file around its records, laid out as ``torch.save`` lays them out.

Records are stored as they are, and each one's sum stands behind it, so that a record can be
written before its sum is known. Source: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5. Pure.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["ROOM", "SUM_IN_ENTRY", "SUM_IN_TAIL", "Record", "between", "directory", "entry"]

ROOM = 112
"""Bytes that `between` needs at most, for records whose names have no more than 20 letters."""

SUM_IN_TAIL = 4
"""At which of the bytes behind a record its sum begins, four bytes in little-endian order."""

SUM_IN_ENTRY = 16
"""At which byte of its `entry` it does."""

_ZIP64 = 0xFFFFFFFF  # a size or an offset from which on it takes eight bytes
_MANY = 0xFFFF
_SUM_FOLLOWS = 1 << 3
_UTF8 = 1 << 11
_FLAGS = _SUM_FOLLOWS | _UTF8
_PADDING = b"FB"  # the extra field that torch pads with

_HEADER = struct.Struct("<4sHHHHHIIIHH")
_SUM = struct.Struct("<4sIII")
_SUM64 = struct.Struct("<4sIQQ")
_ENTRY = struct.Struct("<4sHHHHHHIIIHHHHHII")
_END64 = struct.Struct("<4sQHHIIQQQQ")
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4sHHHHIIH")


@dataclass(slots=True)
class Record:
    """
    One file inside of the zip.

    Attributes:
        name: ASCII, with the folder.
        size: Bytes.
        header: The file's byte at which its header begins; set by `between`.
        sum: CRC-32 of its bytes; set before `between` is called with it as the one before.
    """

    name: str
    size: int
    header: int = 0
    sum: int = 0

    @property
    def _is_large(self) -> bool:
        return self.size >= _ZIP64


def between(before: Record | None, after: Record | None, start: int, stop: int | None = None) -> bytes:
    """
    Return what stands between the bytes of two neighbours.

    Args:
        before: The record whose bytes end here; None at the file's beginning.
        after: The record whose bytes follow; None if the directory does.
        start: Where in the file *before* ends.
        stop: Where *after* is to begin, at least `ROOM` bytes and at most 64 KiB further; None: as soon as
            it can at a multiple of 64.

    Raises:
        ValueError: There is no room for it.
    """
    tail = b"" if before is None else _sum_of(before)
    if after is None:
        return tail
    after.header = start + len(tail)
    name = after.name.encode("ascii")
    # As many zeros as the sum behind the record will take: eight bytes a size, not four.
    large = struct.pack("<HHQQ", 1, 16, 0, 0) if after._is_large else b""
    least = after.header + _HEADER.size + len(name) + len(large) + 4
    if stop is None:
        stop = -(-least // 64) * 64
    if not least <= stop <= least + 0xF000:
        raise ValueError(f"A header of {least - start} bytes does not fill those from {start} to {stop}.")
    padding = _PADDING + (stop - least).to_bytes(2, "little") + bytes(stop - least)
    size = _ZIP64 if after._is_large else 0
    version = 45 if after._is_large else 0
    extra = large + padding
    header = _HEADER.pack(b"PK\x03\x04", version, _FLAGS, 0, 0, 0, 0, size, size, len(name), len(extra))
    return tail + header + name + extra


def directory(entries: bytes, count: int, start: int) -> bytes:
    """
    Return the end of a file whose records end at byte *start*: their directory, and an empty comment.

    Args:
        entries: The `entry` of each record, one behind the other; *count* of them.
    """
    size = len(entries)
    end64 = b""
    if count >= _MANY or size >= _ZIP64 or start >= _ZIP64:
        end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, size, start)
        end64 += _LOCATOR.pack(b"PK\x06\x07", 0, start + size, 1)
    few = min(count, _MANY)
    end = _END.pack(b"PK\x05\x06", 0, 0, few, few, min(size, _ZIP64), min(start, _ZIP64), 0)
    return entries + end64 + end


def entry(record: Record) -> bytes:
    """Return what the directory says of a record; its header's place is known from `between`."""
    name = record.name.encode("ascii")
    large = [record.size, record.size] if record._is_large else []
    if record.header >= _ZIP64:
        large.append(record.header)
    extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
    version = 45 if large else 0
    size = min(record.size, _ZIP64)
    return (
        _ENTRY.pack(
            b"PK\x01\x02",
            version,
            version,
            _FLAGS,
            0,
            0,
            0,
            record.sum,
            size,
            size,
            len(name),
            len(extra),
            0,
            0,
            0,
            0,
            min(record.header, _ZIP64),
        )
        + name
        + extra
    )


def _sum_of(record: Record) -> bytes:
    layout = _SUM64 if record._is_large else _SUM
    return layout.pack(b"PK\x07\x08", record.sum, record.size, record.size)

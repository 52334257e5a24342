"""Writes a snapshot as the file that ``torch.save`` would write of it, from where its bytes lie."""

from __future__ import annotations

import functools
import io
import logging
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.storage import UntypedStorage

from trainbus.checkpoint.state_pickle import Reductions, pickled
from trainbus.checkpoint.zip_records import Record, between, directory

try:
    from isal.isal_zlib import crc32
except ImportError:  # where it has no wheel: the same sum, at a seventh of the speed
    from zlib import crc32

__all__ = ["Image", "Stream", "write_archive"]

_log = logging.getLogger("trainbus")

_FOLDER = "archive"
_BLOCK = 4096
# Summed, hashed and written at once. Not less: a training thread that never leaves Python costs each
# call its 5 ms turn at the interpreter's lock.
_AT_ONCE = 16 << 20


class Stream(Protocol):
    """What `OutputStream` does."""

    def write(self, data: bytes | memoryview) -> int:
        """Copy *data*."""

    def write_in_place(self, data: memoryview) -> None:
        """Write *data*, which is not changed any more."""


class Image:
    """
    Memory that holds the storages of tensors, with room for a file's records between them.

    Args:
        memory: Writable, from the beginning of a page; behind each storage but the last,
            `zip_records.ROOM` bytes are free.
        tensors: All that lie on it. They stay the same for as long as this is used.
        count: How many storages they have.
    """

    def __init__(self, memory: memoryview, tensors: Sequence[torch.Tensor], count: int) -> None:
        self.memory = memory
        self.address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        self.count = count
        self._tensors = tensors

    @functools.cached_property
    def reductions(self) -> Reductions:
        """What pickling asks these tensors for; found out on the thread that first writes them."""
        return Reductions(self._tensors)


def write_archive(
    state: Any, image: Image, stream: Stream, wait_for_bytes: Callable[[], None] = lambda: None
) -> bool:
    """
    Write *state* so that ``torch.load`` opens it, with and without ``mmap``.

    ``torch.save`` would copy every byte once more, sum them up with a slow algorithm, and call
    back into Python, with the GIL, five times for each record.

    Args:
        state: What the file is to hold; its tensors lie on the CPU.
        image: Memory that holds most of them. What stands between them is overwritten.
        stream: Where to.
        wait_for_bytes: Called before the first byte of a tensor is read. What stands around them in
            the file is made while they are still copied.

    Returns:
        False, with nothing written, if only ``torch.save`` can be trusted to write it.
    """
    if not _works():
        return False
    data, storages = pickled(state, image.reductions)
    placed, others = _sorted(storages, image)
    if len(placed) != image.count or any(one.device.type != "cpu" for one in storages):
        return False
    wait_for_bytes()
    _Archive(stream).write(data, placed, others, image)
    return True


class _Archive:
    """One file. Its records in their order: what is small, the image's, the other storages."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._records: list[Record] = []
        self._written = 0

    def write(
        self,
        data: bytes,
        placed: list[tuple[int, str, UntypedStorage]],
        others: list[tuple[str, UntypedStorage]],
        image: Image,
    ) -> None:
        # No ".format_version": with it, torch may reckon where the records are instead of looking.
        self._write_record("data.pkl", data)
        self._write_record(".storage_alignment", b"64")
        self._write_record("byteorder", sys.byteorder.encode())
        self._write_record("version", b"3\n")
        if placed:
            self._write_image(placed, image)
        for key, storage in others:
            self._write_record(f"data/{key}", _bytes_of(storage))
        self._append(between(self._last, None, self._written))
        self._append(directory(self._records, self._written))

    @property
    def _last(self) -> Record | None:
        return self._records[-1] if self._records else None

    def _append(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._written += len(data)

    def _write_record(self, name: str, data: bytes | memoryview) -> None:
        record = Record(f"{_FOLDER}/{name}", len(data), sum=crc32(data))
        self._append(between(self._last, record, self._written))
        self._append(data)
        self._records.append(record)

    def _write_image(self, placed: list[tuple[int, str, UntypedStorage]], image: Image) -> None:
        """Complete the image between its storages, and have it written up to the last one's end."""
        memory = image.memory
        records = [(start, Record(f"{_FOLDER}/data/{key}", one.nbytes())) for start, key, one in placed]
        # Memory is handed to the disk as it is, so blocks of it have to be blocks of the file.
        begins = -(-(self._written + 256) // _BLOCK) * _BLOCK
        self._append(between(self._last, records[0][1], self._written, begins))
        last, end, done = None, 0, 0
        for start, record in records:
            if last is not None:
                memory[end:start] = between(last, record, begins + end, begins + start)
            end = start + record.size
            for at in range(start, end, _AT_ONCE):
                known = min(at + _AT_ONCE, end)
                record.sum = crc32(memory[at:known], record.sum)
                if known - done >= _AT_ONCE:
                    whole = known - (known - done) % _BLOCK
                    self._stream.write_in_place(memory[done:whole])
                    done = whole
            self._records.append(record)
            last = record
        # A small file goes to the disk in one write, through the cache: copying it costs less than another.
        if done:
            self._stream.write_in_place(memory[done:end])
        else:
            self._stream.write(memory[:end])
        self._written = begins + end


def _sorted(
    storages: list[UntypedStorage], image: Image
) -> tuple[list[tuple[int, str, UntypedStorage]], list[tuple[str, UntypedStorage]]]:
    """Return those on the image by where they begin on it, and the others; all with their keys."""
    placed, others = [], []
    size = len(image.memory)
    for number, storage in enumerate(storages):
        start = storage.data_ptr() - image.address
        if 0 <= start < size and storage.nbytes():
            placed.append((start, str(number), storage))
        else:
            others.append((str(number), storage))
    placed.sort(key=lambda one: one[0])
    return placed, others


def _bytes_of(storage: UntypedStorage) -> memoryview:
    flat = torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
    return flat.numpy().data


@functools.cache
def _works() -> bool:
    """Tell whether this torch loads what is written here, by writing and loading a small state once."""
    buffer = mmap.mmap(-1, mmap.PAGESIZE)
    view = torch.frombuffer(buffer, dtype=torch.float32, count=4).fill_(3)
    other = torch.nn.Parameter(torch.ones(2, device="cpu"))
    state = {"view": view, "tied": view[1:3], "other": other, "number": 1}
    stream = _MemoryStream()
    try:
        data, storages = pickled(state, Reductions([view]))
        image = Image(memoryview(buffer), [view], 1)
        placed, others = _sorted(storages, image)
        _Archive(stream).write(data, placed, others, image)
        loaded = torch.load(stream.file(), weights_only=True)
        same = torch.equal(loaded["view"], view) and torch.equal(loaded["other"], other)
        tied = loaded["tied"].data_ptr() == loaded["view"].data_ptr() + view.element_size()
        works = bool(same and tied and loaded["number"] == 1)
    except Exception:
        _log.debug("The check of the archive writer failed.", exc_info=True)
        works = False
    if not works:
        _log.warning("torch %s reads another format: saves go through torch.save, slower.", torch.__version__)
    return works


class _MemoryStream:
    def __init__(self) -> None:
        self._file = io.BytesIO()
        self.write = self._file.write

    def write_in_place(self, data: memoryview) -> None:
        self._file.write(data)

    def file(self) -> io.BytesIO:
        self._file.seek(0)
        return self._file

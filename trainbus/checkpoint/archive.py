"""Writes a snapshot as the file that ``torch.save`` would write of it, from where its bytes lie."""

from __future__ import annotations

import functools
import io
import logging
import mmap
import operator
import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.storage import UntypedStorage

from trainbus.checkpoint import collector
from trainbus.checkpoint.hasher import Hasher, new_hasher
from trainbus.checkpoint.image_records import ImageRecords, Place
from trainbus.checkpoint.record_sums import crc32
from trainbus.checkpoint.state_pickle import Reductions, pickled
from trainbus.checkpoint.turns import Turns
from trainbus.checkpoint.zip_records import Record, between, directory, entry

__all__ = ["Image", "Stream", "write_archive"]

_log = logging.getLogger("trainbus")

_FOLDER = "archive"
_BLOCK = 4096
# A file with less goes to the disk in one write, through the cache: copying it costs less than another.
_WORTH_IN_PLACE = 16 << 20


class Stream(Protocol):
    """What `OutputStream` does."""

    def write(self, data: bytes | memoryview) -> int:
        """Copy *data*."""

    def write_in_place(self, data: memoryview) -> None:
        """Write *data*, which is not changed any more."""

    def leave_hashing(self, count: int) -> Hasher:
        """Leave it to the caller to hash the next *count* bytes."""


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
        self._reductions: Reductions | None = None
        self._records: ImageRecords | None = None
        self._storages: list[UntypedStorage] = []
        self._places: list[Place] = []

    @property
    def reductions(self) -> Reductions:
        """What pickling asks these tensors for; found out on the thread that first writes them."""
        # No `cached_property`: before Python 3.12 that has a lock, which a fork meanwhile leaves locked.
        if self._reductions is None:
            self._reductions = Reductions(self._tensors)
        return self._reductions

    def sorted(self, storages: list[UntypedStorage]) -> tuple[list[Place], list[tuple[str, UntypedStorage]]]:
        """Return those that lie here by where they begin, and the others; all with their records' names."""
        if len(storages) == len(self._storages) and all(map(operator.is_, storages, self._storages)):
            return self._places, []
        places, others = [], []
        turns = Turns()
        for number, storage in enumerate(storages):
            name = f"{_FOLDER}/data/{number}"
            start = storage.data_ptr() - self.address
            if 0 <= start < len(self.memory) and storage.nbytes():
                places.append(Place(start, storage.nbytes(), name))
            else:
                others.append((name, storage))
            turns.offer()
        places.sort()
        if not others:  # which would be kept for nothing
            self._storages, self._places = storages, places
        return places, others

    def records(self, places: list[Place], header: int, begins: int) -> ImageRecords:
        """Return what `ImageRecords` these arguments give: those of the file before, where they fit it."""
        if self._records is None or not self._records.is_for(places, header, begins):
            self._records = ImageRecords(places, header, begins)
        return self._records


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
    with collector.paused():
        data, storages = pickled(state, image.reductions)
        places, others = image.sorted(storages)
    if len(places) != image.count or any(one.device.type != "cpu" for _, one in others):
        return False
    wait_for_bytes()
    _Archive(stream).write(data, places, others, image)
    return True


class _Archive:
    """One file. Its records in their order: what is small, the image's, the other storages."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._written = 0
        self._last: Record | None = None
        self._entries: list[bytes] = []
        self._count = 0

    def write(
        self, data: bytes, places: list[Place], others: list[tuple[str, UntypedStorage]], image: Image
    ) -> None:
        # No ".format_version": with it, torch may reckon where the records are instead of looking.
        self._write_record(f"{_FOLDER}/data.pkl", data)
        self._write_record(f"{_FOLDER}/.storage_alignment", b"64")
        self._write_record(f"{_FOLDER}/byteorder", sys.byteorder.encode())
        self._write_record(f"{_FOLDER}/version", b"3\n")
        if places:
            self._write_image(places, image)
        for name, storage in others:
            self._write_record(name, _bytes_of(storage))
        self._append(between(self._last, None, self._written))
        self._append(directory(b"".join(self._entries), self._count, self._written))

    def _append(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self._written += len(data)

    def _write_record(self, name: str, data: bytes | memoryview) -> None:
        record = Record(name, len(data), sum=crc32(data))
        self._append(between(self._last, record, self._written))
        self._append(data)
        self._list(entry(record), 1, record)

    def _write_image(self, places: list[Place], image: Image) -> None:
        """Complete the image between its storages, and have it written up to the last one's end."""
        first = Record(places[0].name, places[0].size)
        # Memory is handed to the disk as it is, so blocks of it have to be blocks of the file.
        begins = -(-(self._written + 256) // _BLOCK) * _BLOCK
        self._append(between(self._last, first, self._written, begins))
        with collector.paused():
            records = image.records(places, first.header, begins)
        hasher = self._stream.leave_hashing(places[-1].end)
        done = 0
        for end in records.completed(image.memory, hasher):
            whole = end - end % _BLOCK
            if whole - done >= _WORTH_IN_PLACE:
                self._stream.write_in_place(image.memory[done:whole])
                done = whole
        rest = image.memory[done : places[-1].end]
        if done:
            self._stream.write_in_place(rest)
        else:
            self._stream.write(rest)
        self._written = begins + places[-1].end
        self._list(records.entries, len(places), records.last)

    def _list(self, entries: bytes, count: int, last: Record) -> None:
        self._entries.append(entries)
        self._count += count
        self._last = last


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
        _Archive(stream).write(data, *image.sorted(storages), image)
        loaded = torch.load(stream.file(), weights_only=True, mmap=False)
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

    def leave_hashing(self, count: int) -> Hasher:
        return new_hasher()

    def file(self) -> io.BytesIO:
        self._file.seek(0)
        return self._file

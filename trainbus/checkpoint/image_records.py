"""What stands in a file around the storages of an image: the same from save to save, but for the sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from trainbus.checkpoint.record_sums import add_to_sums
from trainbus.checkpoint.turns import Turns
from trainbus.checkpoint.zip_records import SUM_IN_ENTRY, SUM_IN_TAIL, Record, between, entry


def scatter_in_python(memory: memoryview, starts: np.ndarray, parts: bytearray, bounds: np.ndarray) -> None:
    """Do what `scatter` does, more slowly."""
    turns = Turns()
    view = memoryview(parts)
    for start, (begin, end) in zip(starts.tolist(), pairwise(bounds.tolist()), strict=True):
        memory[start : start + end - begin] = view[begin:end]
        turns.offer()


try:
    from trainbus.checkpoint._writing import scatter
except ImportError:  # built where there was a C compiler
    scatter = scatter_in_python

__all__ = ["ImageRecords", "Place"]

# Bytes that are summed up at once, and then written while the next ones are: less at first, because the
# disk waits for it, then more, because beside a thread that never leaves Python each call waits 5 ms for the
# interpreter's lock. With 64 MiB an optimizer step that begins meanwhile has to share its cores for longer.
_FIRST_BATCH = 16 << 20
_LARGEST_BATCH = 32 << 20


class Place(NamedTuple):
    """Where on an image a storage lies, its bytes, and the name of its record."""

    start: int
    size: int
    name: str

    @property
    def end(self) -> int:
        """Where on the image it ends."""
        return self.start + self.size


class _Batch(NamedTuple):
    """
    What is summed up at once: of each of some neighbouring places all bytes, or a piece of them.

    Attributes:
        first: Index of the first of these places.
        starts, sizes: Of each piece, in bytes of the image, as uint64.
    """

    first: int
    starts: np.ndarray
    sizes: np.ndarray


class ImageRecords:
    """
    The records of what lies on an image, for files that hold it from byte *begins* on.

    Made once for many files: with 4,096 storages it takes 17 ms, with the interpreter's lock.

    Attributes:
        last: The last record, with its sum, once `completed` is through.
        entries: What the file's directory says of them, from then on too.

    Args:
        places: In their order; between two of them, `zip_records.ROOM` bytes are free.
        header: The file's byte at which the first one's header begins.
    """

    def __init__(self, places: Sequence[Place], header: int, begins: int) -> None:
        turns = Turns()
        self.last = Record(places[0].name, places[0].size, header)
        gaps, entries = [], [entry(self.last)]
        for place, following in pairwise(places):
            record = Record(following.name, following.size)
            gaps.append(between(self.last, record, begins + place.end, begins + following.start))
            entries.append(entry(record))
            self.last = record
            turns.offer()
        self._key = places, header, begins
        self._count = len(places)
        self._gaps = _Summed(gaps, SUM_IN_TAIL)
        self._gap_starts = np.array([place.end for place in places[:-1]], dtype=np.uint64)
        self._entries = _Summed(entries, SUM_IN_ENTRY)
        self._batches = list(_batches(places))

    def is_for(self, places: Sequence[Place], header: int, begins: int) -> bool:
        """Tell whether these are what it was made with."""
        return self._key == (places, header, begins)

    def completed(self, memory: memoryview) -> Iterator[int]:
        """
        Sum up what lies on *memory*, the image, and fill in what stands between; batch after batch.

        For one file at a time.

        Yields:
            The byte of the image up to which it is complete.
        """
        sums = np.zeros(self._count, dtype=np.uint32)
        for first, starts, sizes in self._batches:
            stop = first + len(starts)
            add_to_sums(sums[first:stop], memory, starts, sizes)
            self._gaps.set_sums(sums, first, stop)
            # Behind the last one too: if that is not complete, the next batch does it again.
            self._gaps.put_on(memory, self._gap_starts, first, stop)
            yield int(starts[-1] + sizes[-1])
        self._entries.set_sums(sums, 0, len(sums))
        self.last.sum = int(sums[-1])

    @property
    def entries(self) -> bytes:
        """The directory's entries, one behind the other."""
        return bytes(self._entries.whole)


class _Summed:
    """
    Bytes in parts, in each of which a record's sum stands.

    Attributes:
        whole: All parts, one behind the other.

    Args:
        position: At which byte of a part the sum begins.
    """

    def __init__(self, parts: Sequence[bytes], position: int) -> None:
        self.whole = bytearray().join(parts)
        self._bounds = np.cumsum([0, *map(len, parts)], dtype=np.uint64)
        self._bytes = np.frombuffer(self.whole, dtype=np.uint8)
        self._at = self._bounds[:-1, None].astype(np.int64) + position + np.arange(4)

    def set_sums(self, sums: np.ndarray, first: int, stop: int) -> None:
        """Set those of the parts from *first* to before *stop*, out of *sums* of all."""
        at = self._at[first:stop]
        self._bytes[at] = sums[first : first + len(at)].astype("<u4").view(np.uint8).reshape(-1, 4)

    def put_on(self, memory: memoryview, starts: np.ndarray, first: int, stop: int) -> None:
        """Copy each of these parts to *memory*, to where *starts* of all say."""
        starts = starts[first:stop]
        scatter(memory, starts, self.whole, self._bounds[first : first + len(starts) + 1])


def _batches(places: Sequence[Place]) -> Iterator[_Batch]:
    most = _FIRST_BATCH
    first, starts, sizes, left = 0, [], [], most
    for index, place in enumerate(places):
        start = place.start
        while start < place.end:
            size = min(left, place.end - start)
            starts.append(start)
            sizes.append(size)
            start += size
            left -= size
            if not left:
                yield _Batch(first, np.array(starts, dtype=np.uint64), np.array(sizes, dtype=np.uint64))
                most = min(2 * most, _LARGEST_BATCH)
                first, starts, sizes, left = index + (start == place.end), [], [], most
    if starts:
        yield _Batch(first, np.array(starts, dtype=np.uint64), np.array(sizes, dtype=np.uint64))

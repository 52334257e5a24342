"""What stands in a file around the storages of an image: the same from save to save, but for the sums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from trainbus.checkpoint.hasher import Hasher
from trainbus.checkpoint.record_sums import Gaps, Pieces, complete
from trainbus.checkpoint.turns import Turns
from trainbus.checkpoint.zip_records import SUM_IN_ENTRY, SUM_IN_TAIL, Record, between, entry

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
    What is completed at once: of each of some neighbouring places all bytes, or a piece of them.

    Attributes:
        first: Index of the first of these places.
        stop: Index behind the last of them that ends with its piece.
        starts, sizes: Of each piece, in bytes of the image, as uint64.
    """

    first: int
    stop: int
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
        self._gaps = _Parts(gaps)
        self._gap_starts = np.array([place.end for place in places[:-1]], dtype=np.uint64)
        self._entries = _Parts(entries)
        self._batches = list(_batches(places))

    def is_for(self, places: Sequence[Place], header: int, begins: int) -> bool:
        """Tell whether these are what it was made with."""
        return self._key == (places, header, begins)

    def completed(self, memory: memoryview, hasher: Hasher) -> Iterator[int]:
        """
        Sum up what lies on *memory*, the image, fill in what stands between, and hash it; batch after batch.

        For one file at a time.

        Args:
            hasher: Has been given what the file has before the image.

        Yields:
            The byte of the image up to which that is done.
        """
        sums = np.zeros(self._count, dtype=np.uint32)
        for first, stop, starts, sizes in self._batches:
            pieces = Pieces(starts, sizes, sums[first : first + len(starts)])
            bounds = self._gaps.bounds[first : stop + 1]
            gaps = Gaps(self._gap_starts[first:stop], bounds, self._gaps.whole, SUM_IN_TAIL)
            complete(memory, pieces, gaps, hasher)
            yield int(starts[-1] + sizes[-1])
        self._entries.set_sums(sums, SUM_IN_ENTRY)
        self.last.sum = int(sums[-1])

    @property
    def entries(self) -> bytes:
        """The directory's entries, one behind the other."""
        return bytes(self._entries.whole)


class _Parts:
    """
    Bytes in parts, in each of which a record's sum stands.

    Attributes:
        whole: All parts, one behind the other.
        bounds: Where in it each begins, and behind it where the last one ends, as uint64.
    """

    def __init__(self, parts: Sequence[bytes]) -> None:
        self.whole = bytearray().join(parts)
        self.bounds = np.cumsum([0, *map(len, parts)], dtype=np.uint64)

    def set_sums(self, sums: np.ndarray, position: int) -> None:
        """Set that of each part, which begins at its byte *position*."""
        at = self.bounds[:-1, None].astype(np.int64) + position + np.arange(4)
        np.frombuffer(self.whole, dtype=np.uint8)[at] = sums.astype("<u4").view(np.uint8).reshape(-1, 4)


def _batches(places: Sequence[Place]) -> Iterator[_Batch]:
    most = _FIRST_BATCH
    first, pieces, left = 0, [], most
    for index, place in enumerate(places):
        start = place.start
        while start < place.end:
            size = min(left, place.end - start)
            pieces.append((start, size))
            start += size
            left -= size
            if not left:
                yield _batch(places, first, pieces)
                most = min(2 * most, _LARGEST_BATCH)
                first, pieces, left = index + (start == place.end), [], most
    if pieces:
        yield _batch(places, first, pieces)


def _batch(places: Sequence[Place], first: int, pieces: list[tuple[int, int]]) -> _Batch:
    starts, sizes = np.array(pieces, dtype=np.uint64).T.copy()
    last = first + len(pieces) - 1
    ends = sum(pieces[-1]) == places[last].end
    return _Batch(first, last + ends, starts, sizes)

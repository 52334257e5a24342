"""The file object that ``torch.save`` writes into."""

from __future__ import annotations

import contextlib
import errno
import queue
import time
from types import TracebackType

import numpy as np
import xxhash

from trainbus.checkpoint.chunk_writers import ChunkWriters
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.file_format import END_RECORD_BYTES, seal
from trainbus.checkpoint.manifest import Manifest

__all__ = ["OutputStream"]

# What file systems answer to a write past the page cache that they cannot do.
_CANNOT_BYPASS = {errno.EINVAL, errno.ENOTSUP}

_BLOCK = 4096


class OutputStream:
    """
    Collects, hashes and writes what it is given, and puts the manifest at its end.

    One thread fills it. Whole blocks, from page-aligned memory, be it a chunk that was filled or
    what lay ready elsewhere, go to *writers* and past the page cache where the file system can do
    that: the bytes are needed on the disk, not in memory, and copying them there costs more than
    half of the time.
    The last bytes stay behind until `finish`: of a zip the 22 that the manifest's length has to
    go into. Leaving it as a context manager waits until no thread writes to *fd* any more.

    Attributes:
        error: The first error of a write, or None. ``torch.save`` turns an `OSError` into a
            ``RuntimeError`` without a number, so whoever calls it raises this instead.

    Args:
        fd: An empty file, open for writing.
        disk: What writes.
        writers: The threads; they may write several files one after the other.
        held_back: How many bytes stay behind; 0 for a file that is to be no zip with a manifest.
    """

    def __init__(
        self, fd: int, disk: Disk, writers: ChunkWriters, *, held_back: int = END_RECORD_BYTES
    ) -> None:
        self.error: BaseException | None = None
        self._fd = fd
        self._disk = disk
        self._writers = writers
        self._held_back = held_back
        self._memory = writers.take()
        self._used = 0
        self._handed_on = 0
        self._hasher = xxhash.xxh3_128()
        self._bypassing = False
        self._in_flight = 0
        self._written: queue.SimpleQueue[None] = queue.SimpleQueue()

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever closes the descriptor before that may see the bytes in another file.
        self._wait()
        self._writers.give_back(self._memory)

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of *data*, of which nothing is kept by reference. Returns its bytes."""
        if self.error is not None:
            raise self.error
        source = np.frombuffer(data, dtype=np.uint8)
        taken = 0
        while taken < source.size:
            count = min(source.size - taken, self._limit - self._used)
            # NumPy copies without the GIL; a memoryview would hold it.
            self._memory[self._used : self._used + count] = source[taken : taken + count]
            self._used += count
            taken += count
            if self._used == self._limit:
                self._hand_on(self._writers.chunk_bytes)
        return int(source.size)

    def write_in_place(self, data: memoryview) -> None:
        """
        Take all of *data* without copying it: it must not change until this is left.

        Begin it at a multiple of 4,096 bytes in the file and in memory; elsewhere, and behind its
        last whole block, it is copied after all. What ends the file must come through `write`.
        """
        if self.error is not None:
            raise self.error
        whole = len(data) - len(data) % _BLOCK if self._used % _BLOCK == 0 else 0
        if whole:
            if self._used:
                self._hand_on(self._used)
            self._write_behind(data[:whole])
        self.write(data[whole:])

    def flush(self) -> None:
        """Do nothing: only `finish` may write the last bytes."""

    def close(self) -> None:
        """Do nothing: whoever opened the descriptor closes it."""

    def tell(self) -> int:
        """Return how many bytes it was given so far."""
        return self._handed_on + self._used

    def finish_plain(self) -> str:
        """
        Write what is left; nothing was held back. The file is not synced yet.

        Returns:
            The xxh3-128 of the whole file, as 32 hex digits.

        Raises:
            OSError: The first that any write had.
        """
        self._finish_body()
        self._raise_error()
        return self._hasher.hexdigest()

    def finish(self, manifest: Manifest) -> Manifest:
        """
        Write what is left, with *manifest* as the zip's comment. The file is not synced yet.

        Returns:
            The manifest as it stands in the file, with size and digest.

        Raises:
            OSError: The first that any write had.
            ValueError: What was written is no zip file, or the manifest is too long.
        """
        end_record, size = self._finish_body()
        final, ending = seal(manifest, end_record, size, self._hasher)
        self._write_all(memoryview(ending), size)
        self._raise_error()
        return final

    def _finish_body(self) -> tuple[bytes, int]:
        """Write all but what is held back; return that, and how many bytes are before it."""
        self._wait()
        self._raise_error()
        if self._bypassing:
            # What is left is no whole number of blocks.
            self._use_cache()
        body = max(0, self._used - self._held_back)
        self._hasher.update(self._memory[:body].data)
        self._write_all(self._memory[:body].data, self._handed_on)
        return self._memory[body : self._used].tobytes(), self._handed_on + body

    @property
    def _limit(self) -> int:
        return self._writers.chunk_bytes + self._held_back

    def _hand_on(self, count: int) -> None:
        """Give *count* bytes of the chunk to the writers and go on in another one, with the rest of them."""
        full = self._memory
        held_back = full[count : self._used].copy()
        self._write_behind(full[:count].data, full)
        self._memory = self._writers.take()
        self._memory[: held_back.size] = held_back
        self._used = held_back.size
        self._raise_error()

    def _write_behind(self, data: memoryview, chunk: np.ndarray | None = None) -> None:
        """Hash *data* and have it written; *chunk* is free then."""
        position = self._handed_on
        if position == 0:
            with contextlib.suppress(OSError):  # then it goes through the cache
                self._bypassing = self._disk.bypass_cache(self._fd, True)
        self._hasher.update(data)
        self._in_flight += 1
        self._handed_on += len(data)
        self._writers.write(chunk, lambda: self._write_chunk(data, position))

    def _write_chunk(self, chunk: memoryview, position: int) -> None:
        try:
            if self.error is None:
                self._write_all(chunk, position)
        finally:
            self._written.put(None)

    def _write_all(self, data: memoryview, position: int) -> None:
        try:
            while data:
                count = self._write_some(data, position)
                data, position = data[count:], position + count
        except BaseException as error:
            # Of any kind: what ends up nowhere would leave a hole in the file.
            self.error = self.error or error

    def _write_some(self, data: memoryview, position: int) -> int:
        bypassing = self._bypassing
        try:
            count = self._disk.write(self._fd, data, position)
        except OSError as error:
            if not bypassing or error.errno not in _CANNOT_BYPASS:
                raise
            # Many file systems agree when asked and refuse when it comes to it.
            self._use_cache()
            return 0
        if count <= 0:
            raise OSError(errno.EIO, "the disk took none of the bytes given to it")
        self._writers.last_progress = time.monotonic()
        if bypassing and count < len(data):
            # It met an end: of the disk, of a limit. Through the cache the next write says which.
            self._use_cache()
        return count

    def _use_cache(self) -> None:
        with contextlib.suppress(OSError):  # if that matters, the next write fails
            self._disk.bypass_cache(self._fd, False)
        self._bypassing = False

    def _wait(self) -> None:
        while self._in_flight:
            self._written.get()
            self._in_flight -= 1

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

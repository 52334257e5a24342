"""The file object that ``torch.save`` writes into."""

from __future__ import annotations

import contextlib
import errno
import functools
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import NamedTuple

import numpy as np

from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.file_format import END_RECORD_BYTES, seal
from trainbus.checkpoint.hasher import Hasher, new_hasher
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.write_behind import WriteBehind

__all__ = ["OutputStream"]

# What file systems answer to a write past the page cache that they cannot do.
_CANNOT_BYPASS = {errno.EINVAL, errno.ENOTSUP}

_BLOCK = 4096


class _Write(NamedTuple):
    """
    A write that was begun.

    Attributes:
        finish: Waits for it; see `WriteBehind.begin`.
        data, position: What is written, and at which byte of the file.
        bypassing: Whether it goes past the page cache.
        chunk: What *data* lies in, if that is one of `WriteBehind`'s.
    """

    finish: Callable[[], int]
    data: memoryview
    position: int
    bypassing: bool
    chunk: np.ndarray | None


class OutputStream:
    """
    Collects, hashes and writes what it is given, and puts the manifest at its end.

    One thread fills it. Whole blocks, from page-aligned memory, be it a chunk that was filled or
    what lay ready elsewhere, are written while the next ones are made ready, and past the page cache
    where the file system can do that: the bytes are needed on the disk, not in memory, and copying
    them there costs more than half of the time.
    The last bytes stay behind until `finish`: of a zip the 22 that the manifest's length has to
    go into. Leaving it as a context manager waits until nothing is written to *fd* any more.

    Attributes:
        error: The first error of a write, or None. ``torch.save`` turns an `OSError` into a
            ``RuntimeError`` without a number, so whoever calls it raises this instead.

    Args:
        fd: An empty file, open for writing.
        disk: What writes.
        behind: Has the memory, and says how many writes may be unfinished; of one file at a time.
        held_back: How many bytes stay behind; 0 for a file that is to be no zip with a manifest.
    """

    def __init__(
        self, fd: int, disk: Disk, behind: WriteBehind, *, held_back: int = END_RECORD_BYTES
    ) -> None:
        self.error: BaseException | None = None
        self._fd = fd
        self._disk = disk
        self._behind = behind
        self._held_back = held_back
        self._memory = behind.take()
        self._used = 0
        self._handed_on = 0
        self._hasher = new_hasher()
        self._hashed_ahead = 0  # up to which byte of the file
        self._bypassing = False
        self._unfinished: deque[_Write] = deque()

    def __enter__(self) -> OutputStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Whoever closes the descriptor before that may see the bytes in another file.
        self._wait()
        self._behind.give_back(self._memory)

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
                self._hand_on(self._behind.chunk_bytes)
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

    def leave_hashing(self, count: int) -> Hasher:
        """
        Leave it to the caller to hash the next *count* bytes: where they are made, or while a cache has them.

        More must follow them than is held back.

        Returns:
            What the caller gives each of them, in their order, before it gives them to this.
        """
        self._hash(self._memory[: self._used].data, self._handed_on)
        self._hashed_ahead = self.tell() + count
        return self._hasher

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
        self._hash(self._memory[:body].data, self._handed_on)
        self._write_all(self._memory[:body].data, self._handed_on)
        return self._memory[body : self._used].tobytes(), self._handed_on + body

    @property
    def _limit(self) -> int:
        return self._behind.chunk_bytes + self._held_back

    def _hand_on(self, count: int) -> None:
        """Write *count* bytes of the chunk behind, and go on in another one with the rest of them."""
        full = self._memory
        self._write_behind(full[:count].data, full)
        self._memory = self._behind.take()
        self._used -= count
        self._memory[: self._used] = full[count : count + self._used]
        self._raise_error()

    def _write_behind(self, data: memoryview, chunk: np.ndarray | None = None) -> None:
        """
        Hash *data*, unless that was done, and begin to write it; *chunk* is free when that is done.

        Summing up is several times as fast as a disk. Who ran ahead of it would keep a core busy for
        a while; a training step that begins then has its OpenMP threads put together on the other
        one, where they wait for each other in turns of the scheduler (two cores: steps of 28 ms took
        46 on average beside a file written that way, 35 beside one written in step with the disk).
        """
        position = self._handed_on
        if position == 0:
            with contextlib.suppress(OSError):  # then it goes through the cache
                self._bypassing = self._disk.bypass_cache(self._fd, True)
        self._hash(data, position)
        self._wait(max(0, self._behind.most - 1))
        self._raise_error()
        finish = self._behind.begin(self._disk, self._fd, data, position)
        self._unfinished.append(_Write(finish, data, position, self._bypassing, chunk))
        self._handed_on += len(data)
        self._wait(self._behind.most)

    def _hash(self, data: memoryview, position: int) -> None:
        """Hash what others have not of *data*, the file's bytes from *position* on."""
        left = data[max(0, self._hashed_ahead - position) :]
        if left:
            self._hasher.update(left)

    def _wait(self, left: int = 0) -> None:
        """Wait until at most *left* writes are unfinished."""
        while len(self._unfinished) > left:
            write = self._unfinished.popleft()
            self._complete(write.finish, write.data, write.position, write.bypassing)
            if write.chunk is not None:
                self._behind.give_back(write.chunk)

    def _write_all(self, data: memoryview, position: int) -> None:
        if data:
            self._complete(self._write(data, position), data, position, self._bypassing)

    def _write(self, data: memoryview, position: int) -> Callable[[], int]:
        return functools.partial(self._disk.write, self._fd, data, position)

    def _complete(self, write: Callable[[], int], data: memoryview, position: int, bypassing: bool) -> None:
        """Make a write of *data*, or wait for it, and write what it leaves."""
        try:
            while left := data[self._taken(write, len(data), bypassing) :]:
                position += len(data) - len(left)
                data, write, bypassing = left, self._write(left, position), self._bypassing
        except BaseException as error:
            # Of any kind: what ends up nowhere would leave a hole in the file.
            self.error = self.error or error

    def _taken(self, write: Callable[[], int], size: int, bypassing: bool) -> int:
        """Return how many of the *size* bytes of a write the disk has taken."""
        try:
            count = write()
        except OSError as error:
            if not bypassing or error.errno not in _CANNOT_BYPASS:
                raise
            # Many file systems agree when asked and refuse when it comes to it.
            self._use_cache()
            return 0
        if count <= 0:
            raise OSError(errno.EIO, "the disk took none of the bytes given to it")
        self._behind.last_progress = time.monotonic()
        if bypassing and count < size:
            # It met an end: of the disk, of a limit. Through the cache the next write says which.
            self._use_cache()
        return count

    def _use_cache(self) -> None:
        with contextlib.suppress(OSError):  # if that matters, the next write fails
            self._disk.bypass_cache(self._fd, False)
        self._bypassing = False

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

"""The file object that ``torch.save`` writes into."""

from __future__ import annotations

import errno
import mmap

import numpy as np
import xxhash

from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.file_format import END_RECORD_BYTES, Manifest, seal

__all__ = ["CHUNK_BYTES", "OutputStream"]

CHUNK_BYTES = 8 << 20


class OutputStream:
    """
    Collects, hashes and writes what it is given, and puts the manifest at its end.

    Used by one thread. Bytes reach the disk in whole chunks from page-aligned memory at
    multiples of the chunk's size; the last 22 stay behind until `finish`, because the
    manifest's length has to go into them.

    Attributes:
        error: The first `OSError` of the disk, or None. ``torch.save`` turns it into a
            ``RuntimeError`` without a number, so whoever calls it raises this instead.
    """

    def __init__(self, fd: int, disk: Disk, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.error: OSError | None = None
        self._fd = fd
        self._disk = disk
        self._chunk_bytes = chunk_bytes
        self._memory = np.frombuffer(mmap.mmap(-1, chunk_bytes + END_RECORD_BYTES), dtype=np.uint8)
        self._used = 0
        self._written = 0
        self._hasher = xxhash.xxh3_128()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """Take all of *data*, of which nothing is kept by reference. Returns its bytes."""
        if self.error is not None:
            raise self.error
        source = np.frombuffer(data, dtype=np.uint8)
        taken = 0
        while taken < source.size:
            count = min(source.size - taken, self._memory.size - self._used)
            # NumPy copies without the GIL; a memoryview would hold it.
            self._memory[self._used : self._used + count] = source[taken : taken + count]
            self._used += count
            taken += count
            if self._used == self._memory.size:
                self._write_chunk(self._chunk_bytes)
        return int(source.size)

    def flush(self) -> None:
        """Do nothing: only `finish` may write the last bytes."""

    def finish(self, manifest: Manifest) -> Manifest:
        """
        Write what is left, with *manifest* as the zip's comment. The file is not synced yet.

        Returns:
            The manifest as it stands in the file, with size and digest.

        Raises:
            OSError: The first that any write had.
            ValueError: What was written is no zip file, or the manifest is too long.
        """
        if self.error is not None:
            raise self.error
        body = max(0, self._used - END_RECORD_BYTES)
        end_record = self._memory[body : self._used].tobytes()
        self._write_chunk(body)
        final, ending = seal(manifest, end_record, self._written, self._hasher)
        self._write_all(memoryview(ending))
        return final

    def _write_chunk(self, count: int) -> None:
        chunk = self._memory[:count].data
        self._hasher.update(chunk)
        self._write_all(chunk)
        self._written += count
        rest = self._memory[count : self._used].copy()
        self._memory[: rest.size] = rest
        self._used = rest.size

    def _write_all(self, data: memoryview) -> None:
        try:
            while data:
                data = data[self._write_some(data) :]
        except OSError as error:
            self.error = error
            raise

    def _write_some(self, data: memoryview) -> int:
        count = self._disk.write(self._fd, data)
        if count <= 0:
            raise OSError(errno.EIO, "the disk took none of the bytes given to it")
        return count

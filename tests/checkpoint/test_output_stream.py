from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch
import xxhash

from trainbus.checkpoint.disk import DISK, Disk
from trainbus.checkpoint.file_format import Manifest
from trainbus.checkpoint.output_stream import OutputStream

MANIFEST = Manifest(contents="object")
END_RECORD = b"PK\x05\x06" + bytes(18)


@pytest.fixture(name="fd")
def _fd(tmp_path):
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


class Recorder(Disk):
    """Notes the length of each write and, if told to, takes only some bytes."""

    def __init__(self, at_most: int = 1 << 30) -> None:
        self.lengths: list[int] = []
        self.at_most = at_most

    def write(self, fd: int, data: memoryview) -> int:
        self.lengths.append(len(data))
        return super().write(fd, data[: self.at_most])


class TestWrite:
    @pytest.mark.parametrize("step", [1, 7, 21, 22, 23, 64, 86, 1000])
    def test_any_division_gives_the_same_file(self, fd, step):
        """
        However the bytes are handed over, the file and its digest are the same.
        """
        data = np.arange(1000, dtype=np.uint8).tobytes() + END_RECORD
        stream = OutputStream(fd, DISK, chunk_bytes=64)

        for start in range(0, len(data), step):
            assert stream.write(data[start : start + step]) == len(data[start : start + step])
        final = stream.finish(MANIFEST)

        written = content(fd)
        assert written[:1000] == data[:1000]
        assert len(written) == final.size
        zeroed = written.replace(final.digest.encode(), b"0" * 32)
        assert xxhash.xxh3_128_hexdigest(zeroed) == final.digest

    @pytest.mark.parametrize(
        "data", [b"abcd", bytearray(b"abcd"), memoryview(b"abcd"), memoryview(np.ones(1, dtype=np.float32))]
    )
    def test_kinds_of_bytes(self, fd, data):
        """
        Bytes, bytearrays and memoryviews of any item are taken and counted in bytes.
        """
        assert OutputStream(fd, DISK).write(data) == 4

    def test_nothing(self, fd):
        """
        An empty write is no error.
        """
        assert OutputStream(fd, DISK).write(b"") == 0

    def test_data_may_change_afterwards(self, fd):
        """
        Nothing of what was handed over is kept by reference.
        """
        stream = OutputStream(fd, DISK)
        data = bytearray(b"a" * 100)
        stream.write(data)
        data[:] = b"b" * 100
        stream.write(END_RECORD)

        stream.finish(MANIFEST)

        assert content(fd)[:100] == b"a" * 100

    def test_chunks_begin_at_multiples(self, fd):
        """
        Until the end, the disk is given whole chunks only.
        """
        disk = Recorder()
        stream = OutputStream(fd, disk, chunk_bytes=64)

        stream.write(bytes(300) + END_RECORD)
        stream.finish(MANIFEST)

        assert disk.lengths[:4] == [64, 64, 64, 64]

    def test_short_writes_are_continued(self, fd):
        """
        A disk that takes a few bytes at a time gets them all.
        """
        stream = OutputStream(fd, Recorder(at_most=5), chunk_bytes=64)
        data = bytes(range(200))

        stream.write(data + END_RECORD)
        final = stream.finish(MANIFEST)

        assert content(fd)[:200] == data
        assert len(content(fd)) == final.size


class TestErrors:
    def test_first_error_is_remembered(self, fd):
        """
        The disk's first error is kept, raised by later writes, and by finish.
        """

        class Full(Disk):
            calls = 0

            def write(self, fd: int, data: memoryview) -> int:
                self.calls += 1
                raise OSError(errno.ENOSPC if self.calls == 1 else errno.EIO, "no")

        stream = OutputStream(fd, Full(), chunk_bytes=64)
        with pytest.raises(OSError) as first:
            stream.write(bytes(200))

        with pytest.raises(OSError) as second:
            stream.write(b"x")
        with pytest.raises(OSError) as third:
            stream.finish(MANIFEST)

        assert first.value is second.value is third.value is stream.error
        assert stream.error.errno == errno.ENOSPC

    def test_disk_that_takes_nothing(self, fd):
        """
        A write of no bytes is an error and no endless loop.
        """
        stream = OutputStream(fd, Recorder(at_most=0), chunk_bytes=64)

        with pytest.raises(OSError, match="took none"):
            stream.write(bytes(200))

    @pytest.mark.parametrize("data", [b"", b"short", bytes(500)])
    def test_no_zip(self, fd, data):
        """
        What does not end as a zip does gets no manifest.
        """
        stream = OutputStream(fd, DISK, chunk_bytes=64)
        stream.write(data)

        with pytest.raises(ValueError, match="no zip file"):
            stream.finish(MANIFEST)

    def test_torch_save_writes_into_it(self, fd):
        """
        torch.save takes it for a file.
        """
        stream = OutputStream(fd, DISK, chunk_bytes=128)
        torch.save({"a": torch.arange(1000)}, stream)

        final = stream.finish(MANIFEST)

        with os.fdopen(os.dup(fd), "rb") as file:
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        assert loaded["a"].equal(torch.arange(1000))
        assert final.size == len(content(fd))

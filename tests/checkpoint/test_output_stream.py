from __future__ import annotations

import errno
import mmap
import os
import threading
import time

import numpy as np
import pytest
import torch
import xxhash

from trainbus.checkpoint import write_behind
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.output_stream import OutputStream
from trainbus.checkpoint.write_behind import CHUNK_BYTES, WriteBehind

MANIFEST = Manifest(contents="object")
END_RECORD = b"PK\x05\x06" + bytes(18)


@pytest.fixture(name="fd")
def _fd(tmp_path):
    fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def content(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def inline(chunk_bytes: int = CHUNK_BYTES) -> WriteBehind:
    """Every write is made at once, by the thread that asks for it."""
    return WriteBehind(most=0, chunk_bytes=chunk_bytes)


@pytest.fixture(name="threads")
def _threads() -> WriteBehind:
    """Two writes at a time, and chunks of a block."""
    return WriteBehind(chunk_bytes=4096)


class Recorder(Disk):
    """Notes the length of each write and whether it went past the cache; takes only some bytes if told to."""

    def __init__(self, at_most: int = 1 << 30) -> None:
        self.lengths: list[int] = []
        self.bypassed: list[bool] = []
        self.bypassing = False
        self.at_most = at_most

    def bypass_cache(self, fd: int, bypass: bool) -> bool:
        self.bypassing = bypass
        return True

    def write(self, fd: int, data: memoryview, position: int) -> int:
        self.lengths.append(len(data))
        self.bypassed.append(self.bypassing)
        return super().write(fd, data[: self.at_most], position)


class NoBypass(Recorder):
    """As some FUSE and overlay file systems: agrees to bypass the cache and refuses to write so."""

    def write(self, fd: int, data: memoryview, position: int) -> int:
        if self.bypassing:
            self.refused = True
            raise OSError(errno.EINVAL, "no")
        return super().write(fd, data, position)


class NeverAgrees(Recorder):
    """As file systems that do not know of it."""

    def bypass_cache(self, fd: int, bypass: bool) -> bool:
        return not bypass


class Gate(Disk):
    """Holds each write until it is opened, and says when one is there."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()
        self.begun = 0

    def write(self, fd: int, data: memoryview, position: int) -> int:
        self.begun += 1
        self.reached.set()
        assert self.open.wait(30)
        return super().write(fd, data, position)


class TestWrite:
    @pytest.mark.parametrize("step", [1, 7, 21, 22, 23, 64, 86, 1000])
    def test_any_division_gives_the_same_file(self, fd, step):
        """
        However the bytes are handed over, the file and its digest are the same.
        """
        data = np.arange(1000, dtype=np.uint8).tobytes() + END_RECORD
        stream = OutputStream(fd, Disk(), inline(64))

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
        assert OutputStream(fd, Disk(), inline()).write(data) == 4

    def test_nothing(self, fd):
        """
        An empty write is no error.
        """
        assert OutputStream(fd, Disk(), inline()).write(b"") == 0

    def test_data_may_change_afterwards(self, fd):
        """
        Nothing of what was handed over is kept by reference.
        """
        stream = OutputStream(fd, Disk(), inline())
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
        stream = OutputStream(fd, disk, inline(64))

        stream.write(bytes(300) + END_RECORD)
        stream.finish(MANIFEST)

        assert disk.lengths[:4] == [64, 64, 64, 64]

    def test_short_writes_are_continued(self, fd):
        """
        A disk that takes a few bytes at a time gets them all.
        """
        stream = OutputStream(fd, Recorder(at_most=5), inline(64))
        data = bytes(range(200))

        stream.write(data + END_RECORD)
        final = stream.finish(MANIFEST)

        assert content(fd)[:200] == data
        assert len(content(fd)) == final.size


class TestLeaveHashing:
    @pytest.mark.parametrize("before", [0, 5, 63, 64, 86, 130])
    @pytest.mark.parametrize("ahead", [1, 22, 64, 200])
    @pytest.mark.parametrize("step", [1, 50, 1000])
    def test_same_digest(self, fd, before, ahead, step):
        """
        What others hash is not hashed again, and all before and behind it is, wherever chunks end.
        """
        data = np.arange(500, dtype=np.uint16).tobytes() + END_RECORD
        stream = OutputStream(fd, Disk(), inline(64))
        stream.write(data[:before])

        stream.leave_hashing(ahead).update(data[before : before + ahead])
        for start in range(before, len(data), step):
            stream.write(data[start : start + step])
        final = stream.finish(MANIFEST)

        zeroed = content(fd).replace(final.digest.encode(), b"0" * 32)
        assert xxhash.xxh3_128_hexdigest(zeroed) == final.digest


class TestWriteInPlace:
    def pages(self, count: int) -> memoryview:
        mapping = mmap.mmap(-1, count * 4096)
        mapping[:] = np.random.default_rng(0).bytes(count * 4096)
        return memoryview(mapping)

    @pytest.mark.parametrize("before", [0, 100, 4096, 8192])
    @pytest.mark.parametrize("length", [0, 5, 4096, 3 * 4096, 5 * 4096 + 9])
    def test_same_file(self, fd, threads, before, length):
        """
        The file and its digest are those of a stream that copies all, wherever the bytes begin and end.
        """
        pages = self.pages(8)
        with OutputStream(fd, Disk(), threads) as stream:
            stream.write(pages[:before])
            stream.write_in_place(pages[8192 : 8192 + length])
            stream.write_in_place(pages[:0])
            stream.write(b"behind" + END_RECORD)
            final = stream.finish(MANIFEST)

        written = content(fd)
        assert written.startswith(bytes(pages[:before]) + bytes(pages[8192 : 8192 + length]) + b"behindPK")
        assert len(written) == final.size
        zeroed = written.replace(final.digest.encode(), b"0" * 32)
        assert xxhash.xxh3_128_hexdigest(zeroed) == final.digest

    def test_is_not_copied(self, fd):
        """
        Whole blocks go to the disk from the memory they lie in, in one write, past the page cache.
        """

        class Addresses(Recorder):
            def __init__(self) -> None:
                super().__init__()
                self.at: list[int] = []

            def write(self, fd: int, data: memoryview, position: int) -> int:
                self.at.append(np.frombuffer(data, dtype=np.uint8).ctypes.data)
                return super().write(fd, data, position)

        pages, disk = self.pages(4), Addresses()
        stream = OutputStream(fd, disk, inline())
        stream.write(bytes(4096))
        stream.write_in_place(pages)
        stream.write(END_RECORD)
        stream.finish(MANIFEST)

        assert disk.lengths[:2] == [4096, 4 * 4096]
        assert disk.at[1] == np.frombuffer(pages, dtype=np.uint8).ctypes.data
        assert disk.bypassed[:2] == [True, True]

    def test_not_begun_on_a_block(self, fd):
        """
        What would not begin at a block of the file is copied, for the disk would refuse it.
        """
        disk = Recorder()
        stream = OutputStream(fd, disk, inline())
        stream.write(b"ab")
        stream.write_in_place(self.pages(2))

        assert disk.lengths == []

    def test_leaving_waits(self, fd, threads):
        """
        The memory may change once the stream is left, and not before.
        """
        disk = Gate()
        with pytest.raises(RuntimeError, match="leave"), OutputStream(fd, disk, threads) as stream:
            stream.write_in_place(self.pages(1))
            assert disk.reached.wait(30)
            threading.Timer(0.1, disk.open.set).start()
            raise RuntimeError("leave")

        assert os.fstat(fd).st_size == 4096

    def test_after_an_error(self, fd):
        """
        After a write that failed, nothing more is taken.
        """

        class Broken(Disk):
            asked = 0

            def write(self, fd: int, data: memoryview, position: int) -> int:
                self.asked += 1
                raise OSError(errno.EIO, "broken")

        disk = Broken()
        stream = OutputStream(fd, disk, inline())
        for _ in range(2):
            with pytest.raises(OSError, match="broken"):
                stream.write_in_place(self.pages(1))

        assert disk.asked == 1

    def test_nothing_behind_it(self, fd):
        """
        A file that would end with such bytes has no end record, and is refused.
        """
        stream = OutputStream(fd, Disk(), inline())
        stream.write_in_place(self.pages(1))

        with pytest.raises(ValueError, match="no zip"):
            stream.finish(MANIFEST)


class TestThreads:
    @pytest.mark.parametrize("disk", [Disk(), NoBypass(), NeverAgrees()], ids=lambda d: type(d).__name__)
    def test_same_file(self, fd, disk, threads):
        """
        Written by several threads, past the cache or through it, the file is the same.
        """
        data = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()
        with OutputStream(fd, disk, threads) as stream:
            stream.write(data + END_RECORD)
            final = stream.finish(MANIFEST)

        written = content(fd)
        assert written[: len(data)] == data
        zeroed = written.replace(final.digest.encode(), b"0" * 32)
        assert xxhash.xxh3_128_hexdigest(zeroed) == final.digest

    def test_whole_chunks_bypass_the_cache(self, fd, threads):
        """
        Whole chunks are written past the page cache, the rest, which is no block, through it.
        """
        disk = Recorder()
        with OutputStream(fd, disk, threads) as stream:
            stream.write(bytes(3 * 4096 + 10) + END_RECORD)
            stream.finish(MANIFEST)

        assert disk.lengths[:4] == [4096, 4096, 4096, 10]
        assert disk.bypassed == [True, True, True, False, False]

    def test_refused_bypass_is_tried_once(self, fd):
        """
        A file system that cannot bypass its cache is asked at the first chunk only.
        """
        disk = NoBypass()
        stream = OutputStream(fd, disk, inline(4096))
        stream.write(bytes(3 * 4096) + END_RECORD)

        assert disk.refused
        assert disk.bypassed == [False] * 3

    def test_small_file_uses_the_cache(self, fd):
        """
        A file of less than a chunk never bypasses the cache.
        """
        disk = Recorder()
        stream = OutputStream(fd, disk, inline())
        stream.write(bytes(5000) + END_RECORD)
        stream.finish(MANIFEST)

        assert set(disk.bypassed) == {False}

    def test_filling_goes_on_while_the_disk_is_slow(self, fd, threads):
        """
        Two chunks can wait for the disk while the third is filled.
        """
        disk = Gate()
        with OutputStream(fd, disk, threads) as stream:
            stream.write(bytes(2 * 4096 + 22 + 100))
            assert not disk.open.is_set()
            disk.open.set()

    def test_in_step_with_the_disk(self, fd, threads):
        """
        A third chunk goes to the disk when one of two is done, and not before.
        """
        disk = Gate()
        filled = threading.Event()

        def write() -> None:
            with OutputStream(fd, disk, threads) as stream:
                stream.write(bytes(3 * 4096 + 22))
                filled.set()

        writing = threading.Thread(target=write)
        writing.start()
        assert not filled.wait(0.05)
        assert disk.begun == 2
        disk.open.set()
        assert filled.wait(30)
        writing.join(30)
        assert disk.begun == 3

    def test_nothing_is_begun_after_an_error(self, fd, threads):
        """
        Once a write has failed no other one is begun.
        """

        class Broken(Recorder):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                super().write(fd, data, position)
                raise OSError(errno.EIO, "broken")

        disk = Broken()
        with pytest.raises(OSError, match="broken"), OutputStream(fd, disk, threads) as stream:
            stream.write(bytes(9 * 4096))

        assert len(disk.lengths) == 2

    def test_leaving_waits_for_the_threads(self, fd, threads):
        """
        Nothing writes to the descriptor any more once the stream is left, by an error too.
        """
        disk = Gate()

        def leave() -> None:
            with pytest.raises(ZeroDivisionError), OutputStream(fd, disk, threads) as stream:
                stream.write(bytes(4096 + 22))
                raise ZeroDivisionError

        leaving = threading.Thread(target=leave)
        leaving.start()
        assert disk.reached.wait(30)
        leaving.join(0.05)
        assert leaving.is_alive()
        disk.open.set()
        leaving.join(30)
        assert not leaving.is_alive()

    @pytest.mark.parametrize("error", [OSError(errno.EIO, "no"), ZeroDivisionError("no")])
    def test_error_of_a_thread(self, fd, threads, error):
        """
        An error that only a thread met is raised by finish at the latest, whatever its kind.
        """

        class Broken(Disk):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                raise error

        with pytest.raises(type(error), match="no"), OutputStream(fd, Broken(), threads) as stream:
            stream.write(bytes(4096) + END_RECORD)
            stream.finish(MANIFEST)

    def test_error_of_the_last_write_behind(self, fd, threads):
        """
        An error of the last write that was unfinished is raised before the file counts as written.
        """

        class BrokenAtFirst(Disk):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                if position == 0:
                    raise OSError(errno.EIO, "no")
                return super().write(fd, data, position)

        with OutputStream(fd, BrokenAtFirst(), threads) as stream:
            stream.write(bytes(4096) + END_RECORD)
            with pytest.raises(OSError, match="no"):
                stream.finish(MANIFEST)

    def test_refused_through_the_cache_too(self, fd, threads):
        """
        What is refused past the cache and through it is an error, and is not tried for ever.
        """

        class Refusing(Recorder):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                super().write(fd, data, position)
                assert len(self.lengths) < 9
                raise OSError(errno.EINVAL, "no")

        with pytest.raises(OSError, match="no"), OutputStream(fd, Refusing(), threads) as stream:
            stream.write(bytes(4096) + END_RECORD)
            stream.finish(MANIFEST)

    def test_memory_is_made_once(self, fd, threads, monkeypatch):
        """
        Files one after the other are written from three chunks, two that are written and one that is filled.
        """
        made: list[int] = []
        real = write_behind.map_pages
        monkeypatch.setattr(write_behind, "map_pages", lambda size: made.append(size) or real(size))

        for _ in range(3):
            with OutputStream(fd, Disk(), threads) as stream:
                stream.write(bytes(9 * 4096) + END_RECORD)
                stream.finish(MANIFEST)

        assert len(made) == 3

    def test_progress(self, fd, threads):
        """
        Each write that the disk has taken counts as progress.
        """
        begun = time.monotonic()
        assert threads.last_progress == 0
        with OutputStream(fd, Disk(), threads) as stream:
            stream.write(bytes(4096) + END_RECORD)
            stream._wait()

            assert begun <= threads.last_progress <= time.monotonic()

    def test_next_file_after_an_error(self, fd, threads):
        """
        The threads and their memory serve the next file, however the last one ended.
        """

        class Broken(Disk):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                raise OSError(errno.EIO, "no")

        for _ in range(5):
            with pytest.raises(OSError, match="no"), OutputStream(fd, Broken(), threads) as stream:
                stream.write(bytes(9 * 4096))
        with OutputStream(fd, Disk(), threads) as stream:
            stream.write(b"a" * (9 * 4096) + END_RECORD)
            stream.finish(MANIFEST)

        assert content(fd)[: 9 * 4096] == b"a" * (9 * 4096)

    def test_next_file_after_there_was_no_memory(self, fd, threads, monkeypatch):
        """
        A chunk that was being written when there was no memory for another has one owner afterwards.
        """
        take = threads.take

        def take_once() -> np.ndarray:
            monkeypatch.setattr(threads, "take", refuse)
            return take()

        def refuse() -> np.ndarray:
            raise OSError(errno.ENOMEM, "no memory")

        monkeypatch.setattr(threads, "take", take_once)
        with pytest.raises(OSError, match="no memory"), OutputStream(fd, Disk(), threads) as stream:
            stream.write(bytes(9 * 4096))

        assert take().ctypes.data != take().ctypes.data


class TestErrors:
    def test_first_error_is_remembered(self, fd):
        """
        The disk's first error is kept, raised by later writes, and by finish.
        """

        class Full(Disk):
            calls = 0

            def write(self, fd: int, data: memoryview, position: int) -> int:
                self.calls += 1
                raise OSError(errno.ENOSPC if self.calls == 1 else errno.EIO, "no")

        stream = OutputStream(fd, Full(), inline(64))
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
        stream = OutputStream(fd, Recorder(at_most=0), inline(64))

        with pytest.raises(OSError, match="took none"):
            stream.write(bytes(200))

    @pytest.mark.parametrize("data", [b"", b"short", bytes(500)])
    def test_no_zip(self, fd, data):
        """
        What does not end as a zip does gets no manifest.
        """
        stream = OutputStream(fd, Disk(), inline(64))
        stream.write(data)

        with pytest.raises(ValueError, match="no zip file"):
            stream.finish(MANIFEST)

    def test_torch_save_writes_into_it(self, fd):
        """
        torch.save takes it for a file.
        """
        stream = OutputStream(fd, Disk(), inline(128))
        torch.save({"a": torch.arange(1000)}, stream)

        final = stream.finish(MANIFEST)

        with os.fdopen(os.dup(fd), "rb") as file:
            file.seek(0)
            loaded = torch.load(file, weights_only=True)
        assert loaded["a"].equal(torch.arange(1000))
        assert final.size == len(content(fd))

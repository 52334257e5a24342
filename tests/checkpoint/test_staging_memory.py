from __future__ import annotations

import ctypes
import gc
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from trainbus.checkpoint.staging_copy import take_snapshot
from trainbus.checkpoint.staging_memory import StagingBuffer, StagingMemory, map_pages


class TestStagingMemory:
    def test_reused(self):
        """
        A buffer that is given back is handed out again, with its memory.
        """
        memory = StagingMemory(2)
        first = memory.acquire(10_000)
        mapping = first.mapping
        memory.release(first)

        second = memory.acquire(9_000)

        assert second is first
        assert second.mapping is mapping
        assert memory.size == 12288

    def test_grown(self):
        """
        A buffer that is too small is replaced, with whatever was kept with it.
        """
        memory = StagingMemory()
        buffer = memory.acquire(100)
        buffer.views = buffer.pins = "old"
        memory.release(buffer)

        buffer = memory.acquire(50_000)

        assert len(buffer.mapping) >= 50_000
        assert buffer.views is buffer.pins is None
        assert memory.size == len(buffer.mapping)

    def test_all_taken(self):
        """
        More snapshots than buffers is an error that says what to do, and no endless wait.
        """
        memory = StagingMemory(2)
        memory.acquire(1)
        memory.acquire(1)

        with pytest.raises(RuntimeError, match="all 2 staging buffers hold one that is not released"):
            memory.acquire(1)

    def test_released_twice(self):
        """
        Releasing a buffer twice does not hand it out twice.
        """
        memory = StagingMemory()
        buffer = memory.acquire(1)
        memory.release(buffer)
        memory.release(buffer)

        memory.acquire(1)
        with pytest.raises(RuntimeError):
            memory.acquire(1)

    def test_no_memory_left(self):
        """
        A buffer that could not be made can be asked for again.
        """
        memory = StagingMemory()
        with pytest.raises(OSError):
            memory.acquire(1 << 60)

        assert len(memory.acquire(100).mapping) == 4096

    def test_threads(self):
        """
        Threads that take and release at the same time never share a buffer.
        """
        memory = StagingMemory(4)
        shared = []

        def use() -> None:
            for _ in range(500):
                buffer = memory.acquire(1)
                if buffer.views is not None:
                    shared.append(buffer)
                buffer.views = "mine"
                buffer.views = None
                memory.release(buffer)

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert shared == []


class StopsAfter(threading.Event):
    """Is set after it was looked at *looks* times."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def resident(mapping: mmap.mmap) -> int:
    """Return how many bytes of *mapping* the system has given memory to."""
    pages = (ctypes.c_ubyte * (len(mapping) // mmap.PAGESIZE))()
    address = ctypes.c_void_p(torch.frombuffer(mapping, dtype=torch.uint8).data_ptr())
    assert ctypes.CDLL(None).mincore(address, ctypes.c_size_t(len(mapping)), pages) == 0
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


class TestTouch:
    SIZE = 12 << 20

    def test_all_of_it(self):
        """
        A mapping has none of its memory until it is touched, and then all of it.
        """
        buffer = StagingMemory().acquire(self.SIZE)
        assert resident(buffer.mapping) == 0

        buffer.touch(threading.Event())

        assert resident(buffer.mapping) == self.SIZE

    def test_stopped_at_once(self):
        """
        Nothing is touched when that was stopped before it began.
        """
        buffer = StagingMemory().acquire(self.SIZE)
        stop = threading.Event()
        stop.set()

        buffer.touch(stop)

        assert resident(buffer.mapping) == 0

    def test_stopped_on_the_way(self):
        """
        Touching ends when it is told to, and the next time it is done to the end.
        """
        buffer = StagingMemory().acquire(self.SIZE)

        buffer.touch(StopsAfter(1))
        assert 0 < resident(buffer.mapping) < self.SIZE
        buffer.touch(threading.Event())

        assert resident(buffer.mapping) == self.SIZE

    def test_once(self):
        """
        What was touched already is left as it is, with the bytes that were written since.
        """
        buffer = StagingMemory().acquire(self.SIZE)
        buffer.touch(threading.Event())
        buffer.mapping[:5] = b"bytes"

        buffer.touch(threading.Event())

        assert buffer.mapping[:5] == b"bytes"

    def test_grown(self):
        """
        A mapping that replaced a smaller one is touched anew.
        """
        memory = StagingMemory()
        buffer = memory.acquire(self.SIZE)
        buffer.touch(threading.Event())
        memory.release(buffer)

        buffer = memory.acquire(2 * self.SIZE)
        buffer.touch(threading.Event())

        assert resident(buffer.mapping) == 2 * self.SIZE

    def test_no_mapping(self):
        """
        A buffer that was never used has nothing to touch.
        """
        buffer = StagingBuffer()

        buffer.touch(threading.Event())

        assert buffer.mapping is None


def is_mapped(address: int) -> bool:
    """Tell whether this process has memory at *address*."""
    ranges = (line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines())
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


# Python warns of every fork beside threads; torch has some.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_child_has_memory_of_its_own(self):
        """
        A forked child takes snapshots without touching the parent's, also if one was being held.
        """
        memory = StagingMemory()
        held = take_snapshot({"a": torch.ones(1000)}, memory)
        address = held.state["a"].data_ptr()

        child = os.fork()
        if child == 0:
            status = 1
            try:
                snapshot = take_snapshot({"a": torch.zeros(1000)}, memory)
                held.release()
                status = 0 if snapshot.state["a"].equal(torch.zeros(1000)) else 2
            finally:
                os._exit(status)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert held.state["a"].equal(torch.ones(1000))
        assert held.state["a"].data_ptr() == address

    def test_child_does_not_inherit_the_pages(self):
        """
        The staging memory is left out of forked children.
        """
        buffer = StagingMemory().acquire(3 << 20)
        address = torch.frombuffer(buffer.mapping, dtype=torch.uint8).data_ptr()
        read, write = os.pipe()

        child = os.fork()
        if child == 0:
            try:
                os.write(write, b"inherited" if is_mapped(address) else b"left out")
            finally:
                os._exit(0)
        os.waitpid(child, 0)

        assert is_mapped(address)
        assert os.read(read, 10) == b"left out"
        os.close(read)
        os.close(write)

    @pytest.mark.skipif(not hasattr(mmap, "MADV_DONTFORK"), reason="children inherit the memory here")
    def test_garbage_of_the_parent_takes_nothing_from_a_child(self):
        """
        Memory that nobody holds any more when a process forks is not given back in the child, where
        something else may lie at its address.
        """
        size, fixed_and_new = 3 << 20, 0x100000
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        gc.collect()  # the garbage of other tests, such as process groups, whose end may hang in a child
        gc.disable()
        try:
            cycle: list[object] = [mapping := map_pages(size)]
            cycle.append(cycle)
            address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
            del cycle, mapping
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | fixed_and_new
                    place = ctypes.c_void_p(address), ctypes.c_size_t(size)
                    own = libc.mmap(*place, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, ctypes.c_size_t(0))
                    gc.collect()
                    ctypes.memset(address, 1, size)  # a segmentation fault where it is gone
                    status = 0 if own == address else 2
                finally:
                    os._exit(status)
        finally:
            gc.enable()

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""Page-locked memory: when it is locked, how far, and when it is let go."""

from __future__ import annotations

import gc
import mmap
import threading
from random import Random

import pytest
import torch

from trainbus.checkpoint import page_locking, snapshot_plan
from trainbus.checkpoint.page_locking import is_locked, lock, pieces
from trainbus.checkpoint.staging_copy import Stager
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.checkpoint.warm_up import WarmUp

from .simulated_cuda import SimulatedCuda

PIECE = mmap.PAGESIZE
CPU = torch.device("cpu")
WAYS = {"aside": {}, "at once": {"device_snapshot": False}, "overlap": {"device_snapshot": False}}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Let small tensors be as many pieces as large ones."""
    monkeypatch.setattr(page_locking, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(snapshot_plan, "SMALLEST_WAITING", 64)


@pytest.fixture(name="sleeps")
def _sleeps(monkeypatch):
    """What was slept between two pieces, without sleeping; the simulated device's own are 0."""
    slept: list[float] = []
    monkeypatch.setattr(page_locking.time, "sleep", lambda seconds: seconds and slept.append(seconds))
    return slept


class TestSnapshots:
    @pytest.mark.parametrize("way", WAYS)
    def test_first_one_goes_into_locked_memory(self, way):
        """
        Already the first copy from a device goes into memory that is locked, all of it.
        """
        cuda = SimulatedCuda(Random(2))
        weights = [torch.arange(4 * PIECE, dtype=torch.float32)]
        owners = {weights[0].data_ptr(): weights[0]} if way == "overlap" else None
        stager = Stager(StagingMemory(), cuda=cuda, **WAYS[way])

        snapshot = stager.take(weights, owners)
        stager.begin(snapshot)
        snapshot.wait()

        assert snapshot.state[0].equal(weights[0])
        assert cuda.pageable == 0 and cuda.trouble == []
        assert sum(cuda.locked.values()) == len(snapshot.buffer.mapping)
        snapshot.release()
        stager.thread.close()

    @pytest.mark.parametrize(("way", "pauses"), [("aside", True), ("at once", False), ("overlap", False)])
    def test_pauses_only_where_nobody_waits(self, way, pauses, sleeps):
        """
        Steps get their turn between two pieces, unless they wait for the copy.
        """
        cuda = SimulatedCuda(Random(2))
        weights = [torch.ones(4 * PIECE)]
        owners = {weights[0].data_ptr(): weights[0]} if way == "overlap" else None
        stager = Stager(StagingMemory(), cuda=cuda, **WAYS[way])
        snapshot = stager.take(weights, owners)
        stager.begin(snapshot)
        snapshot.wait()
        snapshot.release()
        stager.thread.close()

        assert len(cuda.locked) >= 16
        assert (len(sleeps) >= len(cuda.locked)) if pauses else sleeps == []

    def test_host_alone(self):
        """
        Memory for the host's own tensors stays as it is.
        """

        class NoDevice(SimulatedCuda):
            def serves(self, device):
                return False

        cuda = NoDevice(Random(2))
        stager = Stager(StagingMemory(), cuda=cuda)
        weights = [torch.ones(4 * PIECE)]
        snapshot = stager.take(weights, {weights[0].data_ptr(): weights[0]})
        stager.begin(snapshot)
        snapshot.wait()
        snapshot.release()
        stager.thread.close()

        assert cuda.locked == {}

    def test_prepared(self):
        """
        Memory that is made ahead of the first save is locked by then.
        """
        cuda = SimulatedCuda(Random(2))
        stager = Stager(StagingMemory(), cuda=cuda)
        WarmUp(stager).begin([torch.ones(4 * PIECE)])
        done = threading.Event()
        stager.thread.call(done.set)
        assert done.wait(60)
        stager.thread.close()

        assert sum(cuda.locked.values()) == stager._memory.size


class TestLock:
    def test_stopped(self):
        """
        What is not locked when it is told to stop is locked the next time.
        """
        cuda, buffer = SimulatedCuda(Random(2)), StagingMemory().acquire(5 * PIECE)
        stop = threading.Event()
        cuda.lock_pages, real = (lambda *piece: (stop.set(), real(*piece))[1]), cuda.lock_pages

        lock(buffer, CPU, cuda, stop=stop)
        assert len(cuda.locked) == 1 and not is_locked(buffer)

        lock(buffer, CPU, cuda)
        assert sum(cuda.locked.values()) == 5 * PIECE and is_locked(buffer)

    def test_grown(self):
        """
        Memory in the place of one that was too small is locked anew, and the old one let go.
        """
        cuda, memory = SimulatedCuda(Random(2)), StagingMemory()
        buffer = memory.acquire(2 * PIECE)
        lock(buffer, CPU, cuda)
        old = set(cuda.locked)
        memory.release(buffer)
        memory.acquire(1 << 20)
        gc.collect()
        assert cuda.locked == {} and not is_locked(buffer)

        lock(buffer, CPU, cuda)
        assert sum(cuda.locked.values()) == 1 << 20 and len(old) == 2

    def test_let_go(self):
        """
        What is locked is unlocked when the buffer is dropped.
        """
        cuda = SimulatedCuda(Random(2))
        buffer = StagingMemory().acquire(3 * PIECE)
        lock(buffer, CPU, cuda)
        assert len(cuda.locked) == 3

        del buffer
        gc.collect()
        assert cuda.locked == {}

    def test_refusal_is_told_once(self, caplog):
        """
        Memory that cannot be locked is warned of once, with how far it went, and not asked for again.
        """
        cuda = SimulatedCuda(Random(3), refuses_locks_after=1)
        buffer = StagingMemory().acquire(3 * PIECE)
        for _ in range(2):
            lock(buffer, CPU, cuda)

        (warning,) = [record.getMessage() for record in caplog.records]
        assert "no more, after 0 of 0 MiB" in warning and "ulimit -l" in warning
        assert is_locked(buffer) and len(cuda.locked) == 1


class TestPieces:
    @pytest.mark.parametrize("start", [0, 64, PIECE - 64, PIECE, PIECE + 64])
    @pytest.mark.parametrize("size", [1, 64, PIECE - 64, PIECE, PIECE + 1, 3 * PIECE])
    def test_cover_and_never_cross(self, start, size):
        """
        Pieces follow on each other, cover all bytes and cross no multiple of the size locked at a time.
        """
        position = start
        for offset, length in pieces(start, size):
            assert start + offset == position
            assert position // PIECE == (position + length - 1) // PIECE
            position += length
        assert position == start + size

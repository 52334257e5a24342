"""What bounds every peer on this machine, and two ratios of ours that need no loop."""

from __future__ import annotations

import mmap
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.serialization import set_crc32_options
from torch.utils.data import DataLoader
from torch.utils.serialization import config

import trainbus
from benchmarks.stall.peers.base import emptied
from benchmarks.stall.workloads import Workload

__all__ = ["measure"]

_CHUNK = 8 << 20
_REPEATS = 3
_RATIO_REPEATS = 7  # of a few milliseconds each, on a small state


def measure(workload: Workload, folder: str) -> dict[str, Any]:
    """Return bytes a second, and ratios as pairs of seconds."""
    size = workload.state_bytes()
    host = emptied(workload.state())  # in host memory: the copy from a device has no CRC
    sink = {crc: size / _median(lambda crc=crc: _into_sink(host, crc)) for crc in (True, False)}
    return {
        "state_bytes": size,
        "disk": disk_limit(folder, size),
        "sink_crc": sink[True],
        "sink_no_crc": sink[False],
        "load": load_times(workload, folder),
        "fork": fork_times(workload, folder),
    }


def disk_limit(folder: str, size: int) -> dict[str, float | str]:
    """
    Return bytes a second of O_DIRECT writes of *size* bytes to a new file, fsync included.

    By one thread and by four, as virtual disks want several requests at a time. Random bytes, so
    that no layer below compresses them.
    """
    path = os.path.join(folder, "limit")
    memory = mmap.mmap(-1, _CHUNK)  # page-aligned, as O_DIRECT wants it
    memory[:] = os.urandom(_CHUNK)
    found: dict[str, float | str] = {}
    for threads in (1, 4):
        try:
            seconds = _median(lambda threads=threads: _write_directly(path, memory, size, threads), repeats=2)
        except OSError as error:
            return {"error": f"no O_DIRECT in this folder: {error.strerror}"}
        finally:
            if os.path.exists(path):
                os.remove(path)
        found[str(threads)] = size / seconds
    return found


def _write_directly(path: str, memory: mmap.mmap, size: int, threads: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda offset: _write_chunk(fd, memory, offset, size), range(0, size, _CHUNK)))
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_chunk(fd: int, memory: mmap.mmap, offset: int, size: int) -> None:
    count = min(_CHUNK, size - offset)
    count = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    with memoryview(memory)[:count] as view:
        done = os.pwrite(fd, view, offset)
    if done != count:
        raise OSError(None, f"only {done} of {count} bytes were taken")


class _Sink:
    """A file that throws away what it is given."""

    def write(self, data: bytes) -> int:
        return len(data)

    def flush(self) -> None:
        pass


def _into_sink(state: Any, crc: bool) -> None:
    before = config.save.compute_crc32
    set_crc32_options(crc)
    try:
        torch.save(state, _Sink())
    finally:
        set_crc32_options(before)


def load_times(workload: Workload, folder: str) -> dict[str, float]:
    """Return seconds of ``torch.load`` and of verified ``trainbus.load``, both of one cached file."""
    path = os.path.join(folder, "load")
    trainbus.save(workload.state(), path)
    found: dict[str, list[float]] = {"torch": [], "trainbus": []}
    for _ in range(_RATIO_REPEATS + 1):
        found["torch"].append(_seconds(lambda: torch.load(path, map_location="cpu", weights_only=True)))
        found["trainbus"].append(_seconds(lambda: trainbus.load(path)))
    os.remove(path)
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def fork_times(workload: Workload, folder: str) -> dict[str, float]:
    """
    Return seconds of a ``save_async`` call without and with worker processes of a DataLoader.

    What the parent writes to for the first time after the fork is copied by the kernel, page by page,
    unless it was kept from the children. ``with`` is a save that comes first, ``stepped`` one after a
    training step, which has written to every tensor by then.
    """
    path = os.path.join(folder, "fork")
    found: dict[str, list[float]] = {"without": [], "with": [], "stepped": []}
    for _ in range(_RATIO_REPEATS):
        # The first one after a fork may pay for it even when the children are gone.
        _save_call(workload, path)
        found["without"].append(_save_call(workload, path))
        for name in ("with", "stepped"):
            workers = iter(DataLoader(range(1000), num_workers=2))
            next(workers)
            if name == "stepped":
                workload.step(0, lambda: None)
            found[name].append(_save_call(workload, path))
            del workers
    os.remove(path)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _save_call(workload: Workload, path: str) -> float:
    begun = time.perf_counter()
    state = workload.state()
    pending = trainbus.save_async(state, path)
    seconds = time.perf_counter() - begun
    pending.result()
    # Freed here: before, each of its tensors would be a turn at the lock that the writer needs.
    del state
    return seconds


def _seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _median(action: Callable[[], object], repeats: int = _REPEATS) -> float:
    action()
    return statistics.median(_seconds(action) for _ in range(repeats))

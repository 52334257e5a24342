"""
The processor time of a save: what it takes from a training that uses every core.

Run ``python -m benchmarks.processor_time [--size-mib 512] [--repeats 4] [--folder .] [--json]``. It is
counted by the system for each thread, so a machine that does other things meanwhile matters little;
of several repeats the least is taken.

- file: a file of a state in host memory, made on one thread, that nobody writes: trainbus with CRC and
  digest, ``torch.save`` with its CRC. It is what a faster disk could not make faster.
- durable: a whole save by all threads until the file is durable, and the part of the thread that asks. What
  the kernel does for a file by itself, as for those that go through its page cache, is not in it.
- sums: bytes a second that the zip's CRC and the digest take, of memory and of a block in the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash

import trainbus
from trainbus.checkpoint.archive import write_archive
from trainbus.checkpoint.hasher import Hasher, new_hasher
from trainbus.checkpoint.record_sums import crc32
from trainbus.checkpoint.staging_copy import take_snapshot
from trainbus.checkpoint.staging_memory import StagingMemory

TENSORS = (64, 4096)
BLOCK_BYTES = 256 << 10


class Sink:
    """Takes all bytes and keeps none."""

    def write(self, data: bytes | memoryview) -> int:
        """Return how many they are."""
        return len(data)

    def write_in_place(self, data: memoryview) -> None:
        """Do nothing."""

    def leave_hashing(self, count: int) -> Hasher:
        """Return a digest to be continued."""
        return new_hasher()

    def flush(self) -> None:
        """Do nothing."""


def least(action: Callable[[], Any], repeats: int, clock: Callable[[], float] = time.thread_time) -> float:
    """Return the fewest seconds that *action* took of *repeats*, after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        begun = clock()
        action()
        found.append(clock() - begun)
    return min(found[1:])


def file_times(state: Any, repeats: int) -> dict[str, float]:
    """Return the seconds of one thread for a file of *state*."""
    snapshot = take_snapshot(state, StagingMemory())
    snapshot.wait()
    assert snapshot.image is not None
    assert write_archive(snapshot.state, snapshot.image, Sink()), "torch.save would write it"
    return {
        "trainbus": least(lambda: write_archive(snapshot.state, snapshot.image, Sink()), repeats),
        "torch.save": least(lambda: torch.save(state, Sink()), repeats),
    }


def durable_times(state: Any, folder: str, repeats: int) -> dict[str, float]:
    """Return the seconds of all threads, and of the asking one, for a durable file of *state*."""
    asking: list[float] = []

    def save() -> None:
        begun = time.thread_time()
        pending = trainbus.save_async(state, os.path.join(folder, "trainbus.pt"))
        asking.append(time.thread_time() - begun)
        pending.result()

    def save_by_torch() -> None:
        with open(os.path.join(folder, "torch.pt"), "wb") as file:
            torch.save(state, file)
            os.fsync(file.fileno())

    return {
        "trainbus": least(save, repeats, time.process_time),
        "trainbus, asking thread": min(asking[1:]),
        "torch.save, fsync": least(save_by_torch, repeats, time.process_time),
    }


def sum_speeds(size: int, repeats: int) -> dict[str, float]:
    """Return bytes a second: of *size* bytes in memory, and of blocks of them that lie in the cache."""
    memory = np.frombuffer(np.random.default_rng(0).bytes(size), dtype=np.uint8)
    block, blocks = memory[:BLOCK_BYTES], size // BLOCK_BYTES
    found = {}
    for name, add_up in (("CRC", crc32), ("CRC of zlib", zlib.crc32), ("digest", xxhash.xxh3_128)):
        found[name] = size / least(lambda add_up=add_up: add_up(memory), repeats)
        cached = least(lambda add_up=add_up: [add_up(block) for _ in range(blocks)], repeats)
        found[f"{name}, in the cache"] = blocks * BLOCK_BYTES / cached
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.processor_time")
    parser.add_argument("--size-mib", type=int, default=512, help="of the state (default: 512)")
    parser.add_argument("--repeats", type=int, default=4, help="of which the least counts (default: 4)")
    parser.add_argument("--folder", default=".", help="where to write; removed at the end")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    size = options.size_mib << 20
    found: dict[str, Any] = {"size": size, "sums": sum_speeds(size, options.repeats)}
    for count in TENSORS:
        state = {str(index): torch.ones(size // count // 4) for index in range(count)}
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            found[f"{count} tensors"] = {
                "file": file_times(state, options.repeats),
                "durable": durable_times(state, folder, options.repeats),
            }
    if options.json:
        print(json.dumps(found))
        return
    for count in TENSORS:
        for what, times in found[f"{count} tensors"].items():
            for name, seconds in times.items():
                print(f"{count:5} tensors  {what:8} {name:24} {1000 * seconds:6.0f} ms")
    for name, speed in found["sums"].items():
        print(f"{name:24} {speed / 1e9:6.1f} GB/s")


if __name__ == "__main__":
    main()

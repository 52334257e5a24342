"""Reads a file and hashes it, at twice the speed of one thread. Needs no torch."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

import xxhash

__all__ = ["hash_bytes"]

_PIECE = 512 << 10  # stays in the cache of a core until it is hashed
_WORTH_SHARING = 8 << 20

_Turns = SimpleQueue[bool]
"""Says when it is a thread's turn to hash: True, or False when there is no use in going on."""


def hash_bytes(hasher: xxhash.xxh3_128, fd: int, size: int) -> None:
    """
    Hash the first *size* bytes of a file, or those that are there. Blocks while they are read.

    Copying a cached file out of the kernel takes twice as long as hashing it. The bytes have to be
    hashed in their order, by one thread at a time; meanwhile another one can read. So two of them,
    this one and one that ends with this call, read every other piece and hash when it is their turn
    (512 MiB on two cores: 40 ms instead of 71; with threads that only read: 61).

    Raises:
        OSError: They cannot be read.
    """
    mine, its = _Turns(), _Turns()
    mine.put(True)
    if size < _WORTH_SHARING:
        _hash_pieces(hasher, fd, range(0, size, _PIECE), size, mine, mine)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="trainbus-hash") as other:
        odd = range(_PIECE, size, 2 * _PIECE)
        try:
            rest = other.submit(_hash_pieces, hasher, fd, odd, size, its, mine)
        except RuntimeError:  # an interpreter that exits begins no thread any more
            _hash_pieces(hasher, fd, range(0, size, _PIECE), size, mine, mine)
            return
        _hash_pieces(hasher, fd, range(0, size, 2 * _PIECE), size, mine, its)
        rest.result()


def _hash_pieces(
    hasher: xxhash.xxh3_128, fd: int, pieces: range, size: int, mine: _Turns, next_one: _Turns
) -> None:
    memory = memoryview(bytearray(min(_PIECE, size)))
    try:
        for start in pieces:
            data = _read(fd, memory[: size - start], start)
            if not mine.get():
                return
            hasher.update(data)
            next_one.put(True)
    finally:
        next_one.put(False)


def _read(fd: int, memory: memoryview, start: int) -> memoryview:
    """Read into *memory* what the file has from *start* on, and return that."""
    filled = 0
    while filled < len(memory) and (count := os.preadv(fd, [memory[filled:]], start + filled)):
        filled += count
    return memory[:filled]

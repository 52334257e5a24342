"""Where the ranks meet: one round of small messages to rank 0 and back, and who did not come.

Every collective of ours is the same on the wire, whatever it is for, so ranks that come to two different
ones find out at once instead of misreading each other.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import struct
import time
import traceback
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainbus.errors import RankError

__all__ = ["RankTable", "new_group"]

WORD_BYTES = 256
_HEAD = struct.Struct("<I?100p")  # length of what is said, whether the ranks came to the same, to what
_INLINE = WORD_BYTES - _HEAD.size
_GRACE = 2.0  # seconds in which ranks that gave up are waited for, to be told from those that did not come

_numbers = itertools.count()  # of the groups of this process; the same on all ranks, which make them together


def new_group(timeout: float) -> tuple[Any, Any]:
    """
    Make a gloo group of all ranks, whatever backend the script uses; return it and a store of its own.

    Collective; training thread.

    Args:
        timeout: Seconds that a rank waits for the others, here and in the group.

    Raises:
        RankError: Not all ranks came.
    """
    name = f"trainbus {next(_numbers)}"
    world: Any = dist.group.WORLD
    store = dist.PrefixStore(name, world.get_group_store())  # type: ignore[attr-defined]
    store.set(f"joins {dist.get_rank()}", "")
    begun = time.monotonic()
    try:
        return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout), group_desc=name), store
    except RuntimeError as error:
        missing = _ranks_without(store, "joins {}", 0.0)
        seconds = time.monotonic() - begun
        raise RankError(_apart("Handler(...)", missing, seconds, timeout), missing) from error


class RankTable:
    """
    A gloo group of all ranks, apart from the script's own groups. Training thread.

    A round takes one message from each rank to rank 0 and a broadcast back, of 256 bytes each. On a busy
    machine of two cores that took 0.28 ms with 2 ranks and 0.91 with 4 (medians; in the same run
    ``all_reduce`` took 0.17 and 1.0, ``all_gather_object`` 0.68 and 5.1). An all-reduce makes 2 x (ranks - 1)
    hops one after the other, the broadcast log2(ranks).

    Args:
        timeout: Seconds that a rank waits for the others.

    Raises:
        RankError: Not all ranks came to make it.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._rounds = 0
        self._broken: str | None = None
        group, self._store = new_group(timeout)
        # Torch holds it until the script destroys its process groups. One that is held beyond that ends
        # when the interpreter does, and now and then takes the process down with it (std::terminate).
        self._group_if_there = weakref.ref(group)
        self._word = _bytes(WORD_BYTES)
        self._words = [_bytes(WORD_BYTES) for _ in range(self._size)]

    def exchange(self, what: str, mine: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
        """
        Give rank 0 each rank's *mine* and return on every rank what *answer* makes of them there.

        Raises:
            RankError: A rank did not come in time, is dead, or came to something else.
        """
        if self._broken is not None:
            raise RankError(f"Cannot meet the other ranks at {what}: it failed before. {self._broken}", [])
        self._rounds += 1
        begun = time.monotonic()
        try:
            said = self._say(what, mine)
            if self._rank == 0:
                places = [place for place, _ in said]
                same = all(place == places[0] for place in places)
                reply = answer([one for _, one in said]) if same else pickle.dumps(places)
                self._spread(what, reply, same)
                received = same, reply
            else:
                received = self._hear()
        except RuntimeError as error:
            self._broken = f"{error}"
            traceback.clear_frames(error.__traceback__)
            missing = _ranks_without(self._store, self._leave(begun), _GRACE)
            self._broken = _apart(what, missing, self._longest_wait(), self.timeout)
            raise RankError(self._broken, missing) from error
        except BaseException as error:
            # Such as Ctrl-C: what the others say from now on is not what this rank asks for.
            self._broken = f"It was left by {type(error).__name__} at {what}."
            raise
        same, reply = received
        if not same:
            self._broken = _elsewhere(pickle.loads(reply))
            raise RankError(self._broken, [])
        return reply

    @property
    def _group(self) -> Any:
        return self._group_if_there()

    # -- messages

    def _say(self, what: str, mine: bytes) -> list[tuple[str, bytes]]:
        """Send rank 0 this rank's word; there, return every rank's place and word."""
        _write(self._word, what, mine, True)
        is_first = self._rank == 0
        dist.gather(self._word, self._words if is_first else None, dst=0, group=self._group)
        if not is_first:
            if len(mine) > _INLINE:
                dist.send(_tensor(mine), 0, group=self._group)
            return []
        said = []
        for rank, word in enumerate(self._words):
            length, _, place, inline = _read(word)
            if length > _INLINE and rank != 0:
                rest = _bytes(length)
                dist.recv(rest, rank, group=self._group)
                inline = rest.numpy().tobytes()
            said.append((place, mine if rank == 0 else inline))
        return said

    def _spread(self, what: str, reply: bytes, same: bool) -> None:
        _write(self._word, what, reply, same)
        dist.broadcast(self._word, 0, group=self._group)
        if len(reply) > _INLINE:
            dist.broadcast(_tensor(reply), 0, group=self._group)

    def _hear(self) -> tuple[bool, bytes]:
        dist.broadcast(self._word, 0, group=self._group)
        length, same, _, reply = _read(self._word)
        if length > _INLINE:
            rest = _bytes(length)
            dist.broadcast(rest, 0, group=self._group)
            reply = rest.numpy().tobytes()
        return same, reply

    # -- when it fails

    def _leave(self, begun: float) -> str:
        """Leave word of how long this rank has waited; return where the others do, for a rank to fill in."""
        place = f"waited {self._rounds} {{}}"
        with contextlib.suppress(RuntimeError):  # the store was kept by a process that has died
            self._store.set(place.format(self._rank), f"{time.monotonic() - begun}")
        # Those that wait for this rank learn of it by its connections being closed, when nothing holds them.
        if self._group is not None:  # which would mean all groups
            dist.destroy_process_group(self._group)
        return place

    def _longest_wait(self) -> float:
        places = [f"waited {self._rounds} {rank}" for rank in range(self._size)]
        try:
            return max(float(self._store.get(place)) for place in places if self._store.check([place]))
        except (RuntimeError, ValueError):
            return 0.0


def _ranks_without(store: Any, place: str, patience: float) -> list[int]:
    """Return the other ranks that left no word at *place*, after *patience* seconds if there are any."""
    others = [rank for rank in range(dist.get_world_size()) if rank != dist.get_rank()]
    end = time.monotonic() + patience
    try:
        while missing := [rank for rank in others if not store.check([place.format(rank)])]:
            if time.monotonic() >= end:
                break
            time.sleep(0.05)
    except RuntimeError:  # the store was kept by a process that has died
        return others
    return missing


def _write(word: torch.Tensor, what: str, said: bytes, same: bool) -> None:
    inline = said if len(said) <= _INLINE else b""
    packed = _HEAD.pack(len(said), same, what.encode()) + inline
    word[: len(packed)] = _tensor(packed)


def _read(word: torch.Tensor) -> tuple[int, bool, str, bytes]:
    raw = word.numpy().tobytes()
    length, same, what = _HEAD.unpack_from(raw)
    return length, same, what.decode(errors="replace"), raw[_HEAD.size : _HEAD.size + length]


def _bytes(count: int) -> torch.Tensor:
    # Of gloo, wherever the script has tensors made by default.
    return torch.zeros(count, dtype=torch.uint8, device="cpu")


def _tensor(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _apart(what: str, missing: list[int], seconds: float, timeout: float) -> str:
    if not missing:
        return f"Cannot go on at {what}: the other ranks had given up waiting for this one."
    names = _names(missing)
    if seconds < 0.9 * timeout:
        return (
            f"Cannot go on at {what}: {names} did not come, and the connection is gone. Probably a process "
            "has ended; its own output says why. Start the run again, it goes on from the newest checkpoint."
        )
    return (
        f"Cannot go on at {what}: {names} did not come within {timeout:g} s. Every rank has to call it: is "
        "it under `if rank == 0:`, or did a rank fail? Call it on all ranks, rank 0 alone writes. If a rank "
        "may take that long, raise Handler(rank_timeout=...)."
    )


def _elsewhere(places: list[str]) -> str:
    by_place: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        by_place.setdefault(place, []).append(rank)
    told = "; ".join(f"{_names(ranks)} came to {place}" for place, ranks in by_place.items())
    return (
        f"The ranks are not at the same place: {told}. Each has to make the same calls in the same order: is "
        "one under `if rank == 0:`, or do the ranks have different numbers of batches?"
    )


def _names(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"

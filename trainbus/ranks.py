"""Which process of a distributed run this is, and what the ranks tell each other.

The only collectives of trainbus are here, all on the training thread. Works without
``torch.distributed``; imports no torch of its own accord.
"""

from __future__ import annotations

import os
import pickle
import sys
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from trainbus.errors import RankFailedError

if TYPE_CHECKING:
    from trainbus.rank_table import RankTable

__all__ = [
    "agree",
    "connected",
    "decide",
    "exchange",
    "gather",
    "join",
    "rank",
    "separate_group",
    "timeout",
    "together",
    "world_size",
]

T = TypeVar("T")

TIMEOUT = 60.0  # seconds

_tables: weakref.WeakKeyDictionary[Any, RankTable] = weakref.WeakKeyDictionary()  # by default process group
_timeout = TIMEOUT


def rank() -> int:
    """Return this process's rank: from the process group, else from ``RANK``, else 0."""
    distributed = _process_group()
    return int(distributed.get_rank()) if distributed else _from_environment("RANK", 0)


def world_size() -> int:
    """Return the number of processes: from the process group, else from ``WORLD_SIZE``, else 1."""
    distributed = _process_group()
    return int(distributed.get_world_size()) if distributed else _from_environment("WORLD_SIZE", 1)


def connected() -> bool:
    """Return whether there is a process group, be it of this rank alone."""
    return _process_group() is not None


def together() -> bool:
    """Return whether there are other ranks that can be told something: a process group of several."""
    distributed = _process_group()
    return distributed is not None and distributed.get_world_size() > 1


def timeout() -> float:
    """Return how many seconds a rank waits for the others."""
    return _timeout


def join(seconds: float = TIMEOUT) -> None:
    """
    Make the group in which the ranks meet, apart from the script's own; a handler does when it is made.

    Collective, and once for each default process group and time-out. Does nothing where there is no other
    rank. What comes first without it makes the group, so all ranks have to come to the same.

    Args:
        seconds: That a rank waits for the others, from now on.

    Raises:
        RankError: Not all ranks came.
    """
    global _timeout
    _timeout = seconds
    if together():
        _table()


def agree(value: T, what: str = "agree()") -> T:
    """
    Return rank 0's *value* on every rank; what the others give does not matter.

    Collective: every rank calls it, on its training thread. Blocks until all have come. Takes two small
    messages for each rank; alone, nothing.

    Args:
        value: Anything that can be pickled.
        what: At what the ranks meet, the same text on all of them, for the error if they are not.

    Raises:
        RankError: A rank did not come in time, is dead, or came to something else.
    """
    if not together():
        return value
    if rank() == 0:
        _table().exchange(what, pickle.dumps(value), lambda words: words[0])
        return value
    agreed: T = pickle.loads(_table().exchange(what, b"", lambda words: words[0]))
    return agreed


def decide(call: Callable[[], T], what: str = "decide()") -> T:
    """
    Return on every rank what *call* returns on rank 0, where alone it is called, or raise what it raises.

    Collective, see `agree`, but all ranks wait for *call* up to the time-out.
    """
    if not together():
        return call()
    result: Any = None
    failure: Exception | None = None
    if rank() == 0:
        try:
            result = call()
        except Exception as error:
            failure = error
    result, told = agree((result, failure and _portable(failure)), what)
    if told is not None:
        raise failure or told
    decided: T = result
    return decided


def _portable(error: Exception) -> Exception:
    """Return *error* if it can be sent to other ranks, else what tells of it."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RankFailedError(0, f"{type(error).__name__}: {error}")
    return error


def gather(value: T, what: str = "gather()") -> list[T]:
    """
    Return every rank's *value*, in order of rank, on every rank; ``[value]`` without other ranks.

    Collective, see `agree`. *value* should be small, because every rank gets all of them.
    """
    if not together():
        return [value]
    values = _table().exchange(what, pickle.dumps(value), pickle.dumps)
    return [pickle.loads(one) for one in pickle.loads(values)]


def exchange(what: str, mine: bytes, answer: Callable[[list[bytes]], bytes]) -> bytes:
    """
    Give rank 0 each rank's *mine* and return on every rank what it answers; see `agree`.

    The one collective of which the others are made. Needs a process group of several ranks.

    Args:
        what: At what the ranks meet, the same text on all of them.
        mine: What this rank says.
        answer: Called on rank 0 with what all ranks say, in order of rank. Must not raise.
    """
    return _table().exchange(what, mine, answer)


def separate_group(seconds: float) -> Any:
    """
    Return a new gloo group of all ranks for an engine that has collectives of its own, also off this thread.

    Collective. Needs a process group, be it of one rank. Whoever asks for it destroys it.

    Args:
        seconds: That a rank waits for the others, here and in the group.

    Raises:
        RankError: Not all ranks came.
    """
    from trainbus.rank_table import new_group

    return new_group(seconds)[0]


def _world() -> Any:
    return sys.modules["torch.distributed"].group.WORLD


def _table() -> RankTable:
    from trainbus.rank_table import RankTable

    world = _world()
    table = _tables.get(world)
    if table is None or table.timeout != _timeout:
        table = _tables[world] = RankTable(_timeout)
    return table


def _process_group() -> ModuleType | None:
    # A process group can only exist if somebody has imported the module already.
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed


def _from_environment(name: str, default: int) -> int:
    # Launchers set these before the process group exists; two ranks must not both think they are 0.
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else default

"""What differs from rank to rank, in the one file that rank 0 writes: random states, data positions, sums.

Weights and optimizer are the same on all ranks of replicated training, so rank 0's stand for them.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trainbus.state.plain_types import from_plain, to_plain

__all__ = ["KEY", "OWN", "give", "own_state", "together"]

KEY = "ranks"  # in the state of a run of several ranks, beside those of `trainbus.state.collect.KEYS`
OWN = ("progress", "rng", "data")


def give(collected: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a rank gives to the file, as bytes of a file of its own, or in its place why it cannot."""
    stream = io.BytesIO()
    try:
        torch.save(to_plain(dict(collected)), stream)
        return {"part": stream.getvalue()}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def together(given: Sequence[Mapping[str, Any]] | None, world_size: int) -> dict[str, Any]:
    """
    Return the state under `KEY`.

    Args:
        given: What each rank gave, in order of rank; None: rank 0 saves alone.
        world_size: How many ranks there are.

    Raises:
        RuntimeError: A rank could not give its part.
    """
    for rank, one in enumerate(given or ()):
        if "failed" in one:
            raise RuntimeError(f"the state of rank {rank} cannot be saved: {one['failed']}")
    parts = None if given is None else [_taken(rank, one["part"]) for rank, one in enumerate(given)]
    return {"world_size": world_size, "parts": parts}


def _taken(rank: int, part: bytes) -> Any:
    return from_plain(torch.load(io.BytesIO(part), weights_only=True, mmap=False), f"the part of rank {rank}")


def own_state(
    state: Mapping[str, Any], rank: int, world_size: int
) -> tuple[Mapping[str, Any], set[str], str | None]:
    """
    Return what *rank* of *world_size* takes from the state of a run of any number of ranks.

    Returns:
        The state with this rank's `OWN` parts, the keys out of `OWN` that it has not, and what is not exact
        because of that, as a sentence; None if all is.
    """
    saved = state.get(KEY) or {"world_size": 1, "parts": None}
    before, parts = saved["world_size"], saved["parts"]
    if before == world_size == 1:
        return state, set(), None
    if before != world_size:
        return _resharded(state, before, world_size)
    if parts is not None:
        return {**state, **parts[rank]}, set(), None
    told = "Rank 0 saved it alone: the random numbers of the other ranks are not those of before."
    return state, set() if rank == 0 else {"rng"}, told


def _resharded(state: Mapping[str, Any], before: int, now: int) -> tuple[Mapping[str, Any], set[str], str]:
    progress = dict(state["progress"])
    told = (
        f"It was saved by {_ranks(before)} and is loaded by {_ranks(now)}: weights, optimizer and counters "
        "are exact; random numbers and the order of data are those of a new start of the script"
    )
    if progress["epoch_begun"]:
        told += f", and epoch {progress['epoch'] + 1} is done again from its first batch"
        if progress["batches"]:
            told += f", of which {progress['batches']} batches were done"
        progress |= {"batches": 0, "epoch_begun": False, "in_body": False, "in_validation": False}
        progress["metrics"] = {}
    return {**state, "progress": progress}, {"rng", "data"}, f"{told}."


def _ranks(number: int) -> str:
    return "1 process" if number == 1 else f"{number} ranks"

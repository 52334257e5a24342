"""Checkpoints of a run whose state is divided among ranks: each writes its part, together one folder."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from trainbus import ranks
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.nesting import tensors_in, with_tensors
from trainbus.checkpoint.sharded import ShardedSaver
from trainbus.checkpoint.sharded_format import read_sharded, where_it_stands
from trainbus.checkpoint.sharded_load import load_into, read_sharded_outline
from trainbus.errors import RankFailedError
from trainbus.state import rank_parts
from trainbus.state.collect import KEYS, Parts, check_restorable, collect_weights, each_of
from trainbus.state.divided import divided_parts
from trainbus.state.named_optimizer import NamedOptimizer
from trainbus.state.plain_types import NUMPY_KEY, to_plain

__all__ = ["DividedSaves", "gathered"]


class DividedSaves:
    """
    One rank's part of saving and loading such a state. Training thread; all ranks make the same calls.

    Args:
        max_pending: Saves that may be unfinished at once.
        on_busy: What a save does when there are that many: nothing but ``"wait"`` is possible.
        device_snapshot: As for `ShardedSaver`.
        is_busy: As for `ShardedSaver`.
        patience: Seconds that a rank which has written waits for the others, and without progress for its
            own disk.

    Raises:
        ValueError: *on_busy* is another.
        RankError: Not all ranks came.
    """

    def __init__(
        self,
        *,
        max_pending: int,
        on_busy: str,
        device_snapshot: str | bool,
        patience: float,
        is_busy: Callable[[], bool],
    ) -> None:
        if on_busy != "wait":
            raise ValueError(
                f"on_busy must be 'wait' where the state is divided among ranks, got {on_busy!r}: each rank "
                "would find its own disk busy or not. Use max_pending=2 to let saves wait in memory."
            )
        self._group: Any = ranks.separate_group(patience)
        self._saver = ShardedSaver(
            self._group,
            max_pending=max_pending,
            device_snapshot=device_snapshot,
            is_busy=is_busy,
            patience=patience,
        )

    @property
    def last_progress(self) -> float:
        """``time.monotonic()`` when a disk last took something of this rank's part."""
        return self._saver.last_progress

    def parts(self, parts: Parts) -> Parts:
        """Return *parts* such that their state is what each rank has of it, by names."""
        return divided_parts(parts)

    def prepare(self, state: Any) -> None:
        """Have host memory for this rank's part of such a *state* made in the background. No collective."""
        self._saver.prepare(state)

    def save(
        self, path: str, collect: Callable[[], Any], manifest: Callable[[], Manifest]
    ) -> Future[Manifest]:
        """Copy this rank's part of what *collect* returns, have it written; see `ShardedSaver.save`."""
        return self._saver.save(path, collect, manifest)

    def read(
        self, path: str | os.PathLike[str], wanted: set[str], parts: Parts, strict: bool
    ) -> tuple[Any, Manifest | None]:
        """
        Read a checkpoint into the tensors of *parts*: a folder of any number of ranks, or a whole file.

        Collective. What does not fit is raised on all ranks before any tensor has changed.

        Raises:
            CheckpointCorruptError: It is damaged.
            StateMismatchError: It is of other parts or tensors.
            RankFailedError: A rank could not read it.
        """
        if not self._saver.wait():
            raise TimeoutError(
                errno.ETIMEDOUT,
                f"Cannot load {os.fspath(path)!r}: a save of this run hangs. Look at the file system",
            )

        def look() -> tuple[Manifest, Any] | None:
            there = where_it_stands(path)
            if not os.path.isdir(there):
                return None
            return read_sharded(there).manifest, read_sharded_outline(there)

        found = ranks.decide(look, "handler.load")
        if found is None:
            return load_file(path)
        manifest, outline = found
        if manifest.contents == "weights":
            target = collect_weights(divided_parts(parts))
            return load_into(path, target if strict else _common(target, outline), group=self._group)
        if strict:
            check_restorable(parts, outline, wanted)
        keys = wanted | {NUMPY_KEY} | ({rank_parts.KEY} if wanted & set(rank_parts.OWN) else set())
        target = _target(divided_parts(parts), outline, wanted, strict)
        state, manifest = load_into(path, target, group=self._group, keys=keys)
        if NUMPY_KEY in state:
            state[NUMPY_KEY] = [entry for entry in state[NUMPY_KEY] if entry[0][0] in state]
        return state, manifest

    def close(self, timeout: float | None = None) -> None:
        """
        Wait for the saves under way and let go of the group. May be called again.

        Args:
            timeout: Seconds to wait at most. The group goes when the last save is over then.
        """
        unfinished = self._saver.close(timeout)
        group, self._group = self._group, None
        if group is None:
            return
        if unfinished is None:
            _destroy(group)
        else:
            held = [group]  # a future keeps its callbacks
            del group
            unfinished.add_done_callback(lambda _: _destroy(held.pop()))


def _destroy(group: Any) -> None:
    # It may be gone already, with the default group.
    with contextlib.suppress(RuntimeError, ValueError, AssertionError):
        dist.destroy_process_group(group)


def gathered(collect: Callable[[], Any]) -> Callable[[], Any]:
    """
    Call *collect* on every rank, make each `DTensor` whole, and return what gives the result on rank 0.

    Collective. Where *collect* fails on a rank, what is returned raises that.
    """
    problem: str | None = None
    state: Any = None
    try:
        state = to_plain(collect(), divided=True)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    refusal = _refusal(problem)
    if refusal is not None:
        return refusal
    keep = ranks.rank() == 0
    whole, problem = _wholes(state, keep)
    refusal = _refusal(problem)
    if refusal is not None:
        return refusal
    result = with_tensors(state, whole) if keep else None
    return lambda: result


def _refusal(problem: str | None) -> Callable[[], Any] | None:
    """Return what raises the first rank's *problem*, None if no rank has one. Collective."""
    problems = ranks.gather(problem, "handler.save or save_async with full_state=True")
    failed = ((rank, told) for rank, told in enumerate(problems) if told is not None)
    return next((functools.partial(_refuse, rank, told) for rank, told in failed), None)


def _wholes(state: Any, keep: bool) -> tuple[dict[int, torch.Tensor], str | None]:
    """
    Return each tensor of *state*, by its id, whole; or what went wrong.

    Comes to all collectives, also when one of them fails here; not if it fails before the others are in it.
    """
    whole: dict[int, torch.Tensor] = {}
    problem: str | None = None
    with torch.no_grad():
        for tensor in tensors_in(state):
            try:
                whole[id(tensor)] = _whole(tensor, keep)
            except Exception as error:
                problem = problem or f"{type(error).__name__}: {error}"
    return whole, problem


def _refuse(rank: int, problem: str) -> None:
    raise RankFailedError(rank, problem)


def _whole(tensor: torch.Tensor, keep: bool) -> torch.Tensor:
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.full_tensor()
    return whole.cpu() if keep else torch.empty(0)


def _target(parts: Parts, outline: Mapping[str, Any], wanted: set[str], strict: bool) -> dict[str, Any]:
    """Return the tensors that are read into: those of modules and optimizers, and divided ones elsewhere."""
    target: dict[str, Any] = {}
    for key in KEYS[:6]:
        part = getattr(parts, key)
        if key not in wanted or part is None or outline.get(key) is None:
            continue
        if key == "optimizer":
            target[key] = _rooms(part, outline[key], outline.get("module"))
        elif key == "module":
            target[key] = each_of(part, lambda one: one.state_dict())
            if not strict:
                target[key] = _common(target[key], outline[key])
        elif key in ("extra", "callbacks"):
            target[key] = _common(_divided_only(each_of(part, lambda one: one.state_dict())), outline[key])
    return target


def _rooms(optimizer: Any, outline: Mapping[str, Any], module: Any) -> Any:
    if isinstance(optimizer, Mapping):
        return {
            name: _rooms(one, outline[name], module) for name, one in optimizer.items() if name in outline
        }
    return optimizer.room_for(outline, module) if isinstance(optimizer, NamedOptimizer) else {}


def _divided_only(state: Any) -> Any:
    """Return *state* with None for all that is no `DTensor`."""
    if isinstance(state, Mapping):
        return {key: _divided_only(one) for key, one in state.items()}
    if isinstance(state, list | tuple):
        return type(state)([_divided_only(one) for one in state])
    return state if isinstance(state, DTensor) else None


def _common(state: Any, outline: Any) -> Any:
    """Return of *state* what stands in *outline* too."""
    if isinstance(state, Mapping) and isinstance(outline, Mapping):
        return {key: _common(one, outline[key]) for key, one in state.items() if key in outline}
    return state

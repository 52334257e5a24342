"""
Saves of states that are divided among ranks: ``torch.distributed.checkpoint``, fed with our snapshots.

It plans, finds out which rank writes what, and tells all ranks of a failure; what it writes goes through
our writer (`sharded_writer`), and what it copies through our stager.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor
from torch.profiler import record_function

from trainbus.checkpoint import collector
from trainbus.checkpoint.disk import disk_in_use
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_state import STRUCTURE, FlatState, flatten, local_part
from trainbus.checkpoint.sharded_writer import WHOLE, Failure, Shard, ShardPlanner, ShardWriter, StagedState
from trainbus.checkpoint.snapshot import Snapshot
from trainbus.checkpoint.staging_copy import Stager
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.checkpoint.temporary import Sweeper
from trainbus.checkpoint.throttle import Throttle
from trainbus.checkpoint.warm_up import WarmUp
from trainbus.checkpoint.write_behind import WriteBehind
from trainbus.errors import HandlerClosedError, RankFailedError

__all__ = ["ShardedSaver", "collect_sharded", "restore_sharded"]


class _Unfinished(NamedTuple):
    """A save, and the ``time.monotonic()`` at which it was begun."""

    result: Future[Manifest]
    begun: float


class ShardedSaver:
    """
    Saves states with `DTensor`\\ s in them. Every rank of *group* makes one, and calls `save` alike.

    Its collectives are torch's own, run on a thread of torch's, in *group* alone; so nothing else may
    use that group. They fail after the group's time-out where a rank does not come.

    Args:
        group: A gloo group of all ranks that take part, made for this; rank 0 of it commits. Its time-out
            has to be longer than the slowest rank's write, for which the others wait in it.
        max_pending: Saves that may be unfinished at once; each has host memory of its own.
        device_snapshot: Whether to copy CUDA tensors on their device first: ``"auto"``, True, False.
        is_busy: Tells whether the training needs every core now; see `Throttle`. Called on writing threads.
        patience: Seconds without progress of this rank after which nobody here waits for a save any more.
    """

    def __init__(
        self,
        group: torch.distributed.ProcessGroup,
        *,
        max_pending: int = 1,
        device_snapshot: str | bool = "auto",
        is_busy: Callable[[], bool] = lambda: False,
        patience: float = math.inf,
    ) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending!r}.")
        self._group: torch.distributed.ProcessGroup | None = group
        self._max_pending = max_pending
        self._memory = StagingMemory(max_pending)
        self._stager = Stager(self._memory, device_snapshot=device_snapshot)
        self._warm_up = WarmUp(self._stager)
        self._behind = WriteBehind(rest=Throttle(is_busy).rest)
        self._sweeper = Sweeper()
        self._unfinished: deque[_Unfinished] = deque()
        self._patience = patience
        self._items: dict[str, Any] = {}
        self._cache = ""
        self._begin_cache()

    @property
    def last_progress(self) -> float:
        """``time.monotonic()`` when a disk last took bytes of this rank; 0 before."""
        return self._behind.last_progress

    def prepare(self, state: Any) -> None:
        """
        Have host memory for this rank's part of such a *state* made in the background. Blocks for its plan.

        No collective. Does nothing while as many saves as may be are unfinished.
        """
        parts, flat = _own_parts(state)
        self._warm_up.begin((parts, flat.others))

    def save(
        self, path: str | os.PathLike[str], state: Any, manifest: Callable[[], Manifest]
    ) -> Future[Manifest]:
        """
        Copy this rank's part of *state* now and have it written, together with the other ranks.

        Collective: every rank calls it, in the same order, with the same *path*, and its own part of the
        state. What is no `DTensor` should be equal on all ranks; rank 0's is written. A `DTensor` is
        written by those ranks whose coordinate is 0 in each dimension of its mesh that replicates it, and
        not even copied on the others. Blocks while *max_pending* saves are unfinished and while tensors
        are copied to host memory; when it returns, they may change in any way. Never raises for one rank
        alone: what keeps a rank from copying fails the save on all, also a save before it that hangs.

        Args:
            path: A folder on a disk that all ranks share; a checkpoint that is there is replaced in one
                step at the very end.
            state: Tensors and plain values in dict, OrderedDict, Counter, list, tuple and set; or what
                returns such a state and is called once there is room. What it raises fails the save on all.
            manifest: Called on rank 0, on another thread, once all ranks have written.

        Returns:
            A future of what the checkpoint says of itself, on every rank the same; done means durable.
            It fails with `RankFailedError`, on every rank with the same, if the save failed on any; the
            old checkpoint is untouched then, unless the message says that the new one is there.

        Raises:
            HandlerClosedError: It is closed.
        """
        if self._group is None:
            raise HandlerClosedError(
                f"Cannot save {os.fspath(path)!r}: the writer is closed. Save before that."
            )
        self._wait_for_room()
        self._warm_up.end()
        self._memory.spill_folder = os.path.dirname(os.path.abspath(os.path.expanduser(path)))
        snapshots = _SnapshotStager(self._stager, self._items, previous=self._last)
        writer = ShardWriter(
            os.path.abspath(os.path.expanduser(os.fspath(path))),
            manifest,
            disk=disk_in_use(),
            behind=self._behind,
            ready=snapshots.wait,
            before=self._sweeper.sweep_once,
        )
        snapshots.fail = lambda error: setattr(writer, "failed_to_stage", error)
        with record_function("trainbus: sharded save"):
            # In a dict of one: for each key torch does things that take longer than copying its tensor.
            response = async_save(
                {WHOLE: state},
                storage_writer=writer,
                planner=ShardPlanner(self._cache),
                process_group=self._group,
                async_stager=snapshots,
            )
        result: Future[Manifest] = Future()
        self._unfinished.append(_Unfinished(result, time.monotonic()))
        assert not isinstance(response, Future)  # it is one where the stager returns none
        response.upload_completion.add_done_callback(
            lambda upload: self._complete(result, upload, writer, snapshots)
        )
        return result

    def wait(self, timeout: float | None = None) -> bool:
        """
        Block until all saves are finished, whatever became of them; return whether they are.

        They are not after *timeout* seconds, or where one hangs for longer than there is patience.
        """
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        return all(self._is_over(one, deadline) for one in list(self._unfinished))

    def close(self, timeout: float | None = None) -> Future[Manifest] | None:
        """
        Do what `wait` does, end the threads, and let go of the group. Nothing can be saved any more.

        Returns:
            The last save if that is not finished, which goes on and uses the group until it is.
        """
        unfinished = None if self.wait(timeout) else self._last
        # One that is held until the interpreter ends may take the process down with it.
        self._group = None
        self._stager.thread.close()
        self._forget_cache()
        return unfinished

    @property
    def _last(self) -> Future[Manifest] | None:
        return self._unfinished[-1].result if self._unfinished else None

    def _wait_for_room(self) -> None:
        """Wait for the oldest saves. If one hangs there is none: it has the memory, so the new one fails."""
        unfinished = self._unfinished
        while unfinished and (unfinished[0].result.done() or len(unfinished) >= self._max_pending):
            if not self._is_over(unfinished[0]):
                return
            unfinished.popleft()

    def _is_over(self, one: _Unfinished, deadline: float = math.inf) -> bool:
        """Wait for a save to end; return False if it hangs, or has not until *deadline*."""
        while not one.result.done():
            now = time.monotonic()
            silent = now - max(one.begun, self.last_progress)
            left = min(self._patience - silent, deadline - now)
            if left <= 0:
                return False
            wait([one.result], min(left, _LOOKS_EVERY))
        return True

    def _complete(
        self, result: Future[Manifest], upload: Future[Any], writer: ShardWriter, snapshots: _SnapshotStager
    ) -> None:
        try:
            writer.close()
            snapshots.close()
            result.set_result(_manifest_of(upload))
        except BaseException as error:  # whatever it is, somebody waits for it
            # Some ranks may have kept a plan that the others have not.
            self._forget_cache()
            self._begin_cache()
            result.set_exception(error)

    def _begin_cache(self) -> None:
        self._cache = f"trainbus-{next(_numbers)}"

    def _forget_cache(self) -> None:
        for name, kept in vars(SavePlanner).items():
            if name.startswith("_cached_") and isinstance(kept, dict):
                kept.pop(self._cache, None)


class _SnapshotStager(AsyncStager):
    """
    Our snapshot as the stager of one ``async_save``.

    Attributes:
        fail: Told what kept the state from being copied, for all ranks to hear of it.

    Args:
        stager: Copies.
        items: Where descriptions of shards are kept from save to save.
        previous: The save before, whose collectives must be over before this one's begin.
    """

    def __init__(self, stager: Stager, items: dict[str, Any], previous: Future[Manifest] | None) -> None:
        self.fail: Callable[[Exception], None] = lambda error: None
        self._stager = stager
        self._items = items
        self._previous = previous
        self._snapshot: Snapshot | None = None

    def stage(self, state_dict: dict[str, Any]) -> Future[dict[str, Any]]:
        """Copy; return what torch's ``save`` is given once the save before is over."""
        try:
            with collector.paused():
                staged = self._take(state_dict[WHOLE])
        except Exception as error:
            self.fail(error)
            staged = StagedState({}, {})
        except BaseException:  # such as Ctrl-C: nobody else would give the memory back
            self.close()
            raise
        turn: Future[dict[str, Any]] = Future()
        if self._previous is None:
            turn.set_result({WHOLE: staged})
        else:
            self._previous.add_done_callback(lambda _: turn.set_result({WHOLE: staged}))
        return turn

    def wait(self) -> None:
        """Block until the copy is complete; raises what kept it from becoming so."""
        assert self._snapshot is not None
        self._snapshot.wait()

    def synchronize_staging(self) -> None:
        """Do nothing: `stage` returns when the state may change."""

    def close(self) -> None:
        """Give the memory back. May be called again."""
        if self._snapshot is not None:
            self._snapshot.release()

    def _take(self, state: Any) -> StagedState:
        parts, flat = _own_parts(state() if callable(state) else state)
        self._snapshot = snapshot = self._stager.take((parts, flat.others))
        try:
            self._stager.begin(snapshot)
        except BaseException as error:
            # Nobody will run it, and a release waits for it.
            if snapshot.copy is not None:
                snapshot.copy.withdraw(error)
            raise
        copies, others = snapshot.state
        entries: dict[str, Any] = {**flat.values, STRUCTURE: (flat.structure, others)}
        for name, copy in copies.items():
            whole = flat.tensors[name]
            entries[name] = Shard(copy, whole, self._items) if isinstance(whole, DTensor) else copy
        return StagedState(entries, {**flat.paths, STRUCTURE: (STRUCTURE,)})


def _own_parts(state: Any) -> tuple[dict[str, torch.Tensor], FlatState]:
    """Return the tensors that this rank copies, by their names in the flat *state*, and that."""
    flat = flatten(state)
    with torch.no_grad():
        parts = {
            name: part
            for name, tensor in flat.tensors.items()
            if (part := local_part(tensor) if isinstance(tensor, DTensor) else tensor) is not None
        }
    return parts, flat


def collect_sharded(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """
    Return the state of a module and its optimizer, by names of parameters, each rank its part.

    Collective: every rank calls it. The tensors are the live ones, still to be copied. An optimizer that
    has made no step yet is given its state first, as torch does it: by a step with a rate of 0.
    """
    state: dict[str, Any] = {"module": get_model_state_dict(module)}
    if optimizer is not None:
        state["optimizer"] = get_optimizer_state_dict(module, optimizer)
    return state


def restore_sharded(
    module: torch.nn.Module, optimizer: torch.optim.Optimizer | None, state: dict[str, Any]
) -> None:
    """Do the opposite of `collect_sharded`. Collective: every rank calls it, with its own part."""
    set_model_state_dict(module, state["module"])
    if optimizer is not None:
        set_optimizer_state_dict(module, optimizer, state["optimizer"])


def _manifest_of(upload: Future[Any]) -> Manifest:
    """Return what a save came to, or raise why it failed."""
    error = upload.exception()
    if error is None:
        outcome = ShardWriter.outcome_of(upload.result())
        if isinstance(outcome, Manifest):
            return outcome
        raise outcome.error()
    # A frame that the error keeps holds the group, beyond its end here.
    traceback.clear_frames(error.__traceback__)
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        raise Failure.of(rank, cause).error() from error
    raise RankFailedError(None, f"{type(error).__name__}: {error}") from error


_numbers = itertools.count()
_LOOKS_EVERY = 1.0  # seconds between two looks at whether a save that is waited for makes progress

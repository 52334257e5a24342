"""One save on its way from live state to the writer's queue: room, snapshot, job.

The road that every save of trainbus takes, with or without a handler.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, BinaryIO, cast

import torch
from torch.profiler import record_function

from trainbus.checkpoint import collector, fence
from trainbus.checkpoint.archive import Stream, write_archive
from trainbus.checkpoint.background_copy import BackgroundCopy
from trainbus.checkpoint.background_writer import BackgroundWriter
from trainbus.checkpoint.commit import commit, require_file_name
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.snapshot import Snapshot
from trainbus.checkpoint.staging_copy import Stager
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.checkpoint.stats import LostTime, SaveTimes
from trainbus.checkpoint.temporary import Sweeper
from trainbus.checkpoint.throttle import Throttle
from trainbus.checkpoint.warm_up import WarmUp
from trainbus.checkpoint.write_behind import WriteBehind

__all__ = ["Saver"]

_log = logging.getLogger("trainbus")
WORTH_A_WORD = 0.1  # seconds


class Saver:
    """
    Copies states on the calling thread and has them written on the background one.

    Attributes:
        writer: The background writer; flush it there.
        lost: What the saves cost the threads that asked for them.

    Args:
        report: Called on the writer thread with an event's name and fields.
        max_pending: Saves that may be unfinished at once; each has host memory of its own.
        on_busy: What a save does when there are that many: ``"wait"``, ``"skip"`` or ``"replace"``.
        snapshot: ``"auto"``: copy everything before `save` returns, or aside on its device.
            ``"overlap"``: copy what only optimizers change while the next step is prepared.
        device_snapshot: Whether to copy aside: ``"auto"`` where there is room, True, False.
        check_snapshots: Compare each background copy with the values of the request.
        write_timeout: Seconds without progress after which a write counts as failed.
        is_busy: Tells whether the training needs every core now; see `Throttle`. Called on the writer thread.
    """

    def __init__(
        self,
        report: Callable[..., None],
        *,
        max_pending: int = 1,
        on_busy: str = "wait",
        snapshot: str = "auto",
        device_snapshot: str | bool = "auto",
        check_snapshots: bool = False,
        write_timeout: float = 600.0,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        if snapshot not in ("auto", "overlap"):
            raise ValueError(f"snapshot must be 'auto' or 'overlap', got {snapshot!r}.")
        self._memory = StagingMemory(max_pending)
        self._stager = Stager(self._memory, device_snapshot=device_snapshot, check=check_snapshots)
        self._behind = WriteBehind(rest=Throttle(is_busy).rest)
        self.writer = BackgroundWriter(
            report,
            max_pending=max_pending,
            on_busy=on_busy,
            helper=self._stager.thread,
            patience=write_timeout,
            last_progress=lambda: max(self._behind.last_progress, self._last_progress_elsewhere()),
        )
        self._last_progress_elsewhere: Callable[[], float] = lambda: 0.0
        self._warm_up = WarmUp(self._stager)
        self._sweeper = Sweeper()
        self.lost = LostTime()
        self._overlaps = snapshot == "overlap"
        self._lower_fence = fence.raise_fence() if self._overlaps else None
        self._last_copy: BackgroundCopy | None = None
        self._said_that_it_waited = False

    def save(
        self,
        pending: PendingSave,
        collect: Callable[[], Any],
        manifest: Callable[[], Manifest],
        *,
        removals: Sequence[str] = (),
        find_removals: Callable[[], Sequence[str]] = tuple,
        optimizers: Iterable[Any] = (),
    ) -> None:
        """
        Queue the save that *pending* stands for.

        When this returns, the state may change in any way; with *optimizers* and
        ``snapshot="overlap"``, what they own in their steps only. Blocks while the writer is full
        (see ``on_busy``) and while what cannot wait is copied.

        Args:
            pending: Learns what becomes of the save; also of a failure in here.
            collect: Called on this thread, once there is room, for the state, as `to_plain` makes it.
            manifest: Called on the writer thread, for everything the file will say of itself but
                size and digest.
            removals: Files to remove once this one is durable.
            find_removals: Called on the writer thread once it is, for more of them.
            optimizers: Those whose next step nothing but forward and backward passes comes before.

        Raises:
            ValueError: The path names a folder.
            HandlerClosedError: The writer is closed.
        """
        assert pending.path is not None and pending.absolute_path is not None
        require_file_name(pending.path)
        path = pending.absolute_path
        if not self._admit(pending):
            return
        snapshot: Snapshot | None = None
        self._memory.spill_folder = os.path.dirname(path)
        try:
            snapshot = self._take_timed(pending, collect, tuple(optimizers))
            self.writer.submit(
                pending,
                functools.partial(self._write, path, snapshot, manifest),
                removals=removals,
                find_removals=find_removals,
                release=snapshot.release,
            )
        except BaseException as error:
            if not self.writer.has_queued(pending):  # or nobody would ever finish it
                if snapshot is not None:
                    snapshot.release()
                self.writer.fail(pending, error)
            if not isinstance(error, Exception):  # Ctrl-C goes on, but later saves must not wait for this one
                raise

    def follow(
        self,
        pending: PendingSave,
        begin: Callable[[], Future[Manifest]],
        last_progress: Callable[[], float],
        *,
        removals: Sequence[str] = (),
        find_removals: Callable[[], Sequence[str]] = tuple,
    ) -> None:
        """
        Queue a save that several ranks write together, to learn what becomes of it and then remove files.

        Args:
            pending: Learns what becomes of the save.
            begin: Called on this thread: copies this rank's part, returns a future of the durable
                checkpoint. Called in any case, because the other ranks do it too.
            last_progress: When a disk last took something of this rank's part.
            removals: As for `save`.
            find_removals: As for `save`.
        """
        self._last_progress_elsewhere = last_progress
        admitted = self._admit(pending)
        begun = time.monotonic()
        try:
            future = begin()
        except BaseException as error:
            if admitted:
                self.writer.fail(pending, error)
            raise
        seconds = pending.times.copying = time.monotonic() - begun
        self.lost.copying += seconds
        if admitted:
            self.writer.submit(pending, future.result, removals=removals, find_removals=find_removals)

    def prepare(self, state: Any) -> None:
        """
        Have the host memory for a snapshot of such a *state* made in the background. Blocks for its plan.

        Without it the first save does that, which takes it several times as long as the others.
        """
        self._warm_up.begin(state)

    def close(self, timeout: float | None = None) -> None:
        """Finish what was asked for and take no more; see `BackgroundWriter.close`."""
        try:
            self.writer.close(timeout)
        finally:
            if self._lower_fence is not None:
                self._lower_fence()

    def wait_for_room(self, pending: PendingSave, timeout: float | None = None) -> bool:
        """
        Wait until *pending* would be taken at once, *timeout* seconds at most; return whether it would.

        `save` and `follow` wait by themselves; this is for who must not be silent for as long as that takes.
        """
        begun = time.monotonic()
        pending.times.taken = pending.times.taken or begun
        self._warm_up.end()
        with record_function("trainbus: wait for room"):
            has_room = self.writer.wait_for_room(timeout)
        seconds = time.monotonic() - begun
        pending.times.waiting += seconds
        self.lost.waiting += seconds
        return has_room

    def _admit(self, pending: PendingSave) -> bool:
        self.wait_for_room(pending)
        if pending.times.waiting >= WORTH_A_WORD and not self._said_that_it_waited:
            self._said_that_it_waited = True
            _log.warning(
                "A save waited %.2f s for the one before it to be written, and training with it. Save "
                "less often, let saves wait in memory (max_pending=2) or skip some (on_busy='skip').",
                pending.times.waiting,
            )
        return self.writer.admit(pending)

    def _take_timed(
        self, pending: PendingSave, collect: Callable[[], Any], optimizers: Sequence[Any]
    ) -> Snapshot:
        begun = time.monotonic()
        try:
            with record_function("trainbus: snapshot"), collector.paused():
                snapshot = self._take(collect(), optimizers, pending.times)
        finally:
            seconds = pending.times.copying = time.monotonic() - begun
            self.lost.copying += seconds
        if not self._overlaps and fence.knows(optimizers):
            self.lost.overlappable += snapshot.seconds_at_once
        return snapshot

    def _write(self, path: str, snapshot: Snapshot, manifest: Callable[[], Manifest]) -> Manifest:
        self._sweeper.sweep_once(os.path.dirname(path))
        return commit(
            path,
            manifest(),
            lambda stream: _serialize(snapshot, stream),
            behind=self._behind,
            at_least=snapshot.size,
        )

    def _take(self, state: Any, optimizers: Sequence[Any], times: SaveTimes) -> Snapshot:
        owned = fence.owned_tensors(optimizers) if optimizers and self._may_overlap() else None
        snapshot = self._stager.take(state, owned)
        copy = snapshot.copy
        if copy is None:
            return snapshot
        try:
            self._last_copy = copy
            if snapshot.waits:
                fence.hold(copy, functools.partial(self._charge, times))
            self._stager.begin(snapshot)
        except BaseException as error:
            # Steps would wait for what nobody is going to run.
            copy.withdraw(error)
            snapshot.release()
            raise
        return snapshot

    def _may_overlap(self) -> bool:
        if self._overlaps and self._last_copy is not None and self._last_copy.was_changed:
            self._overlaps = False
            _log.warning("Saves copy everything at once from now on: snapshot='overlap' is not safe here.")
        return self._overlaps and not fence.is_stepping()

    def _charge(self, times: SaveTimes, seconds: float) -> None:
        self.lost.fenced += seconds
        times.fenced += seconds
        times.fenced_at = time.monotonic() - seconds


def _serialize(snapshot: Snapshot, stream: BinaryIO) -> None:
    assert snapshot.image is not None
    if write_archive(snapshot.state, snapshot.image, cast(Stream, stream), snapshot.wait):
        return
    snapshot.wait()
    # Set on this thread, because torch's options belong to one each. Other tools check these sums.
    torch.serialization.set_crc32_options(True)
    with collector.paused():
        torch.save(snapshot.state, stream)

"""The saves that a run asks for: named, numbered, put off while gradients accumulate, handed on."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from trainbus import ranks
from trainbus.agreement import Agreement
from trainbus.checkpoint.folder import CheckpointFolder
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retention import Retention, superfluous
from trainbus.checkpoint.saver import Saver
from trainbus.claims import claim
from trainbus.errors import CheckpointSkipped, HandlerClosedError
from trainbus.loop.moments import Moments
from trainbus.loop.unread_metrics import UnreadMetrics
from trainbus.save_load import versions
from trainbus.state import rank_parts
from trainbus.state.plain_types import to_plain

if TYPE_CHECKING:
    from trainbus.divided_saves import DividedSaves
    from trainbus.handler import Handler

__all__ = ["SaveRequest", "SaveRequests"]


@dataclass(frozen=True)
class SaveRequest:
    """
    What who asks says of a save.

    Attributes:
        stream: Who it is.
        logs: The metrics at this moment.
        monitor, mode, score: By what the asker judges its files, and this one's value.
        removals: Files to remove once this one is durable.
        keep: Which files of *stream* and this run stay then; None: all.
        interrupted: Taken amid a batch that an exception ended.
        full_state: Written as one file, also where the state is divided among ranks.
    """

    stream: str = ""
    logs: Mapping[str, Any] = field(default_factory=dict)
    monitor: str | None = None
    mode: str | None = None
    score: float | None = None
    removals: Sequence[str] = ()
    keep: Retention | None = None
    interrupted: bool = False
    full_state: bool = False


@dataclass(frozen=True)
class _Accepted:
    path: str
    pending: PendingSave
    weights_only: bool
    request: SaveRequest
    metrics: UnreadMetrics


class SaveRequests:
    """
    What `Handler.save` and `save_async` do. Training thread.

    With several ranks all come here together. Each gives its part of the state, rank 0 goes on to write.
    """

    def __init__(
        self,
        handler: Handler,
        moments: Moments,
        saver: Saver,
        agreement: Agreement,
        divided: DividedSaves | None,
    ) -> None:
        self._handler = handler
        self._moments = moments
        self._progress = moments.progress
        self._saver = saver
        self._agreement = agreement
        self._divided = divided
        self._postponed: list[_Accepted] = []
        self._sequence = 0
        self._counted_folders: set[str] = set()

    @property
    def postponed(self) -> int:
        """How many saves wait for an optimizer step."""
        return len(self._postponed)

    def ask(
        self,
        path: str | os.PathLike[str],
        weights_only: bool,
        request: SaveRequest,
        *,
        postpone: bool,
    ) -> PendingSave:
        """Take a save now, or with *postpone* at the next optimizer step if gradients accumulate."""
        handler = self._handler
        handler.settle()
        target = os.path.expanduser(os.fspath(path))
        if handler.closed:
            raise HandlerClosedError(
                f"Cannot save {target!r}: this handler is closed. Save inside of `with handler:`."
            )
        if handler.rank != 0 and not self._is_shared(request):
            return PendingSave.nothing()
        claim(os.path.abspath(target), handler)
        metrics = UnreadMetrics(request.logs)
        pending = PendingSave(
            target if handler.rank == 0 else None,
            epoch=self._progress.epoch,
            global_step=self._progress.global_step,
            stream=request.stream,
            logs=metrics.known,
        )
        accepted = _Accepted(target, pending, weights_only, request, metrics)
        if self._divided is not None and ranks.together() and not self._is_shared(request):
            self._skip(
                accepted, "the state is divided among ranks, and the others may not come to give theirs"
            )
            return pending
        if postpone and self._moments.must_wait:
            self._postponed.append(accepted)
        else:
            self._take(accepted)
        return pending

    def prepare(self, *, weights_only: bool, full_state: bool) -> None:
        """Do what `Handler.prepare_saves` does."""
        is_divided = self._divided is not None
        if full_state if is_divided else self._handler.rank != 0:
            return
        # What is wrong with the state is told by the save, and on all ranks.
        with contextlib.suppress(Exception):
            given = None if weights_only else self._parts_of_all()
            state = to_plain(self._collect(weights_only, given), divided=is_divided)
            (self._divided or self._saver).prepare(state)

    def _parts_of_all(self) -> list[dict[str, Any]] | None:
        """Return what stands for all ranks' parts of a save, in as many bytes: this one's."""
        if self._handler.rank != 0 or not ranks.together():
            return None
        return [rank_parts.give(self._moments.collect())] * ranks.world_size()

    def take_postponed(self) -> None:
        """Take the saves that waited for an optimizer step."""
        while self._postponed:
            accepted = self._postponed.pop(0)
            try:
                self._take(accepted)
            except BaseException as error:
                # Ctrl-C while it waits for room: nobody else would finish what its asker may wait for.
                if not accepted.pending.done() and accepted.pending not in self._saver.writer.unfinished:
                    self._skip(accepted, f"{type(error).__name__} came while it was taken")
                raise

    def skip_postponed(self, reason: str) -> None:
        """Give up the saves that waited for an optimizer step that will not come."""
        while self._postponed:
            self._skip(self._postponed.pop(0), reason)

    def _skip(self, accepted: _Accepted, reason: str) -> None:
        pending = accepted.pending
        self._handler.bus.post(
            "checkpoint_skipped",
            save=pending,
            path=pending.path,
            reason=reason,
            stream=pending.stream,
            epoch=pending.epoch,
            global_step=pending.global_step,
            logs=pending.logs,
        )
        pending.fail(CheckpointSkipped(pending.path or "", reason))

    def _is_shared(self, request: SaveRequest) -> bool:
        """Tell whether all ranks ask for this save; amid an exception nobody knows if the others come."""
        return self._agreement.is_shared and not request.interrupted

    def _take(self, accepted: _Accepted) -> None:
        given = None
        if self._is_shared(accepted.request):
            part = {} if accepted.weights_only else rank_parts.give(self._moments.collect())
            given = self._agreement.give(part, functools.partial(self._saver.wait_for_room, accepted.pending))
            self._agreement.expect(accepted.pending)
        if self._divided is not None and not accepted.request.full_state:
            self._write_together(accepted, given, self._divided)
        else:
            state = self._whole_state(accepted, given)
            if self._handler.rank == 0:
                self._write(accepted, state)
        if self._handler.rank != 0:
            accepted.pending.finish_elsewhere()

    def _write(self, accepted: _Accepted, state: Callable[[], Any]) -> None:
        pending, request = accepted.pending, accepted.request
        collect, manifest = self._described(accepted, state)
        self._saver.save(
            pending,
            collect,
            manifest,
            removals=request.removals,
            find_removals=self._retention(pending, request.keep),
            optimizers=self._moments.optimizers_before_step,
        )

    def _write_together(
        self, accepted: _Accepted, given: list[dict[str, Any]] | None, divided: DividedSaves
    ) -> None:
        pending, request = accepted.pending, accepted.request

        def state() -> Any:
            return to_plain(self._collect(accepted.weights_only, given), divided=True)

        if self._handler.rank != 0:
            divided.save(accepted.path, state, _unasked)
            return
        collect, manifest = self._described(accepted, state)
        self._saver.follow(
            pending,
            lambda: divided.save(accepted.path, collect, manifest),
            lambda: divided.last_progress,
            removals=request.removals,
            find_removals=self._retention(pending, request.keep),
        )

    def _whole_state(self, accepted: _Accepted, given: list[dict[str, Any]] | None) -> Callable[[], Any]:
        """Return what gives the state to write to one file, on rank 0. Collective where it is divided."""
        if self._divided is None:
            return lambda: to_plain(self._collect(accepted.weights_only, given))
        from trainbus.divided_saves import gathered

        return gathered(lambda: self._collect(accepted.weights_only, given))

    def _collect(self, weights_only: bool, given: list[dict[str, Any]] | None) -> Any:
        collected = self._handler.collect(weights_only)
        if self._handler.rank == 0 and ranks.together() and not weights_only:
            collected[rank_parts.KEY] = rank_parts.together(given, ranks.world_size())
        return collected

    def _described(
        self, accepted: _Accepted, state: Callable[[], Any]
    ) -> tuple[Callable[[], Any], Callable[[], Manifest]]:
        """Return what gives the state, or raises what is wrong already, and what says of which moment."""
        described: Manifest | Exception
        try:
            described = self._describe(accepted)
        except Exception as error:  # not here, where several ranks would be left by one of them
            described = error

        def collect() -> Any:
            if isinstance(described, Exception):
                raise described
            return state()

        def manifest() -> Manifest:
            assert isinstance(described, Manifest)
            # On the writer thread: the training one must not wait for a device to compute the metrics.
            accepted.pending.logs = accepted.metrics.read()
            return replace(described, logs=dict(accepted.pending.logs))

        return collect, manifest

    def _describe(self, accepted: _Accepted) -> Manifest:
        handler, pending, request = self._handler, accepted.pending, accepted.request
        # An open batch in which the optimizer stepped counts already, so this may be one ahead.
        pending.global_step = self._progress.state_dict()["global_step"]
        return Manifest(
            contents="weights" if accepted.weights_only else "state",
            run_id=handler.run_id,
            parents=handler.lineage,
            left_at=tuple(handler.left_at[run] for run in handler.lineage),
            stream=pending.stream,
            sequence=self._next_sequence(pending.path or ""),
            epoch=pending.epoch,
            global_step=pending.global_step,
            monitor=request.monitor,
            mode=request.mode,
            score=request.score,
            created=time.time(),
            config=handler.config,
            interrupted=request.interrupted,
            versions=versions(),
        )

    def _retention(self, pending: PendingSave, keep: Retention | None) -> Callable[[], Sequence[str]]:
        """Return what looks, once *pending* is durable, for files that need not stay any more."""
        if keep is None:
            return tuple
        folder = os.path.dirname(os.path.abspath(pending.path or ""))
        runs = {self._handler.run_id, *self._handler.lineage}
        left_at = dict(self._handler.left_at)
        left_at.pop(self._handler.run_id, None)  # it went back itself, and goes on

        def find() -> list[str]:
            # What is there says what is superfluous: not what was asked for, of which some may have failed.
            mine = [
                file
                for file in CheckpointFolder(folder)
                if file.manifest.stream == pending.stream and file.manifest.run_id in runs
            ]
            return superfluous(mine, keep, left_at)

        return find

    def _next_sequence(self, path: str) -> int:
        folder = os.path.dirname(os.path.abspath(path))
        if folder not in self._counted_folders:
            self._sequence = max(self._sequence, CheckpointFolder(folder).greatest_sequence())
            self._counted_folders.add(folder)
        self._sequence += 1
        return self._sequence


def _unasked() -> Manifest:
    raise AssertionError("rank 0 alone says what a checkpoint is")

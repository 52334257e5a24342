"""The part of a `Handler` that saves: what it offers, on which ranks, and who waits for whom."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trainbus.agreement import Agreement
from trainbus.bus import EventBus
from trainbus.checkpoint import fence
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retention import Retention
from trainbus.checkpoint.stats import CheckpointStats
from trainbus.errors import CheckpointWriteError, UnsavableStateError
from trainbus.reserved_names import ReservedNames
from trainbus.run_position import RunPosition
from trainbus.save_reports import SaveReports
from trainbus.save_requests import SaveRequest
from trainbus.state.collect import Parts, collect, collect_weights
from trainbus.state.plain_types import find_problems

if TYPE_CHECKING:
    from trainbus.divided_saves import DividedSaves

__all__ = ["RunSaving"]

logger = logging.getLogger("trainbus")


class RunSaving(RunPosition):
    """What `Handler` does about checkpoints, but for loading them."""

    bus: EventBus
    _agreement: Agreement
    _reports: SaveReports
    _divided: DividedSaves | None
    _names: ReservedNames

    def _parts(self) -> Parts:
        raise NotImplementedError

    def save(
        self, path: str | os.PathLike[str], *, weights_only: bool = False, full_state: bool = False
    ) -> Manifest | None:
        """
        Collective when more than one rank runs: all call it. Save the run and return when it is durable.

        Taken at once, also while accumulating. Rank 0 writes, to its *path*, and all wait for its disk; a
        state that is divided among ranks all of them write, see `save_async`.

        Args:
            path: As for `save_async`.
            weights_only: Save only the module's ``state_dict()``.
            full_state: As for `save_async`.

        Returns:
            The file's manifest, on every rank; None on a rank other than 0 that has no process group.

        Raises:
            CheckpointWriteError: If the state could not be saved or the disk refused; on every rank.
            CheckpointSkipped: If the writer was busy and ``on_busy`` is not ``"wait"``; on every rank.
            RankError: If not all ranks call it.
        """
        if self.accumulating and self._moments.optimizer_steps.has_gradients():
            logger.warning(
                "%s is saved between two optimizer steps: the gradients accumulated so far are not in it. "
                "Use save_async(), which waits for the next step.",
                os.fspath(path),
            )
        request = SaveRequest(full_state=full_state)
        return self._agreement.result(self._saves.ask(path, weights_only, request, postpone=False))

    def save_async(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        stream: str = "",
        logs: Mapping[str, Any] | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        score: float | None = None,
        removals: Sequence[str] = (),
        keep: Retention | None = None,
        interrupted: bool = False,
        full_state: bool = False,
    ) -> PendingSave:
        """
        Collective when more than one rank runs: all call it. Copy the state now, have it written later.

        Blocks while the state is copied, and before that while ``max_pending`` saves are unfinished.
        Afterwards the state may change in any way (but see ``snapshot="overlap"``). In a batch in which no
        optimizer stepped (gradient accumulation) it is copied once one does, or at the epoch's end.

        Rank 0 writes, to its *path*, what it holds and the random state and data position of every rank,
        which the others give when they call this. What becomes of the save they all hear at the same event.
        Where the module's parameters are divided among ranks (``fully_shard``, any `DTensor`), each rank
        writes its part, to the same *path*, which becomes a folder; it is copied at once, also with
        ``snapshot="overlap"``.

        Args:
            path: Missing folders are made, ``~`` is expanded.
            weights_only: Save only the module's ``state_dict()``.
            stream: Who asks; callbacks give their ``state_key``.
            logs: Metrics for the manifest; numbers are kept.
            monitor: The metric by which *stream* judges its files.
            mode: ``"min"`` or ``"max"``.
            score: The monitored metric's value.
            removals: Files to remove once this one is durable.
            keep: Which of the files of *stream* and this run (and those it continues) stay then, by
                what is in the folder; the others are removed on the writer thread. Links and copies stay.
            interrupted: Mark the file as saved amid a batch that an exception ended. It is taken at once,
                also while gradients accumulate, and `resume` passes it over unless it is asked for. Not
                collective: rank 0 writes what it has, for the others may never come; a divided state is
                not saved.
            full_state: Make a divided state whole and write it as one file. Collective at once: each
                rank sends its part, and rank 0 has all of it in memory.

        Returns:
            A handle on the save; finished, with ``path=None``, on ranks other than 0.

        Raises:
            RankError: If not all ranks call it.
        """
        request = SaveRequest(
            stream, logs or {}, monitor, mode, score, removals, keep, interrupted, full_state
        )
        return self._saves.ask(path, weights_only, request, postpone=not interrupted)

    def check(self) -> None:
        """
        Raise now if something of this run's state could be saved and not loaded again.

        Called by itself at ``train_begin``.

        Raises:
            UnsavableStateError: Naming each place in the state, with the remedy.
        """
        problems = find_problems(self.collect(weights_only=False), divided=self._divided is not None)
        if problems:
            raise UnsavableStateError(problems)

    def prepare_saves(self, *, weights_only: bool = False, full_state: bool = False) -> None:
        """
        Have the host memory for saves made in the background, so that the first is as fast as the others.

        It is page-locked too, where the state lies on CUDA devices; their work goes on meanwhile.

        Call it after the first optimizer step, when the state has its size; `ModelCheckpoint` does. Not
        collective: rank 0 prepares, and each rank where the state is divided among them.

        Args:
            weights_only: As the saves will be.
            full_state: As the saves will be; whole files of a divided state are not prepared.
        """
        self._saves.prepare(weights_only=weights_only, full_state=full_state)

    def keep_batch_starts(self) -> None:
        """
        Keep the random state from before each batch, from the next one on; `OnException` does.

        A save in the body of a batch that has not changed the weights stands at that batch's beginning,
        and with this its random numbers do too. Takes about 50 microseconds a batch.
        """
        self._moments.keep_batch_starts()

    def reserve(self, folder: str | os.PathLike[str], template: str) -> None:
        """
        Keep other processes from saving under this name template, until `close`; `ModelCheckpoint` does.

        Takes an advisory lock on a hidden file in *folder*, which is made if missing. An earlier handler
        of this process that has it is closed. Collective when more than one rank runs: rank 0 takes it.

        Raises:
            CheckpointLockedError: Another process has it; says which, on which host and since when.
            CheckpointWriteError: Nothing can be written there, and ``on_write_error`` is ``"raise"``.
        """
        if self.rank != 0 and not self._agreement.is_shared:
            return
        try:
            self._names.reserve(os.fspath(folder), template, together=self._agreement.is_shared)
        except CheckpointWriteError as error:
            self._reports.tell(error)

    def fence(self) -> None:
        """Return when weights may be changed by hand under ``snapshot="overlap"``. Waits for copies only."""
        fence.wait()

    def flush(self) -> None:
        """
        Wait until all saves asked for are durable, and deliver their events. Raises a failed one.

        Collective when more than one rank runs and a save was asked for.
        """
        self._loop.settle()
        self.finish_writing()
        self.bus.drain()

    def checkpoint_stats(self) -> CheckpointStats:
        """Return what this run's saves cost so far; events not yet delivered are not in it."""
        return self._reports.stats_with(self._saver.lost)

    def finish_writing(self, timeout: float | None = None) -> None:
        """
        Wait until the writer has nothing left to do; failures are delivered with the next event.

        Collective when more than one rank runs and a save was asked for.

        Raises:
            TimeoutError: It took longer than *timeout* seconds. The writer goes on.
        """
        self._agreement.finish(self._saver.writer.flush, timeout)

    def take_postponed_saves(self) -> None:
        """Take the saves that waited for an optimizer step."""
        self._saves.take_postponed()

    def collect(self, weights_only: bool) -> Any:
        """Return the state to save, with live tensors in it."""
        parts = self._parts() if self._divided is None else self._divided.parts(self._parts())
        if weights_only:
            return collect_weights(parts)
        return collect(parts, **self._moments.collect())

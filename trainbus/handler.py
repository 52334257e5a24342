"""Handler: owns a run's module, optimizer and bus; saves and loads it; delegates everything else."""

from __future__ import annotations

import logging
import math
import os
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from trainbus.bus import EventBus
from trainbus.callback import Callback, add_to
from trainbus.checkpoint import fence
from trainbus.checkpoint.file_format import Manifest, fit_manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retention import Retention
from trainbus.checkpoint.saver import Saver
from trainbus.checkpoint.stats import CheckpointStats
from trainbus.errors import CheckpointWriteError, UnsavableStateError
from trainbus.leaving import announce_and_leave, note_failures, raise_held_back
from trainbus.loading import load_newest, read_state
from trainbus.loop.fit import fit
from trainbus.loop.generators import Loop
from trainbus.loop.moments import Moments
from trainbus.run_position import RunPosition
from trainbus.save_reports import SaveReports, weak_post
from trainbus.save_requests import SaveRequest, SaveRequests
from trainbus.state.collect import Parts, check_parts, collect, collect_weights, restore
from trainbus.state.plain_types import find_problems
from trainbus.unwrap import unwrap

__all__ = ["Handler"]

T = TypeVar("T")
C = TypeVar("C", bound=Callback)

logger = logging.getLogger("trainbus")


class Handler(RunPosition):
    """
    One training run: what it trains, the bus it speaks on, and its checkpoints.

    Everything here is called on the training thread, the one that owns the bus. Use it as a
    context manager: its exit finishes pending saves and announces an exception.

    Args:
        module: A ``torch.nn.Module``, or a dict of them by name. DDP and ``torch.compile``
            wrappers are seen through.
        optimizer, scheduler:
            One, or a dict by name. A learning-rate scheduler is stepped by you, or by `fit`.
        scaler: A ``torch.amp.GradScaler``.
        extra: More to save, by name: anything with ``state_dict`` and ``load_state_dict``.
        config: JSON values that go into each file's manifest, e.g. hyper-parameters.
        bus: The bus to speak on; a new one by default.
        max_pending: Saves that may be unfinished at once, each with a copy of the state in
            host memory.
        on_busy: What a save does when that many are unfinished: ``"wait"`` for one to end,
            ``"skip"`` itself, or ``"replace"`` the one that has not begun (``max_pending=2``).
        snapshot: ``"auto"``: when a save returns, the state may change in any way. ``"overlap"``: your
            promise that weights change in ``Optimizer.step`` alone; what a ``train_batch_end``
            receiver saves of them is then copied during the next batch, and its step waits for it.
        device_snapshot: Copy CUDA tensors on their device first and to the host in the background:
            ``"auto"`` where a tenth of its memory stays free, True, or False.
        check_snapshots: Compare what is copied in the background with a copy made at once, and name
            what something else than an optimizer changed; for trying out ``"overlap"``.
        on_write_error: ``"raise"`` a failed save at the next event, or ``"warn"`` only.
        write_timeout: Seconds in which the disk may take no byte of a file before the save counts as
            failed; whoever waits for it goes on.
    """

    def __init__(
        self,
        module: Any,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        scaler: Any = None,
        extra: Mapping[str, Any] | None = None,
        config: Any = None,
        bus: EventBus | None = None,
        max_pending: int = 1,
        on_busy: str = "wait",
        snapshot: str = "auto",
        device_snapshot: str | bool = "auto",
        check_snapshots: bool = False,
        on_write_error: str = "raise",
        write_timeout: float = 600.0,
    ) -> None:
        fit_manifest(Manifest(contents="state", config=config))  # refuses what would not fit into one
        if on_write_error not in ("raise", "warn"):
            raise ValueError(f"on_write_error must be 'raise' or 'warn', got {on_write_error!r}.")
        self.model = module
        self.module = unwrap(module)
        self.scheduler = scheduler
        self.scaler = scaler
        self.extra = dict(extra or {})
        self.config = config
        self.callbacks: dict[str, Callback] = {}
        self._unclaimed: dict[str, Any] = {}  # states that were loaded for callbacks not yet added
        self.closed = False
        self.resumed = False
        self.stopped = False
        self.stop_reason: str | None = None
        self.run_id = uuid.uuid4().hex
        self.lineage: tuple[str, ...] = ()
        self._moments = Moments(self)
        self.optimizer = optimizer
        self._loop = Loop(self, self._moments)
        check_parts(self._parts())
        self.bus = self._take_bus(bus if bus is not None else EventBus())
        self._saver = Saver(
            weak_post(self.bus),
            max_pending=max_pending,
            on_busy=on_busy,
            snapshot=snapshot,
            device_snapshot=device_snapshot,
            check_snapshots=check_snapshots,
            write_timeout=write_timeout,
        )
        self._saves = SaveRequests(self, self._moments, self._saver)
        self._reports = SaveReports(self.bus, raises=on_write_error == "raise")
        self._undo = [
            self.bus.on("train_begin", self._begin, priority=-math.inf).cancel,
            self.bus.on(
                "train_end", lambda: self._reports.log_summary(self._saver.lost), priority=math.inf
            ).cancel,
            *self._reports.undo,
        ]

    @property
    def optimizer(self) -> Any:
        """The optimizer, a dict of them, or None. May be replaced; the new one's steps are seen."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._moments.watch(optimizer)

    # -- events

    def add_callback(self, callback: C) -> C:
        """Attach *callback*, save its state with the run's, give it what was loaded for it; return it."""
        key = add_to(self.callbacks, callback, self.bus)
        if key in self._unclaimed:
            callback.load_state_dict(self._unclaimed.pop(key))
        return callback

    def on(self, name: str, fn: Callable[..., Any] | None = None, **options: Any) -> Any:
        """Subscribe to an event of this run; see `EventBus.on`."""
        return self.bus.on(name, fn, **options)

    def emit(self, name: str, /, **payload: Any) -> None:
        """
        Emit an event from this run; for loops without the generators. The counters follow.

        ``emit("epoch_end", epoch=e)`` completes epoch *e*; ``emit("train_batch_end")`` counts a batch.
        """
        moment = self._moments.by_event.get(name)
        if moment is not None:
            moment(**payload)
        else:
            self.bus.emit(name, self, **payload)

    def log(self, *, weight: Any = None, **scalars: Any) -> None:
        """
        Record metrics: numbers, or tensors with one element on any device. Never waits for a device.

        In the body of a batch they belong to that batch and are averaged over its epoch; in
        `val_batches` they are named ``val_<name>``. Elsewhere they belong to the epoch, as given.

        Args:
            weight: Of this batch in the average, a number or a tensor with one element; by default
                the first dimension of the batch's first tensor.
            **scalars: The metrics by name.
        """
        self._loop.settle()
        self._moments.log(scalars, weight)

    def stop(self, reason: str = "stop() was called") -> None:
        """End the loops before their next batch, or while gradients accumulate after the next step."""
        self.stopped = True
        self.stop_reason = reason

    # -- loops

    def epochs(self, n: int) -> Iterator[int]:
        """
        Hand out the epochs 0 … n-1, those already done excepted, and emit around them.

        Args:
            n: The run's total, so that a finished run yields nothing.
        """
        return self._loop.epochs(n)

    def batches(self, loader: Iterable[T]) -> Iterator[T]:
        """
        Hand out *loader*'s batches and emit around them; after a resume, those still to come.

        A batch left by ``break`` counts if an optimizer stepped since it was handed out; its
        ``train_batch_end`` is emitted by the next call into this handler.
        """
        return self._loop.batches(loader)

    def val_batches(self, loader: Iterable[T]) -> Iterator[T]:
        """Hand out *loader*'s batches, emit ``val_*`` around them; modes and gradients are yours to set."""
        return self._loop.val_batches(loader)

    def steps(self, n: int, loader: Iterable[T]) -> Iterator[T]:
        """
        Hand out batches, round and round *loader*; each round is an epoch.

        Args:
            n: The run's total of training batches, so that a finished run yields nothing.
            loader: Anything that can be iterated over again and again.
        """
        return self._loop.steps(n, loader)

    fit = fit

    # -- saving

    def save(self, path: str | os.PathLike[str], *, weights_only: bool = False) -> Manifest | None:
        """
        Save the run to *path* and return when it is durable. Taken at once, also while accumulating.

        Returns:
            The file's manifest; None on ranks other than 0, which write nothing.

        Raises:
            CheckpointWriteError: If the state could not be saved or the disk refused.
            CheckpointSkipped: If the writer was busy and ``on_busy`` is not ``"wait"``.
        """
        if self.accumulating and self._moments.optimizer_steps.has_gradients():
            logger.warning(
                "%s is saved between two optimizer steps: the gradients accumulated so far are not in it. "
                "Use save_async(), which waits for the next step.",
                os.fspath(path),
            )
        return self._saves.ask(path, weights_only, SaveRequest(), postpone=False).result()

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
    ) -> PendingSave:
        """
        Copy the state now, have it written in the background.

        Blocks while the state is copied, and before that while ``max_pending`` saves are unfinished.
        Afterwards the state may change in any way (but see ``snapshot="overlap"``). In a batch in which no
        optimizer stepped (gradient accumulation) it is copied once one does, or at the epoch's end.

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
                what is in the folder; the others are removed on the writer thread.
            interrupted: Mark the file as saved amid a batch that an exception ended. It is taken at once,
                also while gradients accumulate, and `resume` passes it over unless it is asked for.

        Returns:
            A handle on the save; finished, with ``path=None``, on ranks other than 0.
        """
        request = SaveRequest(stream, logs or {}, monitor, mode, score, removals, keep, interrupted)
        return self._saves.ask(path, weights_only, request, postpone=not interrupted)

    def check(self) -> None:
        """
        Raise now if something of this run's state could be saved and not loaded again.

        Called by itself at ``train_begin``.

        Raises:
            UnsavableStateError: Naming each place in the state, with the remedy.
        """
        problems = find_problems(self.collect(weights_only=False))
        if problems:
            raise UnsavableStateError(problems)

    def prepare_saves(self, *, weights_only: bool = False) -> None:
        """
        Have the host memory for saves made in the background, so that the first is as fast as the others.

        Call it after the first optimizer step, when the state has its size; `ModelCheckpoint` does.
        """
        if self.rank == 0:
            self._saver.prepare(lambda: self.collect(weights_only))

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
        of this process that has it is closed. Does nothing on ranks other than 0.

        Raises:
            CheckpointLockedError: Another process has it; says which, on which host and since when.
            CheckpointWriteError: Nothing can be written there, and ``on_write_error`` is ``"raise"``.
        """
        if self.rank != 0:
            return
        try:
            self._saves.reserve(os.fspath(folder), template)
        except CheckpointWriteError as error:
            self._reports.tell(error)

    def fence(self) -> None:
        """Return when weights may be changed by hand under ``snapshot="overlap"``. Waits for copies only."""
        fence.wait()

    def flush(self) -> None:
        """Wait until all saves asked for are durable, and deliver their events. Raises a failed one."""
        self._loop.settle()
        self.finish_writing()
        self.bus.drain()

    def checkpoint_stats(self) -> CheckpointStats:
        """Return what this run's saves cost so far; events not yet delivered are not in it."""
        return self._reports.stats_with(self._saver.lost)

    # -- loading

    def load(
        self, path: str | os.PathLike[str], *, only: Collection[str] | None = None, strict: bool = True
    ) -> Manifest | None:
        """
        Load a checkpoint into this run's objects; first finishes a pending save of that file.

        Args:
            path: A file of this class, or a module's state dict saved by anything.
            only: Top-level parts to load, out of ``module, optimizer, scheduler, scaler, extra,
                callbacks, progress, rng, data``. ``("module",)`` is the warm start.
            strict: Refuse what does not fit, in the module's names too.

        Returns:
            The file's manifest, None if it has none.

        Raises:
            CheckpointCorruptError: If the file is damaged; nothing has been changed.
            StateMismatchError: If file and run have different parts.
        """
        loaded = read_state(path, only)
        self.fence()
        restore(self._parts(), loaded.state, loaded.wanted, strict)
        if "callbacks" in loaded.wanted:
            states = loaded.state["callbacks"] or {}
            self._unclaimed = {key: state for key, state in states.items() if key not in self.callbacks}
        if "progress" in loaded.wanted:
            self._loop.reset()
        self._moments.restore(loaded.state, loaded.wanted)
        if "progress" in loaded.wanted:
            self.resumed = True
            if loaded.manifest is not None:
                self.lineage = (*loaded.manifest.parents, loaded.manifest.run_id)
        return loaded.manifest

    def resume(self, folder: str | os.PathLike[str], *, interrupted: bool = False) -> Manifest | None:
        """
        Load the newest valid checkpoint in *folder*; damaged ones are named and passed over.

        Args:
            folder: Where to look.
            interrupted: Take one that `OnException` has saved too, if it is the newest.

        Returns:
            Its manifest, or None if there is nothing to resume from: a first run goes on
            from the start with the same script.
        """
        return load_newest(folder, self.load, interrupted=interrupted)

    # -- leaving

    def close(self, timeout: float | None = None) -> None:
        """
        Finish pending saves, deliver their events, leave the bus. Afterwards nothing can be saved.

        Args:
            timeout: Seconds to wait for the writer; None waits as long as it takes.

        Raises:
            CheckpointWriteError: If a save failed and nobody has seen it.
            TimeoutError: If the writer was not done, naming the saves.
        """
        if self.closed:
            return
        self.closed = True
        self._saves.skip_postponed("the handler was closed before the next optimizer step")
        try:
            self._saver.close(timeout)
            raise_held_back(self.bus)
        finally:
            self._saves.release_names()
            self._leave_bus()

    def __enter__(self) -> Handler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._loop.interrupt()
            self._saves.skip_postponed("the loop was left by an exception before the next optimizer step")
            end_training = [self._moments.end_training] if self._moments.training else []
            announce_and_leave(error, self, [self.finish_writing, *end_training, self.close])
            return
        try:
            self._loop.settle()
            if self._moments.training:
                self._moments.end_training()
        except BaseException as late:
            note_failures(late, self.bus, self.close)
            raise
        self.close()

    def __repr__(self) -> str:
        place = f"epoch {self.epoch}, global step {self.global_step}"
        return f"<Handler of {type(self.module).__name__} at {place}{', closed' if self.closed else ''}>"

    # -- for the loop and the saves

    def settle(self) -> None:
        """Finish a batch or validation that the loop body left by ``break``."""
        self._loop.settle()

    def finish_writing(self, timeout: float | None = None) -> None:
        """
        Wait until the writer has nothing left to do; failures are delivered with the next event.

        Raises:
            TimeoutError: It took longer than *timeout* seconds. The writer goes on.
        """
        self._saver.writer.flush(timeout)

    def take_postponed_saves(self) -> None:
        """Take the saves that waited for an optimizer step."""
        self._saves.take_postponed()

    def collect(self, weights_only: bool) -> Any:
        """Return the state to save, with live tensors in it."""
        if weights_only:
            return collect_weights(self._parts())
        return collect(self._parts(), **self._moments.collect())

    # -- inside

    def _parts(self) -> Parts:
        return Parts(
            self.module, self.optimizer, self.scheduler, self.scaler, self.extra, dict(self.callbacks)
        )

    def _take_bus(self, bus: EventBus) -> EventBus:
        other = bus.handler
        if isinstance(other, Handler) and not other.closed:
            logger.warning("The bus is now used by a new handler; the earlier one is closed.")
            other.close()
        bus.handler = self
        return bus

    def _begin(self) -> None:
        self.check()
        for key in self._unclaimed:
            logger.warning("Not used: the checkpoint's state of callback %r, which this run has not.", key)

    def _leave_bus(self) -> None:
        for callback in self.callbacks.values():
            callback.detach()
        self._moments.optimizer_steps.stop()
        for undo in self._undo:
            undo()
        if self.bus.handler is self:
            self.bus.handler = None

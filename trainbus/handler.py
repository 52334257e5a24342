"""Handler: owns a run's module, optimizer and bus; delegates everything else."""

from __future__ import annotations

import logging
import math
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from trainbus import ranks
from trainbus.agreement import Agreement
from trainbus.bus import EventBus
from trainbus.callback import Callback, add_to
from trainbus.checkpoint.manifest import Manifest, fit_manifest
from trainbus.checkpoint.saver import Saver
from trainbus.leaving import announce_and_leave, note_failures, raise_held_back
from trainbus.loop.fit import fit
from trainbus.loop.generators import Loop
from trainbus.loop.moments import Moments
from trainbus.reserved_names import ReservedNames
from trainbus.run_loading import RunLoading
from trainbus.save_reports import SaveReports, weak_post
from trainbus.save_requests import SaveRequests
from trainbus.state.collect import Parts, check_parts
from trainbus.state.split_state import is_divided
from trainbus.unwrap import unwrap

if TYPE_CHECKING:
    from trainbus.divided_saves import DividedSaves

__all__ = ["Handler"]

T = TypeVar("T")
C = TypeVar("C", bound=Callback)

logger = logging.getLogger("trainbus")


class Handler(RunLoading):
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
            ``"skip"`` itself, or ``"replace"`` the one that has not begun (``max_pending=2``). Where
            the module is divided among ranks (``fully_shard``), only ``"wait"``.
        snapshot: ``"auto"``: when a save returns, the state may change in any way. ``"overlap"``: your
            promise that weights change in ``Optimizer.step`` alone; what a ``train_batch_end``
            receiver saves of them is then copied during the next batch, and its step waits for it.
        device_snapshot: Copy CUDA tensors on their device first and to the host in the background:
            ``"auto"`` where a tenth of its memory stays free, True, or False.
        check_snapshots: Compare what is copied in the background with a copy made at once, and name
            what something else than an optimizer changed; for trying out ``"overlap"``.
        on_write_error: ``"raise"`` a failed save at the next event, or ``"warn"`` only.
        write_timeout: Seconds in which the disk may take no byte of a file before the save counts as
            failed; whoever waits for it goes on. Ranks that have written their part of a divided
            state wait as long for the others, and no less than *rank_timeout*.
        rank_timeout: Seconds that a rank waits for the others where they meet: as a handler is made, behind
            each batch and epoch, and in what is said to be collective.

    Attributes:
        model: What was given as *module*, wrappers included: for the forward pass.
        module: The same without wrappers: whose ``state_dict()`` is saved.
        scheduler, scaler, extra, config, bus: As given; *bus* is there in any case.
        callbacks: Those added, by the key of their state in a file.
        run_id: Of this process's run, 32 hex digits; stands in each manifest.
        lineage: Ids of the runs that this one was resumed from, oldest first.
        left_at: Where each of them was left, by its id: epoch and global step of the file that was loaded.
        resumed: Whether progress was loaded.
        stopped: Whether `stop` was called, ``stop_reason`` with what.
        closed: Whether `close` was called; nothing can be saved then.

    Raises:
        TypeError: If a part has no state to save, stands in the place of another, or its state is not all
            on this rank.
        ValueError: If an option is out of its range.
        RankError: If not all ranks make a handler.
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
        rank_timeout: float = ranks.TIMEOUT,
    ) -> None:
        fit_manifest(Manifest(contents="state", config=config))  # refuses what would not fit into one
        if on_write_error not in ("raise", "warn"):
            raise ValueError(f"on_write_error must be 'raise' or 'warn', got {on_write_error!r}.")
        if not rank_timeout > 0:
            raise ValueError(f"rank_timeout must be more than 0 seconds, got {rank_timeout!r}.")
        self.model = module
        self.module = unwrap(module)
        self.scheduler = scheduler
        self.scaler = scaler
        self.extra = _by_name(extra)
        self.config = config
        self.callbacks: dict[str, Callback] = {}
        self._unclaimed = {}
        self.closed = False
        self.resumed = False
        self.stopped = False
        self.stop_reason: str | None = None
        self.run_id = uuid.uuid4().hex
        self.lineage: tuple[str, ...] = ()
        self.left_at: dict[str, tuple[int, int]] = {}
        self._moments = Moments(self)
        self._optimizer = optimizer
        self._loop = Loop(self, self._moments)
        check_parts(self._parts())
        self.bus = bus if bus is not None else EventBus()
        self._close_earlier()
        ranks.join(rank_timeout)
        self._agreement = Agreement(weak_post(self.bus), self._stop_here)
        self._saver = Saver(
            weak_post(self._agreement),
            max_pending=max_pending,
            on_busy=on_busy,
            snapshot=snapshot,
            device_snapshot=device_snapshot,
            check_snapshots=check_snapshots,
            write_timeout=write_timeout,
            is_busy=self._moments.progress.is_stepping,
        )
        try:
            self._divided = self._join_divided(
                max_pending=max_pending,
                on_busy=on_busy,
                device_snapshot=device_snapshot,
                patience=max(write_timeout, rank_timeout),
                is_busy=self._moments.progress.is_stepping,
            )
        except BaseException:
            self._saver.close()
            raise
        self._saves = SaveRequests(self, self._moments, self._saver, self._agreement, self._divided)
        self._names = ReservedNames(self)
        # Last, because all before may refuse: no half-made handler stays on the bus and the optimizer.
        self.bus.handler = self
        self._moments.watch(optimizer)
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
        """
        End the loops before their next batch, or while gradients accumulate after the next step.

        Any rank may call it, and all end at the same step: where they meet next, which is behind the batch
        or the epoch at hand.
        """
        self._agreement.stop(reason)

    def tell(self, key: str, value: Any) -> None:
        """
        Let all ranks hear *value* (anything that can be pickled); for what comes to one, such as a signal.

        Alone it is heard at once, among several ranks behind the batch or epoch at hand.
        """
        self._agreement.tell(key, value)

    def heard(self, key: str) -> list[Any]:
        """Return what was told under *key* and not heard yet: the same on all ranks, in order of rank."""
        return self._agreement.heard(key)

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
        """
        Hand out *loader*'s batches, emit ``val_*`` around them; modes and gradients are yours to set.

        A run that is resumed behind a validation of its epoch gets no batches of that one again. Before
        and after the training, as for the test of a loaded checkpoint, all batches are handed out.
        """
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

    # -- leaving

    def close(self, timeout: float | None = None) -> None:
        """
        Finish pending saves, deliver their events, leave the bus. Afterwards nothing can be saved.

        Collective when more than one rank runs and a save was asked for.

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
            try:
                if self._agreement.is_shared:
                    self.finish_writing(timeout)
            finally:
                self._close_savers(timeout)
            raise_held_back(self.bus)
        finally:
            self._names.release()
            self._leave_bus()

    def __enter__(self) -> Handler:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._agreement.leave()
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
            self._agreement.leave()
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

    def meet(self, what: str) -> None:
        """Let take effect what the ranks have to tell each other. Collective; *what* names the place."""
        self._agreement.meet(what)

    # -- inside

    def _join_divided(self, **options: Any) -> DividedSaves | None:
        """Return what saves a state that is divided among ranks, None for others. Collective."""
        if not ranks.connected() or not is_divided(self.module):
            return None
        # Here, because it takes a second that only divided states are worth.
        from trainbus.divided_saves import DividedSaves

        return DividedSaves(**options)

    def _close_savers(self, timeout: float | None) -> None:
        begun = time.monotonic()
        try:
            self._saver.close(timeout)
        finally:
            if self._divided is not None:
                left = None if timeout is None else max(0.0, timeout - (time.monotonic() - begun))
                self._divided.close(left)

    def _stop_here(self, reason: str) -> None:
        self.stopped = True
        self.stop_reason = reason

    def _parts(self) -> Parts:
        return Parts(
            self.module, self.optimizer, self.scheduler, self.scaler, self.extra, dict(self.callbacks)
        )

    def _close_earlier(self) -> None:
        other = self.bus.handler
        if isinstance(other, Handler) and not other.closed:
            logger.warning("The bus is now used by a new handler; the earlier one is closed.")
            other.close()

    def _begin(self) -> None:
        self.check()
        for key in self._unclaimed:
            logger.warning("Not used: the checkpoint's state of callback %r, which this run has not.", key)

    def _leave_bus(self) -> None:
        for callback in self.callbacks.values():
            callback.leave(self.bus)
        self._moments.optimizer_steps.stop()
        self._loop.close()
        for undo in self._undo:
            undo()
        if self.bus.handler is self:
            self.bus.handler = None


def _by_name(extra: Any) -> dict[str, Any]:
    try:
        return dict(extra or {})
    except (TypeError, ValueError):
        raise TypeError(
            f"Cannot take extra={extra!r}: it takes a dict of objects by name, e.g. extra={{'ema': ema}}."
        ) from None

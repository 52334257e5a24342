"""Stand-ins for what costs time in a test: a handler that records its saves instead of writing."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trainbus.bus import EventBus
from trainbus.callback import Callback, add_to
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.retention import Retention
from trainbus.errors import CheckpointSkipped, CheckpointWriteError

__all__ = ["FakeHandler", "FakeSave"]

C = TypeVar("C", bound=Callback)


@dataclass(eq=False, kw_only=True)
class FakeSave:
    """
    A save that a `FakeHandler` was asked for.

    `succeed`, `fail` and `skip` do to it what the writer would: they post the event, which is
    delivered before the next one emitted, and complete `pending`. Once for each save; only what has
    failed may still succeed, as a file does that comes all the same from a disk that took too long.

    Attributes:
        path, weights_only, stream, logs, monitor, mode, score, removals, keep, interrupted,
        full_state: As asked for.
        pending: What the one who asked was given.
        epoch: Of the handler at the request; 0-based.
        global_step: Of the handler at the request.
        callbacks_state: What the file would hold of the handler's callbacks, by state key.
        bus: Where its events are posted.
        run_id: Of the run, for the manifest.
        sequence: Which save of its handler it is, from 1 on.
    """

    path: str
    weights_only: bool
    stream: str
    logs: dict[str, float]
    monitor: str | None
    mode: str | None
    score: float | None
    removals: tuple[str, ...]
    keep: Retention | None
    pending: PendingSave
    epoch: int
    global_step: int
    callbacks_state: dict[str, dict[str, Any]]
    bus: EventBus = field(repr=False)
    run_id: str
    sequence: int
    interrupted: bool = False
    full_state: bool = False
    _outcome: str = field(default="", init=False, repr=False)

    @property
    def manifest(self) -> Manifest:
        """What the file would say of itself."""
        return Manifest(
            name=os.path.basename(self.path),
            contents="weights" if self.weights_only else "state",
            run_id=self.run_id,
            stream=self.stream,
            sequence=self.sequence,
            epoch=self.epoch,
            global_step=self.global_step,
            logs=dict(self.logs),
            monitor=self.monitor,
            mode=self.mode,
            score=self.score,
            interrupted=self.interrupted,
        )

    def succeed(self) -> None:
        """
        Let it be durable: ``checkpoint_saved``.

        By ``pending.times`` it is at the moment of the request, and cost nothing, unless the test has
        set them to something else.

        Raises:
            RuntimeError: It has succeeded or was skipped before.
        """
        self._become("succeeded", after=("", "failed"))
        manifest, times = self.manifest, self.pending.times
        if times.durable is None:
            times.taken = times.begun = times.durable = times.requested
        seconds = times.durable - times.requested
        self._post("checkpoint_saved", manifest=manifest, size=manifest.size, seconds=seconds)
        self.pending.complete(manifest)

    def fail(self, error: Exception) -> None:
        """
        Let the writer run into *error*, e.g. ``OSError(28, "")``: ``checkpoint_failed``.

        Raises:
            TypeError: *error* is no exception.
            RuntimeError: It is finished already.
        """
        if not isinstance(error, Exception):
            raise TypeError(
                f"fail() takes the exception that the writer runs into, got {error!r}. "
                "Pass e.g. OSError(28, 'No space left on device')."
            )
        self._become("failed")
        failure = CheckpointWriteError(self.path, self.global_step, error)
        failure.__cause__ = error
        self._post("checkpoint_failed", error=failure)
        self.pending.fail(failure)

    def skip(self, reason: str = "the writer was busy") -> None:
        """
        Let it not be carried out: ``checkpoint_skipped``.

        Raises:
            RuntimeError: It is finished already.
        """
        self._become("been skipped")
        self._post("checkpoint_skipped", reason=reason)
        self.pending.fail(CheckpointSkipped(self.path, reason))

    def _become(self, outcome: str, after: Sequence[str] = ("",)) -> None:
        if self._outcome not in after:
            raise RuntimeError(
                f"Cannot finish the save of {self.path!r} again: it has {self._outcome} already. Each is "
                "finished once; FakeHandler(auto_complete=False) leaves that to the test."
            )
        self._outcome = outcome

    def _post(self, event: str, **fields: Any) -> None:
        self.bus.post(
            event,
            save=self.pending,
            path=self.path,
            stream=self.stream,
            epoch=self.epoch,
            global_step=self.global_step,
            logs=self.logs,
            **fields,
        )


class FakeHandler:
    """
    A handler for tests: counters to set, a bus of its own, and saves that are only recorded.

    Args:
        rank: Of this process.
        module: Whatever a callback may look at.
        resumed: Whether the run continues from a checkpoint.
        run_id: Of the run; by default a new one.
        auto_complete: Let each save succeed at once. False: the test does, by `FakeSave.succeed`,
            `FakeSave.fail` or `FakeSave.skip`.

    Attributes:
        bus: Its bus, whose handler it is.
        saves: What `save_async` was asked for, in order.
        epoch, batch, global_step, total_epochs: As of `Handler`; moved by `emit_run` or the test.
        lineage: The runs that it continues, oldest first.
        left_at: Where each of them was left, by its id: epoch and global step.
        accumulating: Whether gradients of an unfinished accumulation are pending.
        is_stepping: Whether an optimizer is inside of its step, or was left there by an exception.
        optimizer: What a callback may look at; None unless the test sets it.
        logged: The metrics that `log` was given, by name.
        stopped, stop_reason: What `stop` was told.
    """

    def __init__(
        self,
        rank: int = 0,
        module: Any = None,
        *,
        resumed: bool = False,
        run_id: str | None = None,
        auto_complete: bool = True,
    ) -> None:
        self.rank = rank
        self.module = module
        self.optimizer: Any = None
        self.logged: dict[str, Any] = {}
        self.resumed = resumed
        self.run_id = run_id or uuid.uuid4().hex
        self.lineage: tuple[str, ...] = ()
        self.left_at: dict[str, tuple[int, int]] = {}
        self.epoch = 0
        self.batch = 0
        self.global_step = 0
        self.total_epochs: int | None = None
        self.accumulating = self.is_stepping = False
        self.stopped = False
        self.stop_reason: str | None = None
        self.callbacks: dict[str, Callback] = {}
        self.saves: list[FakeSave] = []
        self.bus = EventBus()
        self.bus.handler = self
        self._auto_complete = auto_complete
        self._told: dict[str, list[Any]] = {}

    @property
    def saves_in_flight(self) -> int:
        """Saves asked for and not yet durable, skipped or failed."""
        return sum(not save.pending.done() for save in self.saves)

    def add_callback(self, callback: C) -> C:
        """Attach *callback* to the bus and return it; a second one of the same state key gets ``#2``."""
        add_to(self.callbacks, callback, self.bus)
        return callback

    def log(self, *, weight: Any = None, **scalars: Any) -> None:
        """Record the metrics in `logged`; the logs of events do not get them."""
        self.logged.update(scalars)

    def prepare_saves(self, *, weights_only: bool = False, full_state: bool = False) -> None:
        """Do nothing: there is no memory to prepare."""

    def keep_batch_starts(self) -> None:
        """Do nothing: there are no random numbers to keep."""

    def finish_writing(self, timeout: float | None = None) -> None:
        """
        Do nothing, if all saves are finished.

        Raises:
            TimeoutError: A save is not, and the test has to finish it: nobody else does.
        """
        unfinished = [save.path for save in self.saves if not save.pending.done()]
        if unfinished:
            raise TimeoutError(f"Still unfinished: {', '.join(unfinished)}.")

    def reserve(self, folder: str | os.PathLike[str], template: str) -> None:
        """Do nothing: nothing is written that another process could write too."""

    def save_async(
        self,
        path: str | os.PathLike[str],
        *,
        weights_only: bool = False,
        stream: str = "",
        logs: Mapping[str, float] | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        score: float | None = None,
        removals: Sequence[str] = (),
        keep: Retention | None = None,
        interrupted: bool = False,
        full_state: bool = False,
    ) -> PendingSave:
        """Record the request in `saves`. On ranks other than 0 nothing is recorded, as nothing is written."""
        if self.rank != 0:
            return PendingSave.nothing()
        pending = PendingSave(
            os.fspath(path), epoch=self.epoch, global_step=self.global_step, stream=stream, logs=logs or {}
        )
        save = FakeSave(
            path=os.fspath(path),
            weights_only=weights_only,
            stream=stream,
            logs=dict(logs or {}),
            monitor=monitor,
            mode=mode,
            score=score,
            removals=tuple(removals),
            keep=keep,
            pending=pending,
            epoch=self.epoch,
            global_step=self.global_step,
            callbacks_state={key: one.state_dict() for key, one in self.callbacks.items()},
            bus=self.bus,
            run_id=self.run_id,
            sequence=len(self.saves) + 1,
            interrupted=interrupted,
            full_state=full_state,
        )
        self.saves.append(save)
        if self._auto_complete:
            save.succeed()
        return pending

    def tell(self, key: str, value: Any) -> None:
        """Let it be heard at once, as with one rank."""
        self._told.setdefault(key, []).append(value)

    def heard(self, key: str) -> list[Any]:
        """Return what was told under *key* and not heard yet."""
        return self._told.pop(key, [])

    def stop(self, reason: str = "stop() was called") -> None:
        """End the run before its next batch."""
        self.stopped = True
        self.stop_reason = reason

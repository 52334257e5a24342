"""
The thread that writes and removes files, in the order it was asked to.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from trainbus.checkpoint.pending_save import PendingSave
from trainbus.errors import CheckpointError, CheckpointSkipped, CheckpointWriteError, HandlerClosedError

if TYPE_CHECKING:
    from trainbus.checkpoint.file_format import Manifest

__all__ = ["BackgroundWriter", "finish_saves"]

_log = logging.getLogger("trainbus")
NICENESS = 10
_POLICIES = ("wait", "skip", "replace")


@dataclass(eq=False)
class _Job:
    pending: PendingSave | None = None
    write: Callable[[], Manifest] | None = None
    release: Callable[[], None] | None = None
    stream: str = ""
    # As given, for the report, and absolute: the script may change its working directory.
    removals: list[tuple[str, str]] = field(default_factory=list)


class Helper(Protocol):
    """Threads that a save needs beside the writer's own."""

    def start(self) -> None:
        """Start them, unless they run."""

    def close(self) -> None:
        """Let them end when they have nothing left to do."""


class BackgroundWriter:
    """
    One thread, one queue for saves and removals.

    A save goes through `admit` (there is room), `submit` (it is queued) and the thread.
    What is queued is finished at interpreter exit; a failure that nobody has seen by then
    is printed. A forked child starts with an empty queue and touches nothing of the parent's.

    Args:
        report: Called with an event's name and fields when a save or removal is over, before
            its `PendingSave` is finished; on the writer thread, or in `admit` and `fail` on
            the caller's. An idle writer keeps it alive until `close`.
        max_pending: Saves that may be unfinished at a time, at least 1.
        on_busy: What `admit` does when there are that many: ``"wait"``; ``"skip"`` the new one;
            ``"replace"`` the newest that has not begun, for which *max_pending* must be 2 or more.
        helpers: Other threads that the saves need. They are started before the first save is
            admitted, because none can be while the interpreter exits.
        name: The thread's.
    """

    def __init__(
        self,
        report: Callable[..., None],
        *,
        max_pending: int = 1,
        on_busy: str = "wait",
        helpers: Sequence[Helper] = (),
        name: str = "trainbus-writer",
    ) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending!r}.")
        if on_busy not in _POLICIES:
            raise ValueError(f"on_busy must be one of {', '.join(map(repr, _POLICIES))}, got {on_busy!r}.")
        if on_busy == "replace" and max_pending < 2:
            raise ValueError(f"on_busy='replace' needs max_pending of at least 2, got {max_pending!r}.")
        self._report = report
        self._max_pending = max_pending
        self._on_busy = on_busy
        self._helpers = helpers
        self._name = name
        self._closed = False
        self._begin_empty()
        _WRITERS.add(self)

    def _begin_empty(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[_Job] = deque()
        self._running: _Job | None = None
        self._unfinished: list[PendingSave] = []
        self._thread: threading.Thread | None = None

    @property
    def unfinished(self) -> list[PendingSave]:
        """The saves that are admitted and neither durable nor failed, oldest first."""
        with self._changed:
            return list(self._unfinished)

    def admit(self, pending: PendingSave) -> bool:
        """
        Make room for a save; with ``on_busy="wait"`` block until there is.

        Returns:
            True if `submit` or `fail` must follow; False if the save was skipped.

        Raises:
            HandlerClosedError: The writer is closed, or the interpreter exits.
        """
        with self._changed:
            self._refuse_if_closed(pending)
            if not self._is_full() or self._on_busy != "skip":
                if self._is_full() and self._on_busy == "replace":
                    self._withdraw_waiting()
                self._wait_until(lambda: not self._is_full())
                self._refuse_if_closed(pending)
                self._ensure_thread()
                self._unfinished.append(pending)
                return True
        self._skip(pending, f"{self._max_pending} earlier save(s) were unfinished and on_busy is 'skip'")
        return False

    def submit(
        self,
        pending: PendingSave,
        write: Callable[[], Manifest],
        *,
        removals: Sequence[str] = (),
        release: Callable[[], None] | None = None,
    ) -> None:
        """
        Queue an admitted save. Does not block.

        Args:
            pending: What `admit` was given.
            write: Called once on the writer thread, unless the save is replaced; returns
                when the file is durable. Must only use data that no other thread changes.
            removals: Files to remove once the new one is durable, and only then.
            release: Called when *write* will not use its data any more, before the next
                save is admitted.
        """
        job = _Job(pending, write, release, pending.stream, _absolute(removals))
        with self._changed:
            try:
                # It may have ended since: another thread closed the writer after the save was admitted.
                self._ensure_thread()
            except RuntimeError as error:
                _release(job)
                self._finish_failed(pending, error)
                return
            self._jobs.append(job)
            self._changed.notify_all()

    def fail(self, pending: PendingSave, error: Exception) -> None:
        """Finish an admitted save that will not be submitted, because of *error*."""
        self._finish_failed(pending, error)

    def remove(self, paths: Sequence[str], stream: str = "") -> None:
        """Queue the removal of files. Does not block; one that fails is logged."""
        with self._changed:
            self._ensure_thread()
            self._jobs.append(_Job(stream=stream, removals=_absolute(paths)))
            self._changed.notify_all()

    def flush(self, timeout: float | None = None) -> None:
        """
        Block until all that was submitted is finished, removals included. Raises no save's failure.

        Raises:
            TimeoutError: It took longer than *timeout* seconds; the message names the saves.
        """
        with self._changed:
            if not self._wait_until(lambda: not self._jobs and self._running is None, timeout):
                names = ", ".join(repr(save.path) for save in self._unfinished) or "removals"
                raise TimeoutError(f"Still unfinished after {timeout} s: {names}. They go on being written.")

    def close(self, timeout: float | None = None) -> None:
        """Admit no more saves, then do what `flush` does and end the thread. May be called again."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        self.flush(timeout)
        if thread is not None:
            thread.join(timeout)
        for helper in self._helpers:
            helper.close()

    def _refuse_if_closed(self, pending: PendingSave) -> None:
        if self._closed:
            raise HandlerClosedError(f"Cannot save {pending.path!r}: the writer is closed. Save before that.")

    def _is_full(self) -> bool:
        return len(self._unfinished) >= self._max_pending

    def _ensure_thread(self) -> None:
        if self._thread is not None:
            return
        if _exiting:
            raise HandlerClosedError("Cannot save while the interpreter exits. Save before that.")
        for helper in self._helpers:
            helper.start()
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        self._thread = thread

    def _wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        if threading.current_thread() is self._thread and not condition():
            raise RuntimeError("Cannot wait for the writer on its own thread: it would wait for itself.")
        return self._changed.wait_for(condition, timeout)

    def _withdraw_waiting(self) -> None:
        for job in reversed(self._jobs):
            if job.pending is not None:
                self._jobs.remove(job)
                _release(job)
                self._skip(job.pending, "a newer save took its place")
                return

    def _run(self) -> None:
        give_way()
        try:
            while (job := self._next_job()) is not None:
                self._carry_out(job)
                with self._changed:
                    self._running = None
                    self._changed.notify_all()
        finally:
            self._leave_nobody_waiting()

    def _next_job(self) -> _Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._jobs:
                self._running = self._jobs.popleft()
                return self._running
            # Under the lock, so that whoever submits from now on starts a new thread.
            self._thread = None
            return None

    def _leave_nobody_waiting(self) -> None:
        with self._changed:
            if self._thread is not threading.current_thread():
                return
            jobs = [self._running] if self._running else []
            jobs += self._jobs
            self._jobs.clear()
            self._running = self._thread = None
            self._changed.notify_all()
        for job in jobs:
            _release(job)
            if job.pending is not None:
                self._finish_failed(job.pending, RuntimeError("the writer thread has died"))

    def _carry_out(self, job: _Job) -> None:
        if job.pending is None or self._write(job, job.pending):
            for given, path in job.removals:
                self._remove_file(job, given, path)

    def _write(self, job: _Job, pending: PendingSave) -> bool:
        assert job.write is not None
        try:
            try:
                manifest = job.write()
            finally:
                _release(job)
        except BaseException as error:
            # Also what is meant to end the thread: somebody may be waiting for this save.
            self._finish_failed(pending, error)
            return False
        seconds = time.monotonic() - pending.requested
        self._tell("checkpoint_saved", pending, manifest=manifest, size=manifest.size, seconds=seconds)
        self._settle(pending, lambda: pending.complete(manifest))
        return True

    def _remove_file(self, job: _Job, given: str, path: str) -> None:
        # Not above: this module has to be importable where what a file format needs is not.
        from trainbus.checkpoint.commit import remove

        try:
            remove(path)
        except OSError as error:
            _log.warning("Cannot remove the old checkpoint %r: %s. It stays where it is.", path, error)
            return
        fields: dict[str, Any] = {"path": given, "stream": job.stream}
        if job.pending is not None:
            fields |= _moment(job.pending)
        self._call_report("checkpoint_removed", fields)

    def _skip(self, pending: PendingSave, reason: str) -> None:
        self._tell("checkpoint_skipped", pending, reason=reason)
        self._settle(pending, lambda: pending.fail(CheckpointSkipped(pending.path or "", reason)))

    def _finish_failed(self, pending: PendingSave, error: BaseException) -> None:
        failure = error
        if not isinstance(failure, CheckpointError):
            failure = CheckpointWriteError(pending.path or "", pending.global_step, error)
            failure.__cause__ = error
        _remember(failure)
        self._tell("checkpoint_failed", pending, error=failure)
        self._settle(pending, lambda: pending.fail(failure))

    def _settle(self, pending: PendingSave, finish: Callable[[], None]) -> None:
        # At once: whoever learns that it is finished finds room, and who finds room finds it finished.
        with self._changed:
            if pending in self._unfinished:
                self._unfinished.remove(pending)
            finish()
            self._changed.notify_all()

    def _tell(self, event: str, pending: PendingSave, **fields: Any) -> None:
        known = {"save": pending, "path": pending.path, "stream": pending.stream, **_moment(pending)}
        self._call_report(event, known | fields)

    def _call_report(self, event: str, fields: dict[str, Any]) -> None:
        try:
            self._report(event, **fields)
        except BaseException:
            # A save must be finished even if nobody could be told.
            _log.exception("Reporting %s of %r failed.", event, fields["path"])

    def _start_empty_in_child(self) -> None:
        unfinished = self._unfinished
        self._begin_empty()
        for pending in unfinished:
            pending.give_up_in_child()


def finish_saves(path: str | os.PathLike[str]) -> None:
    """Block until no writer of this process has an unfinished save of this file, or into this folder."""
    target = os.path.abspath(os.path.expanduser(path))
    for writer in list(_WRITERS):
        saved = [os.path.abspath(save.path) for save in writer.unfinished if save.path is not None]
        if any(target in (file, os.path.dirname(file)) for file in saved):
            writer.flush()


def give_way() -> None:
    """Let the calling thread have what time the training leaves, while it uses every core."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def _absolute(paths: Sequence[str]) -> list[tuple[str, str]]:
    return [(path, os.path.abspath(os.path.expanduser(path))) for path in paths]


def _release(job: _Job) -> None:
    if job.release is not None:
        job.release()


def _moment(pending: PendingSave) -> dict[str, Any]:
    return {"epoch": pending.epoch, "global_step": pending.global_step, "logs": pending.logs}


_WRITERS: weakref.WeakSet[BackgroundWriter] = weakref.WeakSet()
_failures: list[CheckpointError] = []
_exiting = False


def _remember(failure: CheckpointError) -> None:
    _failures[:] = [earlier for earlier in _failures if not earlier.seen] + [failure]


def _finish_at_exit() -> None:
    global _exiting
    _exiting = True
    for writer in list(_WRITERS):
        try:
            writer.flush()
        except KeyboardInterrupt:
            _print(f"still writing {writer.unfinished}; interrupt again to give up.")
            writer.flush()
    for failure in _failures:
        if not failure.seen:
            failure.seen = True
            _print(str(failure))


def _print(text: str) -> None:
    if sys.stderr is not None:
        print(f"trainbus: {' '.join(text.split())}", file=sys.stderr, flush=True)


def _start_empty_in_child() -> None:
    _failures.clear()
    for writer in list(_WRITERS):
        writer._start_empty_in_child()


os.register_at_fork(after_in_child=_start_empty_in_child)
# Both: the first also runs in forked multiprocessing children, which leave out atexit; the second also
# comes after threads of the user's that outlive the main one.
if hasattr(threading, "_register_atexit"):
    with contextlib.suppress(RuntimeError):
        threading._register_atexit(_finish_at_exit)
atexit.register(_finish_at_exit)

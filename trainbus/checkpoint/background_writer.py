"""
The thread that writes and removes files, in the order it was asked to.

Imports nothing but the standard library, for it has to work while the interpreter exits.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from trainbus.checkpoint import interpreter_exit
from trainbus.checkpoint.job_runner import JobRunner, give_way
from trainbus.checkpoint.patience import Patience
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.save_outcomes import SaveOutcomes
from trainbus.checkpoint.write_job import WriteJob, absolute
from trainbus.errors import HandlerClosedError

if TYPE_CHECKING:
    from trainbus.checkpoint.manifest import Manifest

__all__ = ["BackgroundWriter", "finish_saves"]

_POLICIES = ("wait", "skip", "replace")
_PATIENCE = 600.0
_LOOKS_EVERY = 1.0  # seconds between two looks at whether the thread still does something


class Helper(Protocol):
    """A thread that a save needs beside the writer's own."""

    def start(self) -> None:
        """Start it, unless it runs."""

    def close(self) -> None:
        """Let it end when it has nothing left to do."""


class BackgroundWriter:
    """
    One thread, one queue of saves; each brings the removals that it entails.

    A save goes through `admit` (there is room), `submit` (it is queued) and the thread.
    What is queued is finished at interpreter exit; a failure that nobody has seen by then
    is printed. A forked child starts with an empty queue and touches nothing of the parent's.

    Args:
        report: Called with an event's name and fields when a save is over, before its `PendingSave`
            is finished, and when a file was removed; on the writer thread, or in `admit` and `fail` on
            the caller's. An idle writer keeps it alive until `close`.
        max_pending: Saves that may be unfinished at a time, at least 1.
        on_busy: What `admit` does when there are that many: ``"wait"``; ``"skip"`` the new one;
            ``"replace"`` the newest that has not begun, for which *max_pending* must be 2 or more.
        helper: Another thread that the saves need. It is started before the first save is
            admitted, because none can be while the interpreter exits.
        name: The thread's.
        patience: Seconds without progress after which the thread counts as stuck: its save and
            those behind it fail, and nobody waits for it any more.
        last_progress: Returns the ``time.monotonic()`` at which the disk last took something.
        pause: Called with the seconds to wait before a failed write is tried again.
    """

    def __init__(
        self,
        report: Callable[..., None],
        *,
        max_pending: int = 1,
        on_busy: str = "wait",
        helper: Helper | None = None,
        name: str = "trainbus-writer",
        patience: float = _PATIENCE,
        last_progress: Callable[[], float] = lambda: 0.0,
        pause: Callable[[float], Any] = time.sleep,
    ) -> None:
        if max_pending < 1:
            raise ValueError(f"max_pending must be at least 1, got {max_pending!r}.")
        if on_busy not in _POLICIES:
            raise ValueError(f"on_busy must be one of {', '.join(map(repr, _POLICIES))}, got {on_busy!r}.")
        if on_busy == "replace" and max_pending < 2:
            raise ValueError(f"on_busy='replace' needs max_pending of at least 2, got {max_pending!r}.")
        self._patience = Patience(patience, last_progress)
        self._outcomes = SaveOutcomes(report, self._settle)
        self._runner = JobRunner(self._outcomes, pause)
        self._max_pending = max_pending
        self._on_busy = on_busy
        self._helper = helper
        self._name = name
        self._closed = False
        self._begin_empty()
        _WRITERS.add(self)
        interpreter_exit.drain_at_exit(self)

    def __repr__(self) -> str:
        names = ", ".join(repr(save.path) for save in self.unfinished) or "nothing"
        return f"<BackgroundWriter with {names} unfinished>"

    def _begin_empty(self) -> None:
        self._changed = threading.Condition()
        self._jobs: deque[WriteJob] = deque()
        self._running: WriteJob | None = None
        self._given_up: WriteJob | None = None
        self._unfinished: dict[PendingSave, threading.Thread] = {}  # who was admitted, oldest first
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
            True if `submit` or `fail` must follow; False if the save was skipped, or failed because
            the writer is stuck.

        Raises:
            HandlerClosedError: The writer is closed, or the interpreter exits.
            RuntimeError: This thread is amid a save, which a signal handler of it has interrupted.
        """
        with self._changed:
            self._refuse_amid_another()
            self._refuse_if_closed(pending)
            self._look_after_thread()
            if not self._is_full() or self._on_busy != "skip":
                if self._is_full() and self._on_busy == "replace":
                    self._withdraw_waiting()
                self._wait_until(lambda: not self._is_full())
                self._refuse_if_closed(pending)
                if self._is_stuck():
                    assert self._given_up is not None
                    self._outcomes.failed(pending, self._patience.verdict(self._given_up))
                    return False
                self._ensure_thread()
                self._unfinished[pending] = threading.current_thread()
                return True
        reason = f"{self._max_pending} earlier save(s) were unfinished and on_busy is 'skip'"
        self._outcomes.skipped(pending, reason)
        return False

    def wait_for_room(self, timeout: float | None = None) -> bool:
        """
        Wait until `admit` would not block, *timeout* seconds at most; return whether that is so.

        It is at once when the writer is closed or stuck, and unless ``on_busy`` is ``"wait"``.

        Raises:
            RuntimeError: As `admit` does.
        """
        with self._changed:
            self._refuse_amid_another()
            self._look_after_thread()
            blocks = self._is_full() and self._on_busy == "wait" and not self._closed
            return not blocks or self._wait_until(lambda: not self._is_full(), timeout)

    def submit(
        self,
        pending: PendingSave,
        write: Callable[[], Manifest],
        *,
        removals: Sequence[str] = (),
        find_removals: Callable[[], Sequence[str]] = tuple,
        release: Callable[[], None] | None = None,
    ) -> None:
        """
        Queue an admitted save. Does not block.

        Args:
            pending: What `admit` was given.
            write: Called on the writer thread, unless the save is replaced, and again if it fails in
                a way that may pass; returns when the file is durable. Must only use data that no
                other thread changes.
            removals: Files to remove once the new one is durable, and only then.
            find_removals: Called on the writer thread once the file is durable, for more of them.
            release: Called when *write* will not use its data any more, before the next
                save is admitted.
        """
        job = WriteJob(pending, write, release or (lambda: None), absolute(removals), find_removals)
        with self._changed:
            try:
                # It may have ended since: another thread closed the writer after the save was admitted.
                self._ensure_thread()
            except RuntimeError as error:
                job.release()
                self._outcomes.failed(pending, error)
                return
            self._jobs.append(job)
            self._changed.notify_all()

    def has_queued(self, pending: PendingSave) -> bool:
        """Tell whether a save is in the queue, being written, or finished."""
        with self._changed:
            jobs = [*self._jobs, *([self._running] if self._running is not None else [])]
            return pending.done() or any(job.pending is pending for job in jobs)

    def fail(self, pending: PendingSave, error: BaseException) -> None:
        """Finish an admitted save that will not be submitted, because of *error*."""
        self._outcomes.failed(pending, error)

    def flush(self, timeout: float | None = None) -> None:
        """
        Block until all that was submitted is finished, removals included. Raises no save's failure.

        Raises:
            TimeoutError: It took longer than *timeout* seconds; the message names the saves.
        """
        with self._changed:
            self._changed.notify_all()  # Ctrl-C in `submit` may have kept the thread from being told
            if not self._wait_until(lambda: not self._jobs and self._running is None, timeout):
                names = ", ".join(repr(save.path) for save in self._unfinished) or "removals"
                raise TimeoutError(f"Still unfinished after {timeout} s: {names}. They go on being written.")

    def abandon(self, reason: str) -> None:
        """Fail the saves that are not finished, wait for them no more. The one under way may still come."""
        with self._changed:
            self._give_up(TimeoutError(errno.ETIMEDOUT, reason))

    def close(self, timeout: float | None = None) -> None:
        """Admit no more saves, then do what `flush` does and end the thread. May be called again."""
        with self._changed:
            self._closed = True
            thread = self._thread
            self._changed.notify_all()
        self.flush(timeout)
        if thread is not None and not self._is_stuck():
            thread.join(timeout)
        if self._helper is not None:
            self._helper.close()

    def _refuse_if_closed(self, pending: PendingSave) -> None:
        if self._closed:
            raise HandlerClosedError(f"Cannot save {pending.path!r}: the writer is closed. Save before that.")

    def _refuse_amid_another(self) -> None:
        here = threading.current_thread()
        for other, thread in self._unfinished.items():
            if thread is here and not self.has_queued(other):
                raise RuntimeError(
                    f"Cannot save amid the save of {other.path!r} on the same thread, which would have to "
                    "end first. Let the signal handler set a flag, and save after the step; SaveOnRequest "
                    "and Preemption do that."
                )

    def _is_full(self) -> bool:
        return len(self._unfinished) >= self._max_pending

    def _ensure_thread(self) -> None:
        if self._thread is not None:
            return
        if interpreter_exit.is_exiting():
            raise HandlerClosedError("Cannot save while the interpreter exits. Save before that.")
        if self._helper is not None:
            self._helper.start()
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        self._thread = thread

    def _wait_until(self, condition: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait for *condition*, or until the thread is stuck; False when it took *timeout* seconds."""
        if threading.current_thread() is self._thread and not condition():
            raise RuntimeError("Cannot wait for the writer on its own thread: it would wait for itself.")
        deadline = None if timeout is None else time.monotonic() + timeout
        while not condition() and not self._is_stuck():
            left = _LOOKS_EVERY if deadline is None else deadline - time.monotonic()
            if left <= 0:
                return False
            self._changed.wait(min(left, _LOOKS_EVERY))
            self._look_after_thread()
        return True

    def _look_after_thread(self) -> None:
        """Notice a thread that has died or does nothing, so that nobody waits for it for ever."""
        if self._thread is not None and not self._thread.is_alive():
            self._bury_thread()
        running = self._running
        if running is not None and not self._is_stuck() and self._patience.is_over(running):
            self._give_up(self._patience.verdict(running))

    def _is_stuck(self) -> bool:
        return self._given_up is not None and self._given_up is self._running

    def _give_up(self, error: TimeoutError) -> None:
        self._given_up = self._running
        for job in self._jobs:
            job.release()
        self._jobs.clear()
        for pending in list(self._unfinished):
            self._outcomes.failed(pending, error)

    def _withdraw_waiting(self) -> None:
        if self._jobs:
            job = self._jobs.pop()
            try:
                job.release()
            finally:  # also after Ctrl-C: nobody else would finish it
                self._outcomes.skipped(job.pending, "a newer save took its place")

    def _run(self) -> None:
        give_way()
        try:
            while (job := self._next_job()) is not None:
                self._runner.carry_out(job)
                with self._changed:
                    self._running = None
                    self._changed.notify_all()
                # Not until the next one comes: it leads to the snapshot.
                del job
        finally:
            self._leave_nobody_waiting()

    def _next_job(self) -> WriteJob | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closed)
            if self._jobs:
                job = self._running = self._jobs.popleft()
                job.begun = job.pending.times.begun = time.monotonic()
                return job
            # Under the lock, so that whoever submits from now on starts a new thread.
            self._thread = None
            return None

    def _leave_nobody_waiting(self) -> None:
        with self._changed:
            if self._thread is threading.current_thread():
                self._bury_thread()

    def _bury_thread(self) -> None:
        with self._changed:
            jobs = [self._running] if self._running else []
            jobs += self._jobs
            self._jobs.clear()
            self._running = self._thread = None
            self._changed.notify_all()
        for job in jobs:
            job.release()
            self._outcomes.failed(job.pending, RuntimeError("the writer thread has died"))

    def _settle(self, pending: PendingSave, finish: Callable[[], None]) -> None:
        # At once: whoever learns that it is finished finds room, and who finds room finds it finished.
        with self._changed:
            self._unfinished.pop(pending, None)
            finish()
            self._changed.notify_all()

    def _start_empty_in_child(self) -> None:
        unfinished = self._unfinished
        self._begin_empty()
        for pending in unfinished:
            pending.give_up_in_child()


def finish_saves(path: str | os.PathLike[str], timeout: float | None = None) -> None:
    """
    Block until no writer of this process has an unfinished save of this file, or into this folder.

    Raises:
        TimeoutError: It took a writer longer than *timeout* seconds.
    """
    target = os.path.abspath(os.path.expanduser(path))
    for writer in list(_WRITERS):
        saved = [save.absolute_path for save in writer.unfinished if save.absolute_path is not None]
        if any(target in (file, os.path.dirname(file)) for file in saved):
            writer.flush(timeout)


_WRITERS: weakref.WeakSet[BackgroundWriter] = weakref.WeakSet()


def _start_empty_in_child() -> None:
    for writer in list(_WRITERS):
        writer._start_empty_in_child()


os.register_at_fork(after_in_child=_start_empty_in_child)

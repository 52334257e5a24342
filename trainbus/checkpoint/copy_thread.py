"""The thread that copies in the background, and how it helps to copy at once."""

from __future__ import annotations

import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable

import torch

from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove, SharedMoves

__all__ = ["CopyThread", "copy_together"]

_log = logging.getLogger("trainbus")


class CopyThread:
    """
    The one thread that copies in the background, in the order it is asked to.

    It has no file to wait for, so neither has who waits for it. May be closed on one thread while
    another one has it copy.
    """

    def __init__(self) -> None:
        self._begin_empty()
        _ALL.add(self)

    def _begin_empty(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._changing = threading.RLock()

    def start(self) -> None:
        """Start the thread, unless it runs. Returns when it does."""
        with self._changing:
            if not self.is_alive():
                name = "trainbus-copy"
                ready = threading.Event()
                thread = threading.Thread(target=_run, args=(self._jobs, ready), name=name, daemon=True)
                threads_of_others = torch.get_num_threads()
                thread.start()
                ready.wait()
                # The call on that thread has also set what threads to come begin with.
                torch.set_num_threads(threads_of_others)
                self._thread = thread

    def close(self) -> None:
        """Let the thread end after what it was given. Does not wait for it."""
        with self._changing:
            if self._thread is not None:
                self._jobs.put(None)
                # The next thread has a queue of its own: it must not take the end of this one for its own.
                self._jobs, self._thread = queue.SimpleQueue(), None

    def is_alive(self) -> bool:
        """Tell whether the thread runs; not in a forked child."""
        return self._thread is not None and self._thread.is_alive()

    def carry_out(self, copy: BackgroundCopy) -> None:
        """
        Run *copy* on the thread.

        Raises:
            RuntimeError: It was closed in between, and none can be started while the interpreter exits.
        """
        with self._changing:
            self.start()
            copy.thread = self._thread
            self.call(copy.run)

    def call(self, job: Callable[[], None]) -> None:
        """Have the thread call *job*, at the latest when it is started; what it raises is logged."""
        with self._changing:
            self._jobs.put(job)


def _run(jobs: queue.SimpleQueue[Callable[[], None] | None], ready: threading.Event) -> None:
    # A second team of OpenMP threads beside the training's would fight it for the same cores, and while
    # there are more threads than cores libgomp lets all of them sleep between two loops.
    torch.set_num_threads(1)
    # A thread takes over what was set last, on any thread, when it first asks: now, before others set it.
    torch.get_num_threads()
    ready.set()
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception:
            # The thread has to be there for the next snapshot.
            _log.exception("What was to be done behind a snapshot failed.")
        # Not until the next one comes: it holds the tensors.
        del job


def copy_together(move: HostMove, thread: CopyThread) -> None:
    """
    Carry out *move* on this thread and, where that would be all and it is idle, on *thread* too.

    Returns when it is done.
    """
    parts = move.parts() if thread.is_alive() and move.is_serial() else [move]
    if len(parts) == 1:
        move.begin()
        return
    moves = SharedMoves(parts)
    thread.call(moves.help_out)
    moves.carry_out()


_ALL: weakref.WeakSet[CopyThread] = weakref.WeakSet()


def _forget_in_child() -> None:
    for thread in list(_ALL):
        thread._begin_empty()


os.register_at_fork(after_in_child=_forget_in_child)

"""A disk that fails when it is told to, for tests of what happens then. Imports no torch."""

from __future__ import annotations

import functools
import inspect
import os
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any

from trainbus.checkpoint.disk import Disk, use_disk

__all__ = ["FaultyDisk"]

CALLS = tuple(
    name for name, value in vars(Disk).items() if inspect.isfunction(value) and not name.startswith("_")
)
"""The calls that a `FaultyDisk` can fail, by name."""


class FaultyDisk(Disk):
    """
    The real disk, but some of its calls fail, or take their time. As a context manager, what the saves of
    this process go to.

    .. code-block:: python

        with FaultyDisk(errno.ENOSPC, calls=["write"], at=2):
            with pytest.raises(CheckpointWriteError):
                trainbus.save(state, "a.pt")

        with FaultyDisk(seconds=0.5, calls=["fsync"]):      # slow, but nothing fails
            handler.fit(...)

    A call that is to fail does nothing, `close` excepted, after which the descriptor is gone whatever
    the system answers. Safe to use from several threads.

    Args:
        error: The errno to fail with; None: nothing fails, calls are only counted.
        calls: Which calls count, by name (`CALLS`); by default all.
        at: Which of those is the first to fail, from 1.
        times: How many fail from there on; ``math.inf`` for ever.
        seconds: How much longer each call that counts takes, on the thread that makes it.
        before: Called before each call that counts, with its name and number, on the thread that
            makes it: to wait for something else, or to end the process.

    Attributes:
        made: The names of the calls that counted so far, in order.
        failed: How many of them failed.

    Raises:
        ValueError: A name in *calls* is none, or a number is out of its range.
    """

    def __init__(
        self,
        error: int | None = None,
        *,
        calls: Collection[str] = CALLS,
        at: int = 1,
        times: float = 1,
        seconds: float = 0.0,
        before: Callable[[str, int], Any] | None = None,
    ) -> None:
        unknown = set(calls) - set(CALLS)
        if unknown:
            raise ValueError(f"calls must be out of {', '.join(CALLS)}, got {', '.join(sorted(unknown))}.")
        if at < 1 or times < 0 or seconds < 0:
            raise ValueError(
                f"Calls are counted from 1, and nothing is negative, got at={at!r}, times={times!r}, "
                f"seconds={seconds!r}. The second write fails with calls=['write'], at=2."
            )
        self.made: list[str] = []
        self.failed = 0
        self._error = error
        self._calls = frozenset(calls)
        self._first, self._behind = at, at + times
        self._seconds = seconds
        self._before = before
        self._lock = threading.Lock()

    def __enter__(self) -> FaultyDisk:
        self._use = use_disk(self)
        self._use.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._use.__exit__(kind, error, trace)

    def _must_fail(self, name: str) -> bool:
        if name not in self._calls:
            return False
        with self._lock:
            self.made.append(name)
            number = len(self.made)
            fails = self._error is not None and self._first <= number < self._behind
            self.failed += fails
        time.sleep(self._seconds)
        if self._before is not None:
            self._before(name, number)
        return fails

    def _fail(self, name: str) -> OSError:
        assert self._error is not None
        return OSError(self._error, f"{os.strerror(self._error)} (injected into {name})")


def _may_fail(name: str) -> Callable[..., Any]:
    real = getattr(Disk, name)

    @functools.wraps(real)
    def call(self: FaultyDisk, *args: Any, **kwargs: Any) -> Any:
        if not self._must_fail(name):
            return real(self, *args, **kwargs)
        if name == "close":
            real(self, *args, **kwargs)
        raise self._fail(name)

    return call


for _name in CALLS:
    setattr(FaultyDisk, _name, _may_fail(_name))

"""What the ranks of one run let each other know, so that all of them do the same at the same step.

Rank 0 writes, any rank may want to stop, and a signal comes to some of them: none of that may take effect
on one rank alone, because the next collective of the script would then wait for ever.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from trainbus import ranks
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.errors import CheckpointError

__all__ = ["Agreement"]

_SLICE = 5.0  # seconds that the other ranks wait for rank 0's disk before they are told that it goes on


@dataclass
class _Word:
    """
    What one rank has to say at a meeting.

    Attributes:
        stop: Why it wants to stop; None: it does not.
        told: What was told there, by key.
        news: Of rank 0's writer: names of events and their fields, with a save's number in its place.
    """

    stop: str | None = None
    told: dict[str, Any] = field(default_factory=dict)
    news: list[tuple[str, dict[str, Any]]] = field(default_factory=list)


class Agreement:
    """
    One rank's part of it. Training thread, but for `post`.

    The ranks meet at ``train_begin``, behind each training batch, before and behind ``epoch_end`` and where a
    save is waited for; nothing in between takes effect. With one rank, and once the run is left because of an
    error, there is nobody to meet and everything takes effect at once.

    Args:
        post: Posts an event on this rank's bus; for any thread.
        stop: Stops this rank's loops, for the reason it is given.
    """

    def __init__(self, post: Callable[..., None], stop: Callable[[str], None]) -> None:
        self._post = post
        self._stop = stop
        self._lock = threading.Lock()
        self._is_left = False
        self._wants_to_stop: str | None = None
        self._told: dict[str, Any] = {}
        self._heard: dict[str, list[Any]] = {}
        self._news: deque[tuple[str, dict[str, Any]]] = deque()
        self._expected: dict[int, PendingSave] = {}  # saves of which no rank knows yet what became of them
        self._saves = 0

    @property
    def is_shared(self) -> bool:
        """Whether there are other ranks to agree with."""
        return not self._is_left and ranks.together()

    def leave(self) -> None:
        """Agree with nobody from now on: this rank ends with an error, of which the others know nothing."""
        with self._lock:
            self._is_left = True
        self._deliver_here()

    # -- what one rank says

    def stop(self, reason: str) -> None:
        """Stop all ranks, at their next meeting."""
        if self.is_shared:
            self._wants_to_stop = self._wants_to_stop or reason
        else:
            self._stop(reason)

    def tell(self, key: str, value: Any) -> None:
        """Have *value* heard on all ranks, from their next meeting on. A later one takes its place."""
        if self.is_shared:
            self._told[key] = value
        else:
            self._heard.setdefault(key, []).append(value)

    def heard(self, key: str) -> list[Any]:
        """Return what was told under *key* and not asked for yet, in order of rank."""
        return self._heard.pop(key, [])

    def post(self, name: str, /, **fields: Any) -> None:
        """Have an event of the writer posted on all ranks, from their next meeting on. For any thread."""
        with self._lock:
            # A save that this rank alone asked for, such as one before the others joined, is its own affair.
            if self.is_shared and ("save" not in fields or self._number(fields["save"]) is not None):
                self._news.append((name, fields))
                return
        self._post(name, **fields)

    def expect(self, pending: PendingSave) -> None:
        """Count a save that all ranks ask for; each gives its own handle on it."""
        with self._lock:
            self._saves += 1
            self._expected[self._saves] = pending

    # -- where they meet

    def meet(self, what: str) -> None:
        """Let what the ranks have said take effect on all of them. Collective; *what* names the place."""
        if not self.is_shared:
            self._deliver_here()
            return
        word = self._word()
        reply = ranks.exchange(what, pickle.dumps(word) if word is not None else b"", _all_words)
        if not reply:
            return
        words = [pickle.loads(one) if one else _Word() for one in pickle.loads(reply)]
        for one in words:
            for key, value in one.told.items():
                self._heard.setdefault(key, []).append(value)
        reasons = [one.stop for one in words if one.stop is not None]
        if reasons:
            self._stop(reasons[0])
        self._take_news(words[0].news)

    def give(self, part: Any, wait_for_room: Callable[[float], bool]) -> list[Any] | None:
        """
        Give rank 0 this rank's *part* of a save, and return when there is room for it there. Collective.

        Args:
            part: Anything that can be pickled.
            wait_for_room: Called on rank 0, waits so many seconds at most and tells whether there is.

        Returns:
            Every rank's part, in order of rank, on rank 0; None on the others.
        """
        what = "handler.save or save_async"
        given: list[Any] = []

        def answer(parts: list[bytes]) -> bytes:
            given.extend(map(pickle.loads, parts))
            return b"" if wait_for_room(0.0) else b"wait"

        if ranks.exchange(what, pickle.dumps(part), answer):
            self._wait_for_first(wait_for_room, what)
        return given or None

    def finish(self, flush: Callable[[float | None], None], timeout: float | None = None) -> None:
        """
        Return when rank 0 has written what was asked for, and all ranks know of it. Collective.

        Args:
            flush: Waits for the writer of this rank, so many seconds at most.
            timeout: Seconds.

        Raises:
            TimeoutError: On all ranks, if it takes longer.
        """
        if not self.is_shared or not self._saves:
            flush(timeout)
            self._deliver_here()
            return
        deadline = None if timeout is None else time.monotonic() + timeout

        def wait(seconds: float) -> bool:
            left = seconds if deadline is None else min(seconds, max(0.0, deadline - time.monotonic()))
            try:
                flush(left)
            except TimeoutError:
                if left < seconds:
                    raise
                return False
            return True

        self._wait_for_first(wait, "waiting for saves")
        self.meet("the end of saves")

    def finish_others(self, flush: Callable[[float], None], what: str) -> None:
        """
        Return when rank 0 has written what other handlers have asked for as well. Collective.

        Args:
            flush: Called on rank 0; waits so many seconds at most, and raises TimeoutError.
            what: At what the ranks meet.
        """

        def wait(seconds: float) -> bool:
            try:
                flush(seconds)
            except TimeoutError:
                return False
            return True

        if self.is_shared:
            self._wait_for_first(wait, what)

    def result(self, pending: PendingSave) -> Manifest | None:
        """
        Return what `PendingSave.result` does on rank 0, or raise it. Collective.

        Raises:
            CheckpointError: On all ranks.
        """
        if not self.is_shared:
            return pending.result()

        def wait(seconds: float) -> tuple[Manifest | None, CheckpointError | None] | None:
            try:
                return pending.result(seconds), None
            except CheckpointError as error:
                return None, error
            except TimeoutError:
                return None

        manifest, error = self._wait_for_first(wait, "handler.save")
        if error is not None:
            raise error
        return manifest  # type: ignore[no-any-return]

    def _wait_for_first(self, wait: Callable[[float], Any], what: str) -> Any:
        """Call *wait* on rank 0 until it returns something true; return that on all ranks. Collective."""
        # A disk may take longer than the ranks wait for each other, so they hear of it again and again.
        seconds = min(_SLICE, ranks.timeout() / 4)
        while not (result := ranks.decide(lambda: wait(seconds), what)):
            pass
        return result

    # -- inside

    def _word(self) -> _Word | None:
        with self._lock:
            news = [(name, self._numbered(fields)) for name, fields in self._news]
        if self._wants_to_stop is None and not self._told and not news:
            return None
        word = _Word(self._wants_to_stop, self._told, news)
        self._wants_to_stop, self._told = None, {}
        return word

    def _number(self, save: PendingSave) -> int | None:
        return next((number for number, one in self._expected.items() if one is save), None)

    def _numbered(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {**fields, "save": self._number(fields["save"])} if "save" in fields else fields

    def _take_news(self, news: list[tuple[str, dict[str, Any]]]) -> None:
        for name, fields in news:
            own = fields
            with self._lock:
                if "save" in fields:
                    own = {**fields, "save": self._expected[fields["save"]]}
                    self._forget(name, fields["save"])
                if ranks.rank() == 0:  # the errors themselves, not copies: who has seen one is noted in it
                    _, own = self._news.popleft()
            self._post(name, **own)

    def _forget(self, event: str, number: int) -> None:
        if event == "checkpoint_skipped":
            self._expected.pop(number, None)
        elif event == "checkpoint_saved":
            # The writer works in order. What failed before this one may not come late any more; it itself may
            # be given up at this very moment, and told of once more.
            self._expected = {other: save for other, save in self._expected.items() if other >= number}

    def _deliver_here(self) -> None:
        while self._news:
            name, fields = self._news.popleft()
            self._post(name, **fields)


def _all_words(words: list[bytes]) -> bytes:
    return pickle.dumps(words) if any(words) else b""

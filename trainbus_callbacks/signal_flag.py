"""A signal that only sets a flag, for callbacks that act on it at their next event."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

__all__ = ["SignalFlag"]

_log = logging.getLogger("trainbus")


_listening: dict[signal.Signals, list[SignalFlag]] = {}
_earlier: dict[signal.Signals, Any] = {}  # whose the signals were before the first of those listened
_process = os.getpid()  # that listens


class SignalFlag:
    """
    Notes that one of some signals came, and does nothing else in the signal's handler.

    Several may listen to one signal, and leave in any order. Forked children do not listen: they have the
    earlier handlers back, so that SIGTERM ends the workers of a pool.

    Args:
        signals: Which.

    Raises:
        ValueError: One of them is none, or cannot be caught.
    """

    def __init__(self, signals: Sequence[int]) -> None:
        self.signals = tuple(_checked(one) for one in signals)
        self._received: signal.Signals | None = None
        self._listens = False

    def listen(self, who: str) -> None:
        """
        Receive the signals from now on; their earlier handlers are called too.

        On another thread than the main one Python cannot, and a warning says so, naming *who* wanted it.
        """
        if not self.signals or self._listens:
            return
        if threading.current_thread() is not threading.main_thread():
            names = ", ".join(one.name for one in self.signals)
            _log.warning("Cannot receive %s: training is not on the main thread (%s).", names, who)
            return
        self._listens = True
        for one in self.signals:
            is_first = one not in _listening
            _listening.setdefault(one, []).append(self)
            if is_first:
                _earlier[one] = signal.getsignal(one)
                signal.signal(one, _note)

    def leave(self) -> None:
        """Give the signals back to whom they belonged, unless somebody else listens yet."""
        if not self._listens:
            return
        self._listens = False
        for one in self.signals:
            if _listening[one] == [self]:
                _give_back(one)
                del _listening[one]
            else:
                _listening[one].remove(self)

    def take(self) -> signal.Signals | None:
        """Return the signal that came last, if one came since the last call."""
        received, self._received = self._received, None
        return received

    def note(self, received: signal.Signals) -> None:
        """Be told that *received* came."""
        self._received = received


def _note(signum: int, frame: FrameType | None) -> None:
    # On the main thread between any two instructions: nothing else may be touched here.
    received = signal.Signals(signum)
    if os.getpid() != _process:  # in a child, before its turn came to give them back
        _leave_in_child()
        signal.raise_signal(received)
        return
    for flag in _listening.get(received, ()):
        flag.note(received)
    earlier = _earlier.get(received)
    # Ctrl-C's own handler raises, which is what a flag is there to avoid.
    if callable(earlier) and earlier is not signal.default_int_handler:
        earlier(signum, frame)


def _give_back(one: signal.Signals) -> None:
    # First, so that no signal is lost. None: it was set by something else than Python, which has to set it
    # again itself.
    signal.signal(one, _earlier[one] or signal.SIG_DFL)
    del _earlier[one]


def _leave_in_child() -> None:
    global _process
    for one, flags in list(_listening.items()):
        for flag in flags:
            flag._listens = False
        if signal.getsignal(one) is _note:  # else it is called by what took its place
            _give_back(one)
    _listening.clear()
    _process = os.getpid()  # last, so that no signal is lost


def _checked(signum: int) -> signal.Signals:
    try:
        one = signal.Signals(signum)
    except ValueError as error:
        raise ValueError(f"{signum!r} is no signal of this system. Use e.g. signal.SIGTERM.") from error
    if one in (signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"{one.name} ends or stops a process unheard. Use e.g. signal.SIGTERM.")
    return one


os.register_at_fork(after_in_child=_leave_in_child)

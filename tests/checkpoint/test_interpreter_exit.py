"""What is told and which exit code is left when the process ends with saves unfinished or lost."""

from __future__ import annotations

import os

import pytest

from trainbus.checkpoint import interpreter_exit
from trainbus.errors import CheckpointWriteError


class Left(BaseException):
    """The process would have ended."""


class Queue:
    """What is to be flushed; the first *interrupts* flushes are interrupted."""

    def __init__(self, interrupts=0):
        self.interrupts = interrupts
        self.calls = []

    def flush(self):
        self.calls.append("flush")
        if len(self.calls) <= self.interrupts:
            raise KeyboardInterrupt

    def abandon(self, reason):
        self.calls.append(f"abandon: {reason}")


@pytest.fixture(autouse=True)
def codes(monkeypatch):
    """Collect exit codes instead of exiting."""
    found = []

    def leave(code):
        found.append(code)
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(interpreter_exit, "_exiting", False)
    monkeypatch.setattr(interpreter_exit, "_drainables", set())
    monkeypatch.setattr(interpreter_exit, "_failures", [])
    return found


def lose(path):
    failure = CheckpointWriteError(path, 7, OSError(28, "No space left on device"))
    interpreter_exit.remember(failure)
    return failure


class TestLostSaves:
    def test_change_the_exit_code(self, codes, capsys):
        """A lost save that nobody was told of is one line on stderr and exit code 74."""
        lose("a.pt")
        with pytest.raises(Left):
            interpreter_exit._finish_last()

        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("trainbus: Cannot write checkpoint 'a.pt' of global step 7: [Errno 28]")
        assert codes == [74]

    def test_all_are_in_the_one_line(self, codes, capsys):
        """Several are still one line, which counts them."""
        for path in ("a.pt", "b.pt", "c.pt"):
            lose(path)
        with pytest.raises(Left):
            interpreter_exit._finish_last()

        (line,) = capsys.readouterr().err.splitlines()
        assert "'a.pt'" in line and line.endswith("(2 more saves were lost.)")

    def test_do_not_when_somebody_has_seen_them(self, codes, capsys):
        """One that somebody was given leaves the exit code alone."""
        lose("a.pt").seen = True
        interpreter_exit._finish_last()

        assert codes == []
        assert capsys.readouterr().err == ""

    def test_wait_for_the_other_hooks(self, codes, capsys):
        """The first hook of two only finishes: what comes after it still runs."""
        lose("a.pt")
        interpreter_exit._finish()

        assert codes == []


class TestDraining:
    def test_is_done(self, codes):
        """What is unfinished is flushed, and nothing can be started from then on."""
        queue = Queue()
        interpreter_exit.drain_at_exit(queue)
        interpreter_exit._finish()

        assert queue.calls == ["flush"]
        assert interpreter_exit.is_exiting()

    def test_survives_one_interrupt(self, codes, capsys):
        """One Ctrl-C while the last files are written does not lose them."""
        queue = Queue(interrupts=1)
        interpreter_exit.drain_at_exit(queue)
        interpreter_exit._finish()

        assert queue.calls == ["flush", "flush"]
        assert "interrupt again to give it up" in capsys.readouterr().err

    def test_is_given_up_at_the_second(self, codes, capsys):
        """A second Ctrl-C gives them up, as lost."""
        queue = Queue(interrupts=2)
        interpreter_exit.drain_at_exit(queue)
        interpreter_exit._finish()

        assert queue.calls == ["flush", "flush", "abandon: the process was interrupted while it ended"]

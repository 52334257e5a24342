"""Saving, failing, crashing, restarting, corrupting, loading, in any order, beside a small model."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import shutil
import tempfile

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import trainbus
from trainbus import CheckpointFolder, CheckpointWriteError, Handler
from trainbus.checkpoint import write_job
from trainbus.testing import FaultyDisk

NAMES = ["a.pt", "b.pt", "c.pt"]
CALLS = ["create", "lock", "write", "fsync", "close", "rename", "fsync_folder"]


class Crash(BaseException):
    """What the process does no more: nothing after it reaches the disk."""


class Run(RuleBasedStateMachine):
    """
    A run and its folder.

    The model: `files` holds the step of each file that is there and whole, `damaged` the names of
    those that are not. The newest is the one that was saved last.
    """

    @initialize()
    def begin(self):
        self.folder = tempfile.mkdtemp()
        self.files: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.step = 0
        self.start()

    def teardown(self):
        if hasattr(self, "folder"):
            self.handler.close()
            shutil.rmtree(self.folder)

    def start(self):
        self.weight = torch.nn.ParameterList([torch.zeros(3)])
        self.handler = Handler(self.weight)

    def path(self, name):
        return os.path.join(self.folder, name)

    def request(self, name, removals=()):
        self.step += 1
        torch.nn.init.constant_(self.weight[0], self.step)
        removed = [self.path(other) for other in removals if other != name]
        return self.handler.save_async(self.path(name), removals=removed)

    def now_there(self, name, removals=()):
        for other in set(removals) - {name}:
            self.files.pop(other, None)
            self.damaged.discard(other)
        self.damaged.discard(name)
        self.files.pop(name, None)  # again at the end: in order of saving
        self.files[name] = self.step

    @rule(name=st.sampled_from(NAMES), removals=st.sets(st.sampled_from(NAMES)))
    def save(self, name, removals):
        self.request(name, removals).result()
        self.handler.flush()
        self.now_there(name, removals)

    @rule(
        name=st.sampled_from(NAMES),
        removals=st.sets(st.sampled_from(NAMES)),
        call=st.sampled_from(CALLS),
        number=st.sampled_from([errno.ENOSPC, errno.EROFS, errno.EIO]),
    )
    def fail(self, name, removals, call, number):
        with FaultyDisk(number, calls=[call], times=math.inf):
            pending = self.request(name, removals)
            with pytest.raises(CheckpointWriteError):
                pending.result()
            self.handler.flush()

    @rule(name=st.sampled_from(NAMES), call=st.sampled_from(CALLS), at=st.integers(1, 2))
    def crash(self, name, call, at):
        """End the process in front of a call, as a kill would: nothing is cleaned up, the run begins anew."""
        crashed, renamed = [], []
        before = open_files()

        def die(made, number):
            if crashed or (made == call and disk.made.count(call) == at):
                crashed.append(made)
                raise Crash
            renamed.extend([1] if made == "rename" else [])

        with FaultyDisk(before=die) as disk:
            pending = self.request(name)
            try:
                pending.result()
            except CheckpointWriteError:
                assert crashed
            self.handler.finish_writing()
        if renamed:
            self.now_there(name)
        self.handler.bus.take_held_back()
        self.handler._leave_bus()
        for fd in open_files() - before:  # as the kernel does when a process dies
            with contextlib.suppress(OSError):
                os.close(fd)
        self.start()

    @precondition(lambda self: self.files)
    @rule(data=st.data(), place=st.floats(0, 1, exclude_max=True))
    def corrupt(self, data, place):
        name = data.draw(st.sampled_from(sorted(self.files)))
        with open(self.path(name), "r+b") as file:
            content = bytearray(file.read())
            content[int(place * len(content))] ^= 1
            file.seek(0)
            file.write(content)
        del self.files[name]
        self.damaged.add(name)

    @rule()
    def restart(self):
        self.handler.close()
        self.start()

    @rule()
    def resume(self):
        manifest = self.handler.resume(self.folder)
        newest = list(self.files.values())[-1:]
        assert [float(self.weight[0].detach()[0])] == newest if manifest is not None else newest == []

    @invariant()
    def agrees_with_the_model(self):
        if not hasattr(self, "folder"):
            return
        assert {name for name in os.listdir(self.folder) if not name.startswith(".")} == (
            set(self.files) | self.damaged
        )
        for name, step in self.files.items():
            assert float(trainbus.load(self.path(name))["module"]["0"].detach()[0]) == step
        for name in self.damaged:
            with pytest.raises(trainbus.CheckpointCorruptError):
                trainbus.verify(self.path(name))
        known = [os.path.basename(one.path) for one in CheckpointFolder(self.folder)]
        assert [name for name in known if name in self.files] == list(self.files)


def open_files():
    """Return the numbers of this process's open files."""
    with os.scandir("/dev/fd") as entries:
        # The one that is open for this alone leads nowhere any more once it is closed.
        numbers = [int(entry.name) for entry in entries]
    return {number for number in numbers if os.path.exists(f"/dev/fd/{number}")}


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(write_job, "PAUSES", (0.0, 0.0))


def explore(examples, steps):
    """Let hypothesis look for an order of events in which folder and model differ."""
    Run.TestCase.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    Run.TestCase("runTest").runTest()


class TestModel:
    def test_agrees(self):
        """Whatever happens in whatever order, the folder holds what the model says."""
        explore(examples=60, steps=20)

    @pytest.mark.full
    def test_agrees_at_length(self, request):
        """The same, with more and longer orders of events."""
        explore(examples=request.config.getoption("--runs") or 500, steps=40)

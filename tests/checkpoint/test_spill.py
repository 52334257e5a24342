"""Where the host has no memory for a copy of the state, it lies on the disk, and the file is the same."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest
import torch

from trainbus import Handler
from trainbus.checkpoint import page_locking, staging_memory
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.saver import Saver
from trainbus.checkpoint.staging_memory import StagingBuffer, StagingMemory, map_file
from trainbus.errors import CheckpointWriteError

from .simulated_cuda import SimulatedCuda

WAIT = 30
"""Seconds after which a test that hangs fails."""
LARGE = 40_000
"""Bytes from which on the system refuses memory here."""
MANIFEST = Manifest(contents="object")


def no_memory() -> OSError:
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.fixture(name="lack", autouse=True)
def _lack(monkeypatch) -> threading.Event:
    """While this is set, as at first, the system refuses memory for copies."""
    lack = threading.Event()
    lack.set()
    give = staging_memory.map_pages

    def refuse(size: int) -> Any:
        if lack.is_set() and size > LARGE:
            raise no_memory()
        return give(size)

    monkeypatch.setattr(staging_memory, "map_pages", refuse)
    return lack


@pytest.fixture(name="saver", params=[1, 2])
def _saver(request) -> Iterator[Saver]:
    with contextlib.closing(Saver(lambda *_, **__: None, max_pending=request.param)) as saver:
        yield saver


def ask(saver: Saver, path: Any, state: Any) -> PendingSave:
    """Ask for a save of *state*."""
    pending = PendingSave(str(path))
    saver.save(pending, lambda: state, lambda: MANIFEST)
    return pending


class TestSave:
    def test_changes_afterwards(self, saver, tmp_path):
        """
        Each file holds the values of its request, whatever happens to the state since.
        """
        weight = torch.zeros(LARGE)
        saves = []
        for number in range(5):
            weight.fill_(number)
            saves.append(ask(saver, tmp_path / f"{number}.pt", {"weight": weight}))
        weight.fill_(-1)

        for number, pending in enumerate(saves):
            pending.result(WAIT)
            assert load_file(pending.path)[0]["weight"].unique().tolist() == [number]

    def test_same_file(self, saver, tmp_path, lack):
        """
        It is byte for byte the file of a copy in memory, but for what a manifest says of its moment.
        """
        tied = torch.nn.Parameter(torch.arange(float(LARGE)).view(2, -1).t())
        state = {"a": tied, "b": [tied, tied[:2]], "c": torch.tensor([1 + 2j]).conj(), "n": 3}
        spilled = ask(saver, tmp_path / "a.pt", state)
        spilled.result(WAIT)
        lack.clear()
        with contextlib.closing(Saver(lambda *_, **__: None)) as other:
            copied = ask(other, tmp_path / "b.pt", state)
            copied.result(WAIT)

        one, two = ((tmp_path / name).read_bytes() for name in ("a.pt", "b.pt"))
        assert one[: -len(one) // 10] == two[: -len(two) // 10]
        assert str(load_file(spilled.path)[0]) == str(load_file(copied.path)[0])

    def test_told_once(self, tmp_path, caplog):
        """
        A buffer that lies on the disk says so when it is made, with the reason and the place.
        """
        folder = tmp_path / "not" / "there" / "yet"
        with contextlib.closing(Saver(lambda *_, **__: None)) as saver:
            for number in range(3):
                ask(saver, folder / f"{number}.pt", torch.zeros(LARGE)).result(WAIT)

        (message,) = caplog.messages
        assert "No host memory for a copy of the state, 0 MB (Cannot allocate memory)" in message
        assert repr(str(folder)) in message

    def test_nothing_is_left(self, saver, tmp_path):
        """
        The file has no name, so nothing has to be removed, also after a kill.
        """
        ask(saver, tmp_path / "a.pt", torch.zeros(LARGE)).result(WAIT)

        assert os.listdir(tmp_path) == ["a.pt"]

    def test_disk_without_room(self, saver, tmp_path, monkeypatch):
        """
        Where the disk has none either that save fails, with both reasons, and training goes on.
        """

        def refuse(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
        pending = ask(saver, tmp_path / "a.pt", torch.zeros(LARGE))

        with pytest.raises(CheckpointWriteError, match=r"Cannot allocate memory.*No space left on device"):
            pending.result(WAIT)
        assert ask(saver, tmp_path / "b.pt", torch.zeros(3)).result(WAIT) is not None

    def test_of_a_run(self, tmp_path, caplog):
        """
        A run has its files, prepared or not, and continues from them.
        """
        module = torch.nn.Linear(300, 300)
        optimizer = torch.optim.Adam(module.parameters())
        with Handler(module, optimizer, snapshot="overlap") as handler:
            handler.on("train_batch_end", lambda: handler.save_async(tmp_path / f"{handler.global_step}.pt"))
            for batch in handler.steps(3, [torch.ones(2, 300)]):
                module(batch).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                handler.prepare_saves()
        expected = {name: value.clone() for name, value in module.state_dict().items()}

        with Handler(module, optimizer) as handler:
            handler.resume(tmp_path)
            assert handler.global_step == 3
        assert all(value.equal(expected[name]) for name, value in module.state_dict().items())
        assert "No host memory" in caplog.text


class TestShardedSave:
    def test_is_written(self, save_sharded, tmp_path, caplog):
        """
        So it is for the part of a state that is divided among ranks.
        """
        save_sharded(tmp_path / "a", {"weight": torch.ones(LARGE)})

        assert "No host memory" in caplog.text
        assert sorted(os.listdir(tmp_path)) == ["a"]


class TestMemory:
    def test_nowhere_to_go(self):
        """
        Who names no folder is told that there is no memory, and a later request may find some.
        """
        memory = StagingMemory()
        with pytest.raises(OSError, match="Cannot allocate memory"):
            memory.acquire(LARGE + 1)

        assert len(memory.acquire(100).mapping) == 4096

    def test_is_not_touched(self, tmp_path):
        """
        It is not filled with zeros to be made warm: that would be a write to the disk.
        """
        buffer = StagingBuffer()
        buffer.reserve(LARGE + 1, str(tmp_path))
        buffer.mapping[0] = 7
        buffer.touch(threading.Event())

        assert buffer.mapping[0] == 7

    def test_is_not_locked(self, tmp_path):
        """
        Its pages are not kept in memory for a device, for there is none to spare.
        """
        cuda = SimulatedCuda(Random(0))
        buffer = StagingBuffer()
        buffer.reserve(LARGE + 1, str(tmp_path))

        assert page_locking.is_locked(buffer)
        page_locking.lock(buffer, torch.device("cpu"), cuda)
        assert cuda.locked == {}

    def test_system_that_sets_no_room_aside(self, tmp_path, monkeypatch):
        """
        Where no room can be set aside there is no such file.
        """
        monkeypatch.delattr(os, "posix_fallocate")

        with pytest.raises(OSError, match="sets no room aside"):
            map_file(LARGE, str(tmp_path))

    def test_takes_its_room_at_once(self, tmp_path, monkeypatch):
        """
        The disk has set aside all of it: a page that it had no room for later would kill the process.
        """
        taken = []
        set_aside = os.posix_fallocate

        def note(fd: int, *args: int) -> None:
            set_aside(fd, *args)
            taken.append(512 * os.fstat(fd).st_blocks)

        monkeypatch.setattr(os, "posix_fallocate", note)
        mapping = map_file(10_000, str(tmp_path))

        assert len(mapping) == 12_288
        assert [size >= 12_288 for size in taken] == [True]

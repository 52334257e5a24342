"""save, save_async and load without a handler."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

import trainbus
from trainbus.checkpoint import disk
from trainbus.testing import FaultyDisk


class TestSave:
    def test_round_trip(self, tmp_path):
        """What was saved is loaded, tied weights tied."""
        weight = torch.ones(3)
        trainbus.save({"a": weight, "b": weight, "n": [1, 2.5, "x"]}, tmp_path / "x.pt")
        state = trainbus.load(tmp_path / "x.pt")
        state["a"][0] = 5

        assert state["b"][0] == 5 and state["n"] == [1, 2.5, "x"]

    @pytest.mark.parametrize("wrap", [lambda v: {"v": v}, lambda v: [v], lambda v: v])
    @pytest.mark.parametrize("value", [np.arange(3), np.float64(0.5)])
    def test_numpy(self, tmp_path, wrap, value):
        """NumPy values come back as NumPy, wherever they stand."""
        trainbus.save(wrap(value), tmp_path / "x.pt")
        loaded = trainbus.load(tmp_path / "x.pt")
        inner = loaded["v"] if isinstance(loaded, dict) else loaded[0] if isinstance(loaded, list) else loaded

        assert type(inner) is type(value) and inner.dtype == value.dtype and np.array_equal(inner, value)

    def test_refuses_at_the_call(self, tmp_path):
        """What could not be loaded again is refused before anything is written."""
        with pytest.raises(trainbus.UnsavableStateError, match=r"state\['s'\]: frozenset: store set"):
            trainbus.save_async({"s": frozenset()}, tmp_path / "x.pt")
        assert list(tmp_path.iterdir()) == []

    def test_load_waits_for_a_pending_save(self, tmp_path, monkeypatch):
        """Loading a file that is still being written waits for it."""
        release, real = threading.Event(), disk.Disk.fsync

        def fsync(self, fd):
            assert release.wait(30)
            real(self, fd)

        monkeypatch.setattr(disk.Disk, "fsync", fsync)
        trainbus.save_async({"x": 1}, tmp_path / "x.pt")
        threading.Timer(0.1, release.set).start()

        assert trainbus.load(tmp_path / "x.pt") == {"x": 1}

    def test_load_waits_also_from_elsewhere(self, tmp_path, monkeypatch):
        """A pending save is known by where it goes, whatever the working directory is now."""
        (tmp_path / "sub").mkdir()
        monkeypatch.chdir(tmp_path)
        go = threading.Event()

        def hold(name, number):
            threading.Timer(0.2, go.set).start()
            assert go.wait(30)

        with FaultyDisk(calls=["fsync"], before=hold):
            trainbus.save_async({"a": torch.ones(1)}, "a.pt")
            os.chdir("sub")
            assert trainbus.load(tmp_path / "a.pt")["a"].item() == 1.0

    @pytest.mark.parametrize("path", ["new/", "new/.", "new/.."])
    def test_name_of_a_folder(self, tmp_path, monkeypatch, path):
        """A path that names a folder makes no file of that name."""
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match="it names a folder, not a file"):
            trainbus.save({}, path)

        assert not list(tmp_path.iterdir())

    def test_tensor_without_memory(self, tmp_path):
        """Zeros that have no place in memory, as forward AD makes them, are saved as zeros."""
        trainbus.save({"w": torch._efficientzerotensor(5)}, tmp_path / "a.pt")

        assert trainbus.load(tmp_path / "a.pt")["w"].equal(torch.zeros(5))

    def test_verify(self, tmp_path):
        """verify gives the manifest of a whole file and names the damage of another."""
        trainbus.save([1], tmp_path / "x.pt")
        assert trainbus.verify(tmp_path / "x.pt").contents == "object"
        (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-1])
        with pytest.raises(trainbus.CheckpointCorruptError, match=r"x\.pt.* is damaged: "):
            trainbus.verify(tmp_path / "x.pt")

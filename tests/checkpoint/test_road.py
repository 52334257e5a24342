"""Snapshot, writer, commit and load together."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from trainbus.checkpoint.background_writer import BackgroundWriter, PendingSave
from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.folder import CheckpointFolder
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.staging_copy import take_snapshot
from trainbus.checkpoint.staging_memory import StagingMemory


def ignore(event: str, **fields: Any) -> None:
    """Nobody listens."""


class TestTogether:
    def test_all_values_of_a_file_are_of_one_step(self, tmp_path):
        """
        In 200 checkpoints of a model that changes right after each request, no file is torn.
        """
        module = nn.Sequential(nn.Linear(40, 60), nn.BatchNorm1d(60), nn.Linear(60, 40))
        tensors = list(module.state_dict().values())
        memory = StagingMemory(3)
        writer = BackgroundWriter(ignore, max_pending=3)

        def write(step: int, state: Any) -> Callable[[], Manifest]:
            manifest = Manifest(contents="state", sequence=step, global_step=step)
            return lambda: commit(tmp_path / f"{step}.pt", manifest, lambda stream: torch.save(state, stream))

        for step in range(1, 201):
            for tensor in tensors:
                tensor.fill_(step)
            pending = PendingSave(f"{step}.pt", global_step=step)
            assert writer.admit(pending)
            snapshot = take_snapshot({"module": module.state_dict(), "step": step}, memory)
            writer.submit(pending, write(step, snapshot.state), release=snapshot.release)
            for tensor in tensors:
                tensor.fill_(-1)
        writer.close(60)

        files = list(CheckpointFolder(tmp_path))
        assert [file.manifest.global_step for file in files] == list(range(1, 201))
        for file in files:
            state, manifest = load_file(file.path)
            values = {float(value) for tensor in state["module"].values() for value in tensor.unique()}
            assert values == {float(manifest.global_step)} == {float(state["step"])}

    def test_size_of_the_file(self, tmp_path):
        """
        A file with its manifest is hardly longer than torch.save's, and with small views far shorter.
        """
        weight = nn.Parameter(torch.randn(300, 300))
        base = torch.randn(1_000_000)
        states = {"tied": {"a": weight, "b": weight.detach(), "c": weight.t()}, "view": {"a": base[:10]}}
        sizes = {}
        for name, state in states.items():
            torch.save(state, tmp_path / "plain.pt")
            snapshot = take_snapshot(state, StagingMemory())
            manifest = Manifest(contents="state", logs={str(n): 0.5 for n in range(5000)})
            commit(
                tmp_path / "ours.pt", manifest, lambda stream, state=snapshot.state: torch.save(state, stream)
            )
            sizes[name] = (os.stat(tmp_path / "ours.pt").st_size, os.stat(tmp_path / "plain.pt").st_size)

        ours, plain = sizes["tied"]
        assert ours <= plain + 64 * 1024
        ours, plain = sizes["view"]
        assert ours < plain / 10

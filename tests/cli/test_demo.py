"""``trainbus demo --json``; the demo as people run it is in tests/test_end_to_end.py."""

from __future__ import annotations

import json
import os

import pytest
import torch
from typer.testing import CliRunner

from trainbus.cli.app import app
from trainbus.handler import Handler


class TestJson:
    def test_one_object(self, tmp_path):
        """One object says what was trained, saved and lost; what people read goes to stderr."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        options = ["--epochs", "1", "--batches", "3", "--save-every", "2", "--json"]
        try:
            done = CliRunner().invoke(app, ["demo", str(tmp_path / "run"), *options])
        finally:
            torch.set_num_threads(threads)
        found = json.loads(done.stdout)

        assert done.exit_code == 0 and "A GPT of" in done.stderr
        assert (found["epoch"], found["global_step"], found["resumed"]) == (1, 3, False)
        assert [one["global_step"] for one in found["checkpoints"]] == [2, 3]
        assert found["cost"]["saves"] == 2 and "val_loss" in found["checkpoints"][1]["logs"]


class TestFolderOfAnother:
    @pytest.mark.parametrize("scheduled", [True, False])
    def test_other_run(self, tmp_path, scheduled):
        """Checkpoints of another run, of other parts or of another model, are refused in one line."""
        module = torch.nn.Linear(1, 1)
        optimizer = torch.optim.AdamW(module.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if scheduled else None
        with Handler(module, optimizer, scheduler=scheduler) as handler:
            handler.save(tmp_path / "last.pt")
        content = (tmp_path / "last.pt").read_bytes()
        done = CliRunner().invoke(app, ["demo", str(tmp_path), "--epochs", "1", "--batches", "1"])

        assert done.exit_code == 1
        assert f"{str(tmp_path)!r} holds checkpoints of another run" in done.output
        assert "Give the demo a folder of its own." in done.output
        assert (tmp_path / "last.pt").read_bytes() == content

    def test_file(self, tmp_path):
        """A file in the folder's place is refused before anything is made."""
        (tmp_path / "afile").write_text("x")
        done = CliRunner().invoke(app, ["demo", str(tmp_path / "afile")])

        assert done.exit_code == 2 and "is a file. The demo takes a folder" in done.stderr
        assert os.listdir(tmp_path) == ["afile"]

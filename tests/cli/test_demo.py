"""``trainbus demo --json``; the demo as people run it is in tests/test_end_to_end.py."""

from __future__ import annotations

import json

import torch
from typer.testing import CliRunner

from trainbus.cli.app import app


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

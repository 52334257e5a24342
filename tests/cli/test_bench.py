"""``trainbus bench``: what it measures, and what it makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from trainbus.cli.app import app
from trainbus.cli.bench import Cost, verdict


def bench(*arguments):
    """Run the command with little to do."""
    small = ["--size", "1", "--tensors", "2", "--step-ms", "1", "--rounds", "1"]
    return CliRunner().invoke(app, ["bench", *small, *map(str, arguments)])


class TestBench:
    def test_words(self, tmp_path):
        """It names each kind of save with what it cost and ends in a sentence about a training."""
        done = bench(tmp_path, "--every", "7")

        assert done.exit_code == 0, done.output
        for words in ("torch.save", 'snapshot="auto"', 'snapshot="overlap"', "not synced"):
            assert words in done.stdout
        assert "With a save every 7 batches, training spends" in done.stdout

    def test_json(self, tmp_path):
        """With --json it gives each warm save's cost, and when each of ours was on the disk."""
        found = json.loads(bench(tmp_path, "--json").stdout)

        assert found["load"] == {"mebibytes": 1, "tensors": 2, "step_seconds": 0.001, "device": "cpu"}
        plain, *ours = found["costs"]
        assert [len(cost["lost"]) for cost in found["costs"]] == [2, 2, 2]
        assert plain["durable"] == []
        assert all(len(cost["durable"]) == 3 and min(cost["durable"]) > 0 for cost in ours)
        assert found["step"] >= 0.001

    def test_leaves_nothing(self, tmp_path):
        """What it has written is gone afterwards, and a missing folder is made."""
        folder = tmp_path / "new"

        assert bench(folder).exit_code == 0
        assert os.listdir(folder) == []

    def test_progress(self, tmp_path):
        """It says on stderr how long it takes at least, each turn, and that a folder was not there."""
        lines = bench(tmp_path / "new").stderr.splitlines()

        assert lines == [
            f"The folder {tmp_path}/new is not there, and is made.",
            "3 turns of 120 steps: this takes more than 0 s.",
            "turn 1 of 3: torch.save",
            'turn 2 of 3: trainbus, snapshot="auto"',
            'turn 3 of 3: trainbus, snapshot="overlap"',
        ]

    def test_sigterm(self, tmp_path):
        """SIGTERM ends it as Ctrl-C does, and leaves nothing either."""
        command = [sys.executable, "-m", "trainbus", "bench", tmp_path, "--size", "1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            while not process.stderr.readline().startswith("turn 1"):
                assert process.poll() is None
            assert len(os.listdir(tmp_path)) == 1
            process.terminate()
            _, told = process.communicate(timeout=60)

        assert process.returncode == 128 + signal.SIGTERM and "Traceback" not in told
        assert os.listdir(tmp_path) == []

    def test_more_tensors_than_numbers(self, tmp_path):
        """More tensors than there are numbers to be in them are refused, before a folder is made."""
        done = bench(tmp_path / "new", "--tensors", 262_145)

        assert done.exit_code == 2
        said = " ".join(done.stderr.replace("│", "").split())
        assert "--size 1 is 262,144 numbers, too few for --tensors 262145" in said
        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("device", ["nowhere", "cuda:99"])
    def test_no_such_device(self, tmp_path, device):
        """A device that cannot be used is refused by name, before anything is written."""
        done = bench(tmp_path, "--device", device)

        assert done.exit_code == 2
        assert f"no device '{device}' can be used here" in " ".join(done.stderr.replace("│", "").split())
        assert os.listdir(tmp_path) == []


def costs(plain, auto, overlap, noise=0.0):
    """Costs of three kinds of save, in seconds."""
    return [Cost("", [median - noise, median, median + noise]) for median in (plain, auto, overlap)]


class TestVerdict:
    def test_share(self):
        """It says which part of the time the saves take: one of 0.1 s in 100 steps of 0.1 s is a 101st."""
        first, *_ = verdict(costs(1.0, 0.1, 0.1), step=0.1, every=100)

        assert "a save every 100 batches" in first and "0.99%" in first and "torch.save 9.09%" in first

    def test_much(self):
        """Where they take more than a twentieth, it says after how many batches they would not."""
        words = verdict(costs(1.0, 1.0, 1.0), step=0.1, every=10)

        assert "That is much. Every 190 batches it would be 5%." in words

    def test_no_cost(self):
        """A cost below zero is noise and counts as none."""
        first, *_ = verdict(costs(-0.1, -0.2, -0.3), step=0.1, every=10)

        assert "spends 0.00% of its time on them, with torch.save 0.00%" in first

    @pytest.mark.parametrize(
        ("overlap", "noise", "words"),
        [(0.1, 0.0, "saves another 400 ms"), (0.45, 0.1, "no difference"), (0.6, 0.0, "no difference")],
    )
    def test_overlap(self, overlap, noise, words):
        """It recommends the promise of snapshot="overlap" only where the gain is more than noise."""
        assert words in verdict(costs(1.0, 0.5, overlap, noise), step=0.1, every=100)[-1]

"""Kill a training at any moment, run it again: the same weights as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import trainbus
from trainbus import CheckpointFolder

TRAINING = Path(__file__).parent / "training"
EXACT = ["no workers", "generator", "sampler", "workers", "persistent workers", "stream", "list", "stateful"]
# Of 3 epochs with 8 batches (in groups of two) and 3 validation batches.
MOMENTS = {
    "first batch": ["train_batch_end", 1],
    "inside accumulation": ["train_batch_begin", 12],
    "after a step": ["train_batch_end", 12],
    "last batch of an epoch": ["train_batch_end", 16],
    "before validation": ["val_begin", 2],
    "in validation": ["val_batch_end", 5],
    "after validation": ["val_end", 2],
    "between epochs": ["epoch_begin", 3],
    "end of an epoch": ["epoch_end", 2],
    "last event": ["epoch_end", 3],
}


class KillServer:
    """Trainings in processes forked from one that has torch."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, TRAINING / "kill_server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def train(self, folder: Path, loader: str, kill: list | None = None, seed: int = 0) -> int:
        """Run one training and return its exit code, negative for a signal."""
        request = {"folder": str(folder), "loader": loader, "kill": kill, "seed": seed}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def server():
    """A kill server for this module."""
    server = KillServer()
    yield server
    server.process.communicate(timeout=30)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """The folder of an uninterrupted training for each kind of loader, made once."""
    folders: dict[str, Path] = {}

    def of(loader: str) -> Path:
        if loader not in folders:
            folders[loader] = tmp_path_factory.mktemp("whole")
            assert server.train(folders[loader], loader) == 0
        return folders[loader]

    return of


def assert_same(one: object, other: object, path: str = "state") -> None:
    """Compare two states bit for bit."""
    assert type(one) is type(other), path
    if isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_same(one[key], other[key], f"{path}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{path}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), path
    else:
        assert one == other, path


def metrics(folder: Path) -> dict[int, dict]:
    """Return each epoch's metrics; an epoch that was done twice counts as its last."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {line["epoch"]: line for line in map(json.loads, lines)}


def assert_same_end(folder: Path, whole: Path) -> None:
    """Both trainings ended in the same weights, optimizer, random numbers and metrics."""
    mine, theirs = trainbus.load(folder / "end.pt"), trainbus.load(whole / "end.pt")
    for key in ("module", "optimizer", "scheduler", "progress", "rng"):
        assert_same(mine[key], theirs[key], key)
    assert metrics(folder) == metrics(whole)
    best = [trainbus.load(one / "best.pt") for one in (folder, whole)]
    assert_same(best[0]["module"], best[1]["module"], "best")


class TestKilled:
    """SIGKILL at chosen moments, with the last save durable or not; then the same script again."""

    @pytest.mark.parametrize("durable", [True, False], ids=["durable", "in flight"])
    @pytest.mark.parametrize("moment", MOMENTS)
    def test_without_workers(self, server, whole, tmp_path, moment, durable):
        """Map-style data without workers: everything is exact, augmentation included."""
        self.kill_and_compare(server, whole, tmp_path, "no workers", moment, durable)

    @pytest.mark.parametrize("loader", EXACT[1:])
    def test_other_loaders_in_the_middle(self, server, whole, tmp_path, loader):
        """Every row of the table, where it says exact."""
        self.kill_and_compare(server, whole, tmp_path, loader, "after a step", durable=True)

    @pytest.mark.full
    @pytest.mark.parametrize("durable", [True, False], ids=["durable", "in flight"])
    @pytest.mark.parametrize("moment", MOMENTS)
    @pytest.mark.parametrize("loader", EXACT[1:])
    def test_other_loaders(self, server, whole, tmp_path, loader, moment, durable):
        """Every row of the table at every moment."""
        self.kill_and_compare(server, whole, tmp_path, loader, moment, durable)

    def kill_and_compare(self, server, whole, tmp_path, loader, moment, durable):
        assert server.train(tmp_path, loader, [*MOMENTS[moment], durable]) == -signal.SIGKILL
        # Where there is something to resume from, the seed of the new process must not matter.
        assert server.train(tmp_path, loader, seed=99 if any(CheckpointFolder(tmp_path)) else 0) == 0
        assert_same_end(tmp_path, whole(loader))

    def test_again_and_again(self, server, whole, tmp_path):
        """A run that is killed every few batches arrives where the undisturbed one does."""
        for round_ in range(30):
            if (
                server.train(tmp_path, "no workers", ["train_batch_end", 3, round_ % 2 == 0], seed=round_)
                == 0
            ):
                break
            server.train(tmp_path, "no workers", ["val_batch_end", 2, True], seed=round_)
        else:
            server.train(tmp_path, "no workers")

        assert_same_end(tmp_path, whole("no workers"))


class TestDemo:
    """The demo, as people run it."""

    COMMAND = ("demo", "--epochs", "2", "--batches", "24", "--save-every", "3")

    def start(self, folder: Path) -> subprocess.Popen:
        main = "from trainbus.cli import main; main()"
        command, *options = self.COMMAND
        return subprocess.Popen(
            [sys.executable, "-c", main, command, str(folder), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Two busy processes with a thread for each core wait for each other most of the time.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    @pytest.mark.full
    def test_killed_at_random_moments(self, tmp_path):
        """SIGKILL three times at random moments, then to the end: the same weights, bit for bit."""
        seed = int(os.environ.get("TRAINBUS_TEST_SEED", time.time()))
        print(f"TRAINBUS_TEST_SEED={seed}")
        moments = random.Random(seed)
        whole, killed = tmp_path / "whole", tmp_path / "killed"
        uninterrupted = self.start(whole)
        uninterrupted.communicate(timeout=120)
        for _ in range(3):
            process = self.start(killed)
            self.wait_for_new_file(process, killed, moments.randrange(1, 5))
            time.sleep(moments.random() / 5)
            process.kill()
            process.communicate()
        last = self.start(killed)
        output, _ = last.communicate(timeout=120)
        assert last.returncode == 0 and uninterrupted.returncode == 0, output
        mine, theirs = (trainbus.load(folder / "last.pt") for folder in (killed, whole))
        for key in ("module", "optimizer", "progress"):
            assert_same(mine[key], theirs[key], key)
        assert_same(mine["rng"]["torch"], theirs["rng"]["torch"], "rng")  # the others it does not use
        assert "Continuing in epoch" in output and "best.pt" in output and "training lost" in output

    @staticmethod
    def wait_for_new_file(process: subprocess.Popen, folder: Path, count: int) -> None:
        """Return once *count* more saves are durable, or the process is done."""
        begin = CheckpointFolder(folder).greatest_sequence()
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if CheckpointFolder(folder).greatest_sequence() >= begin + count:
                return
            time.sleep(0.01)


class TestBest:
    def test_survives_a_kill(self, tmp_path):
        """Losses .9, .5, kill, resume from the file of .5, then .7: best.pt still holds .5."""
        script = (
            "import os, signal, sys, torch\n"
            "from trainbus import Handler\n"
            "from trainbus_callbacks import ModelCheckpoint\n"
            "with Handler(torch.nn.Linear(1, 1)) as handler:\n"
            "    handler.add_callback(ModelCheckpoint('best.pt', monitor='val_loss', save_best_only=True))\n"
            "    handler.resume('.')\n"
            "    for epoch in handler.epochs(3):\n"
            "        if epoch == 2 and not handler.resumed:\n"
            "            handler.flush()\n"
            "            os.kill(os.getpid(), signal.SIGKILL)\n"
            "        handler.log(val_loss=[.9, .5, .7][epoch])\n"
        )
        codes = [subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode for _ in range(2)]

        assert codes == [-signal.SIGKILL, 0]
        assert trainbus.read_manifest(tmp_path / "best.pt").score == 0.5


class TestReturnFromMain:
    def test_completes_the_file(self, tmp_path):
        """A script that ends right after save_async leaves a complete file."""
        script = (
            "import torch, trainbus\n"
            "def main():\n"
            "    trainbus.save_async({'x': torch.ones(3_000_000)}, 'a.pt')\n"
            "main()\n"
        )
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)

        assert trainbus.verify(tmp_path / "a.pt").contents == "object"
        assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


class TestForeignReader:
    def test_plain_torch_load(self, tmp_path):
        """A checkpoint opens where trainbus cannot be imported, with tied weights tied."""
        weight = torch.ones(4)
        trainbus.save({"a": weight, "b": weight}, tmp_path / "a.pt")
        script = (
            "import sys, torch\n"
            "sys.modules['trainbus'] = sys.modules['trainbus_callbacks'] = None\n"
            "state = torch.load('a.pt', weights_only=True)\n"
            "state['a'][0] = 5\n"
            "assert state['b'][0] == 5\n"
        )
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=60)

"""Ranks: processes started by torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture
def torchrun():
    """Return a function that runs a script on so many ranks, and returns its output; none is left behind."""

    def run(ranks: int, script: Path, *arguments: object, cwd: Path | None = None) -> str:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        process = subprocess.Popen(
            [*command, str(ranks), str(script), *map(str, arguments)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=cwd,
            start_new_session=True,
        )
        try:
            return process.communicate(timeout=100)[0]
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # torchrun ends its ranks
            pytest.fail(f"The ranks hang.\n{process.communicate(timeout=60)[0]}")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

    return run


@pytest.fixture
def train(torchrun, tmp_path):
    """Return a function that runs a scenario of ``train.py`` and returns what each rank that ended told."""
    runs = iter(range(100))

    def run(scenario: str, ranks: int = 2, *, folder: str = "run", **options: object) -> dict[int, dict]:
        out = tmp_path / f"out {next(runs)}"
        named = [text for name, value in options.items() for text in (f"--{name}", value)]
        printed = torchrun(ranks, HERE / "train.py", scenario, tmp_path / folder, out, *named)
        print(printed)
        return {int(path.stem): json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}

    return run

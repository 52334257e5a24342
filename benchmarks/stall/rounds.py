"""Runs peers and workloads round by round, each run in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.stall.measure import Job

__all__ = ["run_all"]

_ROOT = Path(__file__).parents[2]
_TIMEOUT = 1800.0  # seconds; a run that takes longer hangs


def run_all(
    jobs: list[Job], rounds: int, folder: str, tell: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    """
    Carry out *jobs* in their order, *rounds* times. A job that cannot run is not tried again.

    Args:
        jobs: Their folders are made inside of *folder*, and are empty again after each run.
        rounds: How often.
        folder: On the disk to measure.
        tell: Called with a line about each run.

    Yields:
        All results so far, after each round.
    """
    results: list[dict[str, Any]] = []
    hopeless: set[tuple[str, str]] = set()
    for number in range(rounds):
        for job in jobs:
            if (job.workload, job.peer) in hopeless:
                continue
            tell(f"round {number + 1} of {rounds}: {job.workload}, {job.peer}")
            result = {**_run(job, folder), "round": number}
            del result["folder"]
            if "error" in result:
                tell(f"  {result['error']}")
                hopeless.add((job.workload, job.peer))
            results.append(result)
        yield results


def _run(job: Job, folder: str) -> dict[str, Any]:
    os.makedirs(job.folder)
    paths = [os.path.join(folder, name) for name in ("job.json", "result.json")]
    with open(paths[0], "w") as file:
        json.dump(asdict(job), file)
    try:
        return _run_child(job, *paths)
    finally:
        shutil.rmtree(job.folder)
        # What this run has left to the kernel to write must not slow down the next.
        os.sync()


def _run_child(job: Job, job_path: str, result_path: str) -> dict[str, Any]:
    if os.path.exists(result_path):
        os.remove(result_path)
    command = [sys.executable, "-m", "benchmarks.stall.measure", job_path, result_path]
    try:
        child = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=_TIMEOUT)
    except subprocess.TimeoutExpired:
        return {**asdict(job), "error": f"not done after {_TIMEOUT:.0f} s"}
    if not os.path.exists(result_path):
        last = (child.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return {**asdict(job), "error": f"ended with exit status {child.returncode}: {last}"}
    with open(result_path) as file:
        result: dict[str, Any] = json.load(file)
    return result

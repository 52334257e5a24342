"""The command line: ``python -m benchmarks.stall --help``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch

from benchmarks.stall import peers, summary
from benchmarks.stall.measure import LIMITS, Job
from benchmarks.stall.rounds import run_all
from benchmarks.stall.table import table
from benchmarks.stall.timeline import draw
from benchmarks.stall.workloads import WORKLOADS, Unavailable, runnable, select

# The settings of a full measurement, of one for a few minutes, and of one that only shows that it runs.
_FULL = {
    "workload": ["host-idle", "cpu", *(["gpu"] if torch.cuda.is_available() else [])],
    "peers": list(peers.MAKERS),
    "rounds": 5,
    "saves": 6,
    "size_mib": 512,
}
_QUICK = {
    "workload": ["host-idle-64", "host-idle-4096"],
    "peers": ["trainbus", "torch-save", "dcp-staged"],
    "rounds": 2,
    "saves": 4,
    "save_every": 10,
    "size_mib": 512,
}
_SMOKE = {
    "workload": ["host-idle-64-20ms"],
    "peers": ["trainbus", "torch-save"],
    "rounds": 1,
    "saves": 2,
    "save_every": 5,
    "size_mib": 8,
}

_PATHS = ("folder", "json", "plot")  # of one machine, nobody else's
_PACKAGES = ("trainbus", "numpy", "isal", "xxhash", "pytorch-lightning", "pytorch-ignite", "torchsnapshot")


def main() -> None:
    """Measure, print, write."""
    options, begun = _options(), datetime.now(UTC).isoformat(timespec="seconds")
    with tempfile.TemporaryDirectory(prefix="stall-", dir=options.folder) as folder:
        jobs = _jobs(options, folder)
        runs: list[dict[str, Any]] = []
        for runs in run_all(jobs, options.rounds, folder, lambda line: print(line, file=sys.stderr)):
            if options.json not in (None, "-"):
                with open(options.json, "w") as file:
                    json.dump(_report(options, begun, runs), file)
    report = _report(options, begun, runs)
    if options.json == "-":
        print(json.dumps(report))
    else:
        print("\n\n".join(table(one["rows"], one["limits"]) for one in report["workloads"].values()))
    if options.plot:
        for name, one in report["workloads"].items():
            draw(runs, one["rows"], _plot_path(options, name))
    if any(run["peer"] == peers.OURS and "error" in run for run in runs):
        sys.exit(1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stall", description="What a checkpoint costs the training thread."
    )
    add = parser.add_argument
    add("--workload", nargs="+", metavar="NAME", help=f"of {', '.join(WORKLOADS)}, or how several begin")
    add("--peers", nargs="+", metavar="NAME", help=f"of {', '.join(peers.MAKERS)}, or how several begin")
    add("--rounds", type=int, help="rounds through all peers (default: 5)")
    add("--saves", type=int, help="saves of each peer in a round, after the first (default: 6)")
    add("--save-every", type=int, help="steps from a save to the next (default: the workload's own)")
    add("--size-mib", type=int, help="state of the host-idle workloads (default: 512)")
    add("--folder", default=".", help="where to write; a temporary folder in it, removed at the end")
    add("--json", nargs="?", const="-", metavar="FILE", help="into a file, or instead of the table")
    add("--plot", metavar="FILE.png", help="timeline of the steps; with several workloads one file each")
    add("--quick", action="store_true", help="some ten minutes: 512 MiB, two rounds, ours and two others")
    add("--smoke", action="store_true", help="a few seconds, to see that it runs; its numbers say nothing")
    add("--no-limits", action="store_true", help="leave out the disk's limit, CRC, load and fork")
    options = parser.parse_args()
    for name, value in (_SMOKE if options.smoke else _QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.folder = os.path.abspath(options.folder)
    try:
        options.workload = runnable(options.workload)
        options.peers = select(options.peers, list(peers.MAKERS))
    except Unavailable as error:
        parser.error(str(error))
    return options


def _jobs(options: argparse.Namespace, folder: str) -> list[Job]:
    names = list(options.peers)
    if not (options.quick or options.smoke or options.no_limits):
        names.insert(0, LIMITS)
    return [
        Job(
            peer=name,
            workload=workload,
            folder=os.path.join(folder, f"{workload}-{name}"),
            size_mib=options.size_mib,
            save_every=options.save_every or WORKLOADS[workload].save_every,
            saves=options.saves,
            warmup=2 if options.smoke else WORKLOADS[workload].warmup,
            baseline=8 if options.smoke else 20,
            pause_saves=1 if options.smoke else 2,
            checks=1,
        )
        for workload in options.workload
        for name in names
    ]


def _report(options: argparse.Namespace, begun: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "begun": begun,
        "options": {name: value for name, value in vars(options).items() if name not in _PATHS},
        "machine": {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernel": platform.release(),
            "cpus": os.cpu_count(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
        "packages": {name: _version(name) for name in _PACKAGES},
        "workloads": {
            name: {"rows": summary.rows(runs, name), "limits": summary.limits(runs, name)}
            for name in options.workload
        },
        "runs": runs,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _plot_path(options: argparse.Namespace, workload: str) -> str:
    if len(options.workload) == 1:
        return str(options.plot)
    stem, ending = os.path.splitext(options.plot)
    return f"{stem}-{workload}{ending or '.png'}"


if __name__ == "__main__":
    main()

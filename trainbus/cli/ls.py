"""``trainbus ls``: the checkpoints of a folder, by what their ends say. Needs no torch."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder, best_of, latest_of
from trainbus.cli.text import printable

__all__ = ["judged_by", "run"]

MOST_ROWS_OF_A_TABLE = 100
_COLUMNS = ("file", "epoch", "step", "metrics", "size", "age", "")
_AGES = ((86_400, "d"), (3_600, "h"), (60, "min"), (0, "s"))


def run(folder: str, monitor: str | None, mode: str | None, *, as_json: bool) -> None:
    """
    Print a line for each checkpoint of *folder*, in the order in which they were saved.

    A table on a terminal for up to `MOST_ROWS_OF_A_TABLE`, else columns divided by tabs. Reads a few
    kilobytes from the end of each file.

    Args:
        folder: Where they are.
        monitor: The metric by which one is the best; None: the one that the newest was judged by.
        mode: ``"min"`` or ``"max"``; None: as the newest has it.
        as_json: One object a line instead: the manifest's facts, ``best`` and ``newest``.

    Raises:
        typer.BadParameter: *folder* is none, or *monitor* is given without a *mode* that is known.
    """
    if not os.path.isdir(os.path.expanduser(folder)):
        what = "is a file: try `trainbus verify`" if os.path.exists(folder) else "does not exist"
        raise typer.BadParameter(f"{folder!r} {what}. `ls` takes a folder.")
    files = list(CheckpointFolder(folder))
    by = judged_by(files, monitor, mode)
    best, newest = best_of(files, *by) if by is not None else None, latest_of(files)
    marks: dict[str, str] = {}
    if newest is not None:
        marks[newest.path] = "newest"
    if best is not None:
        marks[best.path] = "best, newest" if best is newest else "best"
    if as_json:
        for file in files:
            print(json.dumps(_facts(file, marks.get(file.path, ""))))
        return
    now = time.time()
    rows = [_row(file, marks.get(file.path, ""), now) for file in files]
    _print(rows, folder)


def judged_by(
    files: Sequence[CheckpointFile], monitor: str | None, mode: str | None
) -> tuple[str, str] | None:
    """
    Return by which metric and mode one of *files* is the best, or None if they were judged by nothing.

    Args:
        files: Of one folder, in order of saving.
        monitor: The metric; None: the one that the newest was judged by.
        mode: ``"min"`` or ``"max"``; None: as the newest has it.

    Raises:
        typer.BadParameter: *mode* is another word, or no file says which is meant.
    """
    if mode not in (None, "min", "max"):
        raise typer.BadParameter(f"--mode must be min or max, got {mode!r}.")
    judged = [file.manifest for file in files if monitor in (None, file.manifest.monitor)]
    latest = next((one for one in reversed(judged) if one.monitor is not None), None)
    monitor = monitor or (latest.monitor if latest is not None else None)
    if monitor is None:
        return None
    mode = mode or (latest.mode if latest is not None else None)
    if mode is None:
        raise typer.BadParameter(
            f"no file here was judged by {monitor!r}, so nobody knows whether less or more of it is better, "
            "and --mode must say it: min or max."
        )
    return monitor, mode


def _facts(file: CheckpointFile, mark: str) -> dict[str, Any]:
    manifest = file.manifest
    return {
        "path": file.path,
        "contents": manifest.contents,
        "epoch": manifest.epoch,
        "global_step": manifest.global_step,
        # JSON has no other numbers than finite ones.
        "logs": {k: v if math.isfinite(v) else str(v) for k, v in manifest.logs.items()},
        "monitor": manifest.monitor,
        "mode": manifest.mode,
        "size": manifest.size,
        "created": manifest.created,
        "stream": manifest.stream,
        "run_id": manifest.run_id,
        "sequence": manifest.sequence,
        "interrupted": manifest.interrupted,
        "best": "best" in mark,
        "newest": "newest" in mark,
    }


def _row(file: CheckpointFile, mark: str, now: float) -> tuple[str, ...]:
    manifest = file.manifest
    trained = manifest.contents != "object"
    kind = "" if manifest.contents == "state" else manifest.contents
    return (
        printable(os.path.basename(file.path)),
        str(manifest.epoch + 1) if trained else "",
        str(manifest.global_step) if trained else "",
        "  ".join(f"{printable(name)}={value:.4g}" for name, value in manifest.logs.items()),
        f"{manifest.size / 1e6:,.1f} MB",
        _age(now - manifest.created),
        ", ".join(filter(None, (mark, kind, "interrupted" if manifest.interrupted else ""))),
    )


def _age(seconds: float) -> str:
    seconds = max(0.0, seconds)
    length, unit = next((length, unit) for length, unit in _AGES if seconds >= length)
    return f"{seconds / (length or 1):.0f} {unit}"


def _print(rows: Sequence[tuple[str, ...]], folder: str) -> None:
    if not rows:
        print(f"No checkpoints in {folder}.", file=sys.stderr)
        return
    if not sys.stdout.isatty() or len(rows) > MOST_ROWS_OF_A_TABLE:
        print("\t".join((*_COLUMNS[:-1], "mark")))
        for row in rows:
            print("\t".join(row))
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in _COLUMNS:
        right = name in ("epoch", "step", "size", "age")
        table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*row, style="bold" if row[-1] else None)
    console = Console(highlight=False, markup=False)
    console.print(table)

"""``trainbus prune``: remove the checkpoints of a folder that need not stay. Needs no torch."""

from __future__ import annotations

import functools
import json
import operator
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import typer

from trainbus.checkpoint.commit import remove
from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder, ranked
from trainbus.checkpoint.retention import KeepEvery, KeepLast, Retention, superfluous
from trainbus.cli.text import printable

__all__ = ["run"]


@dataclass(frozen=True)
class _KeepBestBy(Retention):
    """Keep the best by any metric in the logs, and not only by the one that the files were judged by."""

    monitor: str
    number: int
    mode: str

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        return ranked(files, self.monitor, self.mode)[: self.number]


def run(
    folder: str,
    keep_last: int | None,
    keep_best: Sequence[str],
    keep_every: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    """
    Remove what no rule keeps, oldest first, and print a line for each file.

    The rules hold for each stream (who asked for the saves) of each run and those it continues by
    itself, as `ModelCheckpoint` applies them. Of each its newest file and the best by what it was judged
    by always stay. Damaged files, interrupted ones, those that are no run's, links and copies
    are left alone.

    Args:
        folder: Where they are.
        keep_last: How many of the newest stay.
        keep_best: ``metric:number``, or ``metric:number:mode`` where no file was judged by it.
        keep_every: Of each so many epochs one stays.
        dry_run: Remove nothing.
        as_json: One object a line: ``path``, ``size`` (bytes) and whether it was ``removed``.

    Raises:
        typer.BadParameter: *folder* is none, or there is no rule, or one cannot be read.
        typer.Exit: With code 1, after the others, if a file could not be removed.
    """
    if not os.path.isdir(os.path.expanduser(folder)):
        raise typer.BadParameter(f"{folder!r} is no folder. `prune` takes a folder of checkpoints.")
    files = [
        file
        for file in CheckpointFolder(folder)
        if file.manifest.contents != "object" and not file.manifest.interrupted and file.is_original
    ]
    rules: list[Retention] = [_best_rule(text, files) for text in keep_best]
    rules += [KeepLast(keep_last)] if keep_last else []
    rules += [KeepEvery(epochs=keep_every)] if keep_every else []
    if not rules:
        raise typer.BadParameter(
            "nothing says which checkpoints stay. Give --keep-last, --keep-best or --keep-every."
        )
    keep = functools.reduce(operator.or_, rules)
    gone = {path for group in _groups(files) for path in superfluous(group, keep)}
    chosen = [file for file in files if file.path in gone]
    removed = [file for file in chosen if _remove(file, dry_run, as_json)]
    if not as_json:
        done = "would be removed" if dry_run else "removed"
        freed = sum(file.manifest.size for file in removed) / 1e6
        print(f"{len(removed)} of {len(files)} checkpoints {done}, {freed:,.1f} MB.", file=sys.stderr)
    if len(removed) < len(chosen):
        raise typer.Exit(1)


def _remove(file: CheckpointFile, dry_run: bool, as_json: bool) -> bool:
    """Remove one, unless it is a dry run, and say so; return False, and say why, if it stays."""
    try:
        if not dry_run:
            remove(file.path)
    except OSError as error:
        print(f"Cannot remove {printable(file.path)}: {error.strerror or error}.", file=sys.stderr)
        return False
    if as_json:
        facts = {"path": file.path, "size": file.manifest.size, "removed": not dry_run}
        print(json.dumps(facts), flush=True)
    else:
        print(f"{'would remove' if dry_run else 'removed'}  {printable(file.path)}", flush=True)
    return True


def _groups(files: Sequence[CheckpointFile]) -> Iterator[list[CheckpointFile]]:
    """Give the files of each stream of each run and those it continues, beginning with the newest run."""
    left = list(files)
    while left:
        newest = left[-1].manifest
        runs = {newest.run_id, *newest.parents}
        group = [
            file for file in left if file.manifest.run_id in runs and file.manifest.stream == newest.stream
        ]
        yield group
        left = [file for file in left if file not in group]


def _best_rule(text: str, files: Sequence[CheckpointFile]) -> Retention:
    parts = text.split(":")
    # The metric's own name may hold colons.
    mode = parts.pop() if parts[-1] in ("min", "max") else None
    number = parts.pop() if len(parts) > 1 else ""
    monitor = ":".join(parts)
    if not monitor or not number.isdecimal() or int(number) < 1:
        raise typer.BadParameter(
            f"--keep-best {text!r} cannot be read. Write the metric and how many stay: val_loss:2, or "
            "with the direction acc:2:max."
        )
    if mode is None:
        judged = (file.manifest.mode for file in reversed(files) if file.manifest.monitor == monitor)
        mode = next(judged, None)
    if mode is None:
        raise typer.BadParameter(
            f"no file here was judged by {monitor!r}, so nobody knows whether less or more of it is better. "
            f"Write {monitor}:{number}:min or {monitor}:{number}:max."
        )
    if not ranked(files, monitor, mode):
        raise typer.BadParameter(f"no file here has the metric {monitor!r}: see `trainbus ls`.")
    return _KeepBestBy(monitor, int(number), mode)

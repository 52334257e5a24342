"""What earlier runs left on the disk: the best file of the run that is resumed, and others. Reads only."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace

from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.retention import KeepBest, is_abandoned
from trainbus.checkpoint.sharded_format import read_manifest
from trainbus.errors import CheckpointCorruptError
from trainbus_callbacks.best_score import Mode, Standing
from trainbus_callbacks.naming import NameTemplate
from trainbus_callbacks.scalars import describe

__all__ = ["best_there", "reconcile", "warning_of_other_runs"]

logger = logging.getLogger("trainbus")


def reconcile(standing: Standing, monitor: str | None, template: NameTemplate) -> Standing:
    """
    Return *standing* as far as the file at its ``best_path`` bears it out.

    A file that is gone from there is looked for where *template* puts them (the folder was moved). What the
    file says of its own score counts more than *standing*.

    Warns:
        RuntimeWarning: If there is no such file, or it does not tell: the best is forgotten.
    """
    path = standing.best_path
    if path is None or monitor is None:
        return standing
    if not os.path.exists(path):
        path = template.path_of(os.path.basename(path))
    try:
        score = _score(read_manifest(path), monitor)
        problem = f"it does not tell a finite {monitor}"
    except CheckpointCorruptError as error:
        score, problem = None, f"it is damaged, {error.reason}"
    except OSError as error:
        score, problem = None, f"{error.strerror or error}"
    if score is None or not math.isfinite(score):
        warnings.warn(
            f"The file {standing.best_path!r} of the best {monitor} ({standing.best_score}) is lost: "
            f"{problem}. That best is forgotten: the best file that is still there counts, or without one "
            f"the next finite {monitor}. Put the file back to keep it.",
            RuntimeWarning,
            stacklevel=4,  # load_state_dict, and whoever calls it
        )
        return replace(standing, best_score=None, best_path=None)
    if score != standing.best_score:
        logger.warning(
            "%r holds %s %s, not %s as the loaded state has it; the file is believed.",
            path,
            monitor,
            score,
            standing.best_score,
        )
    return replace(standing, best_score=score, best_path=path)


def best_there(
    template: NameTemplate,
    stream: str,
    left_at: Mapping[str, tuple[int, int]],
    monitor: str,
    mode: Mode,
    *,
    others: Collection[str] | None = None,
) -> Standing:
    """
    Return the best that earlier runs have saved, by the files that are there. Reads the folder.

    A checkpoint that another callback took has this one's state from before its own save of that moment.
    What a run has saved behind the point at which it was left does not count: who goes back does not want
    it to. But a file whose name is always the same does, because the next save would overwrite it.

    Args:
        template: Says where they lie.
        stream: Who saved them.
        left_at: Where each run that this one continues was left, by its id.
        monitor: The metric that they were judged by.
        mode: In which direction.
        others: Streams of the run's other callbacks. If given, files of all but these count that are named
            by *template*: with other arguments the callback was another stream. None: *stream* alone.

    Raises:
        OSError: The folder cannot be read.
    """

    def is_mine(file: CheckpointFile) -> bool:
        if others is None or file.manifest.stream == stream:
            return file.manifest.stream == stream
        return file.manifest.stream not in others and template.matches(os.path.basename(file.path))

    files = [
        file
        for file in CheckpointFolder(template.folder)
        if is_mine(file)
        and file.manifest.run_id in left_at
        and (file.manifest.monitor, file.manifest.mode) == (monitor, mode)
        and not (template.fields and is_abandoned(file.manifest, left_at))
        and file.is_original
    ]
    best = KeepBest(1).kept(files)
    if not best:
        return Standing()
    last = files[-1].manifest
    path = template.path_of(os.path.basename(best[0].path))
    return Standing(best[0].manifest.score, path, last.epoch, last.global_step)


def warning_of_other_runs(template: NameTemplate, run_id: str, monitor: str | None, mode: Mode) -> str | None:
    """Return what to say of other runs' files under *template*, or None. Reads the folder."""
    theirs = [
        file
        for file in CheckpointFolder(template.folder)
        if file.manifest.run_id != run_id and template.matches(os.path.basename(file.path))
    ]
    if not theirs:
        return None
    newest = theirs[-1]
    files = "1 checkpoint" if len(theirs) == 1 else f"{len(theirs)} checkpoints"
    return (
        f"This run did not resume, and {template.folder!r} holds {files} of another run under its name "
        f"{template.last!r}: the newest is {os.path.basename(newest.path)!r} "
        f"(epoch {newest.manifest.epoch + 1}, step {newest.manifest.global_step})"
        f"{_best([file.manifest for file in theirs], monitor, mode)}. They may be overwritten. "
        f"To continue that run, call handler.resume({template.folder!r}) before training; "
        "to keep its files, save to another folder."
    )


def _score(manifest: Manifest | None, monitor: str) -> float | None:
    if manifest is None:
        return None
    return manifest.score if manifest.monitor == monitor else manifest.logs.get(monitor)


def _best(manifests: list[Manifest], monitor: str | None, mode: Mode) -> str:
    if monitor is None:
        return ""
    found = (_score(manifest, monitor) for manifest in manifests)
    finite = [score for score in found if score is not None and math.isfinite(score)]
    if not finite:
        return ""
    return f", the best {monitor} is {describe(min(finite) if mode == 'min' else max(finite))}"

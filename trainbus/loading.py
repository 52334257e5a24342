"""How a checkpoint gets into a run: a file into its objects and counters, the newest of a folder."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from trainbus.checkpoint.background_writer import finish_saves
from trainbus.checkpoint.file_format import Manifest
from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder
from trainbus.checkpoint.load import load_file
from trainbus.errors import CheckpointCorruptError, StateMismatchError
from trainbus.state.collect import KEYS
from trainbus.state.plain_types import from_plain

__all__ = ["LoadedState", "load_newest", "read_state", "resumable_files"]

logger = logging.getLogger("trainbus")


@dataclass
class LoadedState:
    """
    What a file offers to a run.

    Attributes:
        state: By top-level key.
        wanted: The keys to load.
        manifest: What the file says of itself; None if it has no manifest.
    """

    state: Mapping[str, Any]
    wanted: set[str]
    manifest: Manifest | None


def read_state(path: str | os.PathLike[str], only: Collection[str] | None) -> LoadedState:
    """
    Read and verify a file, once it is written. One that holds weights only offers the module alone.

    Raises:
        ValueError: If *only* names a part there is not.
        CheckpointCorruptError: If the file is damaged.
        StateMismatchError: If *only* names what a file of weights has not.
    """
    wanted = _require_keys(only)
    finish_saves(path)
    value, manifest = load_file(path)
    state = from_plain(value, path)
    if _is_full_state(state, manifest):
        return LoadedState(state, wanted, manifest)
    if only is not None and wanted != {"module"}:
        missing = ", ".join(sorted(wanted - {"module"}))
        raise StateMismatchError(
            f"Cannot load {missing} from {os.fspath(path)!r}: it holds weights only. "
            "Load it with only=('module',), or take a file of the full state."
        )
    logger.info("%s holds weights only; the rest of the run stays as it is.", os.fspath(path))
    return LoadedState({"module": state}, wanted & {"module"}, manifest)


def resumable_files(folder: str | os.PathLike[str], *, interrupted: bool = False) -> list[CheckpointFile]:
    """
    Return the files of *folder* that a run can go on from, the newest first. Reads their ends only.

    Waits for saves into it that are pending in this process, also those of another handler.

    Args:
        folder: Where they are.
        interrupted: Those that were saved amid a batch too; else newer ones of them are told of in the log.
    """
    finish_saves(folder)
    files = list(reversed(list(CheckpointFolder(folder))))
    full = [file for file in files if file.manifest.contents == "state"]
    weights = [file for file in files if file.manifest.contents == "weights"]
    if weights and not full:
        logger.warning(
            "Not resumed: %r holds files of weights only, and the run begins anew. To begin it with the "
            "newest of them, call handler.load(%r). Save with save_weights_only=False to resume.",
            os.fspath(folder),
            weights[0].path,
        )
    if interrupted:
        return full
    newer = list(itertools.takewhile(lambda file: file.manifest.interrupted, full))
    if newer:
        logger.warning(
            "Not resumed from %s, the newest: it was saved when an exception ended the run amid a batch. "
            "resume(interrupted=True) takes it.",
            newer[0].path,
        )
    return [file for file in full if file.is_resumable]


def load_newest(
    folder: str | os.PathLike[str], load: Callable[[str], Manifest | None], *, interrupted: bool = False
) -> Manifest | None:
    """Give *load* the files to go on from until one is not damaged; return its manifest, None without one."""
    try:
        files = resumable_files(folder, interrupted=interrupted)
    except NotADirectoryError as error:
        path = os.fspath(folder)
        raise NotADirectoryError(
            errno.ENOTDIR,
            f"Cannot resume from {path!r}: resume takes a folder and looks for the newest checkpoint in it. "
            f"Give the folder, or load this one file with handler.load({path!r})",
        ) from error
    for file in files:
        try:
            manifest = load(file.path)
        except CheckpointCorruptError as error:
            logger.warning("Passed over while resuming: %s", error)
            continue
        place = f"epoch {file.manifest.epoch + 1}, global step {file.manifest.global_step}"
        logger.info("resumed from %s: %s", file.path, place)
        return manifest
    return None


def _is_full_state(state: Any, manifest: Manifest | None) -> bool:
    if manifest is not None:
        return manifest.contents == "state"
    return isinstance(state, Mapping) and set(KEYS) <= set(state)


def _require_keys(only: Collection[str] | None) -> set[str]:
    if only is None:
        return set(KEYS)
    if isinstance(only, str) or not set(only) <= set(KEYS):
        raise ValueError(f"only must be a tuple of names out of {', '.join(KEYS)}, got {only!r}.")
    return set(only)

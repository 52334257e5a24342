"""How a checkpoint gets into a run: a file into its objects and counters, the newest of a folder."""

from __future__ import annotations

import errno
import itertools
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainbus import ranks
from trainbus.checkpoint.background_writer import finish_saves
from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import read_manifest
from trainbus.errors import CheckpointCorruptError, RankError, StateMismatchError
from trainbus.state import rank_parts
from trainbus.state.collect import KEYS
from trainbus.state.plain_types import from_plain

__all__ = ["LoadedState", "load_newest", "own_part", "read_state", "resumable_files"]

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


def read_state(
    path: str | os.PathLike[str],
    only: Collection[str] | None,
    read: Callable[[set[str]], tuple[Any, Manifest | None]],
) -> LoadedState:
    """
    Read and verify a file, once it is written. One that holds weights only offers the module alone.

    Args:
        path: The file, for messages.
        only: The parts asked for; None: all.
        read: Reads it, for parts that are wanted, and returns its content and its manifest.

    Raises:
        ValueError: If *only* names a part there is not.
        CheckpointCorruptError: If the file is damaged.
        StateMismatchError: If *only* names what a file of weights has not.
    """
    wanted = _require_keys(only)
    finish_saves(path)
    asks_for_more = only is not None and wanted != {"module"}
    if asks_for_more and _says_weights(path):  # before anything is read into live tensors
        raise _weights_only(path, wanted)
    value, manifest = read(wanted)
    state = from_plain(value, path)
    if _is_full_state(state, manifest):
        return LoadedState(state, wanted, manifest)
    if asks_for_more:
        raise _weights_only(path, wanted)
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
    """
    Give *load* the files to go on from until one is not damaged; return its manifest, None without one.

    Collective: rank 0 looks, and a file that one rank cannot load is loaded by none.
    """

    def look() -> list[tuple[str, int, int]]:
        files = resumable_files(folder, interrupted=interrupted)
        return [(file.path, file.manifest.epoch, file.manifest.global_step) for file in files]

    try:
        files = ranks.decide(look, "handler.resume")
    except NotADirectoryError as error:
        path = os.fspath(folder)
        if os.path.isdir(os.path.expanduser(path)):
            raise
        raise NotADirectoryError(
            errno.ENOTDIR,
            f"Cannot resume from {path!r}: resume takes a folder and looks for the newest checkpoint in it. "
            f"Give the folder, or load this one file with handler.load({path!r})",
        ) from error
    half_loaded: str | None = None
    for path, epoch, global_step in files:
        manifest, own = _try(load, path)
        failures = ranks.gather(None if own is None else _Failure.of(own), f"resuming from {path}")
        if any(one is not None and not one.is_damage for one in failures):
            raise own or RankError(_first_failure(path, failures), [])
        if any(failures):
            told = _first_failure(path, failures)
            logger.warning("Passed over while resuming: %s", own or told)
            if not all(failures):
                half_loaded = told
            continue
        if ranks.rank() == 0:
            logger.info("resumed from %s: epoch %d, global step %d", path, epoch + 1, global_step)
        return manifest
    if half_loaded is not None:
        # Some ranks stand where it was saved, and others at the start.
        raise RankError(f"{half_loaded} There is no other to go on from. Start the run again.", [])
    if ranks.rank() == 0:
        logger.info("%s: the run begins anew.", _nothing_in(folder))
    return None


def _nothing_in(folder: str | os.PathLike[str]) -> str:
    """Say how it comes that there is nothing to go on from: a wrong name looks like a first start."""
    path = os.fspath(folder)
    try:
        seen = [name for name in os.listdir(os.path.expanduser(path)) if not name.startswith(".")]
    except OSError:
        return f"{path!r} does not exist"
    if not seen:
        return f"{path!r} is empty"
    return f"None of the {len(seen)} files and folders in {path!r} is a checkpoint to go on from"


def _try(load: Callable[[str], Manifest | None], path: str) -> tuple[Manifest | None, Exception | None]:
    try:
        return load(path), None
    except Exception as error:
        return None, error


@dataclass(frozen=True)
class _Failure:
    """Why one rank could not load a file, as the others are told."""

    is_damage: bool
    message: str

    @classmethod
    def of(cls, error: Exception) -> _Failure:
        return cls(isinstance(error, CheckpointCorruptError), f"{type(error).__name__}: {error}")


def _first_failure(path: str, failures: Sequence[_Failure | None]) -> str:
    rank, failure = next((rank, one) for rank, one in enumerate(failures) if one is not None)
    return f"Rank {rank} cannot load {path!r}, so no rank resumes from it. {failure.message}"


def own_part(loaded: LoadedState, path: str | os.PathLike[str]) -> LoadedState:
    """Return what this rank takes of the run's progress from a file; tells in the log what is not exact."""
    wanted = loaded.wanted & set(rank_parts.OWN)
    if not wanted:
        return loaded
    # A launcher's WORLD_SIZE without a process group is no other rank: such a run saves alone, too.
    is_shared = ranks.together() or rank_parts.KEY in loaded.state
    world_size = ranks.world_size() if is_shared else 1
    state, lacking, told = rank_parts.own_state(loaded.state, ranks.rank(), world_size)
    if told is not None and ranks.rank() == 0:
        logger.warning("%s cannot be continued exactly. %s", os.fspath(path), told)
    return LoadedState(state, loaded.wanted - lacking, loaded.manifest)


def _is_full_state(state: Any, manifest: Manifest | None) -> bool:
    if manifest is not None:
        return manifest.contents == "state"
    return isinstance(state, Mapping) and set(KEYS) <= set(state)


def _says_weights(path: str | os.PathLike[str]) -> bool:
    try:
        manifest = read_manifest(path)
    except (CheckpointCorruptError, OSError):  # which is told where it is read
        return False
    return manifest is not None and manifest.contents == "weights"


def _weights_only(path: str | os.PathLike[str], wanted: set[str]) -> StateMismatchError:
    missing = ", ".join(sorted(wanted - {"module"}))
    return StateMismatchError(
        f"Cannot load {missing} from {os.fspath(path)!r}: it holds weights only. "
        "Load it with only=('module',), or take a file of the full state."
    )


def _require_keys(only: Collection[str] | None) -> set[str]:
    if only is None:
        return set(KEYS)
    if isinstance(only, str) or not set(only) <= set(KEYS):
        raise ValueError(f"only must be a tuple of names out of {', '.join(KEYS)}, got {only!r}.")
    return set(only)

"""A folder of checkpoints: which there are, the newest, the best. Needs no torch."""

from __future__ import annotations

import logging
import math
import os
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from trainbus.checkpoint.file_format import ends_in_manifest, open_regular, read_manifest
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import is_sharded, read_sharded
from trainbus.errors import CheckpointCorruptError

__all__ = [
    "CheckpointFile",
    "CheckpointFolder",
    "best_of",
    "is_file",
    "latest_of",
    "ranked",
    "refuse_folder_of_checkpoints",
]

_log = logging.getLogger("trainbus")
_ZIP_START = b"PK\x03\x04"


@dataclass(frozen=True)
class CheckpointFile:
    """
    One checkpoint: where it is and what it says of itself.

    Attributes:
        path: A file, or the folder of a sharded checkpoint.
        is_sharded: Whether it is such a folder.
        is_link: Whether *path* is a link to it, wherever it is itself.
    """

    path: str
    manifest: Manifest
    is_sharded: bool = False
    is_link: bool = False

    @property
    def is_resumable(self) -> bool:
        """Whether a run can be resumed from it."""
        return self.manifest.contents == "state" and not self.manifest.interrupted

    @property
    def is_original(self) -> bool:
        """Whether it is what a save has put there: no link, nor a copy or a file that was renamed."""
        return not self.is_link and self.manifest.name in ("", os.path.basename(self.path))


def latest_of(files: Iterable[CheckpointFile]) -> CheckpointFile | None:
    """Return the last of *files* that a run can be resumed from, or None."""
    return next((file for file in reversed(list(files)) if file.is_resumable), None)


def best_of(files: Iterable[CheckpointFile], monitor: str, mode: str) -> CheckpointFile | None:
    """Return what `CheckpointFolder.best` says, out of *files* that were listed already."""
    return next(iter(ranked(files, monitor, mode)), None)


def ranked(files: Iterable[CheckpointFile], monitor: str, mode: str) -> list[CheckpointFile]:
    """Return those of *files* that have a finite value of a metric, the best first, the older of equals."""
    if mode not in ("min", "max"):
        raise ValueError(f"mode must be 'min' or 'max', got {mode!r}.")
    sign = 1.0 if mode == "min" else -1.0
    valued = [(sign * value, file) for file in files if math.isfinite(value := _value(file, monitor))]
    return [file for _, file in sorted(valued, key=lambda entry: entry[0])]


class CheckpointFolder:
    """
    The checkpoints directly inside one folder.

    Iterating gives a `CheckpointFile` each, in order of ``sequence``. Only the ends and
    sizes of files are read, and of sharded checkpoints the manifest, anew each time; digests
    are not checked. Files and folders that are no checkpoints, hidden ones and files without a
    manifest are passed over; a damaged one is too, with one warning in the log. A folder that
    does not exist is empty.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.expanduser(os.fspath(path))
        self._damaged: dict[str, str] = {}

    @property
    def damaged(self) -> Mapping[str, str]:
        """What was said, by path, of the damaged files that were passed over so far."""
        return self._damaged

    def __iter__(self) -> Iterator[CheckpointFile]:
        files = []
        for entry, sharded in self._candidates():
            manifest = self._read(entry.path, sharded)
            if manifest is not None:
                files.append(CheckpointFile(entry.path, manifest, sharded, entry.is_symlink()))
        files.sort(key=lambda file: (file.manifest.sequence, file.manifest.created, file.path))
        return iter(files)

    def latest(self) -> CheckpointFile | None:
        """Return the newest that a run can be resumed from, or None."""
        return latest_of(self)

    def best(self, monitor: str, mode: str) -> CheckpointFile | None:
        """
        Return the one with the best finite value of a metric, the older of equals, or None.

        Args:
            monitor: The metric's name.
            mode: ``"min"`` or ``"max"``.
        """
        return best_of(self, monitor, mode)

    def greatest_sequence(self) -> int:
        """Return the greatest ``sequence`` of any checkpoint here, 0 if there is none."""
        return max((file.manifest.sequence for file in self), default=0)

    def _candidates(self) -> list[tuple[os.DirEntry[str], bool]]:
        try:
            with os.scandir(self.path) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except FileNotFoundError:
            return []
        files = [(entry, False) for entry in visible if is_file(entry)]
        return files + [(entry, True) for entry in visible if not is_file(entry) and is_sharded(entry.path)]

    def _read(self, path: str, sharded: bool) -> Manifest | None:
        try:
            return read_sharded(path).manifest if sharded else read_manifest(path)
        except FileNotFoundError:
            return None
        except (CheckpointCorruptError, OSError) as error:
            if path not in self._damaged and (sharded or not _is_foreign(path)):
                self._damaged[path] = str(error)
                _log.warning("Passing over a checkpoint: %s", error)
            return None


def is_file(entry: os.DirEntry[str]) -> bool:
    """Tell whether *entry* is a file or a link to one; a link that leads nowhere is none, for any reason."""
    try:
        return entry.is_file()
    except OSError:
        if entry.is_symlink():
            return False
        raise


def refuse_folder_of_checkpoints(path: str | os.PathLike[str]) -> None:
    """
    Refuse a folder where one of the checkpoints in it was meant; it is no sharded checkpoint itself.

    Raises:
        CheckpointCorruptError: There are checkpoints in it.
    """
    files = [] if is_sharded(path) else list(CheckpointFolder(path))
    if files:
        raise CheckpointCorruptError(
            path,
            "it is no checkpoint but a folder of them",
            instead=f"Name one of them, such as the newest, {files[-1].path!r}; "
            f"`trainbus ls {shlex.quote(os.fspath(path))}` lists them.",
        )


def _value(file: CheckpointFile, monitor: str) -> float:
    if monitor in file.manifest.logs:
        return file.manifest.logs[monitor]
    if file.manifest.monitor == monitor and file.manifest.score is not None:
        return file.manifest.score
    return math.nan


def _is_foreign(path: str) -> bool:
    try:
        with open_regular(path) as file:
            begins_as_zip = file.read(len(_ZIP_START)) == _ZIP_START
        return not begins_as_zip and not ends_in_manifest(path)
    except (CheckpointCorruptError, OSError):
        return False

"""From a file back to a state: checked first, then loaded without running anything it contains."""

from __future__ import annotations

import os
import re
import zipfile
from typing import Any, BinaryIO

import torch

from trainbus.checkpoint.file_format import (
    END_RECORD_BYTES,
    WHAT_TO_NAME,
    WITHOUT_PICKLE,
    is_legacy,
    open_regular,
    read_ending,
)
from trainbus.checkpoint.folder import refuse_folder_of_checkpoints
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import where_it_stands
from trainbus.checkpoint.unpickling import MapLocation, raise_if_no_damage, unpickle
from trainbus.checkpoint.verify import check_digest
from trainbus.errors import CheckpointCorruptError, UntrustedPickleError

__all__ = ["load_checkpoint", "load_file"]

_ZIP_START = b"PK\x03\x04"
# The end record of zip64, and the locator that follows it and says where it is.
_LOCATOR_BYTES = 20
_ZIP64_BYTES = 56 + _LOCATOR_BYTES
_LETTERS_IN_STORAGE = re.compile(r"^[^/]*/data/.*[A-Za-z]")


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = "cpu",
    verify: bool = True,
    trust_pickle: bool = False,
) -> tuple[Any, Manifest | None]:
    """
    Load a file as `load_file` does, or the folder of a sharded checkpoint, each tensor whole.

    Raises:
        TypeError: For a folder, *map_location* is no device.
    """
    path = where_it_stands(path)
    if not os.path.isdir(path):
        return load_file(path, map_location=map_location, verify=verify, trust_pickle=trust_pickle)
    refuse_folder_of_checkpoints(path)
    # Here, because it takes a second that only sharded checkpoints are worth.
    from trainbus.checkpoint.sharded_load import load_sharded

    if map_location is not None and not isinstance(map_location, str | torch.device):
        raise TypeError(
            f"Cannot load {path!r} with map_location={map_location!r}: its tensors are put together from "
            "several files, so it takes a device, such as 'cpu' or 'cuda:0'."
        )
    return load_sharded(path, map_location=map_location, verify=verify)


def load_file(
    path: str | os.PathLike[str],
    *,
    map_location: MapLocation = "cpu",
    verify: bool = True,
    trust_pickle: bool = False,
) -> tuple[Any, Manifest | None]:
    """
    Load a checkpoint. Blocks while the file is read, twice with *verify*.

    Nothing in the file is imported or run unless *trust_pickle* is set.

    Args:
        path: The file; ``~`` is understood. Any file of ``torch.save`` is taken; one
            without a manifest cannot be verified.
        map_location: As for ``torch.load``.
        verify: Compare the whole file with its digest first.
        trust_pickle: Load with ``weights_only=False``: the file may then run any code.

    Returns:
        What was saved, and the manifest or None.

    Raises:
        CheckpointCorruptError: The file is damaged.
        UntrustedPickleError: It has no manifest and holds more than tensors and plain values.
        OSError: It cannot be read.
        MemoryError: There is no room for it.
        TypeError: *map_location* is none.
    """
    location = _Location(map_location)
    with open_regular(path) as file:
        manifest = _examine(file, path, verify=verify)
        file.seek(0)
        try:
            state = unpickle(file, location.given, weights_only=not trust_pickle)
        except Exception as error:
            location.raise_own_failure()
            raise_if_no_damage(error, manifest.size if verify and manifest is not None else 0)
            if trust_pickle and isinstance(error, ImportError | AttributeError):
                raise
            if manifest is None and "Unsupported global" in str(error):
                raise UntrustedPickleError(path, _first_words(error)) from error
            raise _refusal(file, path, error) from error
    return state, manifest


class _Location:
    """
    What was given as ``map_location``. What is wrong with it must not look like a damaged file.

    Attributes:
        given: For ``torch.load``.
    """

    def __init__(self, given: MapLocation) -> None:
        self.given = given
        self._failure: Exception | None = None
        if isinstance(given, str | torch.device):
            torch.empty(0, device=given)
        elif isinstance(given, dict):
            for device in given.values():
                torch.empty(0, device=device)
        elif callable(given):
            self._asked = given
            self.given = self._ask
        elif given is not None:
            raise TypeError(
                f"map_location must be a device such as 'cpu' or 'cuda:0', a dict of them, a function or "
                f"None, got {given!r}."
            )

    def raise_own_failure(self) -> None:
        """Raise what a function that was given has raised."""
        if self._failure is not None:
            raise self._failure

    def _ask(self, storage: Any, location: str) -> Any:
        try:
            return self._asked(storage, location)
        except Exception as error:
            self._failure = error
            raise


def _refusal(file: BinaryIO, path: str | os.PathLike[str], error: Exception) -> CheckpointCorruptError:
    if not is_legacy(file):
        try:
            read_ending(file, path)
        except CheckpointCorruptError as own:
            return own
    return CheckpointCorruptError(path, f"it cannot be read ({_first_words(error)})")


def _examine(file: BinaryIO, path: str | os.PathLike[str], *, verify: bool) -> Manifest | None:
    is_zip = file.read(len(_ZIP_START)) == _ZIP_START
    try:
        ending = read_ending(file, path)
    except CheckpointCorruptError:
        if is_zip:
            raise
        # Nothing of a zip at either end: perhaps the format of torch before 1.6.
        return None
    if ending is not None and verify:
        check_digest(file, path, ending)
    _check_directory(file, path)
    return None if ending is None else ending.manifest


def _check_directory(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    """Refuse a zip that would unpack to more than it is, or that begins before its first record."""
    try:
        directory = zipfile.ZipFile(file)
        records = directory.infolist()
    except Exception as error:
        # Hostile directories make zipfile raise half a dozen different things.
        raise CheckpointCorruptError(path, f"its zip directory is broken ({_first_words(error)})") from error
    if records and not any(record.filename.endswith("/data.pkl") for record in records):
        raise CheckpointCorruptError(path, WITHOUT_PICKLE, instead=WHAT_TO_NAME)
    file_size = os.fstat(file.fileno()).st_size
    sizes = sum(record.file_size for record in records)
    if (
        any(record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1 for record in records)
        or any(record.file_size != record.compress_size for record in records)
        # Torch finds a record without regard to the case of letters, and numbers those of storages.
        or len({record.filename.lower() for record in records}) != len(records)
        or any(_LETTERS_IN_STORAGE.search(record.filename) for record in records)
        or min((record.header_offset for record in records), default=-1) != 0
        or sizes > file_size
        or not _has_one_directory(file, file_size - END_RECORD_BYTES - len(directory.comment))
    ):
        raise CheckpointCorruptError(path, "its zip directory is not one that torch.save writes")


def _has_one_directory(file: BinaryIO, end_record: int) -> bool:
    """Tell whether a zip64 directory, if there is one, is where both `zipfile` and torch look for it."""
    file.seek(max(0, end_record - _ZIP64_BYTES))
    before = file.read(min(_ZIP64_BYTES, end_record))
    locator = before[-_LOCATOR_BYTES:]
    if not locator.startswith(b"PK\x06\x07"):
        return True
    return int.from_bytes(locator[8:16], "little") == end_record - _ZIP64_BYTES


def _first_words(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    # In torch's page of advice stands which class was refused.
    text = text.rpartition("WeightsUnpickler error: ")[2].partition(". Please use ")[0]
    return f"{type(error).__name__}: {text[:200]}"

"""Save and load any object of tensors and plain values: the one-line change from ``torch.save``."""

from __future__ import annotations

import functools
import os
import platform
import time
import uuid
from typing import Any

import torch

from trainbus.checkpoint.background_writer import finish_saves
from trainbus.checkpoint.load import load_checkpoint
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.saver import Saver
from trainbus.checkpoint.verify import verify_checkpoint
from trainbus.state.plain_types import from_plain, to_plain

__all__ = ["load", "save", "save_async", "verify", "versions"]

_RUN_ID = uuid.uuid4().hex


def save(obj: Any, path: str | os.PathLike[str]) -> Manifest:
    """
    Write *obj* to *path* and return when it is durable: written, synced, under its name.

    What stood under *path* is replaced in one step at the very end, so a crash leaves the old
    file or the new one, never half of one. Plain ``torch.load(path)`` opens the file.

    Args:
        obj: Tensors and plain Python values, nested; NumPy values come back as NumPy from `load`.
        path: Missing folders are made, ``~`` is expanded.

    Returns:
        What the file says of itself: size, digest, versions.

    Raises:
        UnsavableStateError: If *obj* holds what could not be loaded again, naming each place.
        CheckpointWriteError: If the disk refused.
    """
    manifest = save_async(obj, path).result()
    assert manifest is not None
    return manifest


def save_async(obj: Any, path: str | os.PathLike[str]) -> PendingSave:
    """
    Copy *obj* now and write it to *path* on a background thread.

    Blocks while *obj* is copied, and before that while an earlier save of this function is still
    being written. CUDA tensors are copied on their device where a tenth of its memory stays free,
    all else to host memory; what the copies take is kept for the next save, until the process ends.
    Afterwards *obj* may change in any way. Saves still pending when the interpreter exits are
    finished first.

    Args:
        obj: See `save`.
        path: See `save`.

    Returns:
        A handle: ``.result()`` waits until the file is durable and raises what went wrong.

    Raises:
        UnsavableStateError: If *obj* holds what could not be loaded again, naming each place.
    """
    plain = to_plain(obj)
    pending = PendingSave(os.path.expanduser(os.fspath(path)))
    manifest = Manifest(contents="object", run_id=_RUN_ID, created=time.time(), versions=versions())
    _saver().save(pending, lambda: plain, lambda: manifest)
    return pending


def load(
    path: str | os.PathLike[str],
    *,
    map_location: Any = "cpu",
    verify: bool = True,
    trust_pickle: bool = False,
) -> Any:
    """
    Load what `save`, a `Handler` or plain ``torch.save`` wrote; first finishes a pending save of it.

    Args:
        path: The file; or the folder of a sharded checkpoint, which is loaded whole, without a process
            group and whatever number of ranks wrote it.
        map_location: As in ``torch.load``; for a folder, a device.
        verify: Read the file through first and compare its digest; files of plain
            ``torch.save`` carry none and are loaded without.
        trust_pickle: Allow arbitrary Python objects in the file, which can run any code while
            being loaded. Only for files from people you trust with your account.

    Raises:
        CheckpointCorruptError: If the file is damaged; no tensor of it has been used.
        UntrustedPickleError: If it is not ours and holds more than tensors and plain values.
        FileNotFoundError: If there is no such file.
    """
    finish_saves(path)
    value, _ = load_checkpoint(path, map_location=map_location, verify=verify, trust_pickle=trust_pickle)
    return from_plain(value, path)


def verify(path: str | os.PathLike[str]) -> Manifest:
    """
    Read a file, or the folder of a sharded checkpoint, through and compare its digest; load nothing of it.

    Returns:
        What it says of itself.

    Raises:
        CheckpointCorruptError: If it is damaged, or carries no digest to compare with; of a folder, the
            damaged files are named.
        FileNotFoundError: If there is no such file.
    """
    return verify_checkpoint(path)


def versions() -> dict[str, str]:
    """Return the versions that a manifest names."""
    from trainbus import __version__

    return {"trainbus": __version__, "torch": str(torch.__version__), "python": platform.python_version()}


@functools.cache
def _saver() -> Saver:
    return Saver(_report_to_nobody)


def _report_to_nobody(name: str, **fields: Any) -> None:
    """There is no bus: the PendingSave tells what became of the save."""

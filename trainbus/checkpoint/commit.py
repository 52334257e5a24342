"""The order in which a file becomes durable. It and `sharded_commit` alone rename and remove."""

from __future__ import annotations

import contextlib
import logging
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import BinaryIO, cast

from trainbus.checkpoint.disk import Disk, disk_in_use
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.output_stream import OutputStream
from trainbus.checkpoint.sharded_commit import put_in_place_of_folder, remove_sharded
from trainbus.checkpoint.sharded_format import is_sharded
from trainbus.checkpoint.temporary import create_temporary, discard
from trainbus.checkpoint.write_behind import CHUNK_BYTES, WriteBehind
from trainbus.errors import UnsyncedNameError

__all__ = ["commit", "durability_of", "remove", "require_file_name"]

_log = logging.getLogger("trainbus")


def commit(
    path: str | os.PathLike[str],
    manifest: Manifest,
    serialize: Callable[[BinaryIO], None],
    *,
    disk: Disk | None = None,
    behind: WriteBehind | None = None,
    at_least: int = 0,
) -> Manifest:
    """
    Write a file durably, in the place of the one that is there; return when it is safe.

    Temporary sibling, write, sync, rename, sync of the folder: at each moment, also after
    a power cut, the old file or the new one stands under *path*, whole. Missing folders
    are made. A link at *path* is replaced, never followed. A sharded checkpoint there is replaced too; a
    crash between two calls leaves it as ``NAME.….trainbus.old``, which is read like any other.

    Args:
        path: Where to; ``~`` is understood.
        manifest: Goes to the file's end; size, digest and durability are filled in, and the name if it has
            none.
        serialize: Writes a zip with an empty comment into the file object it is given,
            e.g. ``lambda stream: torch.save(state, stream)``. Called once, on this thread.
        disk: What writes; by default the one in use.
        behind: Lets writes go on while this thread serializes; None: they do not.
        at_least: Bytes that will certainly be written; room for them is claimed before.

    Returns:
        The manifest as it stands in the file.

    Raises:
        UnsyncedNameError: Only the last step failed: the new file is there and whole, but a
            power cut may bring the old one back.
        FileExistsError: There is a folder at *path* that is no checkpoint.
        OSError: The first thing the disk refused. The old file is untouched and nothing
            temporary is left.
    """
    disk = disk or disk_in_use()
    folder_path, name = _split(path)
    folder = disk.open_folder(folder_path)
    try:
        durability = durability_of(disk, folder, folder_path)
        manifest = replace(manifest, name=manifest.name or name, durability=durability)
        with create_temporary(disk, folder, name) as (temporary, fd):
            final = _write(disk, fd, manifest, serialize, behind or WriteBehind(most=0), at_least)
            replaced = _put_in_place(disk, folder, temporary, name)
        try:
            disk.fsync_folder(folder)
        except OSError as error:
            raise UnsyncedNameError(error.errno, error.strerror or str(error)) from error
        if replaced is not None:
            # Not worth failing for: the next sweep removes it.
            with contextlib.suppress(OSError):
                discard(disk, folder, replaced)
    finally:
        _close_quietly(disk, folder)
    return final


def remove(path: str | os.PathLike[str], *, disk: Disk | None = None) -> None:
    """
    Remove a file or a sharded checkpoint's folder durably; one that is not there is fine.

    Raises:
        OSError: It could not be removed.
    """
    disk = disk or disk_in_use()
    folder_path, name = _split(path)
    try:
        folder = disk.open_folder(folder_path, create=False)
    except FileNotFoundError:
        return
    try:
        if is_sharded(os.path.join(folder_path, name)):
            remove_sharded(disk, folder, name)
        else:
            disk.unlink(folder, name)
        disk.fsync_folder(folder)
    except FileNotFoundError:
        pass
    finally:
        _close_quietly(disk, folder)


def _put_in_place(disk: Disk, folder: int, temporary: str, name: str) -> str | None:
    """Give the file its final *name*; return where a sharded checkpoint that was there stands then."""
    try:
        disk.rename(folder, temporary, name)
    except IsADirectoryError:
        return put_in_place_of_folder(disk, folder, temporary, name)
    return None


def _write(
    disk: Disk,
    fd: int,
    manifest: Manifest,
    serialize: Callable[[BinaryIO], None],
    behind: WriteBehind,
    at_least: int,
) -> Manifest:
    try:
        claimed = at_least >= CHUNK_BYTES and disk.allocate(fd, at_least)
        with OutputStream(fd, disk, behind) as stream:
            try:
                serialize(cast(BinaryIO, stream))
            except Exception as error:
                if stream.error is None:
                    raise
                raise stream.error from error
            final = stream.finish(manifest)
        if claimed:
            disk.trim(fd)
        disk.fsync(fd)
    except BaseException:
        _close_quietly(disk, fd)
        raise
    # Some network file systems report a failed write only here.
    disk.close(fd)
    return final


def _close_quietly(disk: Disk, fd: int) -> None:
    with contextlib.suppress(OSError):
        disk.close(fd)


def _split(path: str | os.PathLike[str]) -> tuple[str, str]:
    require_file_name(path)
    return os.path.split(os.path.expanduser(os.fspath(path)))


def require_file_name(path: str | os.PathLike[str]) -> None:
    """
    Refuse what ends as the name of a folder does, which it does no more once it is made absolute.

    Raises:
        ValueError: It does.
    """
    if os.path.basename(os.fspath(path)) in ("", os.curdir, os.pardir):
        raise ValueError(f"Cannot write a checkpoint to {os.fspath(path)!r}: it names a folder, not a file.")


def durability_of(disk: Disk, folder: int, path: str) -> str:
    """Return what a manifest may promise here: ``"full"``, or ``"file"`` where names cannot be synced."""
    known = _SYNCS_NAMES.setdefault(disk, {})
    device = os.fstat(folder).st_dev
    if device not in known:
        known[device] = disk.fsync_folder(folder)
        if not known[device]:
            _log.warning(
                "The file system of %r cannot sync folders: a checkpoint just written may be missing after "
                "a power cut. Its manifest says durability 'file'.",
                path or os.curdir,
            )
    return "full" if known[device] else "file"


_SYNCS_NAMES: weakref.WeakKeyDictionary[Disk, dict[int, bool]] = weakref.WeakKeyDictionary()

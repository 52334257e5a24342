"""The order in which a file becomes durable. The only module that renames and removes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import BinaryIO, cast

from trainbus.checkpoint.chunk_writers import ChunkWriters
from trainbus.checkpoint.disk import DISK, Disk
from trainbus.checkpoint.file_format import Manifest
from trainbus.checkpoint.output_stream import OutputStream

__all__ = ["commit", "remove"]

_LONGEST_NAME = 255


def commit(
    path: str | os.PathLike[str],
    manifest: Manifest,
    serialize: Callable[[BinaryIO], None],
    *,
    disk: Disk = DISK,
    writers: ChunkWriters | None = None,
) -> Manifest:
    """
    Write a file durably, in the place of the one that is there; return when it is safe.

    Temporary sibling, write, sync, rename, sync of the folder: at each moment, also after
    a power cut, the old file or the new one stands under *path*, whole. Missing folders
    are made. A link at *path* is replaced, never followed.

    Args:
        path: Where to; ``~`` is understood.
        manifest: Goes to the file's end; size and digest are filled in.
        serialize: Writes a zip with an empty comment into the file object it is given,
            e.g. ``lambda stream: torch.save(state, stream)``. Called once, on this thread.
        disk: What writes.
        writers: Threads that write while this one serializes; None: this one does both.

    Returns:
        The manifest as it stands in the file.

    Raises:
        OSError: The first thing the disk refused. The old file is untouched and nothing
            temporary is left, except when only the last step failed: then the new file
            is whole but a power cut may bring the old one back.
    """
    folder_path, name = _split(path)
    folder = disk.open_folder(folder_path)
    try:
        temporary = _temporary_name(name)
        fd = disk.create(folder, temporary)
        try:
            final = _write(disk, fd, manifest, serialize, writers or ChunkWriters(threads=0))
            disk.rename(folder, temporary, name)
        except BaseException:
            with contextlib.suppress(OSError):
                disk.unlink(folder, temporary)
            raise
        disk.fsync_folder(folder)
    finally:
        _close_quietly(disk, folder)
    return final


def remove(path: str | os.PathLike[str], *, disk: Disk = DISK) -> None:
    """
    Remove a file durably; one that is not there is fine.

    Raises:
        OSError: It could not be removed.
    """
    folder_path, name = _split(path)
    try:
        folder = disk.open_folder(folder_path, create=False)
    except FileNotFoundError:
        return
    try:
        disk.unlink(folder, name)
        disk.fsync_folder(folder)
    except FileNotFoundError:
        pass
    finally:
        _close_quietly(disk, folder)


def _write(
    disk: Disk,
    fd: int,
    manifest: Manifest,
    serialize: Callable[[BinaryIO], None],
    writers: ChunkWriters,
) -> Manifest:
    try:
        with OutputStream(fd, disk, writers) as stream:
            try:
                serialize(cast(BinaryIO, stream))
            except Exception as error:
                if stream.error is None:
                    raise
                raise stream.error from error
            final = stream.finish(manifest)
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
    folder, name = os.path.split(os.path.expanduser(os.fspath(path)))
    if name in ("", os.curdir, os.pardir):
        raise ValueError(f"Cannot write a checkpoint to {os.fspath(path)!r}: it names a folder, not a file.")
    return folder, name


def _temporary_name(name: str) -> str:
    ending = f".{os.urandom(8).hex()}.tmp"
    # Cut in bytes, for that is how the file system counts.
    room = _LONGEST_NAME - len(ending) - 1
    return f".{os.fsdecode(os.fsencode(name)[:room])}{ending}"

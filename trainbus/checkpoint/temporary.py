"""
The files that are not finished yet: their names, whose they are, and what dead runs have left of them.

Each is locked for as long as its writer lives, by the kernel, which lets go of the lock however the
writer ends. So one that can be locked belongs to nobody, on whichever machine and in whichever
container it was begun.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from trainbus.checkpoint.disk import Disk

__all__ = ["TEMPORARY", "create_temporary", "sweep"]

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.trainbus\.tmp")
"""What the names of our unfinished files look like, and nobody else's."""

_LONGEST_NAME = 255
_TRIES = 5  # each lost only to a sweep that came between two calls


@contextlib.contextmanager
def create_temporary(disk: Disk, folder: int, final_name: str) -> Iterator[tuple[str, int]]:
    """
    Create a hidden file beside the one it will replace, and keep it from sweeps.

    Inside of ``with`` it is kept also after its descriptor is closed, so that it can be renamed. When
    left by an exception it is removed, if it is still there.

    Yields:
        Its name and a descriptor, which the caller closes.
    """
    name, fd, lock = _create(disk, folder, final_name)
    try:
        yield name, fd
    except BaseException:
        with contextlib.suppress(OSError):
            disk.unlink(folder, name)
        raise
    finally:
        os.close(lock)


def _create(disk: Disk, folder: int, final_name: str) -> tuple[str, int, int]:
    for _ in range(_TRIES):
        name = _temporary_name(final_name)
        fd = disk.create(folder, name)
        try:
            if _take(disk, fd):
                return name, fd, os.dup(fd)
        except BaseException:
            os.close(fd)
            with contextlib.suppress(OSError):
                disk.unlink(folder, name)
            raise
        os.close(fd)
    raise OSError(errno.EAGAIN, "another process removes each new file at once", final_name)


def _take(disk: Disk, fd: int) -> bool:
    try:
        disk.lock(fd)
    except BlockingIOError:
        return False
    # A sweep may have come between the creation and the lock; then the file has no name any more.
    return os.fstat(fd).st_nlink > 0


def sweep(path: str, disk: Disk) -> list[str]:
    """
    Remove the unfinished files that nobody is writing any more.

    Args:
        path: The folder; one that is not there has none.
        disk: What removes.

    Returns:
        The names of those that were removed.

    Raises:
        OSError: The folder cannot be read. A file that cannot be removed stays.
    """
    try:
        folder = disk.open_folder(path, create=False)
    except FileNotFoundError:
        return []
    try:
        unfinished = [name for name in disk.names(folder) if TEMPORARY.fullmatch(name)]
        return [name for name in unfinished if _remove_if_dead(disk, folder, name)]
    finally:
        os.close(folder)


def _remove_if_dead(disk: Disk, folder: int, name: str) -> bool:
    try:
        fd = disk.open(folder, name)
    except OSError:
        return False
    try:
        if not disk.lock(fd):
            return False  # without locks, nobody can tell the living from the dead
        disk.unlink(folder, name)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _temporary_name(final_name: str) -> str:
    ending = f".{os.urandom(8).hex()}.trainbus.tmp"
    # Cut in bytes, for that is how the file system counts.
    room = _LONGEST_NAME - len(ending) - 1
    return f".{os.fsdecode(os.fsencode(final_name)[:room])}{ending}"

"""
The files that are not finished yet: their names, whose they are, and what dead runs have left of them.

Each is locked for as long as its writer lives, by the kernel, which lets go of the lock however the
writer ends. So one that can be locked belongs to nobody, on whichever machine and in whichever
container it was begun. An unfinished folder has such a file beside it, of its own name without the
ending; it is made before the folder and goes after it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from collections.abc import Iterator

from trainbus.checkpoint.disk import Disk, disk_in_use

__all__ = [
    "REPLACED",
    "TEMPORARY",
    "TEMPORARY_FOLDER",
    "Sweeper",
    "create_temporary",
    "create_temporary_folder",
    "discard",
    "replaced_name",
    "sweep",
]

_log = logging.getLogger("trainbus")

# With DOTALL, for a name may hold the end of a line.
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{16}\.trainbus\.tmp", re.DOTALL)
"""What the names of our unfinished files look like, and nobody else's."""

_FOLDER_ENDING = ".d"
TEMPORARY_FOLDER = re.compile(TEMPORARY.pattern + re.escape(_FOLDER_ENDING), re.DOTALL)
"""What the names of our unfinished folders look like, and of those that are being removed."""

REPLACED = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.trainbus\.old", re.DOTALL)
"""What a checkpoint is called while a new one takes its name, where the two cannot change places."""

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


@contextlib.contextmanager
def create_temporary_folder(disk: Disk, folder: int, final_name: str) -> Iterator[str]:
    """
    Make a hidden folder beside what it will replace, and keep it from sweeps inside of ``with``.

    What stands under its name at the end is removed, be it that folder after an exception or what it
    has changed places with. What cannot be removed is left to sweeps.

    Yields:
        Its name.
    """
    with create_temporary(disk, folder, final_name) as (lock, fd):
        disk.close(fd)
        name = lock + _FOLDER_ENDING
        try:
            disk.make_folder(folder, name)
            yield name
        finally:
            with contextlib.suppress(OSError):
                _remove_tree(disk, folder, name)
            # From now on nothing keeps a sweep from what may be left.
            with contextlib.suppress(OSError):
                disk.unlink(folder, lock)


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
    Remove the unfinished files and folders that nobody is writing any more.

    A checkpoint that was moved out of the way of one that never came gets its name back.

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
        names = disk.names(folder)
        removed = [
            name for name in names if TEMPORARY.fullmatch(name) and _remove_if_dead(disk, folder, name)
        ]
        for name in names:
            if TEMPORARY_FOLDER.fullmatch(name) and _remove_folder_if_dead(disk, folder, name):
                removed.append(name)
            elif (replaced := REPLACED.fullmatch(name)) and _put_back(disk, folder, name, replaced["name"]):
                removed.append(name)
        return removed
    finally:
        os.close(folder)


class Sweeper:
    """Sweeps each folder once, before the first checkpoint that a saver puts there."""

    def __init__(self) -> None:
        self._swept: set[str] = set()

    def sweep_once(self, folder: str) -> None:
        """Make room in *folder*: runs that were killed leave theirs unfinished. Logs, raises nothing."""
        if folder in self._swept:
            return
        self._swept.add(folder)
        try:
            names = sweep(folder, disk_in_use())
        except OSError as error:
            _log.warning("Cannot look for unfinished files of dead runs in %r: %s.", folder, error)
            return
        if names:
            _log.info("Removed %d unfinished file(s) that dead runs have left in %r.", len(names), folder)


def discard(disk: Disk, folder: int, name: str) -> None:
    """
    Remove a folder with the files directly in it, or a file, durably. At no moment it is there in part.

    Raises:
        FileNotFoundError: It is not there.
        OSError: It could not be hidden; then it is whole. What is hidden and cannot be removed is left to
            sweeps.
    """
    hidden = _temporary_name(name) + _FOLDER_ENDING
    disk.rename(folder, name, hidden)
    disk.fsync_folder(folder)
    with contextlib.suppress(OSError):
        _remove_tree(disk, folder, hidden)


def _remove_tree(disk: Disk, folder: int, name: str) -> None:
    """Remove a folder with the files directly in it, or a file; one that is not there is fine."""
    try:
        inside = disk.enter_folder(folder, name)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        disk.unlink(folder, name)
        return
    try:
        for entry in disk.names(inside):
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(inside, entry)
    finally:
        os.close(inside)
    disk.remove_folder(folder, name)


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


def _remove_folder_if_dead(disk: Disk, folder: int, name: str) -> bool:
    try:
        # Asked after the folder was seen: it has the file for as long as anybody writes to it.
        os.close(disk.open(folder, name.removesuffix(_FOLDER_ENDING)))
    except FileNotFoundError:
        pass
    except OSError:
        return False
    else:
        return False
    try:
        _remove_tree(disk, folder, name)
    except OSError:
        return False
    return True


def _put_back(disk: Disk, folder: int, old: str, name: str) -> bool:
    """Give a checkpoint that was to be replaced its name back, or remove it if the new one has come."""
    try:
        if name in disk.names(folder):
            discard(disk, folder, old)
            return True
        disk.rename(folder, old, name)
    except OSError:
        pass
    return False


def replaced_name(name: str) -> str:
    """Return a new name for what *name* is moved out of the way to."""
    return f"{name}.{os.urandom(8).hex()}.trainbus.old"


def _temporary_name(final_name: str) -> str:
    ending = f".{os.urandom(8).hex()}.trainbus.tmp"
    room = _LONGEST_NAME - len(ending) - len(_FOLDER_ENDING) - 1
    # The file system counts bytes, and some refuse half a letter.
    while len(os.fsencode(final_name)) > room:
        final_name = final_name[:-1]
    return f".{final_name}{ending}"

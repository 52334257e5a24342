"""Writes what a command makes, whole or not at all."""

from __future__ import annotations

import contextlib
import os

from trainbus.checkpoint.disk import disk_in_use
from trainbus.checkpoint.temporary import create_temporary

__all__ = ["write_whole"]


def write_whole(target: str, data: bytes) -> None:
    """
    Write *data* to *target*, durably: a crash leaves what was there or the new file.

    Raises:
        OSError: The disk refused, or the folder is missing; what was there still is.
    """
    disk = disk_in_use()
    folder_path, name = os.path.split(os.path.expanduser(target))
    folder = disk.open_folder(folder_path or os.curdir, create=False)
    with contextlib.ExitStack() as stack:
        stack.callback(disk.close, folder)
        temporary, fd = stack.enter_context(create_temporary(disk, folder, name))
        try:
            view, done = memoryview(data), 0
            while done < len(view):
                done += disk.write(fd, view[done:], done)
            disk.fsync(fd)
        finally:
            disk.close(fd)
        disk.rename(folder, temporary, name)
        disk.fsync_folder(folder)

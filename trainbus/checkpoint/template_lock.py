"""One process at a time for the files of one name template. Needs no torch."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import socket
import time
import weakref
from typing import Any

from trainbus.checkpoint.disk import disk_in_use
from trainbus.errors import CheckpointLockedError

__all__ = ["TemplateLock", "lock_path"]

_log = logging.getLogger("trainbus")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]+")
_LONGEST_NAME = 200
_DIGITS = 16  # of the digest that tells templates apart whose names look alike
_MOST_BYTES = 1000  # of what a lock file says of its holder
_TRIES = 5  # each lost only to a holder that lets go between two calls


class TemplateLock:
    """
    Holds an advisory lock, on a hidden file beside the checkpoints, until `release`.

    The kernel lets go of it when the process dies, however that happens. Forked children close their
    copy of the descriptor: a DataLoader worker that outlives its parent must not keep the next run out.

    Args:
        folder: Where the files go; made if missing.
        template: Of their names.

    Raises:
        CheckpointLockedError: Another process has it; says which, on which host and since when.
        OSError: The lock file cannot be made.
    """

    def __init__(self, folder: str, template: str) -> None:
        self.path = lock_path(folder, template)
        self._disk = disk_in_use()
        self._fd: int | None = None
        opened = self._disk.open_folder(os.path.dirname(self.path))
        try:
            self._fd = self._take(opened, os.path.basename(self.path), template)
        finally:
            os.close(opened)
        _held.add(self)

    def _take(self, folder: int, name: str, template: str) -> int | None:
        for _ in range(_TRIES):
            fd = self._disk.open(folder, name, create=True)
            is_mine = False
            try:
                if not self._disk.lock(fd):
                    _log.warning(
                        "The file system of %r has no locks: a second run that saves under %r would not "
                        "be noticed.",
                        os.path.dirname(self.path),
                        template,
                    )
                    return None
                # Else whoever held it has just let go of it and removed the file.
                if _is_still_there(fd, folder, name):
                    _describe_holder(fd)
                    is_mine = True
                    return fd
            except BlockingIOError:
                raise CheckpointLockedError(self.path, template, _read_holder(fd)) from None
            finally:
                if not is_mine:
                    os.close(fd)  # or this process would keep itself out
        raise CheckpointLockedError(self.path, template, "another process")

    def release(self) -> None:
        """Let others have it. May be called again."""
        fd, self._fd = self._fd, None
        if fd is None:
            return
        with contextlib.suppress(OSError):
            # While it is held. It may be another's all the same, if the folder was removed and made again.
            if _is_still_there(fd, None, self.path):
                os.unlink(self.path)
        os.close(fd)

    def __del__(self) -> None:
        self.release()

    def _forget(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def lock_path(folder: str, template: str) -> str:
    """Return the absolute path of the lock file of a name template in a folder, one for each template."""
    name = _UNSAFE.sub("_", template)[:_LONGEST_NAME]
    if name != template:
        digest = hashlib.sha256(template.encode(errors="surrogatepass")).hexdigest()[:_DIGITS]
        name = f"{name[: _LONGEST_NAME - _DIGITS - 1]}-{digest}"
    return os.path.join(os.path.abspath(os.path.expanduser(folder)), f".{name}.lock")


def _is_still_there(fd: int, folder: int | None, name: str) -> bool:
    try:
        there = os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _describe_holder(fd: int) -> None:
    holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.time()}
    # It is for a message alone, and the lock holds without it, on a full disk too.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(holder).encode(), 0)


def _read_holder(fd: int) -> str:
    """Return who holds the lock, as far as the file says so. What it says may be anything."""
    try:
        holder: Any = json.loads(os.pread(fd, _MOST_BYTES, 0))
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(float(holder["started"])))
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]!r}, running since {started},"
    except (ValueError, TypeError, KeyError, OverflowError, OSError):
        return "another process"


_held: weakref.WeakSet[TemplateLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    for lock in list(_held):
        lock._forget()


os.register_at_fork(after_in_child=_forget_in_child)

"""The one door to the disk for writing. Tests replace it by one whose calls fail."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["Disk", "disk_in_use", "use_disk"]

# What file systems answer to what they cannot do at all.
_UNSUPPORTED = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK, errno.ENOTTY}
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE
_RENAME_EXCHANGE = 2


class Disk:
    """
    The calls a commit makes, one system call each, on descriptors.

    Every method blocks for as long as the disk takes and raises `OSError` as it comes.
    Names are relative to a folder's descriptor, so a folder that is renamed meanwhile
    does not lead a commit astray.
    """

    def open_folder(self, path: str, *, create: bool = True) -> int:
        """Open a folder; with *create* make what is missing of it, durably. Returns its descriptor."""
        path = path or os.curdir
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not create:
                raise
        self._make_folder(path.rstrip(os.sep))
        return self.open_folder(path, create=False)

    def _make_folder(self, path: str) -> None:
        above, name = os.path.split(path)
        parent = self.open_folder(above)
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=parent)
            self.fsync_folder(parent)
        finally:
            self.close(parent)

    def names(self, folder: int) -> list[str]:
        """Return the names in a folder."""
        return os.listdir(folder)

    def create(self, folder: int, name: str) -> int:
        """Create a file that must not exist, with the mode that the umask leaves. Returns its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _flag("O_NOFOLLOW") | os.O_CLOEXEC
        return os.open(name, flags, 0o666, dir_fd=folder)

    def open(self, folder: int, name: str, *, create: bool = False) -> int:
        """Open a regular file, never through a link, for reading and writing. Returns its descriptor."""
        flags = os.O_RDWR | _flag("O_NOFOLLOW") | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        fd = os.open(name, flags, 0o666, dir_fd=folder)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is not a regular file", name)
        return fd

    def lock(self, fd: int) -> bool:
        """
        Take the advisory lock of a file for as long as it is open, also in forked children. Never waits.

        Returns:
            False where the file system has no locks; a second caller is then not noticed.

        Raises:
            BlockingIOError: Another process or descriptor has it.
        """
        return _attempt(lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB))

    def allocate(self, fd: int, size: int) -> bool:
        """
        Claim room for the first *size* bytes of a file, whose length stays as it is.

        Returns:
            False where the file system cannot; ``posix_fallocate`` would write zeros there.

        Raises:
            OSError: There is not that much room.
        """
        fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)
        return fallocate is not None and _attempt(lambda: _fallocate(fallocate, fd, size))

    def trim(self, fd: int) -> None:
        """
        Give back the room behind the file's end, which `allocate` has claimed.

        XFS claims as much again and more by itself when a file grows over what was claimed, and what
        goes with a file with claimed room is not given back when it is closed.
        """
        os.ftruncate(fd, os.fstat(fd).st_size)

    def write(self, fd: int, data: memoryview, position: int) -> int:
        """Write some of *data* at a byte of the file, releasing the GIL; return how many bytes it was."""
        return os.pwrite(fd, data, position)

    def bypass_cache(self, fd: int, bypass: bool) -> bool:
        """
        Let writes go past the page cache, or not; return whether the file system agreed.

        One that agrees may still refuse the first write, with ``EINVAL``.
        """
        if not hasattr(os, "O_DIRECT"):
            return not bypass
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if bypass else flags & ~os.O_DIRECT)
        except OSError:
            return False
        return True

    def fsync(self, fd: int) -> None:
        """Return when the file's bytes have reached the disk. Must not be tried again when it fails."""
        if hasattr(fcntl, "F_FULLFSYNC"):  # without it macOS leaves them in the drive's own cache
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
        else:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file or folder. The descriptor is gone even when this fails."""
        os.close(fd)

    def rename(self, folder: int, old: str, new: str) -> None:
        """Put *old* in the place of *new*; a link at *new* is replaced, never followed."""
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def exchange(self, folder: int, one: str, other: str) -> bool:
        """
        Let two names, of files or folders, change places in one step.

        Returns:
            False where the file system or the system cannot; then nothing has changed.
        """
        renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        return renameat2 is not None and _attempt(lambda: _exchange(renameat2, folder, one, other))

    def unlink(self, folder: int, name: str) -> None:
        """Remove a file's name."""
        os.unlink(name, dir_fd=folder)

    def make_folder(self, folder: int, name: str) -> None:
        """Make a folder that must not exist, with the mode that the umask leaves."""
        os.mkdir(name, dir_fd=folder)

    def enter_folder(self, folder: int, name: str) -> int:
        """Open a folder inside another, never through a link. Returns its descriptor."""
        flags = os.O_RDONLY | os.O_DIRECTORY | _flag("O_NOFOLLOW") | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=folder)

    def remove_folder(self, folder: int, name: str) -> None:
        """Remove an empty folder."""
        os.rmdir(name, dir_fd=folder)

    def fsync_folder(self, folder: int) -> bool:
        """
        Return when the folder's names have reached the disk.

        Returns:
            False where the file system cannot tell (some FUSE and network ones).

        Raises:
            OSError: They may not have.
        """
        done = _attempt(lambda: os.fsync(folder))
        # XFS that shuts itself down drops the names and lets the sync succeed; from then on it answers
        # no other call.
        os.fstat(folder)
        return done


def disk_in_use() -> Disk:
    """Return the disk that saves go to: the real one, but in tests of what happens when it fails."""
    return _disks[-1]


@contextlib.contextmanager
def use_disk(disk: Disk) -> Iterator[None]:
    """Let the saves of this process go to *disk* meanwhile, those of all threads."""
    _disks.append(disk)
    try:
        yield
    finally:
        _disks.remove(disk)


_disks = [Disk()]


def _flag(name: str) -> int:
    return int(getattr(os, name, 0))


def _attempt(call: Callable[[], Any]) -> bool:
    try:
        call()
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return False
        raise
    return True


def _fallocate(function: Any, fd: int, size: int) -> None:
    while function(fd, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _exchange(function: Any, folder: int, one: str, other: str) -> None:
    if function(folder, os.fsencode(one), folder, os.fsencode(other), ctypes.c_uint(_RENAME_EXCHANGE)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

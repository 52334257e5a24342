"""The one door to the disk for writing. Tests replace it by a subclass whose calls fail."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os

__all__ = ["DISK", "Disk"]

_log = logging.getLogger("trainbus")
# What file systems answer that cannot sync a folder (some FUSE and network ones).
_CANNOT_SYNC_FOLDERS = {errno.EINVAL, errno.ENOTSUP}


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

    def create(self, folder: int, name: str) -> int:
        """Create a file that must not exist, with the mode that the umask leaves. Returns its descriptor."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o666, dir_fd=folder)

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
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a file or folder. The descriptor is gone even when this fails."""
        os.close(fd)

    def rename(self, folder: int, old: str, new: str) -> None:
        """Put *old* in the place of *new*; a link at *new* is replaced, never followed."""
        os.rename(old, new, src_dir_fd=folder, dst_dir_fd=folder)

    def unlink(self, folder: int, name: str) -> None:
        """Remove a file's name."""
        os.unlink(name, dir_fd=folder)

    def fsync_folder(self, folder: int) -> None:
        """Return when the folder's names have reached the disk, if its file system can tell."""
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in _CANNOT_SYNC_FOLDERS:
                raise
            _log.warning(
                "The file system cannot sync folders (%s): a checkpoint just written may be "
                "missing after a power cut.",
                error,
            )


DISK = Disk()
"""The real one."""

"""The order in which a folder of shards becomes durable. It and `commit` alone rename and remove."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.output_stream import OutputStream
from trainbus.checkpoint.sharded_format import DIGESTS, MANIFEST, METADATA, seal_folder
from trainbus.checkpoint.temporary import create_temporary_folder, discard, replaced_name
from trainbus.checkpoint.write_behind import WriteBehind
from trainbus.errors import UnsyncedNameError

__all__ = ["PendingFolder", "Written", "put_in_place_of_folder", "remove_sharded", "write_file"]

_OURS = re.compile(rf"{re.escape(MANIFEST)}|{re.escape(DIGESTS)}|{re.escape(METADATA)}|__\d+_\d+\.distcp")


class Written(NamedTuple):
    """A file that is on the disk: its bytes, and their xxh3-128 as 32 hex digits."""

    size: int
    digest: str


@contextlib.contextmanager
def write_file(
    disk: Disk, folder: int, name: str, behind: WriteBehind, written: dict[str, Written]
) -> Iterator[OutputStream]:
    """
    Write a new file in *folder*; when ``with`` is left it is synced, and *written* says what it is.

    Yields:
        What takes its bytes.

    Raises:
        OSError: The first thing the disk refused, also where who was writing made another error of it.
    """
    fd = disk.create(folder, name)
    try:
        with OutputStream(fd, disk, behind, held_back=0) as stream:
            try:
                yield stream
            except Exception as error:
                if stream.error is None:
                    raise
                raise stream.error from error
            size, digest = stream.tell(), stream.finish_plain()
        disk.fsync(fd)
    except BaseException:
        with contextlib.suppress(OSError):
            disk.close(fd)
        raise
    # Some network file systems report a failed write only here.
    disk.close(fd)
    written[name] = Written(size, digest)


class PendingFolder:
    """
    A folder that is to become a checkpoint. One process makes it, all ranks write into it.

    Until `commit` it has a hidden name that sweeps leave alone while this process lives. `close`
    must follow, be it committed or not: it removes what is left, the replaced checkpoint included.

    Attributes:
        parent: Descriptor of the folder it is in.
        parent_path: Of that folder.
        name: The hidden name.

    Args:
        path: The checkpoint's; missing folders above it are made.
        disk: What writes.

    Raises:
        FileExistsError: There is a folder at *path* that is no checkpoint.
        OSError: The disk refused.
    """

    def __init__(self, path: str, disk: Disk) -> None:
        self._disk = disk
        self.parent_path, self._final_name = os.path.split(path)
        with contextlib.ExitStack() as stack:
            self.parent = disk.open_folder(self.parent_path)
            stack.callback(_close_quietly, disk, self.parent)
            _refuse_foreign(disk, self.parent, self._final_name)
            self.name = stack.enter_context(create_temporary_folder(disk, self.parent, self._final_name))
            self._stack = stack.pop_all()

    def commit(self, manifest: Manifest, written: Mapping[str, Written], behind: WriteBehind) -> Manifest:
        """
        Put the list of digests and the manifest into the folder, sync it, and give it its name.

        At each moment, also after a power cut, the old checkpoint or the new one is there whole. Where
        the file system cannot let two names change places, a crash between two calls leaves the old one
        as ``NAME.….trainbus.old``, which is read like any other.

        Args:
            manifest: Name, size and digest are filled in.
            written: All the files, of all ranks, each synced by who wrote it.
            behind: Lets writes go on while the next bytes are made ready.

        Raises:
            UnsyncedNameError: Only the last step failed: the new checkpoint is there and whole, but a
                power cut may bring the old one back.
            OSError: The first thing the disk refused. The old checkpoint is untouched.
        """
        disk, digests = self._disk, {name: one.digest for name, one in written.items()}
        manifest = replace(manifest, name=self._final_name)
        final, listed, text = seal_folder(manifest, digests, sum(one.size for one in written.values()))
        folder = disk.enter_folder(self.parent, self.name)
        try:
            for name, content in ((DIGESTS, listed), (MANIFEST, text)):
                with write_file(disk, folder, name, behind, {}) as stream:
                    stream.write(content)
            disk.fsync_folder(folder)
        finally:
            _close_quietly(disk, folder)
        _refuse_foreign(disk, self.parent, self._final_name)
        replaced = _put_in_place(disk, self.parent, self.name, self._final_name)
        try:
            disk.fsync_folder(self.parent)
        except OSError as error:
            if replaced is None:
                # It may come back after a power cut, so `close` must not empty it.
                with contextlib.suppress(OSError):
                    disk.rename(self.parent, self.name, replaced_name(self._final_name))
            raise UnsyncedNameError(error.errno, error.strerror or str(error)) from error
        if replaced is not None:
            # Not worth failing for: the next sweep removes it.
            with contextlib.suppress(OSError):
                discard(disk, self.parent, replaced)
        return final

    def close(self) -> None:
        """Remove what is left under the hidden name, and let go of it. Raises nothing, also when repeated."""
        self._stack.close()


def remove_sharded(disk: Disk, folder: int, name: str) -> None:
    """
    Remove a sharded checkpoint durably: at no moment it is there in part.

    Raises:
        FileNotFoundError: It is not there.
        OSError: It could not be removed, or holds what is none of ours; then all of it is still there.
    """
    _refuse_foreign(disk, folder, name)
    discard(disk, folder, name)


def _put_in_place(disk: Disk, folder: int, new: str, name: str) -> str | None:
    """Give *new* its final *name*; return under which visible name the old one stands then, if any does."""
    try:
        if disk.exchange(folder, new, name):
            return None  # the old one has the hidden name now
        return _move_aside(disk, folder, new, name)
    except FileNotFoundError:
        disk.rename(folder, new, name)
        return None


def put_in_place_of_folder(disk: Disk, folder: int, new: str, name: str) -> str:
    """
    Give the file *new* the *name* of a sharded checkpoint; return under which one that stands then.

    A crash between two calls leaves it there, where it is read like any other.

    Raises:
        FileExistsError: The folder is no checkpoint.
        OSError: The disk refused, and the old one stands as before.
    """
    _refuse_foreign(disk, folder, name)
    if not _has_list(disk, folder, name):
        raise FileExistsError(
            errno.EEXIST,
            "the folder is no checkpoint of trainbus. Give the file a name of its own, or inside of it",
            name,
        )
    return _move_aside(disk, folder, new, name)


def _move_aside(disk: Disk, folder: int, new: str, name: str) -> str:
    """Give *new* the *name* of what is there; return under which visible name that one stands then."""
    old = replaced_name(name)
    disk.rename(folder, name, old)
    try:
        disk.rename(folder, new, name)
    except OSError:
        disk.rename(folder, old, name)
        raise
    return old


def _has_list(disk: Disk, folder: int, name: str) -> bool:
    inside = disk.enter_folder(folder, name)
    try:
        return DIGESTS in disk.names(inside)
    finally:
        _close_quietly(disk, inside)


def _refuse_foreign(disk: Disk, folder: int, name: str) -> None:
    """Raise FileExistsError if *name* is a folder with anything in it that no checkpoint has."""
    try:
        if not stat.S_ISDIR(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            return
        inside = disk.enter_folder(folder, name)
    except FileNotFoundError:
        return
    try:
        foreign = [entry for entry in disk.names(inside) if not _OURS.fullmatch(entry)]
    finally:
        _close_quietly(disk, inside)
    if foreign:
        raise FileExistsError(
            errno.EEXIST,
            f"the folder is no checkpoint: {min(foreign)!r} is in it. Give the checkpoint a name of its own",
            name,
        )


def _close_quietly(disk: Disk, fd: int) -> None:
    with contextlib.suppress(OSError):
        disk.close(fd)

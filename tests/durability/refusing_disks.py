"""Saves to disks that refuse them for real, and what is there afterwards. Functions of the server."""

from __future__ import annotations

import errno
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from saving_loop import read_number, unfinished
from torch import nn
from volumes import Volume, command, mounted, take_own_mounts

import trainbus
from trainbus import CheckpointWriteError, Handler
from trainbus.checkpoint.disk import Disk, use_disk
from trainbus.checkpoint.write_behind import CHUNK_BYTES
from trainbus_callbacks import ModelCheckpoint

OLD, NEW = 1, 2


def save(path: str, number: int, mebibytes: float = 0) -> str | None:
    """Save tensors of one number; return None, or the name of the errno that the typed error carries."""
    sizes = (7, int(mebibytes * (1 << 18)))
    state = {"module": {str(size): torch.full((size,), float(number)) for size in sizes}}
    try:
        trainbus.save(state, path)
    except CheckpointWriteError as error:
        assert error.path == path and isinstance(error.__cause__, OSError)
        return errno.errorcode[error.errno]
    return None


def look(folder: str) -> dict[str, Any]:
    """Return what each file of a folder holds, and how many unfinished ones there are."""
    names = sorted(name for name in os.listdir(folder) if name.endswith(".pt"))
    return {
        "files": {name: read_number(os.path.join(folder, name))[0] for name in names},
        "unfinished": len(unfinished(folder)),
    }


def size_of(folder: str, mebibytes: float) -> int:
    """Return the bytes that such a save takes."""
    path = os.path.join(folder, "probe")
    assert save(path, NEW, mebibytes) is None
    size = os.path.getsize(path)
    os.unlink(path)
    return size


@contextmanager
def some_file_system(kind: str, folder: str, options: str = "") -> Iterator[str]:
    """Make a file system of any kind, with a folder in it that is of no other use."""
    if kind in ("tmpfs", "ramfs"):
        with mounted(kind, folder, options) as path:
            yield path
    else:
        with Volume(folder, kind) as volume:
            path = os.path.join(volume.path, "saves")
            os.mkdir(path)
            yield path


def full(folder: str, kind: str, mebibytes: int, options: str = "") -> dict[str, Any]:
    """Save to a disk that has room for half of it, then once more after something was removed."""
    take_own_mounts()
    with some_file_system(kind, folder, options) as path:
        assert save(f"{path}/a.pt", OLD) is None
        free = os.statvfs(path).f_bavail * os.statvfs(path).f_frsize
        with open(f"{path}/ballast", "wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, free - (mebibytes << 20) // 2)
        refused = save(f"{path}/a.pt", NEW, mebibytes)
        then = look(path)
        os.unlink(f"{path}/ballast")
        return {"refused": refused, "then": then, "again": save(f"{path}/a.pt", NEW, mebibytes), **look(path)}


def full_at_each_page(folder: str) -> dict[str, Any]:
    """Save 40 KiB to a disk with room for one page more each time."""
    take_own_mounts()
    page = os.sysconf("SC_PAGESIZE")
    with mounted("tmpfs", folder, "size=4m") as path:
        assert save(f"{path}/a.pt", OLD) is None
        pages = size_of(path, 0.04) // page + 1
        outcomes = []
        for room in range(pages + 2):
            with open(f"{path}/ballast", "wb") as ballast:
                ballast.write(bytes((os.statvfs(path).f_bavail - room) * page))
            refused = save(f"{path}/a.pt", NEW, 0.04)
            outcomes.append([room, refused, look(path)])
            os.unlink(f"{path}/ballast")
            assert save(f"{path}/a.pt", OLD) is None
    return {"pages": pages, "outcomes": outcomes}


def without_names(folder: str) -> dict[str, Any]:
    """Save to a disk that can hold no other file, then once more after one was removed."""
    take_own_mounts()
    with mounted("tmpfs", folder, "nr_inodes=4") as path:
        assert save(f"{path}/a.pt", OLD) is None
        with open(f"{path}/1", "wb"), open(f"{path}/2", "wb"):
            pass
        refused = save(f"{path}/a.pt", NEW)
        then = look(path)
        os.unlink(f"{path}/1")
        return {"refused": refused, "then": then, "again": save(f"{path}/a.pt", NEW), **look(path)}


def full_under_training(folder: str) -> dict[str, Any]:
    """Let a training fill its disk in step 3."""
    take_own_mounts()
    with mounted("tmpfs", folder, "size=4m") as path:
        model = nn.ParameterList([torch.zeros(1000), torch.zeros(1000)])
        refused = None
        try:
            with Handler(model) as handler, torch.no_grad():
                handler.add_callback(ModelCheckpoint(f"{path}/last.pt", save_freq=1))
                for _ in handler.steps(20, range(20)):
                    if handler.global_step == 2:
                        handler.flush()
                        with open(f"{path}/ballast", "wb") as ballast:
                            ballast.write(bytes(os.statvfs(path).f_bavail * os.statvfs(path).f_frsize))
                    for parameter in model:
                        parameter.fill_(handler.global_step + 1)
        except CheckpointWriteError as error:
            refused = errno.errorcode[error.errno]
        return {"refused": refused, "step": handler.global_step, **look(path)}


def limited(folder: str, stride: int) -> dict[str, Any]:
    """Save with a limit on the size of files, at one byte out of *stride*, from none to more than enough."""
    size = size_of(folder, 0)
    limits = [*range(random.randrange(stride), size, stride), *range(size - 8, size), size + 64]
    return {"size": size, "outcomes": list(save_within(f"{folder}/a.pt", limits, 0))}


def limited_in_chunks(folder: str, kind: str, tries: int) -> dict[str, Any]:
    """Do that around the edges of chunks and pages, and anywhere, with a file of three chunks."""
    take_own_mounts()
    mebibytes = 33
    with some_file_system(kind, folder) as path:
        size = size_of(path, mebibytes)
        edges = [*range(0, size, CHUNK_BYTES), size // 4096 * 4096]
        limits = {edge + off for edge in edges for off in (-4096, -1, 0, 1, 511, 512, 4096)}
        limits |= {random.randrange(size) for _ in range(tries)} | set(range(size - 25, size + 64, 11))
        limits = sorted(limit for limit in limits if limit >= 0)
        return {"size": size, "outcomes": list(save_within(f"{path}/a.pt", limits, mebibytes))}


def save_within(path: str, limits: list[int], mebibytes: int) -> Iterator[list[Any]]:
    """Save over a small old file under each limit; give the limit, the refusal and what is there then."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    for limit in limits:
        assert save(path, OLD) is None
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal
        try:
            refused = save(path, NEW, mebibytes)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        yield [limit, refused, look(os.path.dirname(path))]


def written_back_to_nothing(folder: str, mebibytes: float, saves: int) -> dict[str, Any]:
    """
    Save again and again to a disk that claims to have more room than there is.

    Writes succeed, and what is wrong is noticed when they are synced, if at all. Afterwards the disk is
    mounted anew, with nothing left in memory of what was written.
    """
    take_own_mounts()
    with Volume(folder, "ext4", room="16m") as volume:
        durable, refusals, left = {}, [], []
        for number in range(1, saves + 1):
            for name in (f"new-{number}.pt", "last.pt"):
                refused = save(f"{volume.path}/{name}", number, mebibytes)
                if refused is None:
                    durable[name] = number
                else:
                    refusals.append(refused)
                    left += [one for one in unfinished(volume.path) if can_be_removed(volume.path, one)]
        volume.unmount()
        volume.enlarge_room()
        volume.mount()
        return {"durable": durable, "refusals": refusals, "left": left, **look(volume.path)}


def can_be_removed(folder: str, name: str) -> bool:
    """Remove a file, unless the disk has come to refuse that too, as it may from one moment to the next."""
    try:
        os.remove(os.path.join(folder, name))
    except OSError:
        return False
    return True


def gone(folder: str, kind: str, mebibytes: int) -> dict[str, Any]:
    """Save to a disk that has gone away, then mount it again."""
    take_own_mounts()
    with Volume(folder, kind) as volume:
        assert save(f"{volume.path}/a.pt", OLD) is None
        volume.cut_power()
        refused = save(f"{volume.path}/a.pt", NEW, mebibytes)
        volume.unmount()
        volume.mount()
        return {"refused": refused, **look(volume.path)}


def gone_after_rename(folder: str, kind: str) -> dict[str, Any]:
    """Save to a disk that goes away when all is done but the sync of the folder, then mount it again."""
    take_own_mounts()
    with Volume(folder, kind) as volume:
        assert save(f"{volume.path}/a.pt", OLD) is None

        class Unplugged(Disk):
            def rename(self, folder: int, old: str, new: str) -> None:
                super().rename(folder, old, new)
                volume.cut_power()

        with use_disk(Unplugged()):
            refused = save(f"{volume.path}/a.pt", NEW)
        volume.unmount()
        volume.mount()
        return {"refused": refused, **look(volume.path)}


def read_only(folder: str, name: str) -> dict[str, Any]:
    """Save where a mount allows only reading."""

    def protect(path: str) -> Callable[[], object]:
        command("mount", "--bind", path, path)
        command("mount", "-o", "remount,ro,bind", path)
        return lambda: command("umount", path)

    take_own_mounts()
    with mounted("tmpfs", folder) as path:
        return save_where_forbidden(os.path.join(path, "saves"), name, protect)


def immutable(folder: str, name: str) -> dict[str, Any]:
    """Save into a folder in which nothing may change, not even by root."""

    def protect(path: str) -> Callable[[], object]:
        command("chattr", "+i", path)
        return lambda: command("chattr", "-i", path)

    take_own_mounts()
    with Volume(folder, "ext4") as volume:
        return save_where_forbidden(os.path.join(volume.path, "saves"), name, protect)


def save_where_forbidden(
    folder: str, name: str, protect: Callable[[str], Callable[[], object]]
) -> dict[str, Any]:
    """Save before, during and after *protect*, which returns what undoes it."""
    os.mkdir(folder)
    assert save(f"{folder}/a.pt", OLD) is None
    undo = protect(folder)
    refused = save(f"{folder}/{name}", NEW)
    then = look(folder)
    undo()
    return {"refused": refused, "then": then, "again": save(f"{folder}/{name}", NEW)}


def without_bypass(folder: str, kind: str, mebibytes: int) -> dict[str, Any]:
    """Save to a file system, telling whether it refuses writes past the page cache."""
    take_own_mounts()
    with some_file_system(kind, folder) as path:
        try:
            os.close(os.open(f"{path}/direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
            refuses = False
        except OSError:
            refuses = True
        return {"refuses": refuses, "refused": save(f"{path}/a.pt", NEW, mebibytes), **look(path)}


def room_of(folder: str, kind: str, mebibytes: int) -> dict[str, int]:
    """Save once and return the bytes of the file and those of the disk that it takes."""
    take_own_mounts()
    with some_file_system(kind, folder) as path:
        assert save(f"{path}/a.pt", NEW, mebibytes) is None
        status = os.stat(f"{path}/a.pt")
        return {"size": status.st_size, "room": status.st_blocks * 512}

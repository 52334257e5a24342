"""File systems of all kinds, made for one process and gone with it. Linux, root.

The process gets a mount table of its own, and loop devices that the kernel detaches at their last
use: however it ends, nothing stays mounted.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

FS_IOC_SHUTDOWN = 0x8004587D
WITHOUT_LOG_FLUSH = 2
CLONE_NEWNS = 0x00020000
PR_SET_PDEATHSIG = 1


class Unavailable(Exception):
    """This machine cannot do what a test needs; the message says what."""


@dataclass(frozen=True)
class Kind:
    """How to make and mount a file system."""

    make: tuple[str, ...]
    mount: str
    mebibytes: int


KINDS = {
    "ext4": Kind(("mkfs.ext4", "-q", "-F", "-m", "0"), "", 192),
    # Without these two, ext4 itself hides most missing syncs.
    "ext4-writeback": Kind(("mkfs.ext4", "-q", "-F", "-m", "0"), "data=writeback,noauto_da_alloc", 192),
    "xfs": Kind(("mkfs.xfs", "-q", "-f"), "", 320),
}


def die_with_parent() -> None:
    """Have this process killed when the one that forked it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def command(*words: str) -> str:
    """Run a program and return what it prints."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise Unavailable(f"there is no {words[0]} here") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


def take_own_mounts() -> None:
    """Let what this process mounts be seen by it and its children only, and vanish with them."""
    if sys.platform != "linux" or os.geteuid() != 0:
        raise Unavailable("it takes root on Linux to mount file systems")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        raise Unavailable(f"no mounts of our own are allowed here: {os.strerror(ctypes.get_errno())}")
    try:
        command("mount", "--make-rprivate", "/")
    except RuntimeError as error:
        raise Unavailable(str(error)) from None


@contextlib.contextmanager
def mounted(kind: str, folder: str, options: str = "") -> Iterator[str]:
    """Mount a file system that needs no device, e.g. ``tmpfs``. Gives the folder, which is made."""
    os.makedirs(folder, exist_ok=True)
    command("mount", "-t", kind, *(["-o", options] if options else []), kind, folder)
    try:
        yield folder
    finally:
        command("umount", "--lazy", folder)


class Volume:
    """
    A file system on a device that lies in memory and whose power can be cut.

    Attributes:
        path: Where it is mounted.

    Args:
        folder: A place for the device and the mount point; empty.
        kind: One of `KINDS`.
        room: The memory that there really is for it, as tmpfs wants it; by default enough.
    """

    def __init__(self, folder: str, kind: str, room: str = "100%") -> None:
        self.path = os.path.join(folder, "volume")
        self._memory = os.path.join(folder, "memory")
        self._image = os.path.join(self._memory, "image")
        self._kind = KINDS[kind]
        self._room = room

    def __enter__(self) -> Volume:
        for folder in (self.path, self._memory):
            os.makedirs(folder)
        command("mount", "-t", "tmpfs", "-o", f"size={self._room}", "tmpfs", self._memory)
        with open(self._image, "wb") as image:
            image.truncate(self._kind.mebibytes << 20)
        command(*self._kind.make, self._image)
        self.mount()
        return self

    def __exit__(self, *_: object) -> None:
        # The mounts go with the process in any case; so this may be as quick as it likes.
        for folder in (self.path, self._memory):
            with contextlib.suppress(RuntimeError):
                command("umount", "--lazy", folder)

    def mount(self) -> None:
        """Mount it, as after a boot: from what the device has."""
        try:
            device = command("losetup", "--find", "--show", self._image)
        except RuntimeError as error:
            raise Unavailable(f"no loop device can be had: {error}") from None
        # Detached while it is open, it stays until its last use, and not a moment longer.
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
        try:
            command("losetup", "--detach", device)
            options = self._kind.mount
            command("mount", *(["-o", options] if options else []), device, self.path)
        finally:
            os.close(fd)

    def unmount(self) -> None:
        """Unmount it; nobody may have anything open there."""
        command("umount", self.path)

    def cut_power(self) -> None:
        """From now on nothing reaches the device, also not what only the page cache or the journal had."""
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)

    def enlarge_room(self) -> None:
        """Give the device the memory that it claims to have."""
        command("mount", "-o", "remount,size=100%", self._memory)

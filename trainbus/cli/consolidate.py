"""``trainbus consolidate``: a sharded checkpoint as one plain file."""

from __future__ import annotations

import contextlib
import functools
import json
import mmap
import os
import sys
from collections.abc import Callable, Iterator

import torch
import typer

from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.disk import disk_in_use
from trainbus.checkpoint.folder import refuse_folder_of_checkpoints
from trainbus.checkpoint.sharded_format import where_it_stands
from trainbus.checkpoint.sharded_load import ALIGNMENT, load_sharded, size_of
from trainbus.checkpoint.temporary import create_temporary
from trainbus.errors import TrainbusError

__all__ = ["run"]


def run(folder: str, target: str, *, force: bool, as_json: bool) -> None:
    """
    Write what is in a sharded checkpoint to one ``torch.save`` file, with its manifest, durably.

    Needs no process group. The tensors are put together in a hidden file beside *target*, which is gone
    afterwards, so that a state that is larger than the memory can be written; the disk has to have room
    for it twice.

    Args:
        folder: The sharded checkpoint; verified first.
        target: Where to; its folder must be there.
        force: Replace a file that is there.
        as_json: Print one object, ``path``, ``size``, ``digest`` and ``files``, instead of a sentence.

    Raises:
        typer.BadParameter: *target* is there, or *folder* is no sharded checkpoint, or damaged.
    """
    target = os.path.expanduser(target)
    if os.path.isdir(target) or (os.path.lexists(target) and not force):
        more = "" if os.path.isdir(target) else " Give --force to replace it."
        raise typer.BadParameter(f"{target!r} is there already.{more}")
    place = where_it_stands(folder)
    if not os.path.lexists(place):
        raise typer.BadParameter(f"{folder!r} does not exist.")
    if os.path.isfile(place):
        raise typer.BadParameter(
            f"{folder!r} is a file already; `consolidate` takes a sharded checkpoint's folder."
        )
    try:
        refuse_folder_of_checkpoints(place)
        with _memory_on_disk(target, size_of(place)) as allocate:
            state, manifest = load_sharded(place, map_location=None, allocate=allocate)
            final = commit(target, manifest, functools.partial(torch.save, state))
    except TrainbusError as error:
        raise typer.BadParameter(str(error)) from error
    except OSError as error:
        name = error.filename or target
        sys.exit(
            f"trainbus: cannot write {target!r}: {name}: {error.strerror}. What was there before still is."
        )
    files = sum(name.endswith(".distcp") for name in os.listdir(place))
    if as_json:
        print(json.dumps({"path": target, "size": final.size, "digest": final.digest, "files": files}))
        return
    print(f"{target}: {final.size / 1e6:,.1f} MB, out of {files} file(s).")


@contextlib.contextmanager
def _memory_on_disk(beside: str, size: int) -> Iterator[Callable[[torch.Size, torch.dtype], torch.Tensor]]:
    """Yield what makes tensors in a hidden file of *size* bytes, whose pages need not stay in memory."""
    disk = disk_in_use()
    folder_path, name = os.path.split(os.path.expanduser(beside))
    folder = disk.open_folder(folder_path or os.curdir, create=False)
    with contextlib.ExitStack() as stack:
        stack.callback(disk.close, folder)
        temporary, fd = stack.enter_context(create_temporary(disk, folder, name))
        disk.close(fd)
        fd = disk.open(folder, temporary)
        stack.callback(disk.close, fd)
        # Its name is not needed: so it goes with this process, however that ends.
        disk.unlink(folder, temporary)
        # Claimed now: a disk that is full when a page is written would end the process by a signal.
        os.posix_fallocate(fd, 0, max(size, 1))
        mapping = mmap.mmap(fd, max(size, 1))
        at = 0

        def allocate(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
            nonlocal at
            count = shape.numel() * dtype.itemsize
            if not count:
                return torch.empty(shape, dtype=dtype)
            tensor = (
                torch.frombuffer(mapping, dtype=torch.uint8, count=count, offset=at).view(dtype).view(shape)
            )
            at += -(-count // ALIGNMENT) * ALIGNMENT
            return tensor

        yield allocate

"""How a folder takes its name: in which order, over what, and what is left when the disk fails."""

from __future__ import annotations

import errno
import math
import os

import pytest
import torch

from trainbus.checkpoint.commit import commit, remove
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_commit import PendingFolder, Written, write_file
from trainbus.checkpoint.sharded_format import METADATA, read_manifest
from trainbus.checkpoint.temporary import sweep
from trainbus.checkpoint.verify import verify_checkpoint
from trainbus.checkpoint.write_behind import WriteBehind
from trainbus.errors import UnsyncedNameError
from trainbus.testing.faults import CALLS, FaultyDisk

WRITERS = WriteBehind(most=0)


class NoExchange(FaultyDisk):
    """A disk on which two names cannot change places."""

    def exchange(self, folder, one, other):
        """Say so."""
        os.stat(other, dir_fd=folder)
        return False


def save(path, step, disk=None):
    """Write a checkpoint of one file that says of which step it is."""
    disk = disk or Disk()
    pending = PendingFolder(str(path), disk)
    try:
        written: dict[str, Written] = {}
        folder = disk.enter_folder(pending.parent, pending.name)
        try:
            with write_file(disk, folder, METADATA, WRITERS, written) as stream:
                stream.write(b"%d" % step)
        finally:
            os.close(folder)
        return pending.commit(Manifest(contents="state", global_step=step), written, WRITERS)
    finally:
        pending.close()


def step_of(path):
    """Return which step a checkpoint says it is of, once it is verified."""
    return verify_checkpoint(path).global_step


WRITE = ["create", "write", "fsync", "close"]
ORDER = [
    *("open_folder", "enter_folder", "names", "close"),  # is it a checkpoint that is there?
    *("create", "lock", "close", "make_folder"),
    *("enter_folder", *WRITE),
    *("enter_folder", *WRITE, *WRITE, "fsync_folder", "close"),
    *("enter_folder", "names", "close", "exchange", "fsync_folder"),
]


def save_file(path, step, disk):
    """Write a plain checkpoint that says of which step it is."""
    manifest = Manifest(contents="state", global_step=step)
    return commit(path, manifest, lambda stream: torch.save({}, stream), disk=disk)


class TestPlainFile:
    """A plain file that takes the name of a sharded checkpoint."""

    @pytest.mark.parametrize("persistent", [False, True])
    def test_disk_fails_at_each_call(self, tmp_path, persistent):
        """Whichever call fails, the old checkpoint or the new one is whole under its name; no rest stays."""
        leaving = {"unlink", "remove_folder", "close"} if persistent else set()
        calls = [name for name in CALLS if name not in leaving]
        number, failed = 0, 1
        while failed:
            number += 1
            (tmp_path / "a").unlink(missing_ok=True)
            save(tmp_path / "a", 0)
            disk = FaultyDisk(errno.EIO, calls=calls, at=number, times=math.inf if persistent else 1)
            try:
                save_file(tmp_path / "a", number, disk)
            except OSError as error:
                assert error.errno == errno.EIO
                assert step_of(tmp_path / "a") == (number if isinstance(error, UnsyncedNameError) else 0)
                save_file(tmp_path / "a", number, Disk())
            failed = disk.failed
            assert step_of(tmp_path / "a") == number
            sweep(str(tmp_path), Disk())
            assert os.listdir(tmp_path) == ["a"] and (tmp_path / "a").is_file()
        assert number > 15

    @pytest.mark.parametrize("inside", [[], [".metadata", "__0_0.distcp"]])
    def test_folder_of_nothing_of_ours_stays(self, tmp_path, inside):
        """Nor is an empty folder replaced, or one of torch.distributed.checkpoint, by a file."""
        (tmp_path / "a").mkdir()
        for name in inside:
            (tmp_path / "a" / name).write_text("dear")
        with pytest.raises(FileExistsError, match="is no checkpoint of trainbus"):
            save_file(tmp_path / "a", 1, Disk())

        assert sorted(os.listdir(tmp_path / "a")) == inside and os.listdir(tmp_path) == ["a"]

    def test_foreign_folder_stays(self, tmp_path):
        """A folder with anything else in it is refused, and nothing of it is touched."""
        save(tmp_path / "a", 0)
        (tmp_path / "a" / "thesis.tex").write_text("dear")
        with pytest.raises(FileExistsError, match=r"'thesis\.tex' is in it. Give the checkpoint a name"):
            save_file(tmp_path / "a", 1, Disk())

        assert step_of(tmp_path / "a") == 0 and os.listdir(tmp_path) == ["a"]


class TestCommit:
    def test_order(self, tmp_path):
        """All files are synced before the folder, the folder before its name changes, its name at last."""
        save(tmp_path / "a", 1)
        disk = FaultyDisk()
        final = save(tmp_path / "a", 2, disk)

        assert disk.made[: len(ORDER)] == ORDER
        assert set(disk.made[len(ORDER) :]) == {
            *("enter_folder", "names", "unlink", "remove_folder", "close"),
        }
        assert read_manifest(tmp_path / "a") == final
        assert os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("disk_kind", [FaultyDisk, NoExchange])
    @pytest.mark.parametrize("persistent", [False, True])
    def test_disk_fails_at_each_call(self, tmp_path, disk_kind, persistent):
        """Whichever call fails, the old checkpoint or the new one is whole under its name; no rest stays."""
        # A disk that breaks for good still lets go of names and descriptors.
        leaving = {"unlink", "remove_folder", "close"} if persistent else set()
        calls = [name for name in CALLS if name not in leaving]
        save(tmp_path / "a", 0)
        before = set(os.listdir("/proc/self/fd"))
        number = 0
        while True:
            number += 1
            disk = disk_kind(errno.EIO, calls=calls, at=number, times=math.inf if persistent else 1)
            try:
                save(tmp_path / "a", number, disk)
            except OSError as error:
                assert error.errno == errno.EIO
                assert step_of(tmp_path / "a") in (number - 1, number)
                assert persistent or (tmp_path / "a").exists()
                done = isinstance(error, UnsyncedNameError)
            else:
                done = True
            assert step_of(tmp_path / "a") == number or not done
            save(tmp_path / "a", number)
            assert set(os.listdir("/proc/self/fd")) <= before
            sweep(str(tmp_path), Disk())
            assert os.listdir(tmp_path) == ["a"]
            if not disk.failed:
                break
        assert number > 20

    def test_failed_sync_of_the_name_is_told(self, tmp_path):
        """A checkpoint that is there, but may not be after a power cut, is not reported as saved."""
        with pytest.raises(UnsyncedNameError):
            save(tmp_path / "a", 1, FaultyDisk(errno.EIO, calls=["fsync_folder"], at=2))

        assert step_of(tmp_path / "a") == 1

    def test_old_one_outlives_a_name_that_was_not_synced(self, tmp_path):
        """Where a power cut may bring the old checkpoint back, it stays whole until the next sweep."""
        save(tmp_path / "a", 1)
        with pytest.raises(UnsyncedNameError):
            save(tmp_path / "a", 2, FaultyDisk(errno.EROFS, calls=["fsync_folder"], at=2))

        (old,) = (path for path in tmp_path.iterdir() if path.name != "a")
        assert (step_of(tmp_path / "a"), step_of(old)) == (2, 1)
        sweep(str(tmp_path), Disk())
        assert os.listdir(tmp_path) == ["a"]

    def test_replaces_a_file(self, tmp_path):
        """A plain checkpoint of the same name is replaced as well."""
        for disk in (Disk(), NoExchange()):
            (tmp_path / "a").write_text("old")
            save(tmp_path / "a", 1, disk)

            assert step_of(tmp_path / "a") == 1
            assert os.listdir(tmp_path) == ["a"]
            remove(tmp_path / "a")

    @pytest.mark.parametrize("moment", ["before", "meanwhile"])
    def test_folder_of_something_else_stays(self, tmp_path, moment):
        """A folder that is no checkpoint is not replaced, whatever is in it."""

        def fill(name, number):
            (tmp_path / "a").mkdir()
            (tmp_path / "a" / "thesis.tex").write_text("dear")

        disk = FaultyDisk(calls=["make_folder"], before=fill)
        if moment == "before":
            fill("", 0)
            disk = FaultyDisk()

        with pytest.raises(FileExistsError, match=r"no checkpoint: 'thesis\.tex' is in it"):
            save(tmp_path / "a", 1, disk)
        assert (tmp_path / "a" / "thesis.tex").read_text() == "dear"
        assert os.listdir(tmp_path) == ["a"]

    def test_makes_missing_folders(self, tmp_path):
        """Folders above the checkpoint are made."""
        save(tmp_path / "x" / "y" / "a", 1)

        assert step_of(tmp_path / "x" / "y" / "a") == 1


class TestRemove:
    def test_takes_the_folder(self, tmp_path):
        """The folder is gone, and nothing beside it; one that is not there is fine."""
        save(tmp_path / "a", 1)
        save(tmp_path / "b", 1)

        remove(tmp_path / "a")
        remove(tmp_path / "a")
        assert os.listdir(tmp_path) == ["b"]

    def test_at_no_moment_half_is_there(self, tmp_path):
        """However far a removal comes, the checkpoint is whole or not there, and a sweep removes the rest."""
        number = 0
        while True:
            number += 1
            save(tmp_path / "a", 1)
            disk = FaultyDisk(errno.EIO, at=number, times=math.inf)
            try:
                remove(tmp_path / "a", disk=disk)
            except OSError:
                pass
            if (tmp_path / "a").exists():
                assert step_of(tmp_path / "a") == 1
                remove(tmp_path / "a")
            sweep(str(tmp_path), Disk())
            assert os.listdir(tmp_path) == []
            if not disk.failed:
                break
        assert number > 6

    def test_leaves_what_is_not_ours(self, tmp_path):
        """A checkpoint into which somebody has put a file of theirs stays whole."""
        save(tmp_path / "a", 1)
        (tmp_path / "a" / "notes.txt").write_text("dear")

        with pytest.raises(FileExistsError, match=r"'notes\.txt' is in it"):
            remove(tmp_path / "a")
        assert step_of(tmp_path / "a") == 1


class TestSweep:
    def test_leaves_what_is_being_written(self, tmp_path):
        """The folder of a save that is under way stays; a sweep after its process has died takes it."""
        pending = PendingFolder(str(tmp_path / "a"), Disk())
        assert sweep(str(tmp_path), Disk()) == []
        assert len(os.listdir(tmp_path)) == 2

        (lock,) = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
        (tmp_path / lock).unlink()  # as the kernel lets go of it
        assert sweep(str(tmp_path), Disk()) == [f"{lock}.d"]
        pending.close()
        assert os.listdir(tmp_path) == []

    def test_puts_back_what_was_moved_away(self, tmp_path):
        """A checkpoint whose successor never came gets its name back; one whose successor came goes."""
        moved = tmp_path / "a.0123456789abcdef.trainbus.old"
        save(tmp_path / "a", 1)
        (tmp_path / "a").rename(moved)

        assert sweep(str(tmp_path), Disk()) == []
        assert step_of(tmp_path / "a") == 1
        save(moved, 0)
        assert sweep(str(tmp_path), Disk()) == [moved.name]
        assert os.listdir(tmp_path) == ["a"] and step_of(tmp_path / "a") == 1

    @pytest.mark.parametrize(
        "name", [".a.0123456789abcdef.trainbus.tmp.d", "a.0123456789abcdef.trainbus.old"]
    )
    def test_follows_no_link(self, tmp_path, name):
        """What a link of such a name leads to stays."""
        save(tmp_path / "victim", 1)
        save(tmp_path / "a", 1)
        (tmp_path / name).symlink_to(tmp_path / "victim")

        sweep(str(tmp_path), Disk())
        assert step_of(tmp_path / "victim") == 1

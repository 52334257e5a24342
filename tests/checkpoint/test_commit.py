from __future__ import annotations

import errno
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from trainbus.checkpoint.commit import commit, remove
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.file_format import read_manifest
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.testing.faults import CALLS, FaultyDisk

MANIFEST = Manifest(contents="object")


def save(path: str | Path, state: Any, disk: Disk | None = None) -> Manifest:
    return commit(path, MANIFEST, lambda stream: torch.save(state, stream), disk=disk or Disk())


def value(path: Path) -> float:
    state, _ = load_file(path)
    return float(state["a"][0])


ORDER = [
    *("open_folder", "fsync_folder"),  # what the manifest may promise depends on the latter
    *("create", "lock", "write", "write", "fsync", "close", "rename", "fsync_folder", "close"),
]


class TestCommit:
    def test_order(self, tmp_path):
        """
        The file is synced before it gets its name, and its name before the commit is over.
        """
        disk = FaultyDisk()

        final = save(tmp_path / "a.pt", {"a": torch.ones(3)}, disk)

        assert disk.made == ORDER
        assert read_manifest(tmp_path / "a.pt") == final
        assert os.listdir(tmp_path) == ["a.pt"]

    @pytest.mark.parametrize("fail_at", range(1, len(ORDER) + 1))
    @pytest.mark.parametrize("persistent", [False, True])
    def test_disk_fails_at_each_call(self, tmp_path, fail_at, persistent):
        """
        Whichever call fails, the error comes out as it is, the old file stays and nothing is left over.
        """
        save(tmp_path / "a.pt", {"a": torch.zeros(3)})
        before = set(os.listdir("/proc/self/fd"))
        disk = FaultyDisk(errno.EIO, at=fail_at)
        if persistent:
            # A disk that breaks for good still lets go of names and descriptors.
            rest = [name for name in CALLS if name not in ("unlink", "close")]
            disk = FaultyDisk(errno.EIO, calls=rest, at=fail_at, times=math.inf)
            order = [name for name in ORDER if name in rest]
        else:
            order = ORDER

        if fail_at > len(order) or (fail_at == len(order) and not persistent):
            save(tmp_path / "a.pt", {"a": torch.ones(3)}, disk)
        else:
            with pytest.raises(OSError, match=f"injected into {order[fail_at - 1]}") as info:
                save(tmp_path / "a.pt", {"a": torch.ones(3)}, disk)
            assert info.value.errno == errno.EIO

        renamed = order.index("rename") + 1
        assert value(tmp_path / "a.pt") == float(fail_at > renamed)
        assert os.listdir(tmp_path) == ["a.pt"]
        assert set(os.listdir("/proc/self/fd")) == before

    def test_write_fails_inside_torch_save(self, tmp_path):
        """
        An error in the middle of a large tensor keeps its number, which torch.save would drop.
        """
        disk = FaultyDisk(errno.EIO, calls=["write"], at=2)

        with pytest.raises(OSError, match="injected into write"):
            save(tmp_path / "a.pt", {"a": torch.zeros(12 << 20)}, disk)

        assert os.listdir(tmp_path) == []

    def test_swallowed_error(self, tmp_path):
        """
        An error of the disk that the serializer hides is raised all the same.
        """

        def serialize(stream: Any) -> None:
            for _ in range(3):
                try:
                    stream.write(bytes(17 << 20))
                except OSError:
                    pass

        with pytest.raises(OSError, match="injected into write"):
            commit(tmp_path / "a.pt", MANIFEST, serialize, disk=FaultyDisk(errno.EIO, calls=["write"]))

        assert os.listdir(tmp_path) == []

    def test_room_is_given_back(self, tmp_path):
        """
        A finished file takes no room behind its end, whatever was claimed for it before.
        """

        class Generous(Disk):
            def allocate(self, fd: int, size: int) -> bool:
                return super().allocate(fd, size + (32 << 20))

        commit(
            tmp_path / "a.pt",
            MANIFEST,
            lambda stream: torch.save(bytes(17 << 20), stream),
            disk=Generous(),
            at_least=17 << 20,
        )

        status = os.stat(tmp_path / "a.pt")
        assert 17 << 20 < status.st_size <= status.st_blocks * 512 < 18 << 20

    @pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt("mine")])
    def test_serializer_fails(self, tmp_path, error):
        """
        What the serializer raises, Ctrl-C included, comes out; the old file stays.
        """
        save(tmp_path / "a.pt", {"a": torch.zeros(1)})

        def serialize(stream: Any) -> None:
            stream.write(b"half")
            raise error

        with pytest.raises(type(error), match="mine"):
            commit(tmp_path / "a.pt", MANIFEST, serialize)

        assert value(tmp_path / "a.pt") == 0.0
        assert os.listdir(tmp_path) == ["a.pt"]

    def test_config_too_long(self, tmp_path):
        """
        A manifest that does not fit leaves no file.
        """
        manifest = Manifest(contents="object", config="x" * 70_000)

        with pytest.raises(ValueError, match="limit is 60000"):
            commit(tmp_path / "a.pt", manifest, lambda stream: torch.save(1, stream))

        assert os.listdir(tmp_path) == []

    def test_somebody_elses_file_is_not_removed(self, tmp_path):
        """
        A temporary name that is taken is an error, and whose it is stays there.
        """

        class Taken(Disk):
            def create(self, folder: int, name: str) -> int:
                (tmp_path / name).write_text("another's")
                return super().create(folder, name)

        with pytest.raises(FileExistsError):
            save(tmp_path / "a.pt", {}, Taken())

        assert len(os.listdir(tmp_path)) == 1

    def test_temporary_is_a_hidden_sibling(self, tmp_path):
        """
        The file is written beside its place, under a hidden name that ends in .tmp.
        """
        names = []

        def serialize(stream: Any) -> None:
            names.extend(os.listdir(tmp_path))
            torch.save(1, stream)

        commit(tmp_path / "a.pt", MANIFEST, serialize)

        (name,) = names
        assert name.startswith(".a.pt.")
        assert name.endswith(".tmp")

    @pytest.mark.parametrize("name", ["x" * 255, "\u00fc" * 127])
    def test_longest_name(self, tmp_path, name):
        """
        A name as long as the file system allows can be saved.
        """
        save(tmp_path / name, {"a": torch.ones(1)})

        assert os.listdir(tmp_path) == [name]

    @pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
    def test_mode_follows_umask(self, tmp_path, mask, mode):
        """
        The file has the mode that any file made here would have.
        """
        old = os.umask(mask)
        try:
            save(tmp_path / "a.pt", {})
        finally:
            os.umask(old)

        assert (tmp_path / "a.pt").stat().st_mode & 0o777 == mode

    def test_link_is_replaced(self, tmp_path):
        """
        A link at the path is replaced; what it leads to is untouched.
        """
        (tmp_path / "victim").write_text("dear")
        (tmp_path / "a.pt").symlink_to(tmp_path / "victim")

        save(tmp_path / "a.pt", {"a": torch.ones(1)})

        assert (tmp_path / "victim").read_text() == "dear"
        assert not (tmp_path / "a.pt").is_symlink()
        assert value(tmp_path / "a.pt") == 1.0

    def test_bare_name_missing_folder_and_home(self, tmp_path, monkeypatch):
        """
        A bare file name, a folder that is not there and ~ work.
        """
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))

        save("a.pt", {"a": torch.ones(1)})
        save("runs/1/a.pt", {"a": torch.ones(1)})
        save("~/deep/a.pt", {"a": torch.ones(1)})

        for name in ("a.pt", "runs/1/a.pt", "home/deep/a.pt"):
            assert value(tmp_path / name) == 1.0

    @pytest.mark.parametrize("path", ["", "a/", ".", "a/.."])
    def test_folder_for_a_file(self, path):
        """
        A path that names a folder is refused before anything is written.
        """
        with pytest.raises(ValueError, match="names a folder, not a file"):
            save(path, {})

    def test_reader_of_the_old_file(self, tmp_path):
        """
        Whoever has the old file mapped goes on reading it.
        """
        save(tmp_path / "a.pt", {"a": torch.zeros(1000)})
        old = torch.load(tmp_path / "a.pt", mmap=True, weights_only=True)

        save(tmp_path / "a.pt", {"a": torch.ones(1000)})

        assert old["a"].equal(torch.zeros(1000))

    def test_two_at_a_time(self, tmp_path):
        """
        Two threads that write the same path leave one of the two files, whole.
        """
        threads = [
            threading.Thread(target=save, args=(tmp_path / "a.pt", {"a": torch.full((1000,), float(n))}))
            for n in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)

        assert value(tmp_path / "a.pt") in (0.0, 1.0)
        assert os.listdir(tmp_path) == ["a.pt"]


class TestRemove:
    def test_removed_durably(self, tmp_path):
        """
        The folder is synced after the name is gone.
        """
        save(tmp_path / "a.pt", {})
        disk = FaultyDisk()

        remove(tmp_path / "a.pt", disk=disk)

        assert disk.made == ["open_folder", "unlink", "fsync_folder", "close"]
        assert os.listdir(tmp_path) == []

    def test_missing(self, tmp_path):
        """
        A file or folder that is not there is fine, and none is made.
        """
        remove(tmp_path / "a.pt")
        remove(tmp_path / "no" / "a.pt")

        assert os.listdir(tmp_path) == []

    @pytest.mark.parametrize("fail_at", [1, 2, 3])
    def test_failure(self, tmp_path, fail_at):
        """
        What the disk refuses comes out as it is.
        """
        save(tmp_path / "a.pt", {})

        with pytest.raises(OSError, match="injected"):
            remove(tmp_path / "a.pt", disk=FaultyDisk(errno.EIO, at=fail_at))

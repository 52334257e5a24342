"""What a folder says of itself, and what is found out when it lies."""

from __future__ import annotations

import os
import subprocess

import pytest
import torch
import xxhash

import trainbus
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_format import (
    DIGESTS,
    MANIFEST,
    METADATA,
    is_sharded,
    read_manifest,
    read_sharded,
    seal_folder,
    where_it_stands,
)
from trainbus.errors import CheckpointCorruptError


@pytest.fixture
def folder(tmp_path):
    """Make a folder whose files have nothing in them that anybody would load."""
    return make(tmp_path / "a", {METADATA: b"meta", "__0_0.distcp": b"shard" * 100, "__1_0.distcp": b"!"})


def make(path, files, **fields):
    """Write files, their list and the manifest."""
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    digests = {name: xxhash.xxh3_128(content).hexdigest() for name, content in files.items()}
    size = sum(map(len, files.values()))
    _, listed, text = seal_folder(Manifest(contents="state", **fields), digests, size)
    (path / DIGESTS).write_bytes(listed)
    (path / MANIFEST).write_bytes(text)
    return path


class TestManifest:
    def test_describes_the_folder(self, folder):
        """It counts every byte of the folder, and the list names every other file."""
        files = read_sharded(folder)

        assert files.manifest.size == sum(path.stat().st_size for path in folder.iterdir())
        assert set(files.digests) == {METADATA, "__0_0.distcp", "__1_0.distcp"}
        assert trainbus.verify(folder) == read_manifest(folder) == files.manifest
        assert is_sharded(folder) and not is_sharded(folder.parent)

    def test_stays_small(self, tmp_path):
        """With a thousand ranks the manifest is as short as with one."""
        files = {f"__{rank}_0.distcp": b"x" for rank in range(1000)}
        make(tmp_path / "many", {METADATA: b"", **files})

        assert (tmp_path / "many" / MANIFEST).stat().st_size < 400
        assert len(read_sharded(tmp_path / "many").digests) == 1001

    def test_list_is_that_of_xxh128sum(self, folder):
        """The list is what xxh128sum prints, so that it checks the files without trainbus."""
        name, *_ = [line.split("  ")[1] for line in (folder / DIGESTS).read_text().splitlines()]
        assert (folder / name).exists()
        try:
            subprocess.run(["xxh128sum", "--check", "--quiet", DIGESTS], cwd=folder, check=True, timeout=60)
        except FileNotFoundError:
            pytest.skip("xxh128sum is not installed")

    def test_is_found_where_it_was_moved_to(self, folder):
        """A checkpoint that was moved out of the way of one that never came is found under its own name."""
        moved = folder.with_name("a.0123456789abcdef.trainbus.old")
        folder.rename(moved)

        assert where_it_stands(folder) == str(moved)
        assert trainbus.verify(folder) == read_manifest(folder)
        assert where_it_stands(moved) == str(moved)
        assert where_it_stands(folder.with_name("b")) == str(folder.with_name("b"))


class TestDamage:
    @pytest.mark.parametrize("name", [MANIFEST, DIGESTS, METADATA, "__0_0.distcp", "__1_0.distcp"])
    def test_flipped_bits(self, folder, name):
        """No bit of any file can flip unnoticed, and what is damaged is named."""
        whole = (folder / name).read_bytes()
        step = max(1, len(whole) // 40)
        for at in range(0, len(whole), step):
            for bit in (0, 3, 7):
                content = bytearray(whole)
                content[at] ^= 1 << bit
                (folder / name).write_bytes(content)
                with pytest.raises(CheckpointCorruptError) as info:
                    trainbus.verify(folder)
                if name not in (MANIFEST, DIGESTS):
                    assert info.value.reason == f"{name} does not have the digest it was written with"

    @pytest.mark.parametrize("name", [MANIFEST, METADATA, "__1_0.distcp"])
    def test_missing_file(self, folder, name):
        """A file that is not there is named."""
        (folder / name).unlink()

        with pytest.raises(CheckpointCorruptError, match=name.replace(".", r"\.")):
            trainbus.verify(folder)

    def test_missing_list(self, folder):
        """A checkpoint whose list of digests is gone is a damaged one, and no folder of something else."""
        (folder / DIGESTS).unlink()

        with pytest.raises(
            CheckpointCorruptError, match=r"is damaged: it is a folder without digests\.xxh128"
        ):
            trainbus.verify(folder)

    def test_all_damaged_files_are_named(self, folder):
        """Of several damaged files each is named."""
        for name in ("__0_0.distcp", "__1_0.distcp"):
            (folder / name).write_bytes(b"")

        with pytest.raises(CheckpointCorruptError, match=r"__0_0\.distcp, __1_0\.distcp do not have"):
            trainbus.verify(folder)

    @pytest.mark.parametrize("line", ["../a/x", "/etc/passwd", "notes.txt", "__0_0.distcp/x", ""])
    def test_list_that_names_other_files(self, tmp_path, line):
        """A list in which anything but the files of a checkpoint stands is refused, right digest or not."""
        path = make(tmp_path / "a", {METADATA: b""})
        _, listed, text = seal_folder(Manifest(contents="state"), {METADATA: "0" * 32, line: "1" * 32}, 0)
        (path / DIGESTS).write_bytes(listed)
        (path / MANIFEST).write_bytes(text)

        with pytest.raises(CheckpointCorruptError, match="is no list of the files"):
            read_sharded(path)

    def test_size_that_is_not_so(self, folder):
        """A manifest that counts other bytes than there are is refused."""
        digests = dict(read_sharded(folder).digests)
        _, listed, text = seal_folder(Manifest(contents="state"), digests, 7)
        (folder / DIGESTS).write_bytes(listed)
        (folder / MANIFEST).write_bytes(text)

        with pytest.raises(CheckpointCorruptError, match="bytes and should have"):
            trainbus.verify(folder)

    def test_other_folders(self, tmp_path):
        """A folder of something else is no checkpoint, and says why."""
        (tmp_path / "x").mkdir()
        for call in (trainbus.verify, trainbus.load):
            with pytest.raises(
                CheckpointCorruptError, match=r"^Cannot read .*: it is a folder without digests\.xxh128"
            ):
                call(tmp_path / "x")
        with pytest.raises(FileNotFoundError):
            trainbus.load(tmp_path / "none")

    def test_checkpoint_of_plain_torch(self, tmp_path, save_sharded):
        """What torch.distributed.checkpoint wrote alone has no digests, so its pickle is not opened."""
        import torch.distributed.checkpoint as dcp

        dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "plain")

        with pytest.raises(CheckpointCorruptError, match=r"^Cannot read .* without digests\.xxh128"):
            trainbus.load(tmp_path / "plain")
        assert sorted(os.listdir(tmp_path / "plain")) == [".metadata", "__0_0.distcp"]

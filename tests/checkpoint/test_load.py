from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import shutil
import struct
import subprocess
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import trainbus
from trainbus import Handler
from trainbus.checkpoint.file_format import read_manifest
from trainbus.checkpoint.load import load_checkpoint, load_file
from trainbus.checkpoint.verify import verify_checkpoint, verify_file
from trainbus.errors import CheckpointCorruptError, UntrustedPickleError

SAMPLES = Path(__file__).parent / "samples"


class Foreign:
    """A class that no allow-list has."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Foreign)

    __hash__ = object.__hash__


class TestLoadFile:
    def test_state_and_manifest(self, tmp_path, write):
        """
        What was saved comes back with the manifest of the file.
        """
        written = write(tmp_path / "a.pt", {"a": torch.arange(5)}, epoch=3)

        state, manifest = load_file(tmp_path / "a.pt")

        assert state["a"].equal(torch.arange(5))
        assert manifest == written

    def test_map_location(self, tmp_path, write):
        """
        The device is the caller's choice; one that is not there is no damage of the file.
        """
        write(tmp_path / "a.pt", {"a": torch.ones(2)})

        state, _ = load_file(tmp_path / "a.pt", map_location="meta")
        assert state["a"].is_meta
        with pytest.raises(RuntimeError) as info:
            load_file(tmp_path / "a.pt", map_location="no_such_device")
        assert not isinstance(info.value, CheckpointCorruptError)

    def test_missing(self, tmp_path):
        """
        A file that is not there is no damaged one.
        """
        with pytest.raises(FileNotFoundError):
            load_file(tmp_path / "a.pt")

    def test_home(self, tmp_path, write, monkeypatch):
        """
        The path may begin with ~.
        """
        monkeypatch.setenv("HOME", str(tmp_path))
        write("~/a.pt", {"a": 1})

        assert load_file("~/a.pt")[0] == {"a": 1}

    def test_one_open_file(self, tmp_path, write, monkeypatch):
        """
        What is checked and what is loaded is the same file, even if it is replaced in between.
        """
        write(tmp_path / "a.pt", {"a": 1})
        write(tmp_path / "b.pt", {"a": 2})
        real_load = torch.load

        def load(*args, **kwargs):
            os.replace(tmp_path / "b.pt", tmp_path / "a.pt")
            return real_load(*args, **kwargs)

        monkeypatch.setattr(torch, "load", load)

        assert load_file(tmp_path / "a.pt")[0] == {"a": 1}

    def test_unverified(self, tmp_path, write):
        """
        With verify=False the digest is not computed.
        """
        write(tmp_path / "a.pt", {"a": torch.zeros(1000)})
        data = bytearray((tmp_path / "a.pt").read_bytes())
        data[2000] ^= 1
        (tmp_path / "a.pt").write_bytes(data)

        state, _ = load_file(tmp_path / "a.pt", verify=False)
        assert state["a"].count_nonzero() == 1
        with pytest.raises(CheckpointCorruptError, match="do not have the digest"):
            load_file(tmp_path / "a.pt")

    def test_out_of_memory_is_no_damage(self, tmp_path, write, monkeypatch):
        """
        A device without room does not make the file a damaged one.
        """
        write(tmp_path / "a.pt", {})

        def load(*args, **kwargs):
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(torch, "load", load)

        with pytest.raises(torch.OutOfMemoryError):
            load_file(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("error", "raised"),
        [
            (RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError),
            (
                RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
                MemoryError,
            ),
            (OSError(errno.EIO, "Input/output error"), OSError),
            (RuntimeError("Attempting to deserialize object on a CUDA device"), RuntimeError),
        ],
    )
    def test_machine_without_room_is_no_damage(self, tmp_path, write, monkeypatch, error, raised):
        """
        What the machine or its disk refuses says nothing of the file, and a run does not begin anew for it.
        """
        write(tmp_path / "a.pt", {}, contents="state")

        def load(*args, **kwargs):
            raise error

        monkeypatch.setattr(torch, "load", load)
        with pytest.raises(raised) as caught:
            load_file(tmp_path / "a.pt")
        assert not isinstance(caught.value, CheckpointCorruptError)
        with Handler(torch.nn.Linear(1, 1)) as handler, pytest.raises(raised):
            handler.resume(tmp_path)

    def test_size_that_nobody_verified(self, tmp_path, write, monkeypatch):
        """
        A file that asks for more memory than there is may be damaged, unless its digest says it is not.
        """
        torch.save({}, tmp_path / "a.pt")

        def load(*args, **kwargs):
            raise RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9999999 bytes."
            )

        write(tmp_path / "b.pt", {})
        monkeypatch.setattr(torch, "load", load)
        for name in ("a.pt", "b.pt"):  # nor is a tensor larger than its file
            with pytest.raises(CheckpointCorruptError):
                load_file(tmp_path / name)

    def test_torchs_own_option(self, tmp_path, write):
        """
        Files load where torch was told to map all files into memory.
        """
        write(tmp_path / "a.pt", {"a": torch.ones(3)})
        with torch.utils.serialization.config.patch("load.mmap", True):
            assert load_file(tmp_path / "a.pt")[0]["a"].equal(torch.ones(3))

    @pytest.mark.parametrize(
        ("location", "error"),
        [
            (0, TypeError),
            ({"cpu": "no such device"}, RuntimeError),
            ({"cpu": 1.5}, TypeError),
            (lambda storage, location: 1 / 0, ZeroDivisionError),
        ],
    )
    def test_bad_location_is_no_damage(self, tmp_path, write, location, error):
        """
        What is wrong with map_location is the caller's own error.
        """
        write(tmp_path / "a.pt", {"a": torch.ones(3)})

        with pytest.raises(error) as caught:
            load_file(tmp_path / "a.pt", map_location=location)
        assert not isinstance(caught.value, CheckpointCorruptError)

    @pytest.mark.parametrize("location", [None, {"cpu": "cpu"}, lambda storage, location: storage])
    def test_any_location(self, tmp_path, write, location):
        """
        All that torch.load takes works.
        """
        write(tmp_path / "a.pt", {"a": torch.ones(3)})

        assert load_file(tmp_path / "a.pt", map_location=location)[0]["a"].equal(torch.ones(3))


class TestWarnings:
    """What torch warns of while it loads, where a script makes errors of warnings."""

    def test_says_nothing_of_the_file(self, tmp_path, write, monkeypatch):
        """
        A file of which torch warns is loaded, and the warning is shown.
        """
        write(tmp_path / "a.pt", {"a": torch.ones(2)})

        def warn(*args: Any, **options: Any) -> str:
            warnings.warn("this will be removed", FutureWarning, stacklevel=1)
            return "the state"

        monkeypatch.setattr(torch, "load", warn)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("error")
            state, _ = load_file(tmp_path / "a.pt")

            with pytest.raises(FutureWarning):  # as before
                warn()
        assert state == "the state"
        assert [str(one.message) for one in shown] == ["this will be removed"]

    def test_sparse_tensors(self, tmp_path, write):
        """
        Sparse tensors are checked without torch's warning that it does.
        """
        write(tmp_path / "a.pt", {"a": torch.eye(3).to_sparse()})

        state, _ = load_file(tmp_path / "a.pt")

        assert torch.equal(state["a"].to_dense(), torch.eye(3))


class TestForeignFiles:
    @pytest.mark.parametrize("zip_format", [True, False])
    def test_plain_torch_save(self, tmp_path, zip_format):
        """
        Files of torch.save load without a manifest, also in its format from before 1.6.
        """
        torch.save({"a": torch.ones(3)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)

        state, manifest = load_file(tmp_path / "a.pt")

        assert state["a"].equal(torch.ones(3))
        assert manifest is None

    @pytest.mark.parametrize("zip_format", [True, False])
    def test_classes_need_trust(self, tmp_path, zip_format):
        """
        What weights_only refuses is loaded on trust alone, and the error says what that means.
        """
        torch.save([Foreign()], tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)

        with pytest.raises(
            UntrustedPickleError, match=r"Unsupported.*Foreign.*trust_pickle=True\) loads it.* run any code"
        ):
            load_file(tmp_path / "a.pt")
        assert load_file(tmp_path / "a.pt", trust_pickle=True) == ([Foreign()], None)

    def test_class_that_is_gone(self, tmp_path, monkeypatch):
        """
        A trusted file whose class cannot be found is not called damaged.
        """
        torch.save([Foreign()], tmp_path / "a.pt")
        monkeypatch.delitem(globals(), "Foreign")

        with pytest.raises(AttributeError, match="Foreign"):
            load_file(tmp_path / "a.pt", trust_pickle=True)

    @pytest.mark.parametrize(
        "data", [b"", b"x", b"PK\x03", b"hello, world", bytes(5000), pickle.dumps({"a": 1})]
    )
    def test_no_checkpoint_at_all(self, tmp_path, data):
        """
        Anything else is a damaged checkpoint.
        """
        (tmp_path / "a.pt").write_bytes(data)

        with pytest.raises(CheckpointCorruptError):
            load_file(tmp_path / "a.pt")

    def test_pipe(self, tmp_path):
        """
        A pipe is refused at once.
        """
        os.mkfifo(tmp_path / "a.pt")

        with pytest.raises(CheckpointCorruptError, match="not a regular file"):
            load_file(tmp_path / "a.pt")


class TestSomethingElse:
    @pytest.mark.parametrize("data", [b"hello", b"Please", pickle.dumps({"a": 1})])
    def test_no_zip(self, tmp_path, data):
        """
        What never was a checkpoint is not called a damaged one, and no older one is asked for.
        """
        (tmp_path / "a.pt").write_bytes(data)

        with pytest.raises(CheckpointCorruptError, match=r"it is no checkpoint, as .* Name a file of"):
            load_file(tmp_path / "a.pt")

    @pytest.mark.parametrize("save", [numpy.savez, numpy.savez_compressed])
    def test_other_zip(self, tmp_path, save):
        """
        Neither is a zip of another library.
        """
        save(tmp_path / "a.npz", a=numpy.zeros(3))

        with pytest.raises(CheckpointCorruptError, match="it is no checkpoint but a zip without the pickle"):
            load_file(tmp_path / "a.npz")

    def test_cut_off(self, tmp_path):
        """
        One of torch before 1.6 that is cut off is damaged, and so is one whose bytes are all gone.
        """
        torch.save({"a": torch.ones(9)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        os.truncate(tmp_path / "a.pt", 100)
        (tmp_path / "b.pt").write_bytes(bytes(100))

        for name in ("a.pt", "b.pt"):
            with pytest.raises(CheckpointCorruptError, match="is damaged"):
                load_file(tmp_path / name)

    @pytest.mark.parametrize("read", [load_checkpoint, verify_checkpoint])
    def test_folder_of_checkpoints(self, tmp_path, read):
        """
        Of a folder of checkpoints one has to be named, and the newest is told.
        """
        trainbus.save({}, tmp_path / "a.pt")
        trainbus.save({}, tmp_path / "b.pt")

        with pytest.raises(CheckpointCorruptError, match=r"Name one of them, such as the newest, '.*b\.pt'"):
            read(tmp_path)


def rewritten(source: Path, target: Path, *, repeat: str = "", **options: int) -> None:
    """Copy a zip record by record, with other options or one record twice."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
            if name == repeat:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    new.writestr(name, old.read(name))


class TestHostileFiles:
    @pytest.fixture(name="plain")
    def _plain(self, tmp_path):
        torch.save({"a": torch.zeros(100_000)}, tmp_path / "plain.pt")
        return tmp_path / "plain.pt"

    def test_compressed_records(self, tmp_path, plain):
        """
        A file that would unpack to more than it is is refused before it does.
        """
        rewritten(plain, tmp_path / "a.pt", compression=zipfile.ZIP_DEFLATED)

        with pytest.raises(CheckpointCorruptError, match=r"not one that torch\.save writes"):
            load_file(tmp_path / "a.pt")

    def test_stored_records(self, tmp_path, plain):
        """
        The same records uncompressed are fine, so it was the compression that was refused.
        """
        rewritten(plain, tmp_path / "a.pt")

        assert load_file(tmp_path / "a.pt")[0]["a"].numel() == 100_000

    def test_record_twice(self, tmp_path, plain):
        """
        Two records of one name are refused: tools would not agree which counts.
        """
        rewritten(plain, tmp_path / "a.pt", repeat="plain/version")

        with pytest.raises(CheckpointCorruptError, match=r"not one that torch\.save writes"):
            load_file(tmp_path / "a.pt")

    def test_overlapping_records(self, tmp_path, plain):
        """
        Records that together are longer than the file are refused.
        """
        data = bytearray(plain.read_bytes())
        with zipfile.ZipFile(plain) as archive:
            offset = archive.getinfo("plain/data/0").header_offset
        # Each entry of the directory: sizes at byte 20, the record's offset at 42, its name at 46.
        for name in (b"plain/data.pkl", b"plain/version"):
            entry = data.rindex(name) - 46
            data[entry + 20 : entry + 28] = struct.pack("<II", 400_000, 400_000)
            data[entry + 42 : entry + 46] = struct.pack("<I", 0 if name.endswith(b"pkl") else offset)
        (tmp_path / "a.pt").write_bytes(data)

        with pytest.raises(CheckpointCorruptError, match=r"not one that torch\.save writes"):
            load_file(tmp_path / "a.pt")

    def test_something_in_front(self, tmp_path, plain):
        """
        A zip inside of another file is not taken for that file.
        """
        (tmp_path / "a.pt").write_bytes(b"PK\x03\x04" + plain.read_bytes())

        with pytest.raises(CheckpointCorruptError, match="zip directory"):
            load_file(tmp_path / "a.pt")

    def test_malicious_pickle_with_a_valid_digest(self, tmp_path, write):
        """
        A right digest does not make a file trusted: code in it is not run.
        """

        class Payload:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "victim"),)

        write(tmp_path / "a.pt", {"a": Payload()})

        with pytest.raises(CheckpointCorruptError, match="cannot be read"):
            load_file(tmp_path / "a.pt")
        assert not (tmp_path / "victim").exists()

    def test_invalid_sparse_tensor(self, tmp_path, write):
        """
        A sparse tensor whose indices point outside of it is refused.
        """
        with torch.sparse.check_sparse_tensor_invariants(False):
            bad = torch.sparse_coo_tensor(torch.tensor([[1 << 20]]), torch.ones(1), (3,))
        write(tmp_path / "a.pt", {"a": bad})

        with pytest.raises(CheckpointCorruptError, match="cannot be read"):
            load_file(tmp_path / "a.pt")


class TestEveryDamage:
    @pytest.fixture(name="small")
    def _small(self, tmp_path, write):
        write(tmp_path / "a.pt", {"a": torch.arange(40)}, logs={"loss": 0.5}, run_id="aB")
        assert (tmp_path / "a.pt").stat().st_size < 3000
        return tmp_path / "a.pt"

    @pytest.mark.parametrize("check", [verify_file, load_file])
    def test_every_flipped_bit(self, small, check):
        """
        No single bit of a file can change unnoticed.
        """
        data = small.read_bytes()
        missed = []
        with small.open("r+b", buffering=0) as file:
            for at, byte in enumerate(data):
                for bit in range(8):
                    os.pwrite(file.fileno(), bytes([byte ^ 1 << bit]), at)
                    try:
                        check(small)
                    except CheckpointCorruptError:
                        continue
                    missed.append((at, bit))
                os.pwrite(file.fileno(), bytes([byte]), at)

        assert missed == []
        check(small)

    @pytest.mark.parametrize("check", [verify_file, load_file])
    def test_every_truncation(self, small, check):
        """
        A file cut off anywhere is damaged.
        """
        for length in reversed(range(small.stat().st_size)):
            os.truncate(small, length)
            with pytest.raises(CheckpointCorruptError):
                check(small)

    @pytest.mark.parametrize("check", [verify_file, load_file])
    def test_cut_off_behind_a_zip_inside(self, tmp_path, write, check):
        """
        A file that holds another and is cut off just behind that is damaged, not a plain one.
        """
        inner = io.BytesIO()
        torch.save({"a": 1}, inner)
        write(tmp_path / "a.pt", {"inner": torch.frombuffer(bytearray(inner.getvalue()), dtype=torch.uint8)})
        end = (tmp_path / "a.pt").read_bytes().index(inner.getvalue()) + len(inner.getvalue())
        os.truncate(tmp_path / "a.pt", end)

        with pytest.raises(CheckpointCorruptError):
            check(tmp_path / "a.pt")

    def test_letter_case_of_the_digest(self, small):
        """
        A digest in capital letters is another file.
        """
        data = small.read_bytes()
        digest = read_manifest(small).digest.encode()
        small.write_bytes(data.replace(digest, digest.upper()))

        with pytest.raises(CheckpointCorruptError, match="no manifest"):
            verify_file(small)


class TestVerifyFile:
    def test_whole_file(self, tmp_path, write):
        """
        A whole file gives its manifest.
        """
        written = write(tmp_path / "a.pt", {"a": torch.zeros(1_000_000)})

        assert verify_file(tmp_path / "a.pt") == written

    def test_without_manifest(self, tmp_path):
        """
        A file without a manifest cannot be verified.
        """
        torch.save({}, tmp_path / "a.pt")

        with pytest.raises(CheckpointCorruptError, match="nothing to check it against"):
            verify_file(tmp_path / "a.pt")

    def test_moved_bytes(self, tmp_path, write):
        """
        Two pages that changed places are found.
        """
        write(tmp_path / "a.pt", {"a": torch.arange(10_000)})
        data = (tmp_path / "a.pt").read_bytes()
        swapped = data[:4096] + data[8192:12288] + data[4096:8192] + data[12288:]
        (tmp_path / "a.pt").write_bytes(swapped)

        with pytest.raises(CheckpointCorruptError, match="do not have the digest"):
            verify_file(tmp_path / "a.pt")


class TestOtherTools:
    @pytest.fixture(name="path")
    def _path(self, tmp_path, write):
        write(tmp_path / "a.pt", {"a": torch.arange(5000)}, epoch=3, run_id="run-1")
        return tmp_path / "a.pt"

    @pytest.mark.parametrize("mmap", [False, True])
    def test_plain_torch_load(self, path, mmap):
        """
        torch.load opens the file, mapped or read.
        """
        state = torch.load(path, weights_only=True, mmap=mmap)

        assert state["a"].equal(torch.arange(5000))

    def test_checksums_of_the_zip(self, path):
        """
        For other tools it is a zip whose checksums are right.
        """
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None
            assert json.loads(archive.comment)["epoch"] == 3

    @pytest.mark.skipif(shutil.which("unzip") is None, reason="unzip is not installed")
    def test_unzip_prints_the_manifest(self, path):
        """
        `unzip -z` prints the manifest.
        """
        done = subprocess.run(
            ["unzip", "-z", str(path)], capture_output=True, text=True, check=True, timeout=60
        )

        comment = done.stdout.split("\n", 1)[1]
        assert json.loads(comment)["run_id"] == "run-1"


class TestSamples:
    def test_format_1(self):
        """
        A file written by the first version is read for ever.
        """
        state, manifest = load_file(SAMPLES / "format-1.pt")

        module = state["module"]
        assert type(module) is OrderedDict
        assert module["embedding"].equal(torch.arange(6, dtype=torch.float32).reshape(2, 3))
        assert module["embedding"].data_ptr() == module["head"].data_ptr()
        assert module["scale"].shape == ()
        assert module["scale"] == 0.5
        assert state["optimizer"]["state"][0]["step"] == 3.0
        assert state["optimizer"]["param_groups"] == [{"lr": 0.1, "params": [0]}]
        assert state["progress"] == {"epoch": 2, "names": ("a", "b"), "done": False, "nothing": None}
        assert verify_file(SAMPLES / "format-1.pt").size == os.stat(SAMPLES / "format-1.pt").st_size
        assert (manifest.format, manifest.contents, manifest.run_id) == (1, "state", "sample-run")
        assert (manifest.parents, manifest.stream, manifest.sequence) == (("older-run",), "best", 4)
        assert (manifest.epoch, manifest.global_step) == (2, 30)
        assert math.isnan(manifest.logs.pop("diverged"))
        assert manifest.logs == {"val_loss": 0.25, "norm": math.inf}
        assert (manifest.monitor, manifest.mode, manifest.score) == ("val_loss", "min", 0.25)
        assert manifest.created == 1_780_000_000.25
        assert manifest.config == {"lr": 0.1, "layers": [2, 3]}
        assert (manifest.durability, manifest.interrupted) == ("full", False)
        assert manifest.versions == {"trainbus": "0.1.0", "torch": "2.13.0"}

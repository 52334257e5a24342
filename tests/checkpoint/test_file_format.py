from __future__ import annotations

import json
import math
import os
import pickle
from dataclasses import fields, replace

import pytest
import torch
import xxhash

from trainbus.checkpoint.file_format import open_regular, read_manifest, seal
from trainbus.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, fit_manifest
from trainbus.errors import CheckpointCorruptError

END_RECORD = b"PK\x05\x06" + bytes(18)

FULL = Manifest(
    contents="state",
    run_id="run-2",
    parents=("run-0", "run-1"),
    left_at=((1, 400), (3, 1100)),
    stream="best",
    sequence=7,
    epoch=3,
    global_step=1200,
    logs={"val_loss": 0.25, "diverged": math.inf, "other": -math.inf},
    monitor="val_loss",
    mode="min",
    score=0.25,
    created=1_800_000_000.5,
    config={"lr": 0.1, "layers": [1, 2], "name": "gr\u00fc\u00df", "nothing": None},
    durability="full",
    interrupted=True,
    versions={"torch": "2.13.0"},
)


def sealed(manifest: Manifest, body: bytes = b"body") -> tuple[Manifest, bytes]:
    final, ending = seal(manifest, END_RECORD, len(body), xxhash.xxh3_128(body))
    return final, body + ending


def with_comment(comment: bytes) -> bytes:
    return END_RECORD[:20] + len(comment).to_bytes(2, "little") + comment


def comment_of(values: dict[str, object], size: int | None = None) -> bytes:
    """A manifest around *values* whose size is right, whatever else is wrong."""
    for _ in range(3):
        head = {"format": 1, "size": size or 0, "digest": "0" * 32}
        comment = json.dumps(head | values, separators=(",", ":")).encode()
        size = 22 + len(comment)
    return comment


class TestSeal:
    def test_everything_comes_back(self, tmp_path):
        """
        A manifest is read as it was written, with size and digest filled in.
        """
        final, data = sealed(FULL)
        (tmp_path / "a.pt").write_bytes(data)

        assert read_manifest(tmp_path / "a.pt") == final
        assert final == replace(FULL, size=len(data), digest=final.digest)
        assert final.digest != "0" * 32

    def test_nan_is_valid_json_and_comes_back(self, tmp_path):
        """
        Numbers that JSON does not know are written as strings and read as floats.
        """
        _, data = sealed(Manifest(contents="state", logs={"loss": math.nan}, score=math.nan))
        (tmp_path / "a.pt").write_bytes(data)

        manifest = read_manifest(tmp_path / "a.pt")

        comment = json.loads(data[len(b"body") + 22 :], parse_constant=pytest.fail)
        assert comment["logs"] == {"loss": "nan"}
        assert math.isnan(manifest.logs["loss"])
        assert math.isnan(manifest.score)

    def test_comment_is_ascii(self):
        """
        What goes into the comment any tool can print.
        """
        _, data = sealed(FULL)

        assert data[4 + 22 :].isascii()

    def test_digest_covers_the_file_with_its_own_digits_as_zeros(self):
        """
        The digest is the xxh3-128 of the whole file, its own place taken as 32 zeros.
        """
        final, data = sealed(FULL)

        zeroed = data.replace(final.digest.encode(), b"0" * 32)
        assert xxhash.xxh3_128_hexdigest(zeroed) == final.digest

    @pytest.mark.parametrize("length", range(780, 800))
    def test_size_counts_its_own_digits(self, length):
        """
        The size is right also where one more digit makes the file longer.
        """
        body = b"x" * length
        final, data = sealed(Manifest(contents="object"), body)

        assert final.size == len(data)

    @pytest.mark.parametrize("record", [b"", END_RECORD[:-1], b"x" * 22, END_RECORD[:20] + b"\1\0"])
    def test_no_zip_end_refused(self, record):
        """
        A manifest is only put behind a zip that has none.
        """
        with pytest.raises(ValueError, match=r"no zip file with an empty comment.* torch\.save"):
            seal(FULL, record, 0, xxhash.xxh3_128())


class TestFitManifest:
    def test_too_many_logs(self):
        """
        When the comment would be too long, only the monitored metric stays, and the others are counted.
        """
        logs = {f"metric_{n}": float(n) for n in range(5000)}
        fitted = fit_manifest(replace(FULL, logs=logs, monitor="metric_7"))

        assert fitted.logs == {"metric_7": 7.0}
        assert fitted.logs_left_out == 4999
        final, data = sealed(replace(FULL, logs=logs, monitor="metric_7"))
        assert final.logs_left_out == 4999
        assert len(data) < MAX_MANIFEST_BYTES

    def test_longest_that_fits_stays(self):
        """
        Up to 60,000 bytes of comment nothing is left out.
        """
        room = MAX_MANIFEST_BYTES - len(sealed(Manifest(contents="state", config=""))[1]) - 100
        manifest = Manifest(contents="state", logs={"a": 1.0}, config="x" * room)

        assert fit_manifest(manifest) is manifest

    def test_config_too_long(self):
        """
        A config that alone is too long is refused with the limit.
        """
        with pytest.raises(ValueError, match=r"limit is 60000\. Make `config` smaller \(70002 bytes"):
            fit_manifest(replace(FULL, config="x" * 70_000))

    def test_config_that_is_no_json(self):
        """
        A config with anything but JSON in it is refused with what it may hold.
        """
        with pytest.raises(TypeError, match=r"Cannot write config \{'when': <object .* int, float, str"):
            fit_manifest(replace(FULL, config={"when": object()}))

    def test_infinite_config(self):
        """
        A non-finite number in the config is written as its name, so that the JSON stays valid.
        """
        _, data = sealed(replace(FULL, config={"clip": math.inf, "all": (1, math.nan)}))

        assert json.loads(data[4 + 22 :])["config"] == {"clip": "inf", "all": [1, "nan"]}


class TestReadManifest:
    def test_plain_torch_save(self, tmp_path):
        """
        A file of plain torch.save has no manifest and is not damaged.
        """
        torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")

        assert read_manifest(tmp_path / "a.pt") is None

    @pytest.mark.parametrize("length", [100, 4000, 4100, 50_000])
    def test_length_of_comment(self, tmp_path, length):
        """
        Short and long manifests are found.
        """
        final, data = sealed(replace(FULL, config="x" * length), bytes(100_000))
        (tmp_path / "a.pt").write_bytes(data)

        assert read_manifest(tmp_path / "a.pt") == final

    def test_signature_inside_the_end_record(self, tmp_path):
        """
        A record whose fields happen to look like another record's beginning is still found.
        """
        record = b"PK\x05\x06" + bytes(8) + b"PK\x05\x06" + bytes(6)
        final, ending = seal(FULL, record, 0, xxhash.xxh3_128())
        (tmp_path / "a.pt").write_bytes(ending)
        (tmp_path / "b.pt").write_bytes(record)

        assert read_manifest(tmp_path / "a.pt") == final
        assert read_manifest(tmp_path / "b.pt") is None

    def test_home_folder(self, tmp_path, monkeypatch):
        """
        A path may begin with ~.
        """
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "a.pt").write_bytes(sealed(FULL)[1])

        assert read_manifest("~/a.pt").run_id == "run-2"

    def test_missing_file(self, tmp_path):
        """
        A file that is not there is no damaged one.
        """
        with pytest.raises(FileNotFoundError):
            read_manifest(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"PK",
            bytes(30),
            with_comment(b"made by somebody"),
            b"PK\3\4" + sealed(FULL)[1][:-1],
            b"PK\3\4" + bytes(70_000),
            b"PK\3\4" + sealed(FULL)[1] + b"\n",
        ],
    )
    def test_damage(self, tmp_path, data):
        """
        What begins as a zip and ends otherwise, lost all its bytes or has another comment is damaged.
        """
        (tmp_path / "a.pt").write_bytes(data)

        with pytest.raises(CheckpointCorruptError, match=r"a\.pt' is damaged: (it does not end|the comment)"):
            read_manifest(tmp_path / "a.pt")

    @pytest.mark.parametrize("data", [b"hello", b"x" * 70_000, pickle.dumps({"a": 1}), b"\x10\0\0\0{}"])
    def test_something_else(self, tmp_path, data):
        """
        What neither begins nor ends as a zip was never a checkpoint, and is not called a damaged one.
        """
        (tmp_path / "a.pt").write_bytes(data)

        with pytest.raises(CheckpointCorruptError, match=r"it is no checkpoint, as .* Name a file of"):
            read_manifest(tmp_path / "a.pt")

    def test_legacy(self, tmp_path):
        """
        A file of torch before 1.6 is not called damaged, and how it is read and written anew is said.
        """
        torch.save({"a": 1}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)

        with pytest.raises(CheckpointCorruptError, match=r"before 1\.6 .* trainbus\.load reads it"):
            read_manifest(tmp_path / "a.pt")

    def test_other_size(self, tmp_path):
        """
        A file that lost or gained bytes in front of its manifest is damaged.
        """
        (tmp_path / "a.pt").write_bytes(sealed(FULL)[1][1:])

        with pytest.raises(CheckpointCorruptError, match=r"it has \d+ bytes and should have \d+"):
            read_manifest(tmp_path / "a.pt")

    def test_newer_format(self, tmp_path):
        """
        A later format is named as such.
        """
        comment = comment_of({"format": 2, "contents": "state"})
        (tmp_path / "a.pt").write_bytes(with_comment(comment))

        with pytest.raises(
            CheckpointCorruptError, match="it has format 2, and this version of trainbus reads 1"
        ):
            read_manifest(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("contents", "anything"),
            ("contents", ["state"]),
            ("run_id", 3),
            ("parents", "run"),
            ("parents", [1]),
            ("left_at", 3),
            ("left_at", [3]),
            ("left_at", [[3]]),
            ("left_at", [[3, "1"]]),
            ("left_at", [[1, 2, 3]]),
            ("stream", None),
            ("sequence", -1),
            ("sequence", True),
            ("sequence", 1.5),
            ("sequence", 2**63),
            ("epoch", "1"),
            ("global_step", None),
            ("logs", []),
            ("logs", {"a": "b"}),
            ("logs", {"a": True}),
            ("logs", {"a": 10**400}),
            ("logs_left_out", -1),
            ("monitor", 1),
            ("mode", 1),
            ("score", "much"),
            ("created", None),
            ("durability", 1),
            ("interrupted", 0),
            ("versions", {"a": 1}),
        ],
    )
    def test_wrong_type(self, tmp_path, name, value):
        """
        A field of another type than it should have is damage that names the field.
        """
        comment = comment_of({"contents": "state", name: value})
        (tmp_path / "a.pt").write_bytes(with_comment(comment))

        with pytest.raises(CheckpointCorruptError, match=rf"its manifest says {name} is"):
            read_manifest(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        "rest",
        [b"", b"}", b'"contents":"state"', b'"contents":NaN}', b'"config":' + b"[" * 40_000, b'"a":"\xff"}'],
    )
    def test_broken_json(self, tmp_path, rest):
        """
        A comment that begins as a manifest does and is not one is damage.
        """
        comment = b'{"format":1,"size":99,"digest":"' + b"0" * 32 + b'",' + rest
        (tmp_path / "a.pt").write_bytes(with_comment(comment))

        with pytest.raises(CheckpointCorruptError, match="no valid JSON"):
            read_manifest(tmp_path / "a.pt")

    def test_contents_missing(self, tmp_path):
        """
        A manifest must say what the file contains; all else may be left out.
        """
        (tmp_path / "a.pt").write_bytes(with_comment(comment_of({"epoch": 1})))
        (tmp_path / "b.pt").write_bytes(with_comment(comment_of({"contents": "weights"})))

        with pytest.raises(CheckpointCorruptError, match="does not say what it contains"):
            read_manifest(tmp_path / "a.pt")
        assert read_manifest(tmp_path / "b.pt").epoch == 0

    def test_every_field_is_checked(self):
        """
        No field of the manifest is without a check of its type.
        """
        from trainbus.checkpoint import manifest

        assert list(manifest._DECODERS) == [entry.name for entry in fields(Manifest)]


class TestOpenRegular:
    def test_pipe(self, tmp_path):
        """
        A pipe is refused at once, without waiting for its other end.
        """
        os.mkfifo(tmp_path / "a.pt")

        with pytest.raises(CheckpointCorruptError, match="not a regular file"):
            open_regular(tmp_path / "a.pt")

    def test_folder(self, tmp_path):
        """
        A folder is refused.
        """
        with pytest.raises(CheckpointCorruptError, match="it is a folder and not a regular file"):
            open_regular(tmp_path)


class TestLeftFromHere:
    def test_parents(self):
        """
        Who goes on from a file leaves its run there, and each parent where that was left, but no later.
        """
        assert FULL.left_from_here() == {"run-0": (1, 400), "run-1": (3, 1100), "run-2": (3, 1200)}
        earlier = replace(FULL, epoch=2, global_step=800)
        assert earlier.left_from_here() == {"run-0": (1, 400), "run-1": (2, 800), "run-2": (2, 800)}

    def test_older_file(self):
        """
        Of a file that does not say where its parents were left, they are left here.
        """
        older = replace(FULL, left_at=())

        assert older.left_from_here() == dict.fromkeys(["run-0", "run-1", "run-2"], (3, 1200))

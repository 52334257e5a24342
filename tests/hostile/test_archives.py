"""A zip file that lies about itself and a manifest that lies about its file are refused, and never obeyed."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch

import trainbus
from trainbus import CheckpointCorruptError, CheckpointFolder, Handler
from trainbus.checkpoint.manifest import Manifest

from .files import (
    MEMORY,
    MIB,
    OTHERS,
    REFUSED,
    archive,
    bomb,
    call,
    forged,
    good,
    letters,
    pickle_of,
    plain_zip,
    ref,
    sealed,
    two_directories,
    zip64,
)

# Python warns of every fork beside threads; torch has some.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def refusal(path: str, check: Callable[[str], object] = trainbus.load) -> str:
    try:
        check(path)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def named_reason(path: str) -> str:
    """Return what is wrong with a file, in the words of the refusal."""
    try:
        trainbus.load(path)
    except CheckpointCorruptError as error:
        return error.reason
    return "none"


class TestArchives:
    @pytest.fixture
    def outcome(self, in_child, tmp_path):
        """Load these bytes in a child: what was raised, and by how much its memory grew."""

        def outcome(data: bytes) -> tuple[str, int]:
            (tmp_path / "a.pt").write_bytes(data)
            done = in_child(lambda: refusal(str(tmp_path / "a.pt")))
            assert done.status == 0, done.value
            return done.value, done.growth

        return outcome

    @pytest.mark.parametrize("seal", [False, True])
    @pytest.mark.parametrize("whole", [lambda: good().finish(), zip64])
    def test_control(self, outcome, whole, seal):
        """
        What is told of here without a lie loads, so it is the lie that is refused.
        """
        data = sealed(whole()) if seal else whole()

        assert outcome(data)[0] == "nothing"

    def test_bomb(self, outcome, tmp_path, in_child):
        """
        Plain torch.load unpacks the bomb, so there is something to refuse.
        """
        (tmp_path / "a.pt").write_bytes(bomb().finish())

        assert (tmp_path / "a.pt").stat().st_size < MIB
        assert in_child(lambda: torch.load(tmp_path / "a.pt").numel()).growth > 60 * MIB

    @pytest.mark.parametrize("seal", [False, True])
    @pytest.mark.parametrize("lie", REFUSED)
    def test_lies(self, outcome, tmp_path, lie, seal):
        """
        A zip that torch.save would not write is refused before memory is taken, also with a right digest.
        """
        data = REFUSED[lie]()
        kind, growth = outcome(sealed(data) if seal else data)
        reason = named_reason(str(tmp_path / "a.pt"))

        assert (kind, growth < MEMORY) == ("CheckpointCorruptError", True)
        # Torch is not asked what it makes of it, but for lies that its own reader must stumble over.
        assert reason.startswith("its zip directory is") or lie in (
            "no pickle",
            "behind the end",
            "zip64 count",
        )

    @pytest.mark.parametrize("what", OTHERS)
    def test_no_zip_at_all(self, outcome, what):
        """
        What is no zip is refused before memory is taken.
        """
        kind, growth = outcome(OTHERS[what]())

        assert (kind, growth < MEMORY) == ("CheckpointCorruptError", True)

    @pytest.mark.parametrize(
        "name", ["/etc/passwd", "../../up", "archive/../../up", "C:\\up", "a\0b", "x" * 999]
    )
    def test_names(self, outcome, tmp_path, name):
        """
        No record's name becomes a path.
        """
        folder = tmp_path / "in" / "it"
        folder.mkdir(parents=True)
        made = good()
        made.add(name, b"x")
        (folder / "a.pt").write_bytes(sealed(made.finish()))

        assert refusal(str(folder / "a.pt")) in ("nothing", "CheckpointCorruptError")
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [
            "in",
            "in/it",
            "in/it/a.pt",
        ]

    @pytest.mark.parametrize("seal", [False, True])
    def test_two_directories(self, outcome, seal):
        """
        The directory that is examined is the one that is used.
        """
        data = two_directories()
        kind, growth = outcome(sealed(data) if seal else data)

        assert (kind, growth < MEMORY) == ("CheckpointCorruptError", True)

    def test_one_record_by_many_names(self, outcome):
        """
        A record is in memory once, however it is named.
        """
        data = letters()
        assert len(data) < 2 * MIB

        assert outcome(sealed(data))[1] < MEMORY


class TestKindsOfFiles:
    @pytest.mark.parametrize("kind", ["pipe", "folder", "device", "link to a device", "link to a pipe"])
    @pytest.mark.parametrize("check", [trainbus.load, trainbus.verify, trainbus.read_manifest])
    def test_refused(self, in_child, tmp_path, kind, check):
        """
        What is no regular file is refused at once, without waiting and without reading it.
        """
        path, pipe = str(tmp_path / "a.pt"), str(tmp_path / "pipe")
        os.mkfifo(pipe)
        {
            "pipe": lambda: os.mkfifo(path),
            "folder": lambda: os.mkdir(path),
            "device": lambda: None,
            "link to a device": lambda: os.symlink("/dev/zero", path),
            "link to a pipe": lambda: os.symlink(pipe, path),
        }[kind]()
        target = "/dev/zero" if kind == "device" else path

        outcome = in_child(lambda: refusal(target, check), timeout=20)

        assert outcome[:2] == (0, "CheckpointCorruptError") and outcome.growth < MEMORY

    def test_socket(self, tmp_path, monkeypatch):
        """
        A socket cannot be opened, and a folder that holds one is read all the same.
        """
        monkeypatch.chdir(tmp_path)  # a socket's path is short
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("a.pt")
            with pytest.raises(OSError, match="No such device"):
                trainbus.load("a.pt")
            assert list(CheckpointFolder(tmp_path)) == []

    def test_link(self, tmp_path):
        """
        A link to a checkpoint is that checkpoint.
        """
        trainbus.save({"a": 1}, tmp_path / "a.pt")
        os.symlink("a.pt", tmp_path / "b.pt")

        assert trainbus.load(tmp_path / "b.pt") == {"a": 1}
        assert trainbus.verify(tmp_path / "b.pt") == trainbus.verify(tmp_path / "a.pt")
        assert len(list(CheckpointFolder(tmp_path))) == 2

    @pytest.mark.parametrize(
        "leads_to",
        [
            "gone",
            "a.pt",
        ],
    )
    def test_link_to_nothing(self, tmp_path, leads_to):
        """
        A link that leads nowhere is no checkpoint, and a folder that holds one is read all the same.
        """
        os.symlink(leads_to, tmp_path / "a.pt")
        trainbus.save({}, tmp_path / "b.pt")

        with pytest.raises(OSError, match=r"symbolic links|No such file"):
            trainbus.load(tmp_path / "a.pt")
        assert len(list(CheckpointFolder(tmp_path))) == 1

    def test_open_files(self, tmp_path):
        """
        No refusal leaves the file open.
        """
        if not os.path.exists("/proc/self/fd"):
            pytest.skip("a process's open files are listed on Linux only")
        os.mkfifo(tmp_path / "pipe")
        files = {"zip": REFUSED["encrypted"](), "digest": sealed(good().finish())[:-1] + b" ", "legacy": b"x"}
        for name, data in files.items():
            (tmp_path / name).write_bytes(data)
        before = len(os.listdir("/proc/self/fd"))
        kinds = {
            refusal(str(path), check)
            for path in tmp_path.iterdir()
            for check in (trainbus.load, trainbus.verify)
        }

        assert kinds == {"CheckpointCorruptError"}
        assert len(os.listdir("/proc/self/fd")) == before


class TestSparse:
    def bad(self, layout: torch.layout) -> torch.Tensor:
        ones = torch.ones(1)
        compressed, plain = torch.tensor([0, MIB]), torch.tensor([0])
        if layout in (torch.sparse_bsr, torch.sparse_bsc):
            ones = ones.reshape(1, 1, 1)
        return torch.sparse_compressed_tensor(
            compressed, plain, ones, (1, 1), layout=layout, check_invariants=False
        )

    @pytest.mark.filterwarnings("ignore:.*Sparse .* beta state:UserWarning")
    @pytest.mark.parametrize(
        "layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str
    )
    @pytest.mark.parametrize("wrap", [lambda data: data, sealed], ids=["plain", "sealed"])
    def test_compressed(self, tmp_path, layout, wrap):
        """
        A compressed sparse tensor that counts more values than it has is refused.
        """
        (tmp_path / "a.pt").write_bytes(wrap(plain_zip([self.bad(layout)])))

        with pytest.raises(CheckpointCorruptError, match="cannot be read"):
            trainbus.load(tmp_path / "a.pt")

    @pytest.mark.parametrize("index", [3, MIB, -1, -(2**62)])
    @pytest.mark.parametrize("zip_format", [True, False])
    def test_coordinates(self, tmp_path, index, zip_format):
        """
        A sparse tensor with an index outside of it is refused, also in the format before torch 1.6.
        """
        bad = torch.sparse_coo_tensor(torch.tensor([[index]]), torch.ones(1), (3,), check_invariants=False)
        torch.save(bad, tmp_path / "a.pt", _use_new_zipfile_serialization=zip_format)

        with pytest.raises(CheckpointCorruptError, match="cannot be read"):
            trainbus.load(tmp_path / "a.pt")

    def test_as_it_was(self, tmp_path):
        """
        Neither a good nor a bad file changes whether sparse tensors are checked elsewhere.
        """
        bad = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), check_invariants=False)
        for value_ in (bad, {}):
            torch.save(value_, tmp_path / "a.pt")
            for switch in (False, True):
                with torch.sparse.check_sparse_tensor_invariants(switch):
                    refusal(str(tmp_path / "a.pt"))
                    assert torch.sparse.check_sparse_tensor_invariants.is_enabled() is switch

    def test_next_file(self, tmp_path):
        """
        A hostile file does not make the next one that is loaded a bad one.
        """
        bad = torch.sparse_coo_tensor(torch.tensor([[9]]), torch.ones(1), (3,), check_invariants=False)
        pickled = pickle_of(plain_zip([bad]))[:-1] + call(ref("os", "system"), "true") + b"."
        (tmp_path / "a.pt").write_bytes(archive(pickled, _0=bytes([9, *bytes(7)]), _1=bytes(4)))
        torch.save({"a": 1}, tmp_path / "b.pt")

        assert refusal(str(tmp_path / "a.pt")) != "nothing"
        assert trainbus.load(tmp_path / "b.pt") == {"a": 1}


class TestManifests:
    """What a comment may say that no writer of ours says; the size and the digest are always right."""

    VALUES = (
        *(None, True, False, -1, 0, 1.5, 2**63, 2**64, 10**400, -(10**400), "", "x", "9" * 20, "nan", "NaN"),
        *([], {}, [[]], ["a"], [1], {"a": None}, {"a": "nan"}, {"a": [1]}, {"": 1}, [{}], "state"),
    )

    @pytest.mark.parametrize("name", [entry.name for entry in fields(Manifest)])
    def test_types(self, tmp_path, name):
        """
        Whatever is in a field, it is refused or read as it is, if it is of the field's type.
        """
        body = plain_zip({})
        for value_ in self.VALUES:
            rest = {"contents": "state", "logs": {"a": 1.0}, name: value_}
            path = tmp_path / "a.pt"
            path.write_bytes(forged(body, json.dumps(rest)[1:].encode()))
            kinds = {refusal(str(path), check) for check in (trainbus.load, trainbus.verify)}
            read = [file.manifest for file in CheckpointFolder(tmp_path)]
            CheckpointFolder(tmp_path).best("a", "min")
            CheckpointFolder(tmp_path).latest()

            assert kinds in ({"nothing"}, {"CheckpointCorruptError"}), value_
            # A folder's reader does not compare digests.
            assert len(read) == (kinds == {"nothing"}) or name == "digest", value_
            assert all(_is_typed(manifest) for manifest in read), value_
            said = [getattr(manifest, name) for manifest in read]
            # Lists are read as tuples, and the word for it as the float that is no number.
            assert all(
                one == value_ or json.dumps(one).replace("NaN", '"nan"') == json.dumps(value_) for one in said
            ), value_

    @pytest.mark.parametrize(
        "rest",
        [
            b'"config":' + b"[" * 60_000,
            b'"config":' + b'{"a":' * 12_000,
            b'"contents":"state","config":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
            b'"contents":"state","epoch":' + b"9" * 60_000 + b"}",
            b'"contents":"state","score":' + b"9" * 60_000 + b"}",
            b'"contents":"state","score":1e' + b"9" * 60_000 + b"x}",
            b'"contents":"state","config":' + b'"' + b"\\u0000" * 10_000 + b"}",
            b'"contents":"state","contents":"anything"}',
            b'"contents":"state","digest":"' + b"0" * 32 + b'"}',
            b'"contents":"state","size":5}',
            b'"contents":"state","format":2}',
            b'"contents":"state","format":true}',
            b'"contents":"state","epoch":NaN}',
            b'"contents":"state","epoch":-Infinity}',
            b'"contents":"state","score":NaN}',
            b'"contents":"state","created":Infinity}',
            b'"contents":"state"}{"contents":"state"}',
            b'"contents":"st\xc3\xa4te"}',
            b'"contents":"state","stream":"\x05"}',
            b"",
            b'"contents":"state"',
            b"PK\5\6" + bytes(18),
            b"x" * 65_000,
        ],
        ids=range(23),
    )
    def test_comments(self, in_child, tmp_path, rest):
        """
        JSON that is too deep, too large, said twice or none at all is refused, and costs no memory.
        """
        path = tmp_path / "a.pt"
        path.write_bytes(forged(plain_zip({}), rest))
        checks = (trainbus.load, trainbus.verify, lambda _: CheckpointFolder(tmp_path).latest())

        outcome = in_child(lambda: [refusal(str(path), check) for check in checks])

        assert outcome[:2] == (0, ["CheckpointCorruptError", "CheckpointCorruptError", "nothing"])
        assert outcome.growth < MEMORY

    @pytest.mark.parametrize("config", [b"[" * 400 + b"]" * 400, b'"' + b"x" * 59_000 + b'"', b"9" * 4_000])
    def test_large_config(self, tmp_path, config):
        """
        A config may be anything, within what a comment can hold.
        """
        path = tmp_path / "a.pt"
        body = plain_zip({"a": torch.arange(1_000)})
        path.write_bytes(forged(body, b'"contents":"object","config":' + config + b"}"))

        assert trainbus.load(path)["a"].sum() == 499_500
        assert trainbus.verify(path).config == json.loads(config)

    @pytest.mark.parametrize("length", [4_000, 8_000, 50_000])
    def test_manifest_longer_than_its_file(self, tmp_path, length):
        """
        What was saved loads, also where little was saved and much is said of it.
        """
        with Handler(torch.nn.Linear(3, 2), config="x" * length) as handler:
            handler.save(tmp_path / "a.pt", weights_only=True)

        assert trainbus.load(tmp_path / "a.pt")["bias"].shape == (2,)

    @pytest.mark.parametrize(
        "text",
        [
            *("os.system", "os:mkdir", "__import__('os').mkdir('made')", "../../made", "/tmp/made", "~/made"),
            *("{0.__class__.__init__.__globals__}", "{made}", "%s%s%n%(made)d", "$HOME/made", "*.pt", "-rf"),
            *("made\0.pt", "made\n\x1b[31mERROR", "\ud800made", "file:///made", "<script>made</script>"),
        ],
    )
    def test_strings(self, in_child, tmp_path, monkeypatch, caplog, text):
        """
        A manifest's strings are never imported, formatted or used as a path.
        """
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        folder = tmp_path / "run"
        with Handler(torch.nn.Linear(2, 1)) as handler:
            handler.save(folder / "a.pt")
        state = torch.load(folder / "a.pt")
        names = ("run_id", "stream", "monitor", "mode", "durability")
        hostile = dict.fromkeys(names, text) | {"parents": [text], "config": {text: [text]}}
        hostile |= {
            "contents": "state",
            "sequence": 9,
            "logs": {text: 1.0},
            "score": 1.0,
            "versions": {text: text},
        }
        (folder / "a.pt").write_bytes(forged(plain_zip(state), json.dumps(hostile)[1:].encode()))

        def use() -> list[Any]:
            caplog.set_level(logging.DEBUG, "trainbus")
            touched = []

            def hook(event: str, args: tuple[Any, ...]) -> None:
                # Logging looks up the frame it is called from.
                if event != "sys._getframe" and any(text in str(one) for one in args):
                    touched.append(f"{event}{args!r}")

            files = CheckpointFolder(folder)
            with Handler(torch.nn.Linear(2, 1)) as handler:
                sys.addaudithook(hook)
                trainbus.load(folder / "a.pt")
                found = [
                    trainbus.verify(folder / "a.pt"),
                    files.latest().manifest,
                    files.best(text, "max").manifest,
                ]
                found.append(handler.resume(folder))
                known = [[one.stream, one.monitor, one.parents[0], one.versions] for one in found]
            return [touched, known == [[text, text, text, {text: text}]] * 4, caplog.messages]

        outcome = in_child(use)

        assert outcome.status == 0, outcome.value
        touched, known, messages = outcome.value
        assert touched == [] and known
        assert messages == [f"resumed from {folder / 'a.pt'}: epoch 1, global step 0"]
        assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["run", "run/a.pt"]


def _is_typed(manifest: Manifest) -> bool:
    whole = (manifest.format, manifest.size, manifest.sequence, manifest.epoch, manifest.global_step)
    texts = (manifest.digest, manifest.contents, manifest.run_id, manifest.stream, manifest.durability)
    numbers = (manifest.created, manifest.score or 0.0, *manifest.logs.values())
    return (
        all(type(one) is int and 0 <= one < 2**63 for one in (*whole, manifest.logs_left_out))
        and all(type(one) is str for one in (*texts, *manifest.parents, *manifest.logs, *manifest.versions))
        and all(
            type(one) is str
            for one in (manifest.monitor or "", manifest.mode or "", *manifest.versions.values())
        )
        and all(type(one) is float for one in numbers)
        and type(manifest.interrupted) is bool
    )

"""``trainbus verify``: a line for each file, the damaged tensor's name, the exit code."""

from __future__ import annotations

import errno
import json
import os
import zipfile

import pytest
import torch
from typer.testing import CliRunner

import trainbus
from trainbus.cli.app import app


def verify(*arguments):
    """Run the command; return its exit code and its lines."""
    done = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout.splitlines()


def damage(path, record):
    """Flip a bit in the middle of a record of the zip."""
    info = zipfile.ZipFile(path).getinfo(record)
    content = bytearray(path.read_bytes())
    header = content[info.header_offset :]
    start = (
        info.header_offset
        + 30
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
    content[start + info.file_size // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def state():
    """Nested, with a tied tensor, a view, and what is no tensor."""
    weight = torch.randn(3, 4)
    return {
        "module": {"embedding": weight, "head": weight, "bias": torch.randn(4)},
        "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.randn(3, 4)}}, "lr": 0.1},
        "list": [torch.arange(5), (torch.ones(2, dtype=torch.bfloat16), "text")],
    }


class TestVerify:
    def test_whole_files(self, tmp_path):
        """Files that are what was written are a line each, and exit code 0."""
        for name in ("a.pt", "b.pt"):
            trainbus.save(torch.ones(3), tmp_path / name)

        code, lines = verify(tmp_path / "a.pt", tmp_path / "b.pt")
        assert code == 0
        assert [line.split()[:2] for line in lines] == [
            ["ok", str(tmp_path / name)] for name in ("a.pt", "b.pt")
        ]

    def test_names_place_of_a_run(self, tmp_path):
        """A run's checkpoint is shown with its epoch, counted from 1, and its step."""
        with trainbus.Handler(torch.nn.Linear(1, 1)) as handler:
            for _ in handler.epochs(2):
                for _ in handler.batches(range(3)):
                    pass
            handler.save(tmp_path / "a.pt")

        assert "epoch 3, step 6" in verify(tmp_path / "a.pt")[1][0]

    @pytest.mark.parametrize(
        ("number", "place"),
        [
            (number, place)
            for number, place in enumerate(
                [
                    "state['module']['embedding']",
                    "state['module']['bias']",
                    "state['optimizer']['state'][0]['step']",
                    "state['optimizer']['state'][0]['exp_avg']",
                    "state['list'][0]",
                    "state['list'][1][0]",
                ]
            )
        ],
    )
    def test_names_the_damaged_tensor(self, tmp_path, state, number, place):
        """A damaged tensor is named by where it is in the state, and the exit code is 1."""
        path = tmp_path / "a.pt"
        trainbus.save(state, path)
        (record,) = [name for name in zipfile.ZipFile(path).namelist() if name.endswith(f"/data/{number}")]
        damage(path, record)

        code, (line,) = verify(path)
        assert code == 1
        assert line.startswith(f"damaged  {path}") and line.endswith(f"damaged: {place})")

    def test_names_the_record_where_no_tensor_is_sure(self, tmp_path, state):
        """Damage outside of the tensors is named by the zip's record."""
        trainbus.save(state, tmp_path / "a.pt")
        (record,) = [
            name for name in zipfile.ZipFile(tmp_path / "a.pt").namelist() if name.endswith("data.pkl")
        ]
        damage(tmp_path / "a.pt", record)

        assert verify(tmp_path / "a.pt")[1][0].endswith(f"damaged: {record})")

    def test_folder(self, tmp_path):
        """Of a folder, its checkpoints are looked at, the damaged ones too; other files are not."""
        for name in ("a.pt", "b.pt", ".hidden.pt"):
            trainbus.save({"w": torch.randn(1000)}, tmp_path / name)
        (tmp_path / "b.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:-100])
        (tmp_path / "log.csv").write_text("epoch,loss")
        torch.save(torch.ones(1), tmp_path / "plain.pt")

        code, lines = verify(tmp_path)
        assert code == 1
        assert [line.split()[:2] for line in lines] == [
            ["ok", str(tmp_path / "a.pt")],
            ["damaged", str(tmp_path / "b.pt")],
        ]

    def test_links_that_lead_nowhere(self, tmp_path):
        """Links to themselves, to nothing, or through a file are passed over."""
        trainbus.save(torch.ones(1), tmp_path / "a.pt")
        for name, target in (("loop.pt", "loop.pt"), ("gone.pt", "nothing"), ("through.pt", "a.pt/x")):
            (tmp_path / name).symlink_to(target)

        code, lines = verify(tmp_path)
        assert code == 0 and [line.split()[1] for line in lines] == [str(tmp_path / "a.pt")]

    def test_folder_without_any(self, tmp_path):
        """Where there is nothing to verify, nothing was verified."""
        trainbus.save(torch.ones(1), tmp_path / "a" / "a.pt")
        (tmp_path / "empty").mkdir()

        assert verify(tmp_path / "empty") == (1, [])
        code, (line,) = verify(tmp_path / "empty", tmp_path / "a")
        assert code == 0 and line.startswith("ok")

    def test_folder_that_may_not_be_read(self, tmp_path, monkeypatch):
        """It has a line, and what else was named is verified."""
        trainbus.save(torch.ones(1), tmp_path / "a.pt")
        (tmp_path / "locked").mkdir()

        def scandir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)

        monkeypatch.setattr(os, "scandir", scandir)
        code, lines = verify(tmp_path / "locked", tmp_path / "a.pt")
        assert code == 1 and "locked  (Permission denied)" in lines[0] and lines[1].startswith("ok")

    def test_odd_names(self, tmp_path):
        """A name is one line, whatever is in it."""
        for name in ("a\nok       b.pt", os.fsdecode(b"caf\xe9.pt")):
            trainbus.save(torch.ones(1), tmp_path / name)

        _, lines = verify(tmp_path)
        assert len(lines) == 2 and f"{tmp_path}/a?ok       b.pt" in lines[0] and "caf?.pt" in lines[1]

    @pytest.mark.parametrize("kind", ["missing", "plain", "no zip"])
    def test_what_cannot_be_checked(self, tmp_path, kind):
        """A file that is missing or has nothing to be checked against is said to be so, with exit code 1."""
        path = tmp_path / "a.pt"
        if kind == "plain":
            torch.save(torch.ones(1), path)
        elif kind == "no zip":
            path.write_text("hello")
        reason = {"missing": "No such file", "plain": "no manifest", "no zip": "it is no checkpoint, as"}[
            kind
        ]

        code, (line,) = verify(path)
        assert code == 1 and reason in line

    def test_json(self, tmp_path):
        """--json prints an object for each file."""
        trainbus.save(torch.ones(3), tmp_path / "a.pt")
        (tmp_path / "b.pt").write_text("hello")

        _, lines = verify("--json", tmp_path / "a.pt", tmp_path / "b.pt")
        whole, broken = map(json.loads, lines)
        assert whole["ok"] and whole["digest"] == trainbus.verify(tmp_path / "a.pt").digest
        assert not broken["ok"] and broken["parts"] == [] and "zip" in broken["reason"]

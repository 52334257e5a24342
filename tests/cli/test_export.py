"""``trainbus export``: the weights of any checkpoint as safetensors."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from typer.testing import CliRunner

import trainbus
from trainbus import Handler
from trainbus.cli.app import app
from trainbus.testing import FaultyDisk


def export(*arguments):
    """Run the command; return its exit code, what it printed, and what it said of trouble."""
    done = CliRunner().invoke(app, ["export", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout, " ".join(done.stderr.replace("│", "").split())


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.fixture
def target(tmp_path):
    return tmp_path / "out.safetensors"


class TestWeights:
    def test_of_a_checkpoint(self, tmp_path, target):
        """Of a full checkpoint the module's weights are written, and the metadata says whose they are."""
        model = torch.nn.Linear(3, 2)
        with Handler(model, torch.optim.Adam(model.parameters())) as handler:
            handler.save_async(tmp_path / "a.pt", logs={"loss": 0.5}).result()
        code, said, _ = export(tmp_path / "a.pt", target)
        found, facts = load_file(target), metadata(target)

        assert code == 0 and "2 tensors" in said
        assert found.keys() == {"weight", "bias"} and torch.equal(found["weight"], model.weight)
        assert facts["format"] == "pt" and json.loads(facts["trainbus.logs"]) == {"loss": 0.5}

    @pytest.mark.parametrize("save", [torch.save, trainbus.save])
    def test_of_a_state_dict(self, tmp_path, target, save):
        """A file of weights is taken as it is, also one of torch.save."""
        save({"w": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "a.pt")
        export(tmp_path / "a.pt", target)

        assert load_file(target)["w"].dtype == torch.bfloat16

    def test_several_modules(self, tmp_path, target):
        """Several modules' names begin with the module's own."""
        with Handler({"g": torch.nn.Linear(1, 1), "d": torch.nn.Linear(1, 1)}) as handler:
            handler.save(tmp_path / "a.pt")
        export(tmp_path / "a.pt", target)

        assert load_file(target).keys() == {"g.weight", "g.bias", "d.weight", "d.bias"}

    def test_durable(self, tmp_path, target):
        """The file is synced before it gets its name, and its name afterwards."""
        trainbus.save({"w": torch.ones(1)}, tmp_path / "a.pt")
        with FaultyDisk(calls=["fsync", "rename", "fsync_folder"]) as disk:
            export(tmp_path / "a.pt", target)

        assert disk.made == ["fsync", "rename", "fsync_folder"]

    def test_tied(self, tmp_path, target):
        """A weight with two names is written once, and safetensors' own load_model ties it again."""
        model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        trainbus.save(model.state_dict(), tmp_path / "a.pt")
        _, said, _ = export(tmp_path / "a.pt", target, "--json")

        assert json.loads(said)["shared"] == {"1.weight": "0.weight"}
        assert list(load_file(target)) == ["0.weight"] and metadata(target)["1.weight"] == "0.weight"
        expected = model[0].weight.clone()
        model[0].weight.data.zero_()
        load_model(model, target)
        assert torch.equal(model[1].weight, expected)

    def test_views(self, tmp_path, target):
        """Transposed tensors and pieces of one storage come out whole, each by itself."""
        base = torch.arange(6.0).reshape(2, 3)
        state = {
            "whole": base,
            "row": base[0],
            "turned": base.T,
            "none": torch.empty(0),
            "no": torch.empty(0),
        }
        trainbus.save(state, tmp_path / "a.pt")
        export(tmp_path / "a.pt", target)
        found = load_file(target)

        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], state[name]) for name in state)


class TestMistakes:
    @pytest.mark.parametrize(
        "state, message",
        [
            ({"w": torch.ones(1), "n": 3}, "holds int 'n'"),
            ([torch.ones(1)], "holds no dict but list, and safetensors"),
            (torch.ones(1), "holds no dict but Tensor, and safetensors"),
            ({"s": torch.ones(1).to_sparse()}, "holds Tensor 's'"),
        ],
    )
    def test_no_weights(self, tmp_path, target, state, message):
        """What is no named tensor is refused by its name, and nothing is written."""
        trainbus.save(state, tmp_path / "a.pt")
        code, _, told = export(tmp_path / "a.pt", target)

        assert code == 2 and message in told and not target.exists()

    def test_suffix(self, tmp_path):
        """Another suffix is refused, because it would promise another format."""
        code, _, told = export(tmp_path / "a.pt", tmp_path / "out.pt")

        assert code == 2 and "does not end in .safetensors" in told

    def test_is_there(self, tmp_path, target):
        """A file that is there stays, unless --force is given."""
        trainbus.save({"w": torch.ones(1)}, tmp_path / "a.pt")
        target.write_text("mine")
        code, _, told = export(tmp_path / "a.pt", target)
        assert code == 2 and "is there already" in told and target.read_text() == "mine"

        assert export(tmp_path / "a.pt", target, "--force")[0] == 0
        assert load_file(target).keys() == {"w"}

    def test_is_there_at_home(self, tmp_path, monkeypatch):
        """Also where its path begins with ~."""
        monkeypatch.setenv("HOME", str(tmp_path))
        trainbus.save({"w": torch.ones(1)}, tmp_path / "a.pt")
        (tmp_path / "w.safetensors").write_text("mine")
        code, _, told = export(tmp_path / "a.pt", "~/w.safetensors")

        assert code == 2 and "is there already" in told
        assert (tmp_path / "w.safetensors").read_text() == "mine"

    def test_damaged(self, tmp_path, target):
        """A damaged checkpoint is not exported."""
        trainbus.save({"w": torch.ones(1000)}, tmp_path / "a.pt")
        data = bytearray((tmp_path / "a.pt").read_bytes())
        data[1500] ^= 1
        (tmp_path / "a.pt").write_bytes(data)
        code, _, told = export(tmp_path / "a.pt", target)

        assert code == 2 and "digest" in told and not target.exists()

    def test_disk_full(self, tmp_path, target):
        """A disk that refuses leaves what was there, and nothing unfinished."""
        trainbus.save({"w": torch.ones(1)}, tmp_path / "a.pt")
        target.write_text("mine")
        with FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf):
            done = CliRunner().invoke(app, ["export", str(tmp_path / "a.pt"), str(target), "--force"])

        assert done.exit_code == 1 and "No space left" in str(done.exception)
        assert target.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["a.pt", target.name]

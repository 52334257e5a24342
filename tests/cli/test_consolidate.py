"""``trainbus consolidate``, and what the other commands make of a sharded checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import trainbus
from trainbus import CheckpointFolder
from trainbus.cli.app import app
from trainbus.testing import FaultyDisk


def run(*arguments):
    """Run a command; return its exit code and all it printed."""
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.output


@pytest.fixture
def path(tmp_path, save_sharded):
    """Save a sharded checkpoint."""
    state = {
        "module": {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 1.0)}],
        },
        "progress": {"epoch": 1},
        "none": torch.empty(0, 2),
    }
    save_sharded(tmp_path / "run" / "a", state, epoch=1, global_step=7, sequence=4, logs={"loss": 0.5})
    return tmp_path / "run" / "a"


class TestConsolidate:
    def test_one_plain_file(self, tmp_path, path):
        """The file holds all that the folder does, opens with plain torch, and says of itself what it did."""
        code, text = run("consolidate", path, tmp_path / "out.pt")

        assert code == 0 and text.startswith(f"{tmp_path / 'out.pt'}: ") and "out of 1 file(s)" in text
        mine, plain = trainbus.load(path), torch.load(tmp_path / "out.pt", weights_only=True)
        assert torch.equal(plain["module"]["w"], mine["module"]["w"])
        assert plain["module"]["b"].dtype == torch.bfloat16 and plain["none"].shape == (0, 2)
        assert plain["optimizer"]["state"][0]["step"] == 3
        assert plain["optimizer"]["param_groups"] == [{"lr": 0.1, "betas": (0.9, 1.0)}]
        manifest = trainbus.verify(tmp_path / "out.pt")
        assert (manifest.epoch, manifest.global_step, manifest.logs) == (1, 7, {"loss": 0.5})
        assert sorted(os.listdir(tmp_path)) == ["out.pt", "run"]

    def test_does_not_count(self, tmp_path, path):
        """The file is a copy of what a callback has saved, and none of its own."""
        run("consolidate", path, path.with_name("whole.pt"))

        assert {os.path.basename(file.path): file.is_original for file in CheckpointFolder(path.parent)} == {
            path.name: True,
            "whole.pt": False,
        }

    def test_json(self, tmp_path, path):
        """--json prints what was written."""
        told = json.loads(run("consolidate", path, tmp_path / "out.pt", "--json")[1])

        assert told == {
            "path": str(tmp_path / "out.pt"),
            "size": os.path.getsize(tmp_path / "out.pt"),
            "digest": trainbus.verify(tmp_path / "out.pt").digest,
            "files": 1,
        }

    def test_what_is_there_stays(self, tmp_path, path):
        """A file that is there stays unless --force is given; a folder always."""
        (tmp_path / "out.pt").write_text("dear")

        code, text = run("consolidate", path, tmp_path / "out.pt")
        assert code == 2 and "--force" in text and (tmp_path / "out.pt").read_text() == "dear"
        assert run("consolidate", path, tmp_path / "out.pt", "--force")[0] == 0
        assert run("consolidate", path, path, "--force")[0] == 2 and trainbus.verify(path)

    @pytest.mark.parametrize("kind", ["damaged", "file", "missing", "other"])
    def test_what_is_no_checkpoint(self, tmp_path, path, kind):
        """What cannot be read whole is refused, and nothing is written."""
        if kind == "damaged":
            (path / "__0_0.distcp").write_bytes(b"x")
        source = {"damaged": path, "file": path / ".metadata", "missing": tmp_path / "x", "other": tmp_path}[
            kind
        ]

        code, text = run("consolidate", source, tmp_path / "out.pt")
        assert code != 0 and os.listdir(tmp_path) == ["run"], text

    def test_names_what_is_wrong(self, tmp_path, path):
        """Of what is not there, and of the folder around checkpoints, the source is named and no target."""
        code, text = run("consolidate", tmp_path / "x.pt", tmp_path / "out.pt")
        said = " ".join(text.replace("│", "").split())
        assert code == 2 and said.endswith(f"'{tmp_path}/x.pt' does not exist.")

        code, text = run("consolidate", tmp_path / "run", tmp_path / "out.pt")
        said = " ".join(text.replace("│", "").split())
        assert code == 2 and f"Name one of them, such as the newest, '{path}'" in said
        assert os.listdir(tmp_path) == ["run"]

    def test_full_disk(self, tmp_path, path):
        """A disk that is full leaves what was there and nothing else."""
        (tmp_path / "out.pt").write_text("dear")
        with FaultyDisk(errno.ENOSPC, calls=["write"]):
            code, text = run("consolidate", path, tmp_path / "out.pt", "--force")

        assert code == 1 and "No space left" in text
        assert (tmp_path / "out.pt").read_text() == "dear"
        assert sorted(os.listdir(tmp_path)) == ["out.pt", "run"]

    @pytest.mark.full
    def test_state_larger_than_the_memory(self, tmp_path, save_sharded):
        """A state of 1.5 GiB is written by a process that may allocate less than that."""
        limit = 1200 << 20
        save_sharded(
            tmp_path / "a", {str(n): torch.full((64 << 20,), n, dtype=torch.float32) for n in range(6)}
        )
        code = (
            "import resource, sys, torch\n"
            "from trainbus.cli.consolidate import run\n"
            "import trainbus.checkpoint.sharded_load\n"
            "import torch.distributed.checkpoint\n"
            f"resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))\n"
            "try:\n"
            "    torch.zeros(6 * (64 << 20))\n"
            "except RuntimeError:\n"
            "    run(sys.argv[1], sys.argv[2], force=False, as_json=False)\n"
        )
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a", tmp_path / "out.pt"], check=True, timeout=240
        )
        loaded = torch.load(tmp_path / "out.pt", mmap=True)
        assert all(int(loaded[str(n)][-1]) == n for n in range(6))


class TestOthers:
    def test_ls(self, path):
        """`ls` lists a sharded checkpoint like a file."""
        code, text = run("ls", path.parent)

        assert code == 0 and text.splitlines()[1].split("\t")[:4] == ["a", "2", "7", "loss=0.5"]

    def test_show(self, path):
        """`show` prints the tree with the whole tensors' shapes."""
        _, text = run("show", path)
        entries = json.loads(run("show", path, "--json")[1])["entries"]

        assert "epoch 2, global step 7" in text and "  w  float32 [3, 4]  48 B" in text
        assert {"name": ["optimizer", "param_groups", 0, "lr"], "value": 0.1} in entries

    @pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
    def test_verify_names_the_damaged_file(self, path, name):
        """`verify` checks a sharded checkpoint, given itself or its folder, and names what is damaged."""
        for given in (path, path.parent):
            assert run("verify", given)[1].startswith(f"ok       {path}")
        content = bytearray((path / name).read_bytes())
        content[len(content) // 2] ^= 16
        (path / name).write_bytes(content)

        for given in (path, path.parent):
            code, text = run("verify", given)
            assert code == 1 and text.startswith(f"damaged  {path}") and f"damaged: {name})" in text
        assert json.loads(run("verify", path, "--json")[1])["parts"] == [name]

    def test_diff_and_export(self, tmp_path, path):
        """`diff` and `export` take a sharded checkpoint in a file's place."""
        run("consolidate", path, tmp_path / "out.pt")

        assert run("diff", path, tmp_path / "out.pt")[0] == 0
        assert run("export", path, tmp_path / "w.safetensors")[0] == 0
        exported = load_file(tmp_path / "w.safetensors")
        assert set(exported) == {"w", "b"} and torch.equal(exported["w"], torch.arange(12.0).view(3, 4))

    def test_prune(self, tmp_path, save_sharded):
        """`prune` removes sharded checkpoints whole."""
        for step in range(3):
            save_sharded(
                tmp_path / str(step), {"a": torch.ones(3)}, sequence=step, stream="x", run_id="r", created=1.0
            )
        code, _ = run("prune", tmp_path, "--keep-last", 1)

        assert code == 0 and os.listdir(tmp_path) == ["2"]

"""``trainbus ls``: what it lists, how, and what it reads for that."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

import trainbus
from trainbus import Handler
from trainbus.checkpoint import file_format
from trainbus.checkpoint import folder as checkpoint_folder
from trainbus.cli import ls
from trainbus.cli.app import app


def listed(*arguments):
    """Run the command; return its exit code, the lines it printed, and what it said of trouble."""
    done = CliRunner().invoke(app, ["ls", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout.splitlines(), " ".join(done.stderr.replace("│", "").split())


@pytest.fixture
def folder(tmp_path):
    """Three files of a run, whose second has the best val_loss."""
    with Handler(torch.nn.Linear(2, 1)) as handler:
        for epoch, loss in enumerate((0.5, 0.25, 0.75)):
            handler.save_async(
                tmp_path / f"m{epoch}.pt",
                logs={"val_loss": loss, "acc": epoch / 4},
                monitor="val_loss",
                mode="min",
                score=loss,
            ).result()
    return tmp_path


class TestLines:
    def test_columns(self, folder):
        """Piped, it prints a header and a line a file, divided by tabs, in the order of saving."""
        code, (header, *lines), _ = listed(folder)
        rows = [line.split("\t") for line in lines]

        assert code == 0
        assert header.split("\t") == ["file", "epoch", "step", "metrics", "size", "age", "mark"]
        assert [row[0] for row in rows] == ["m0.pt", "m1.pt", "m2.pt"]
        assert [row[3] for row in rows] == [
            "val_loss=0.5  acc=0",
            "val_loss=0.25  acc=0.25",
            "val_loss=0.75  acc=0.5",
        ]
        assert [row[6] for row in rows] == ["", "best", "newest"]
        assert all(row[4] == "0.0 MB" and row[5].endswith(" s") for row in rows)

    def test_terminal(self, folder, monkeypatch, capsys):
        """On a terminal it prints a table, unless that would be long."""
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        monkeypatch.setenv("COLUMNS", "100")
        ls.run(str(folder), None, None, as_json=False)
        table = capsys.readouterr().out
        monkeypatch.setattr(ls, "MOST_ROWS_OF_A_TABLE", 2)
        ls.run(str(folder), None, None, as_json=False)

        assert "\t" not in table and "m1.pt" in table and "best" in table
        assert "\t" in capsys.readouterr().out

    def test_json(self, folder):
        """With --json each line is an object with the manifest's facts."""
        found = [json.loads(line) for line in listed(folder, "--json")[1]]

        assert [one["best"] for one in found] == [False, True, False]
        assert [one["newest"] for one in found] == [False, False, True]
        assert found[1]["path"] == str(folder / "m1.pt")
        assert found[1]["logs"] == {"val_loss": 0.25, "acc": 0.25}
        assert found[1]["size"] == (folder / "m1.pt").stat().st_size

    def test_other_metric(self, folder):
        """--monitor and --mode say by what one is the best."""
        marks = [line.split("\t")[6] for line in listed(folder, "--monitor", "acc", "--mode", "max")[1][1:]]

        assert marks == ["", "", "best, newest"]

    def test_judged_by_another_metric(self, folder):
        """Where files were judged by several metrics, that of the newest says which is the best."""
        with Handler(torch.nn.Linear(2, 1)) as handler:
            handler.resume(folder)
            handler.save_async(
                folder / "m3.pt", logs={"acc": 0.125}, monitor="acc", mode="max", score=0.125
            ).result()

        assert [line.split("\t")[6] for line in listed(folder)[1][1:]] == ["", "", "best", "newest"]

    def test_kinds(self, tmp_path):
        """Weights and objects are called so, plain files of torch.save and damaged ones are left out."""
        with Handler(torch.nn.Linear(2, 1)) as handler:
            handler.save(tmp_path / "weights.pt", weights_only=True)
        trainbus.save({"a": 1}, tmp_path / "object.pt")
        torch.save({}, tmp_path / "plain.pt")
        (tmp_path / "damaged.pt").write_bytes((tmp_path / "object.pt").read_bytes()[:-1])

        lines = [line.split("\t") for line in listed(tmp_path)[1][1:]]
        assert sorted((line[0], line[1], line[6]) for line in lines) == [
            ("object.pt", "", "object"),
            ("weights.pt", "1", "weights"),
        ]

    def test_strange_names(self, tmp_path):
        """The name of a metric can neither begin a line nor colour the terminal; NaN is valid JSON."""
        with Handler(torch.nn.Linear(2, 1)) as handler:
            handler.save_async(tmp_path / "a.pt", logs={"x\n\x1b[31m\ty": math.nan}).result()

        lines = listed(tmp_path)[1]
        assert len(lines) == 2 and "x??[31m?y=nan" in lines[1]
        assert json.loads(listed(tmp_path, "--json")[1][0])["logs"] == {"x\n\x1b[31m\ty": "nan"}


class TestMistakes:
    def test_nothing_there(self, tmp_path):
        """An empty folder is no error, and it says so beside the output."""
        assert listed(tmp_path) == (0, [], f"No checkpoints in {tmp_path}.")

    def test_no_folder(self, tmp_path):
        """What is no folder is refused by name."""
        (tmp_path / "a.pt").write_bytes(b"")

        code, _, said = listed(tmp_path / "gone")
        assert code == 2 and "gone' does not exist" in said
        code, _, said = listed(tmp_path / "a.pt")
        assert code == 2 and "is a file: try `trainbus verify`" in said

    def test_no_mode(self, folder):
        """A metric that no file was judged by needs a mode."""
        code, _, said = listed(folder, "--monitor", "acc")

        assert code == 2 and "no file here was judged by 'acc'" in said and "--mode must say it" in said

    @pytest.mark.parametrize("mode", ["foo", "MIN", ""])
    @pytest.mark.parametrize("command", ["ls", "report"])
    def test_other_mode(self, folder, command, mode):
        """A mode that is none is refused by itself, whatever the files were judged by."""
        (folder / "empty").mkdir()
        for place in (folder, folder / "empty"):
            done = CliRunner().invoke(app, [command, str(place), "--mode", mode, "--json"])
            assert done.exit_code == 2 and f"--mode must be min or max, got {mode!r}." in done.stderr


class TestCost:
    def test_imports_no_torch(self, folder):
        """Listing imports neither torch nor NumPy."""
        code = (
            "import sys; from trainbus.cli import ls; "
            f"ls.run({str(folder)!r}, None, None, as_json=False); "
            "assert not {'torch', 'numpy'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60, stdout=subprocess.DEVNULL)

    def test_reads_ends_only(self, tmp_path, monkeypatch):
        """Of a file of megabytes it reads some kilobytes, whatever its size."""
        trainbus.save({"a": torch.zeros(1 << 20)}, tmp_path / "a.pt")
        read = []
        real = file_format._read_comment

        def counted(file, size):
            comment = real(file, size)
            read.append(file.tell() - max(0, size - 4096))
            return comment

        monkeypatch.setattr(file_format, "_read_comment", counted)
        listed(tmp_path)

        assert os.path.getsize(tmp_path / "a.pt") > 4 << 20
        assert read and max(read) <= 4096

    def test_reads_each_file_once(self, folder, monkeypatch):
        """One look at each file tells all that is said of it, the best and the newest included."""
        read, real = [], checkpoint_folder.read_manifest
        monkeypatch.setattr(checkpoint_folder, "read_manifest", lambda path: read.append(path) or real(path))
        _, lines, _ = listed(folder)

        assert [line.split("\t")[-1] for line in lines] == ["mark", "", "best", "newest"]
        assert sorted(os.path.basename(path) for path in read) == ["m0.pt", "m1.pt", "m2.pt"]

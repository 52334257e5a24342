"""``trainbus show``: what a file holds, told without loading a tensor or running anything in it."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy
import pytest
import torch
from typer.testing import CliRunner

import trainbus
from trainbus import Handler
from trainbus.checkpoint import outline
from trainbus.cli.app import app


def show(*arguments):
    """Run the command; return its exit code, the lines it printed, and what it said of trouble."""
    done = CliRunner().invoke(app, ["show", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout.splitlines(), " ".join(done.stderr.replace("│", "").split())


def zipped(path, pickled):
    """Write a file as torch.save lays it out, with any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    return path


class TestTree:
    def test_of_a_checkpoint(self, tmp_path):
        """First what the file says of itself, then each name with dtype, shape and size, by depth."""
        model = torch.nn.Linear(3, 2)
        with Handler(model, config={"lr": 0.1}) as handler:
            handler.save_async(tmp_path / "a.pt", logs={"loss": 0.5}, monitor="loss", mode="min", score=0.5)
        code, lines, _ = show(tmp_path / "a.pt")

        assert code == 0
        assert lines[0] == "epoch 1, global step 0" and "loss=0.5" in lines
        assert "judged by loss (min): 0.5" in lines and 'config: {"lr": 0.1}' in lines
        at = lines.index("module  (32 B)")
        assert lines[at + 1 : at + 3] == ["  weight  float32 [2, 3]  24 B", "  bias  float32 [2]  8 B"]
        assert "optimizer  None" in lines

    def test_of_torch_save(self, tmp_path):
        """Any file of torch.save is shown, and said to be none of ours."""
        torch.save({"a": torch.ones(2), "n": [1, "x"]}, tmp_path / "a.pt")
        _, lines, _ = show(tmp_path / "a.pt")

        assert lines == [
            "no manifest: this file was not written by trainbus",
            "a  float32 [2]  8 B",
            "n  [1, 'x']",
        ]

    @pytest.mark.parametrize(
        "tensor, text",
        [
            (torch.ones(2, 3, dtype=torch.bfloat16), "bfloat16 [2, 3]  12 B"),
            (torch.ones(4, dtype=torch.complex64), "complex64 [4]  32 B"),
            (torch.ones(4).to(torch.float8_e4m3fn), "float8_e4m3fn [4]  4 B"),
            (torch.ones(4, dtype=torch.uint16), "uint16 [4]  8 B"),
            (torch.tensor(True), "bool []  1 B"),
            (torch.empty(0, 3), "float32 [0, 3]  0 B"),
            (torch.nn.Parameter(torch.ones(1)), "float32 [1]  4 B"),
            (torch.eye(3).to_sparse(), "float32 sparse [3, 3]  60 B"),
            (torch.ones(10)[2:4], "float32 [2]  8 B"),
        ],
    )
    def test_tensors(self, tmp_path, tensor, text):
        """Each kind of tensor is shown with its dtype, shape and the bytes of its values."""
        torch.save({"t": tensor}, tmp_path / "a.pt")

        assert show(tmp_path / "a.pt")[1][1:] == [f"t  {text}"]

    def test_tied(self, tmp_path):
        """A tensor with two names is shown under the first, counted once, and another view is another one."""
        one = torch.ones(4)
        torch.save({"m": {"a": one, "b": one, "half": one[:2], "rest": one[2:]}}, tmp_path / "a.pt")

        assert show(tmp_path / "a.pt")[1][1:] == [
            "m  (32 B)",
            "  a  float32 [4]  16 B",
            "  b  float32 [4]  = m.a",
            "  half  float32 [2]  8 B",
            "  rest  float32 [2]  8 B",
        ]

    def test_values(self, tmp_path):
        """Long values are shortened, long lists counted, and no name begins a line of its own."""
        state = {"text": "x" * 99, "numbers": list(range(99)), "a\nb": 1, "nested": [{"c": None}], "none": {}}
        torch.save(state, tmp_path / "a.pt")
        lines = show(tmp_path / "a.pt")[1][1:]

        assert lines[0].startswith("text  'xxx") and lines[0].endswith("...") and len(lines[0]) < 70
        assert lines[1:] == [
            "numbers  list of 99",
            "a?b  1",
            "nested  list of 1",
            "  0",
            "    c  None",
            "none  {}",
        ]

    @pytest.mark.parametrize(
        "value, line, entry",
        [
            (torch.ones(5), "float32 [5]  20 B", {"dtype": "float32", "shape": [5], "bytes": 20}),
            ([1, 2, "a"], "[1, 2, 'a']", {"type": "list"}),
            (7, "7", {"value": 7}),
            ("abc", "'abc'", {"value": "abc"}),
            (None, "None", {"value": None}),
            ({}, "{}", {"type": "dict"}),
            ([], "[]", {"type": "list"}),
        ],
    )
    def test_without_names(self, tmp_path, value, line, entry):
        """A tensor, a plain value or a list of them that is all of a file is shown itself."""
        torch.save(value, tmp_path / "a.pt")
        trainbus.save(value, tmp_path / "b.pt")

        assert show(tmp_path / "a.pt")[1][1:] == [line]
        assert show(tmp_path / "b.pt")[1][-1] == line
        same_as = {"same_as": None} if "dtype" in entry else {}
        found = json.loads(show(tmp_path / "a.pt", "--json")[1][0])
        assert found["entries"] == [{"name": [], **entry, **same_as}]

    def test_module(self, tmp_path):
        """A whole module is named by its class."""
        torch.save(torch.nn.Linear(3, 2), tmp_path / "a.pt")

        assert show(tmp_path / "a.pt")[1][1:] == ["an object of torch.nn.modules.linear.Linear"]

    def test_name(self, tmp_path):
        """A dtype, of which a file has the name alone, is shown by it."""
        torch.save({"dtype": torch.float32}, tmp_path / "a.pt")

        assert show(tmp_path / "a.pt")[1][1:] == ["dtype  torch.float32"]
        found = json.loads(show(tmp_path / "a.pt", "--json")[1][0])
        assert found["entries"] == [{"name": ["dtype"], "type": "torch.float32"}]

    def test_json(self, tmp_path):
        """With --json there is one object of the manifest and the entries, with numbers JSON knows."""
        trainbus.save({"t": torch.ones(2), "x": float("inf")}, tmp_path / "a.pt")
        _, (line,), _ = show(tmp_path / "a.pt", "--json")
        found = json.loads(line)

        assert found["manifest"]["contents"] == "object"
        assert found["entries"] == [
            {"name": ["t"], "dtype": "float32", "shape": [2], "bytes": 8, "same_as": None},
            {"name": ["x"], "value": "inf"},
        ]


class TestWhatItReads:
    def test_no_torch(self, tmp_path):
        """It imports no torch."""
        trainbus.save({"t": torch.ones(2)}, tmp_path / "a.pt")
        code = (
            "import sys; from trainbus.cli.show import run; run(sys.argv[1], as_json=False); "
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, tmp_path / "a.pt"], timeout=60, capture_output=True
        )

        assert done.returncode == 0 and b"float32 [2]" in done.stdout, done.stderr

    def test_no_data(self, tmp_path):
        """The data of tensors is not read: a file whose data is gone wrong is shown all the same."""
        torch.save({"t": torch.zeros(100_000)}, tmp_path / "a.pt")
        data = bytearray((tmp_path / "a.pt").read_bytes())
        data[200_000:200_100] = b"x" * 100
        (tmp_path / "a.pt").write_bytes(data)

        assert show(tmp_path / "a.pt")[1][1:] == ["t  float32 [100000]  400.0 kB"]


class Evil:
    """Would make a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


class TestHostile:
    def test_nothing_is_run(self, tmp_path, monkeypatch):
        """What a pickle would call is named, not called."""
        monkeypatch.chdir(tmp_path)
        _, lines, _ = show(zipped("a.pt", pickle.dumps({"x": Evil(), "y": pytest.raises})))

        assert os.listdir() == ["a.pt"]
        assert lines[1] == "x  an object of posix.mkdir" and lines[2].startswith("y  ")

    def test_holds_itself(self, tmp_path):
        """A list that holds itself ends."""
        endless = [1, {}]
        endless.append(endless)
        _, lines, _ = show(zipped(tmp_path / "a.pt", pickle.dumps(endless)))

        assert lines[1:] == ["0  1", "1  {}", "2  list of 3"]

    def test_laughs(self, tmp_path, monkeypatch):
        """A few bytes that stand for endless lines are cut off."""
        monkeypatch.setattr("trainbus.cli.show._MOST_LINES", 50)
        laughs = [{}]
        for _ in range(40):
            laughs = [laughs, laughs]
        _, lines, _ = show(zipped(tmp_path / "a.pt", pickle.dumps(laughs)))

        assert len(lines) == 52 and lines[-1] == "... and more than these 50 lines"

    @pytest.mark.parametrize("pickled", [b"", b"garbage", b"cposix\nsystem\n(S'a'\ntR", b"\x80\x02X\xff\xff"])
    def test_broken_pickle(self, tmp_path, pickled):
        """A pickle that cannot be read is a damaged file."""
        code, _, told = show(zipped(tmp_path / "a.pt", pickled))

        assert code == 2 and "cannot be read as a file of torch.save" in told

    def test_huge_pickle(self, tmp_path, monkeypatch):
        """Names that would fill the memory are not read."""
        monkeypatch.setattr(outline, "_MOST_BYTES", 10)
        code, _, told = show(zipped(tmp_path / "a.pt", pickle.dumps("x" * 99)))

        assert code == 2 and "and 10 are read" in told

    @pytest.mark.parametrize(
        "name, message",
        [
            ("none.pt", "No such file"),
            ("text.pt", "it is no checkpoint, as"),
            ("", "not a regular file"),
            ("x.npz", "it is no checkpoint but a zip without the pickle of torch.save."),
            ("legacy.pt", "': it has the format of torch before 1.6"),
        ],
    )
    def test_no_file(self, tmp_path, name, message):
        """What is no zip of torch.save is refused with the reason, and not called damaged."""
        torch.save({"a": 1}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
        numpy.savez(tmp_path / "x.npz", a=numpy.zeros(3))
        (tmp_path / "text.pt").write_text("hello")
        code, _, told = show(tmp_path / name)

        assert code == 2 and message in told and "damaged" not in told

    def test_folder_of_checkpoints(self, tmp_path):
        """Of a folder of checkpoints it names the newest."""
        trainbus.save({}, tmp_path / "a.pt")
        code, _, told = show(tmp_path)

        assert code == 2 and f"such as the newest, '{tmp_path}/a.pt'; `trainbus ls {tmp_path}`" in told

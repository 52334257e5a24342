"""What people suffered from in the files themselves."""

from __future__ import annotations

import collections

import pytest
import torch

import trainbus
from trainbus import CheckpointFolder, Handler
from trainbus.errors import CheckpointCorruptError
from trainbus_callbacks import ModelCheckpoint


class TestDamage:
    @pytest.fixture(autouse=True)
    def _damaged(self):
        trainbus.save({"x": torch.zeros(1000)}, "a.pt")
        with open("a.pt", "r+b") as file:
            content = file.read()
            file.seek(content.index(b"\0" * 4000) + 2000)
            file.write(b"@")

    def test_wrong_numbers_load_without_an_error(self):
        """One changed byte is found before a tensor is used."""
        with pytest.raises(CheckpointCorruptError, match=r"'a.pt' is damaged"):
            trainbus.load("a.pt")

    def test_there_is_no_way_to_ask_whether_a_file_is_whole(self):
        """A file is verified in one call, without loading it."""
        with pytest.raises(CheckpointCorruptError, match=r"'a.pt' is damaged"):
            trainbus.verify("a.pt")


class TestOpening:
    def test_the_file_opens_only_with_the_library_that_wrote_it(self, train):
        """Every file opens with plain torch.load, with nothing trusted."""
        train([0.5], ModelCheckpoint("state.pt"), ModelCheckpoint("weights.pt", save_weights_only=True))
        trainbus.save({"x": 1}, "object.pt")

        for path in ("state.pt", "weights.pt", "object.pt"):
            assert torch.load(path, weights_only=True)

    def test_weights_have_the_names_of_a_wrapper(self):
        """Names are those of the module itself, compiled or not."""
        module = torch.nn.Linear(1, 1)
        with Handler(torch.compile(module)) as handler:
            handler.save("a.pt", weights_only=True)

        assert list(torch.load("a.pt", weights_only=True)) == ["weight", "bias"]

    def test_a_file_has_to_be_loaded_to_know_what_it_is(self, train):
        """The end of a file tells its epoch, step and metrics."""
        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt", monitor="val_loss"))

        files = [file.manifest for file in CheckpointFolder(".")]

        assert [(one.epoch, one.logs["val_loss"], one.score) for one in files] == [
            (0, 0.5, 0.5),
            (1, 0.4, 0.4),
        ]

    def test_numpy_values_make_it_unloadable(self):
        """NumPy values are saved as plain ones, and given back as NumPy."""
        numpy = pytest.importorskip("numpy")

        trainbus.save({"best": numpy.float64(0.5), "history": numpy.arange(3)}, "a.pt")

        assert torch.load("a.pt", weights_only=True)["best"] == 0.5
        loaded = trainbus.load("a.pt")
        assert type(loaded["best"]) is numpy.float64 and loaded["history"].tolist() == [0, 1, 2]

    def test_values_of_other_types_are_found_when_it_is_too_late(self):
        """A value that could not be loaded again is refused when it is saved, with the remedy."""
        with pytest.raises(trainbus.UnsavableStateError, match=r"state\['best'\]: .*store dict\(value\)"):
            trainbus.save({"best": collections.defaultdict(float)}, "a.pt")

    def test_nobody_can_say_where_two_files_differ(self, train, capsys):
        """`trainbus diff` names each place in which two checkpoints differ, and by how much."""
        app = pytest.importorskip("trainbus.cli.app").app
        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"))

        with pytest.raises(SystemExit) as info:
            app(["diff", "1.pt", "2.pt"])

        said = capsys.readouterr().out
        assert info.value.code == 1
        assert "module.weight  differs in 1 values" in said
        assert "progress.epoch  value: 1 in A, 2 in B" in said

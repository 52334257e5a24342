"""CSVLogger: what is in the file, at each moment and after a resume."""

from __future__ import annotations

import csv
import os

import pytest
import torch

from trainbus import Handler
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import CSVLogger


def run(path, *, epochs, logs, first_epoch=0, handler=None):
    """Run fake epochs of two batches."""
    handler = handler or FakeHandler(resumed=first_epoch > 0)
    handler.add_callback(CSVLogger(path))
    emit_run(handler.bus, epochs=epochs, batches=2, logs=logs, first_epoch=first_epoch)


def rows(path):
    """Return the rows as dicts of text."""
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class TestRows:
    def test_each_epoch(self, tmp_path):
        """A row holds the 1-based epoch, the step and every metric, in all its digits."""
        run(tmp_path / "new" / "a.csv", epochs=2, logs={"val/loss": [0.1, 1 / 3], "note": "text"})

        assert rows(tmp_path / "new" / "a.csv") == [
            {"epoch": "1", "global_step": "2", "val/loss": "0.1"},
            {"epoch": "2", "global_step": "4", "val/loss": str(1 / 3)},
        ]

    def test_at_once(self, tmp_path):
        """A row is in the file when its event is over."""
        handler, seen = FakeHandler(), []
        handler.bus.on("epoch_end", lambda: seen.append(len(rows(tmp_path / "a.csv"))), priority=90)
        run(tmp_path / "a.csv", epochs=3, logs={"loss": 1.0}, handler=handler)

        assert seen == [1, 2, 3]

    def test_new_column(self, tmp_path):
        """A metric that appears later gets a column, empty in the rows before; no other file is left."""
        handler = FakeHandler()
        handler.add_callback(CSVLogger(tmp_path / "a.csv"))
        handler.bus.emit("train_begin", resumed=False)
        for epoch, logs in enumerate(({"a": 1.0}, {"b, quoted": 2.0}, {"a": 3.0})):
            handler.bus.emit("epoch_end", epoch=epoch, global_step=epoch, logs=logs)

        assert [(row["a"], row["b, quoted"]) for row in rows(tmp_path / "a.csv")] == [
            ("1.0", ""),
            ("", "2.0"),
            ("3.0", ""),
        ]
        assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]

    def test_another_working_directory(self, tmp_path, monkeypatch):
        """A relative path is meant where the callback was made, whatever the script does later."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        handler = FakeHandler()
        handler.bus.on("epoch_end", lambda: os.chdir("elsewhere"), once=True)
        run("a.csv", epochs=3, logs={"loss": 1.0}, handler=handler)

        assert len(rows(tmp_path / "a.csv")) == 3 and not list((tmp_path / "elsewhere").iterdir())

    def test_synced_before_it_is_renamed(self, tmp_path, monkeypatch):
        """What takes the file's place is on the disk with all its bytes."""
        synced, replace = [], os.replace
        monkeypatch.setattr(
            os, "fsync", lambda fd: synced.append((os.fstat(fd).st_ino, os.fstat(fd).st_size))
        )
        renamed = []

        def note(old, new):
            renamed.append((os.stat(old).st_ino, os.stat(old).st_size) in synced)
            replace(old, new)

        monkeypatch.setattr(os, "replace", note)
        run(tmp_path / "a.csv", epochs=1, logs={"loss": 1.0})

        assert renamed == [True]

    def test_rank_0_only(self, tmp_path):
        """Other ranks write nothing."""
        run(tmp_path / "a.csv", epochs=1, logs={}, handler=FakeHandler(rank=1))

        assert not list(tmp_path.iterdir())


class TestSecondRun:
    def test_resumed(self, tmp_path):
        """A resumed run drops the rows behind its point, so that no epoch stands twice."""
        run(tmp_path / "a.csv", epochs=3, logs={"loss": [1.0, 2.0, 3.0]})
        handler = FakeHandler(resumed=True)
        handler.epoch, handler.global_step = 1, 2
        run(tmp_path / "a.csv", epochs=3, logs={"loss": [0, 5.0, 6.0]}, first_epoch=1, handler=handler)

        assert [(row["epoch"], row["loss"]) for row in rows(tmp_path / "a.csv")] == [
            ("1", "1.0"),
            ("2", "5.0"),
            ("3", "6.0"),
        ]

    @pytest.mark.parametrize("at", ["train_batch_end", "val_end", "epoch_end"])
    def test_resumed_at_the_end_of_an_epoch(self, tmp_path, at):
        """Nor does one of which the last batch, or all but the row, was done when it was saved."""
        for _ in range(2):
            model = torch.nn.Linear(1, 1)
            with Handler(model) as handler:
                handler.add_callback(CSVLogger(tmp_path / "a.csv"))
                if handler.resume(tmp_path) is None:
                    save = lambda handler: handler.save_async(tmp_path / "b.pt")  # noqa: E731
                    handler.on(at, save, once=True, after={"train_batch_end": 3}.get(at, 1))
                for _ in handler.epochs(3):
                    for _ in handler.batches(range(2)):
                        handler.log(loss=1.0)
                    for _ in handler.val_batches(range(1)):
                        pass

        assert [row["epoch"] for row in rows(tmp_path / "a.csv")] == ["1", "2", "3"]

    def test_cut_off(self, tmp_path):
        """What a power cut has left of a row is dropped."""
        run(tmp_path / "a.csv", epochs=2, logs={"loss": [1.0, 2.0]})
        with open(tmp_path / "a.csv", "a") as file:
            file.write("3,")
        run(tmp_path / "a.csv", epochs=3, logs={"loss": [0, 0, 9.0]}, first_epoch=2)

        assert [row["loss"] for row in rows(tmp_path / "a.csv")] == ["1.0", "2.0", "9.0"]

    @pytest.mark.parametrize("resumed", [True, False])
    def test_empty(self, tmp_path, resumed):
        """A file with nothing in it, as a power cut may leave one, is begun anew."""
        (tmp_path / "a.csv").touch()
        run(tmp_path / "a.csv", epochs=2, logs={"loss": [1.0, 2.0]}, first_epoch=int(resumed))

        assert [row["epoch"] for row in rows(tmp_path / "a.csv")] == (["2"] if resumed else ["1", "2"])
        assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]

    def test_new_run(self, tmp_path):
        """A run that is not resumed sets the file of the one before aside."""
        for value in (1.0, 2.0, 3.0):
            run(tmp_path / "a.csv", epochs=1, logs={"loss": value})

        kept = [rows(tmp_path / name)[0]["loss"] for name in ("a.csv.1", "a.csv.2", "a.csv")]
        assert kept == ["1.0", "2.0", "3.0"]

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("name,age\nx,1\n", r"its first columns are \['name', 'age'\].*Move the file away"),
            ("x", r"its first columns are \[\]"),
            ("epoch,global_step\nx,1\n", "the epoch of a row is 'x' and should be an int"),
            ("epoch,global_step\n,1\n", "the epoch of a row is ''"),
        ],
    )
    def test_foreign_file(self, tmp_path, text, words):
        """A file that is no such table is refused and left as it is."""
        (tmp_path / "a.csv").write_text(text)

        with pytest.raises(ValueError, match=words):
            run(tmp_path / "a.csv", epochs=2, logs={}, first_epoch=1)
        assert (tmp_path / "a.csv").read_text() == text

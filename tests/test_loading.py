"""Which file several ranks resume from: the same on all, or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainbus import Handler, ranks
from trainbus.errors import CheckpointCorruptError, RankError
from trainbus.loading import LoadedState, _Failure, load_newest, own_part
from trainbus.state.collect import KEYS


@pytest.fixture
def folder(tmp_path):
    """A folder with an older and a newer file."""
    with Handler(nn.Linear(1, 1)) as handler:
        handler.save(tmp_path / "old.pt")
        handler.save(tmp_path / "new.pt")
    return tmp_path


def other_rank(monkeypatch, failures):
    """Let a second rank come to these failures, one for each file."""
    told = iter(failures)
    monkeypatch.setattr(ranks, "gather", lambda mine, what: [mine, next(told)])


class TestLoadNewest:
    def test_damaged_on_another_rank(self, folder, monkeypatch, caplog):
        """A file that another rank finds damaged is passed over here too."""
        other_rank(monkeypatch, [_Failure(True, "CheckpointCorruptError: torn"), None])
        loaded = []
        load_newest(folder, loaded.append)

        assert loaded == [str(folder / "new.pt"), str(folder / "old.pt")]
        assert "Passed over while resuming: Rank 1 cannot load" in caplog.text and "torn" in caplog.text

    @pytest.mark.parametrize("half", ["new.pt", "old.pt"])
    def test_nothing_left(self, folder, monkeypatch, half):
        """Where this rank has loaded a file that another could not, and no other is left, nothing begins."""
        damaged = _Failure(True, "CheckpointCorruptError: torn")
        other_rank(monkeypatch, [damaged, damaged])

        def load(path):
            if not path.endswith(half):
                raise CheckpointCorruptError(path, "torn")

        with pytest.raises(RankError, match=rf"Rank 1 cannot load .*{half}'.* no other to go on from"):
            load_newest(folder, load)

    def test_missing_on_another_rank(self, folder, monkeypatch):
        """One that another rank cannot read at all ends the resume on all."""
        other_rank(monkeypatch, [_Failure(False, "FileNotFoundError: no such file")])

        with pytest.raises(RankError, match=r"Rank 1 cannot load .*new\.pt', .* no such file"):
            load_newest(folder, lambda path: None)

    @pytest.mark.parametrize(
        ("names", "told"),
        [
            (None, "'{}' does not exist"),
            ([], "'{}' is empty"),
            ([".hidden"], "'{}' is empty"),
            (["a.txt", "model.pt"], "None of the 2 files and folders in '{}' is a checkpoint to go on from"),
        ],
    )
    def test_says_that_a_run_begins_anew(self, tmp_path, caplog, names, told):
        """Where there is nothing to resume from, one line says so, and why; a first start is no warning."""
        there = tmp_path / "run"
        if names is not None:
            there.mkdir()
            for name in names:
                (there / name).write_text("foreign")
        caplog.set_level("INFO", "trainbus")

        assert load_newest(there, lambda path: None) is None
        assert [(one.levelname, one.getMessage()) for one in caplog.records] == [
            ("INFO", f"{told.format(there)}: the run begins anew.")
        ]


class TestOwnPart:
    """A launcher has set WORLD_SIZE, and there is no process group."""

    @pytest.fixture(autouse=True)
    def launcher(self, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "4")
        monkeypatch.setenv("RANK", "1")

    def test_run_of_one_process(self, caplog):
        """Who saves alone goes on alone from its file, exactly."""
        loaded = LoadedState(dict.fromkeys(KEYS), set(KEYS), None)

        assert own_part(loaded, "a.pt") == loaded and not caplog.text

    def test_file_of_several_ranks(self, caplog):
        """From the file of as many ranks it takes its own part, as the ranks may meet later."""
        parts = [{"rng": rank} for rank in range(4)]
        state = {**dict.fromkeys(KEYS), "ranks": {"world_size": 4, "parts": parts}}
        own = own_part(LoadedState(state, set(KEYS), None), "a.pt")

        assert own.state["rng"] == 1 and own.wanted == set(KEYS) and not caplog.text

    def test_bit_for_bit(self, tmp_path, monkeypatch, caplog):
        """Stopped in the middle of an epoch, such a run draws the same batches as one that was not."""
        monkeypatch.setenv("RANK", "0")

        def train(folder, stop=None):
            torch.manual_seed(0)
            loader, seen = DataLoader(range(8), 2, shuffle=True), []
            with Handler(nn.Linear(1, 1)) as handler:
                handler.resume(folder)
                for _ in handler.epochs(1):
                    for batch in handler.batches(loader):
                        seen.append(batch.tolist())
                        if len(seen) == stop:
                            handler.on("train_batch_end", lambda: handler.save(folder / "a.pt"), once=True)
                            handler.stop()
            return seen

        assert train(tmp_path / "b", stop=2) + train(tmp_path / "b") == train(tmp_path / "a")
        assert not [record for record in caplog.records if record.levelname == "WARNING"]

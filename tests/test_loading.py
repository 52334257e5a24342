"""Which file several ranks resume from: the same on all, or none."""

from __future__ import annotations

import pytest
from torch import nn

from trainbus import Handler, ranks
from trainbus.errors import CheckpointCorruptError, RankError
from trainbus.loading import _Failure, load_newest


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

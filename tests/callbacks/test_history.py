"""History: what stands in the file, whatever happens to the run; and what is read from it."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch

from trainbus import Handler
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import History, KeepLast, ModelCheckpoint, read_history
from trainbus_callbacks.history_file import Metrics, Removal, SaveRecord


def run(path, *, handler=None, every=None, **options):
    """Run fake epochs of four batches with the callback."""
    handler = handler or FakeHandler()
    handler.add_callback(History(path, every=every))
    emit_run(handler.bus, batches=4, **options)
    return handler


def records(path, kind):
    """Return the records of one kind, of all sittings."""
    return [
        record
        for sitting in read_history(path).sittings
        for record in sitting.records
        if isinstance(record, kind)
    ]


class TestMetrics:
    def test_of_epochs(self, tmp_path):
        """Each epoch's metrics stand there with their step, those that are not finite too."""
        run(tmp_path / "new" / "h.jsonl", epochs=3, logs={"loss": [0.5, math.nan, -math.inf], "note": "x"})
        found = records(tmp_path / "new" / "h.jsonl", Metrics)

        assert [(one.scope, one.epoch, one.global_step) for one in found] == [
            ("epoch", 0, 4),
            ("epoch", 1, 8),
            ("epoch", 2, 12),
        ]
        first, second, third = (one.logs["loss"] for one in found)
        assert (first, third) == (0.5, -math.inf) and math.isnan(second)
        assert all(list(one.logs) == ["loss"] for one in found)

    def test_of_batches(self, tmp_path):
        """Those of every so many batches of the run stand there too, and the others are not read."""
        seen = []

        def loss(step):
            seen.append(step)
            return torch.tensor(float(step))

        run(tmp_path / "h", every=3, epochs=2, batch_logs={"loss": loss})

        found = [(one.scope, one.global_step, one.logs["loss"]) for one in records(tmp_path / "h", Metrics)]
        assert found == [("batch", 3, 3.0), ("batch", 6, 6.0)]

    def test_at_once(self, tmp_path):
        """What happened is in the file when the event is over."""
        handler, seen = FakeHandler(), []
        handler.bus.on("epoch_end", lambda: seen.append(len(records(tmp_path / "h", Metrics))), priority=90)
        run(tmp_path / "h", handler=handler, epochs=3, logs={"loss": 1.0})

        assert seen == [1, 2, 3]

    def test_rank_0_only(self, tmp_path):
        """Other ranks write nothing, and know no paths of saves."""
        handler = FakeHandler(rank=1)
        run(tmp_path / "h", handler=handler, every=1, epochs=1, logs={"loss": 1.0})
        save = PendingSave(None)
        handler.bus.post("checkpoint_saved", save=save, path=None, manifest=Manifest(contents="state"))
        handler.bus.post("checkpoint_failed", save=save, path=None, error=OSError())
        handler.bus.post("checkpoint_skipped", save=save, path=None, reason="busy")
        handler.bus.drain()

        assert not (tmp_path / "h").exists()

    def test_every_is_a_count(self):
        """Something that counts no batches is refused."""
        with pytest.raises(ValueError, match=r"every counts training batches and must be an int.*got 0"):
            History("h", every=0)


class TestSaves:
    @pytest.fixture
    def handler(self, tmp_path):
        handler = FakeHandler(auto_complete=False)
        handler.add_callback(History(tmp_path / "h"))
        return handler

    def test_saved(self, handler, tmp_path, monkeypatch):
        """A save stands there with its manifest's facts, its seconds, and its moments by the calendar."""
        handler.epoch, handler.global_step = 2, 30
        path = tmp_path / "sub" / "a.pt"
        pending = handler.save_async(
            path, stream="best", logs={"val_loss": 0.5}, monitor="val_loss", mode="min", score=0.5
        )
        times, now = pending.times, 1_700_000_000.0
        monkeypatch.setattr("time.monotonic", lambda: times.requested + 10)
        monkeypatch.setattr("time.time", lambda: now)
        times.taken, times.waiting, times.copying = times.requested + 1, 0.25, 0.5
        times.fenced, times.fenced_at = 0.125, times.requested + 4
        times.begun, times.durable = times.requested + 2, times.requested + 3
        handler.saves[0].succeed()
        handler.bus.drain()

        (one,) = records(tmp_path / "h", SaveRecord)
        assert (one.outcome, one.file, one.stream) == ("saved", os.path.join("sub", "a.pt"), "best")
        assert (one.epoch, one.global_step, one.logs) == (2, 30, {"val_loss": 0.5})
        assert (one.monitor, one.mode, one.score, one.sequence) == ("val_loss", "min", 0.5, 1)
        assert one.run_id == handler.run_id
        assert (one.waiting, one.copying, one.fenced) == (0.25, 0.5, 0.125)
        moments = (one.requested, one.taken, one.begun, one.durable, one.fenced_at)
        assert [moment - now for moment in moments] == pytest.approx([-10, -9, -8, -7, -6], abs=1e-5)

    def test_not_saved(self, handler, tmp_path):
        """A failed and a skipped save stand there with the reason."""
        for name in ("a.pt", "b.pt"):
            handler.save_async(tmp_path / name)
        handler.saves[0].fail(OSError(errno.ENOSPC, "No space left on device"))
        handler.saves[1].skip("the writer was busy")
        handler.bus.drain()

        failed, skipped = records(tmp_path / "h", SaveRecord)
        assert (failed.outcome, failed.file, failed.durable) == ("failed", "a.pt", None)
        assert "No space left" in failed.reason
        assert (skipped.outcome, skipped.reason) == ("skipped", "the writer was busy")

    def test_of_a_real_run(self, tmp_path):
        """What saves cost adds up to what the handler says, and removed files are named."""
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with Handler(model, optimizer, snapshot="overlap") as handler:
            handler.add_callback(History(tmp_path / "h"))
            handler.add_callback(ModelCheckpoint(tmp_path / "a_{epoch}.pt", keep=KeepLast(1)))
            for _ in handler.epochs(3):
                for _ in handler.batches(range(2)):
                    model(torch.ones(1, 2)).sum().backward()
                    optimizer.step()
            stats = handler.checkpoint_stats()

        saves = records(tmp_path / "h", SaveRecord)
        assert len(saves) == stats.saves == 3
        assert sum(one.copying for one in saves) == pytest.approx(stats.seconds_copying)
        assert sum(one.waiting for one in saves) == pytest.approx(stats.seconds_waiting)
        assert sum(one.fenced for one in saves) == pytest.approx(stats.seconds_fenced)
        assert sum(one.size for one in saves) == stats.bytes
        assert [one.file for one in records(tmp_path / "h", Removal)] == ["a_1.pt", "a_2.pt"]


class TestSittings:
    def test_begin_and_end(self, tmp_path):
        """Each process has a begin and an end, and says which runs it continues."""
        handler = run(tmp_path / "h", epochs=1)
        later = FakeHandler(resumed=True)
        later.lineage = (handler.run_id,)
        run(tmp_path / "h", handler=later, epochs=2, first_epoch=1)

        first, second = read_history(tmp_path / "h").sittings
        assert (first.begin.resumed, first.begin.global_step, first.begin.total_epochs) == (False, 0, 1)
        assert (first.last_step, first.end.reason) == (4, None)
        assert (second.begin.resumed, second.begin.epoch, second.begin.global_step) == (True, 1, 4)
        assert second.begin.parents == (first.begin.run_id,)

    def test_reason(self, tmp_path):
        """A run that ended before its time says why, an exception by its name."""
        handler = FakeHandler()
        handler.bus.on("epoch_end", lambda: handler.stop("the loss was NaN"))
        run(tmp_path / "h", handler=handler, epochs=3)
        other = FakeHandler()
        other.add_callback(History(tmp_path / "h"))
        other.bus.emit("train_begin")
        other.bus.emit("exception", error=ValueError("bad batch"))
        other.bus.emit("train_end")

        ends = [sitting.end.reason for sitting in read_history(tmp_path / "h").sittings]
        assert ends == ["the loss was NaN", "ValueError: bad batch"]

    def test_killed(self, tmp_path):
        """SIGKILL amid an epoch loses no line that was written, and what follows is read as well."""
        script = textwrap.dedent(
            """
            import os, sys
            from trainbus.testing import FakeHandler, emit_run
            from trainbus_callbacks import History

            handler = FakeHandler()
            handler.add_callback(History(sys.argv[1], every=1))
            handler.bus.on("train_batch_end", lambda: os.kill(os.getpid(), 9), after=6, priority=90)
            emit_run(handler.bus, epochs=9, batches=4, batch_logs={"loss": float})
            """
        )
        done = subprocess.run([sys.executable, "-c", script, tmp_path / "h"], timeout=60)
        run(tmp_path / "h", handler=FakeHandler(resumed=True), epochs=2, first_epoch=1)

        assert done.returncode == -9
        killed, after = read_history(tmp_path / "h").sittings
        assert (killed.end, killed.last_step) == (None, 7)
        assert after.end is not None


class TestDamage:
    def test_torn_line(self, tmp_path):
        """What a power cut left of a line is passed over and counted, and the next line is whole."""
        run(tmp_path / "h", epochs=1, logs={"loss": 0.5})
        whole = (tmp_path / "h").read_bytes()
        (tmp_path / "h").write_bytes(whole + b'{"record": "metrics", "ti')
        run(tmp_path / "h", epochs=1, logs={"loss": 0.25})

        history = read_history(tmp_path / "h")
        assert history.unreadable == 1
        assert [one.logs["loss"] for one in records(tmp_path / "h", Metrics)] == [0.5, 0.25]

    @pytest.mark.parametrize(
        "line",
        [
            b"\xff\xfe\x00",
            b"[1, 2]",
            b"null",
            b'{"record": "unheard of", "time": 1}',
            b'{"record": ["metrics"], "time": 1}',
            b'{"record": "metrics", "time": 1, "scope": "epoch", "epoch": 0, "global_step": 1}',
            b'{"record": "metrics", "time": 1, "scope": "epoch", "epoch": -1, "global_step": 1, "logs": {}}',
            b'{"record": "metrics", "time": 1, "scope": "epoch", "epoch": 0, "global_step": 1, "logs": [1]}',
            b'{"record": "removal", "time": "nan", "file": "a"}',
            b'{"record": "removal", "time": 1e300, "file": "a"}',
            b'{"record": "removal", "time": 1' + b"0" * 400 + b', "file": "a"}',
            b'{"record": "save", "time": 1, "outcome": "saved", "file": 3}',
            b'{"record": "save", "time": 1, "outcome": "saved", "file": "a", "size": true}',
            b'{"record": "save", "time": 1, "outcome": "saved", "file": "a", "durable": "inf"}',
            b'{"record": "begin", "time": 1, "parents": "abc"}',
            b'{"record": "save", "time": 1, "outcome": "kept", "file": "a"}',
            b'{"record": "metrics", "time": 1, "scope": "x", "epoch": 0, "global_step": 1, "logs": {}}',
            b"[" * 100_000,
            b'{"record": "removal", "time": 1, "file": "' + b"9" * 10_000,
        ],
    )
    def test_no_record(self, tmp_path, line):
        """A line that says nothing known, or not as it should, is counted and harms no other."""
        run(tmp_path / "h", epochs=1, logs={"loss": 0.5})
        with open(tmp_path / "h", "ab") as file:
            file.write(line + b"\n")
        run(tmp_path / "h", epochs=1, logs={"loss": 0.25})

        history = read_history(tmp_path / "h")
        assert (history.unreadable, len(history.sittings)) == (1, 2)

    def test_fields_of_later_versions(self, tmp_path):
        """Fields that are not known are passed over."""
        run(tmp_path / "h", epochs=1)
        facts = json.loads((tmp_path / "h").read_text().splitlines()[0])
        (tmp_path / "h").write_text(json.dumps({**facts, "weather": "fine"}) + "\n")

        (sitting,) = read_history(tmp_path / "h").sittings
        assert sitting.begin.run_id == facts["run_id"]

    def test_disk_full(self, tmp_path, monkeypatch, caplog):
        """A disk that refuses is told of once; training goes on, and so does the file once there is room."""
        write, calls = os.write, itertools.count()

        def refuse(fd, data):
            return write(fd, data[:9] if next(calls) in (1, 2) else data)

        monkeypatch.setattr(os, "write", refuse)
        with caplog.at_level(logging.WARNING, "trainbus"):
            run(tmp_path / "h", epochs=4, logs={"loss": 0.5})

        assert len(caplog.records) == 1 and "will have gaps" in caplog.text and "No space" not in caplog.text
        assert [one.epoch for one in records(tmp_path / "h", Metrics)] == [2, 3]

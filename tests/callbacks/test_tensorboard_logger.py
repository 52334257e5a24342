"""TensorBoardLogger: what TensorBoard itself reads from the files."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainbus.errors import MissingExtraError
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import TensorBoardLogger


def curves(folder):
    """Return the points of each curve as TensorBoard shows them."""
    shown = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(point.step, round(point.value, 4)) for point in shown.Scalars(tag)]
        for tag in shown.Tags()["scalars"]
    }


class TestFolder:
    def test_another_working_directory(self, tmp_path, monkeypatch):
        """A relative folder is meant where the callback was made, whatever the script does later."""
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        handler = FakeHandler()
        handler.add_callback(TensorBoardLogger("tb"))
        handler.bus.on("epoch_end", lambda: os.chdir("elsewhere"), once=True)
        emit_run(handler.bus, epochs=3, batches=1, logs={"loss": 1.0})

        assert curves(tmp_path / "tb")["loss"] == [(1, 1.0), (2, 1.0), (3, 1.0)]

    def test_elsewhere(self):
        """What is no path on this machine is handed on as it is."""
        assert TensorBoardLogger("s3://runs/a").log_dir == "s3://runs/a"


class TestCurves:
    def test_of_epochs_and_batches(self, tmp_path):
        """Epochs stand under their metrics' names, every second batch under batch/, both over steps."""
        handler = FakeHandler()
        handler.add_callback(TensorBoardLogger(tmp_path, every=2))
        emit_run(
            handler.bus,
            epochs=2,
            batches=3,
            logs={"val/loss": [0.5, 0.25], "note": "text"},
            batch_logs={"loss": [6.0, 5.0, 4.0, 3.0, 2.0, 1.0]},
        )

        assert curves(tmp_path) == {
            "val/loss": [(3, 0.5), (6, 0.25)],
            "batch/loss": [(2, 5.0), (4, 3.0), (6, 1.0)],
        }

    def test_epochs_only(self, tmp_path):
        """every=None leaves the batches out."""
        handler = FakeHandler()
        handler.add_callback(TensorBoardLogger(tmp_path, every=None))
        emit_run(handler.bus, epochs=1, batches=2, logs={"loss": 1.0}, batch_logs={"loss": 1.0})

        assert list(curves(tmp_path)) == ["loss"]

    def test_loop_that_emits_epochs_alone(self, tmp_path):
        """A run that counts no steps stands over its epochs, also when it is resumed."""
        for resumed in (False, True):
            handler = FakeHandler(resumed=resumed)
            handler.epoch = 2 if resumed else 0
            handler.add_callback(TensorBoardLogger(tmp_path))
            handler.bus.emit("train_begin", resumed=resumed)
            for epoch in range(2, 4) if resumed else range(3):
                handler.bus.emit(
                    "epoch_end", epoch=epoch, global_step=0, logs={"loss": epoch + 0.5 * resumed}
                )
            handler.bus.emit("train_end")

        assert curves(tmp_path) == {"loss": [(1, 0.0), (2, 1.0), (3, 2.5), (4, 3.5)]}

    def test_after_each_epoch(self, tmp_path):
        """What was written is in the file when the epoch is over, so that a kill takes none of it."""
        handler, seen = FakeHandler(), []
        handler.add_callback(TensorBoardLogger(tmp_path))
        handler.bus.on("epoch_end", lambda: seen.append(len(curves(tmp_path)["loss"])), priority=90)
        emit_run(handler.bus, epochs=3, logs={"loss": 1.0})

        assert seen == [1, 2, 3]

    def test_rank_0_only(self, tmp_path):
        """Other ranks write nothing."""
        handler = FakeHandler(rank=1)
        handler.add_callback(TensorBoardLogger(tmp_path / "run"))
        emit_run(handler.bus, logs={"loss": 1.0})

        assert list(tmp_path.iterdir()) == []


class TestResumed:
    def test_what_was_lost_is_hidden(self, tmp_path):
        """Points behind the one where the run continues give way to the new ones; those before it stay."""
        first = FakeHandler()
        first.add_callback(TensorBoardLogger(tmp_path, every=1))
        emit_run(first.bus, epochs=3, batches=1, batch_logs={"loss": [1.0, 2.0, 3.0]})
        second = FakeHandler(resumed=True)
        second.global_step = 1
        second.add_callback(TensorBoardLogger(tmp_path, every=1))
        second.bus.emit("train_begin", resumed=True)
        for step in (2, 3):
            second.bus.emit("train_batch_end", global_step=step, logs={"loss": 10.0 * step})
        second.bus.emit("train_end")

        assert curves(tmp_path) == {"batch/loss": [(1, 1.0), (2, 20.0), (3, 30.0)]}


class TestWriter:
    def test_is_there_for_pictures(self, tmp_path):
        """While a run goes on its writer takes what else there is to show; afterwards there is none."""
        handler, callback = FakeHandler(), TensorBoardLogger(tmp_path)
        handler.add_callback(callback)
        handler.bus.on("epoch_end", lambda: callback.writer.add_text("remark", "fine", 1))
        emit_run(handler.bus, epochs=1)

        assert "remark/text_summary" in EventAccumulator(str(tmp_path)).Reload().Tags()["tensors"]
        assert callback.writer is None


class TestArguments:
    @pytest.mark.parametrize("every", [0, -1, True, 2.0])
    def test_no_count(self, every):
        """What counts no batches is refused."""
        with pytest.raises(ValueError, match=f"an int of at least 1 or None, got {every}"):
            TensorBoardLogger("run", every=every)

    def test_without_tensorboard(self, monkeypatch):
        """Where tensorboard is missing, the error comes at once and names what to install."""
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)

        with pytest.raises(MissingExtraError, match=r'pip install "trainbus\[tensorboard\]"'):
            TensorBoardLogger("run")

    def test_import_takes_no_tensorboard(self):
        """Importing the callbacks imports neither tensorboard nor torch."""
        code = "import sys, trainbus_callbacks; assert not {'tensorboard', 'torch'} & {*sys.modules}"

        subprocess.run([sys.executable, "-c", code], check=True)

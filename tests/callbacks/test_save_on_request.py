"""SaveOnRequest: asked by a file or a signal, answered once, at the next event where that is safe."""

from __future__ import annotations

import errno
import os
import signal
import threading

import pytest

from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import SaveOnRequest


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Return a handler with the callback, which looks for its file at each event, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def asked(handler=None, **options):
        handler = handler or FakeHandler()
        handler.add_callback(SaveOnRequest("{global_step}.pt", seconds_between_looks=0, **options))
        return handler

    return asked


def touch_at(handler, event, step, path="save-now"):
    """Touch a file at the first such event of a step."""

    def touch(global_step):
        if global_step == step:
            open(path, "w").close()

    handler.bus.on(event, touch)


class TestFile:
    @pytest.mark.parametrize("event", ["train_batch_begin", "train_batch_end"])
    def test_saves_once_and_goes_on(self, asked, event):
        """One file is written at the end of the batch at hand, and the request is gone."""
        handler = asked()
        touch_at(handler, event, 3)
        emit_run(handler.bus, epochs=2, batches=4)

        step = 4 if event == "train_batch_begin" else 3
        assert [save.path for save in handler.saves] == [f"{step}.pt"]
        assert handler.global_step == 8 and not handler.stopped
        assert os.listdir() == []

    def test_of_ones_own(self, asked):
        """The file may be another one."""
        handler = asked(request_file="please")
        touch_at(handler, "train_batch_end", 2, path="please")
        touch_at(handler, "train_batch_end", 2)
        emit_run(handler.bus)

        assert [save.global_step for save in handler.saves] == [2]
        assert os.listdir() == ["save-now"]

    def test_stands_in_the_folder_of_the_checkpoints(self, tmp_path):
        """By default the file is looked for beside the checkpoints."""
        callback = SaveOnRequest(tmp_path / "runs" / "a.pt")

        assert callback.request_file == str(tmp_path / "runs" / "save-now")

    def test_is_not_looked_for_all_the_time(self, asked, monkeypatch):
        """Within the seconds between looks the disk is left alone."""
        now, handler = [0.0], FakeHandler()
        asked()  # goes to the empty folder
        monkeypatch.setattr("time.monotonic", lambda: now[0])
        handler.add_callback(SaveOnRequest("{global_step}.pt", seconds_between_looks=5))
        handler.bus.on("train_batch_begin", lambda: now.__setitem__(0, now[0] + 1))
        touch_at(handler, "train_batch_end", 2)
        emit_run(handler.bus, epochs=1, batches=9)

        assert [save.global_step for save in handler.saves] == [6]

    def test_cannot_be_taken(self, asked, caplog):
        """What cannot be removed is warned of once; training goes on, and a later request is answered."""
        handler = asked()
        os.mkdir("save-now")
        handler.bus.on("train_batch_begin", lambda: os.rmdir("save-now"), after=4, once=True)
        touch_at(handler, "train_batch_end", 6)
        emit_run(handler.bus, epochs=1, batches=8)

        assert [save.global_step for save in handler.saves] == [6]
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == 1 and "'./save-now': " in warned[0] and "Training goes on" in warned[0]

    def test_disk_that_fails(self, asked, monkeypatch, caplog):
        """A disk that does not answer ends no training."""

        def unlink(path):
            raise OSError(errno.ESTALE, "Stale file handle", path)

        handler = asked()
        with monkeypatch.context() as failing:
            failing.setattr(os, "unlink", unlink)
            emit_run(handler.bus, epochs=1, batches=3)

        assert handler.global_step == 3 and caplog.text.count("Stale file handle") == 1

    def test_other_ranks(self, asked):
        """Other ranks neither take the request nor save."""
        handler = asked(FakeHandler(rank=1))
        touch_at(handler, "train_batch_end", 2)
        emit_run(handler.bus)

        assert handler.saves == [] and os.listdir() == ["save-now"]


class TestSignal:
    def test_in_a_batch(self, asked):
        """The batch in which the signal comes is finished and saved; two signals in it are one request."""
        handler = asked()
        handler.bus.on(
            "train_batch_begin",
            lambda global_step: [signal.raise_signal(signal.SIGUSR2) for _ in range(2 * (global_step == 2))],
        )
        emit_run(handler.bus, epochs=1, batches=5)

        assert [save.global_step for save in handler.saves] == [3]

    def test_in_validation(self, asked):
        """A validation does not hold the save up until it is over."""
        handler, at = asked(), []
        handler.bus.emit("train_begin")
        signal.raise_signal(signal.SIGUSR2)
        handler.bus.on("val_end", lambda: at.append(len(handler.saves)))
        for event in ("val_begin", "val_batch_begin", "val_batch_end", "val_end", "train_end"):
            handler.bus.emit(event)

        assert at == [1]

    def test_other_ranks_live_on(self, asked):
        """A signal to all ranks does not kill those that do not write."""
        handler = asked(FakeHandler(rank=1))
        handler.bus.on("train_batch_begin", lambda: signal.raise_signal(signal.SIGUSR2))
        emit_run(handler.bus)

        assert handler.saves == []

    def test_earlier_handler(self, asked):
        """Who listened before hears the signal too, and has it again after the run."""
        heard = []
        before = signal.signal(signal.SIGUSR2, mine := lambda signum, frame: heard.append(signum))
        try:
            handler = asked()
            handler.bus.on("epoch_begin", lambda: signal.raise_signal(signal.SIGUSR2))
            emit_run(handler.bus, epochs=1)

            assert signal.getsignal(signal.SIGUSR2) is mine
        finally:
            signal.signal(signal.SIGUSR2, before)
        assert heard == [signal.SIGUSR2] and len(handler.saves) == 1

    def test_none(self, asked):
        """signum=None leaves signals alone."""
        handler, seen = asked(signum=None), []
        handler.bus.on("epoch_end", lambda: seen.append(signal.getsignal(signal.SIGUSR2)))
        emit_run(handler.bus, epochs=1)

        assert seen == [signal.SIG_DFL]

    def test_on_another_thread(self, asked, caplog):
        """Where no signal can be received the file still can, and the log says so."""

        def train():
            handler = asked()
            touch_at(handler, "train_batch_end", 2)
            emit_run(handler.bus)
            saves.extend(handler.saves)

        saves = []
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()

        assert [save.global_step for save in saves] == [2]
        assert "annot receive SIGUSR2" in caplog.text and "touch './save-now' instead" in caplog.text


class TestAnswer:
    def test_name(self):
        """The file name counts epochs from 1 and holds how many batches are done."""
        handler = FakeHandler()
        handler.add_callback(SaveOnRequest("{epoch}_{batch}_{global_step}.pt"))
        handler.bus.on(
            "train_batch_begin", lambda global_step: global_step == 4 and signal.raise_signal(signal.SIGUSR2)
        )
        emit_run(handler.bus, epochs=2, batches=3)

        assert [save.path for save in handler.saves] == ["2_2_5.pt"]

    def test_skipped_save_is_asked_for_again(self, asked):
        """A request that fell on a busy writer is answered later."""
        handler = asked(FakeHandler(auto_complete=False))
        touch_at(handler, "train_batch_end", 2)
        handler.bus.on(
            "train_batch_end",
            lambda global_step: handler.saves[0].skip() if global_step == 2 else None,
            priority=200,
        )
        emit_run(handler.bus, epochs=1, batches=3)

        assert len(handler.saves) == 2

    def test_too_late(self, asked, caplog):
        """A request after the last batch is told of, and not left to a next run of the same callback."""
        handler = asked()
        handler.bus.on("epoch_end", lambda: signal.raise_signal(signal.SIGUSR2), priority=200)
        emit_run(handler.bus, epochs=1)
        assert "came too late" in caplog.text

        emit_run(handler.bus, epochs=0)
        assert handler.saves == []

    def test_metric_in_the_name(self):
        """A name that depends on metrics is refused at once."""
        with pytest.raises(ValueError, match=r"the field 'val_loss'.* Use epoch, batch, global_step"):
            SaveOnRequest("{epoch}_{val_loss}.pt")

    @pytest.mark.parametrize("seconds", [-1, float("nan")])
    def test_no_time(self, seconds):
        """Nobody can look more often than always."""
        with pytest.raises(ValueError, match=f"seconds_between_looks must be .* got {seconds}"):
            SaveOnRequest("a.pt", seconds_between_looks=seconds)

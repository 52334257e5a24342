"""What a run finds on the disk: the best file it comes back to, and files of others."""

from __future__ import annotations

import errno
import io
import logging
import math
import os
import shutil
import zipfile

import pytest
from torch import nn

from trainbus import Handler, read_manifest
from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.manifest import Manifest
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import Every, ModelCheckpoint


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path, **manifest):
    """Write a checkpoint file without tensors."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("empty", "")
    commit(path, Manifest(contents="state", **manifest), lambda stream: stream.write(content.getvalue()))


def best_only(path="runs/best.pt", **options):
    return ModelCheckpoint(path, "val_loss", save_best_only=True, **options)


def state(score, path="runs/best.pt"):
    return {"monitor": "val_loss", "mode": "min", "best_score": score, "best_path": path}


def saves(checkpoint, *val_loss, handler=None):
    """Return the values that a training with these values of val_loss saves."""
    handler = handler or FakeHandler(resumed=True)
    handler.add_callback(checkpoint)
    emit_run(handler.bus, epochs=len(val_loss), logs={"val_loss": list(val_loss)})
    return [save.score for save in handler.saves]


class TestReconcile:
    def test_file_agrees(self, caplog):
        """
        A best that its file bears out is kept; nothing is said.
        """
        caplog.set_level(logging.INFO, "trainbus")
        write("runs/best.pt", monitor="val_loss", mode="min", score=0.5)
        checkpoint = best_only()

        checkpoint.load_state_dict(state(0.5))

        assert (checkpoint.best_score, checkpoint.best_path) == (0.5, "runs/best.pt")
        assert caplog.records == []
        assert saves(checkpoint, 0.7, 0.4) == [0.4]

    @pytest.mark.parametrize(("score", "saved"), [(0.3, []), (0.9, [0.7, 0.4])])
    def test_file_is_believed(self, score, saved, caplog):
        """
        If the file says another score than the state, the file is right: the state may be older or newer.
        """
        write("runs/best.pt", monitor="val_loss", mode="min", score=score)
        checkpoint = best_only()

        checkpoint.load_state_dict(state(0.5))

        assert checkpoint.best_score == score
        assert f"'runs/best.pt' holds val_loss {score}, not 0.5 as the loaded state has it" in caplog.text
        assert saves(checkpoint, 0.7, 0.4) == saved

    def test_moved_folder(self):
        """
        A file that is not where it was is found beside the template, under its name.
        """
        write("moved/best_3.pt", monitor="val_loss", mode="min", score=0.5)
        checkpoint = best_only("moved/best_{epoch}.pt")

        checkpoint.load_state_dict(state(0.5, "/gone/runs/best_3.pt"))

        assert (checkpoint.best_score, checkpoint.best_path) == (0.5, "moved/best_3.pt")

    def test_bare_name(self):
        """
        Beside a bare name means here.
        """
        write("best.pt", monitor="val_loss", mode="min", score=0.5)
        checkpoint = best_only("best.pt")

        checkpoint.load_state_dict(state(0.5, "/gone/best.pt"))

        assert checkpoint.best_path == "best.pt"

    def test_gone(self):
        """
        A best whose file is gone is forgotten with a warning, so that the next finite value is saved.
        """
        checkpoint = best_only()

        with pytest.warns(
            RuntimeWarning, match=r"'runs/best.pt' of the best val_loss \(0.5\) is lost: No such file"
        ):
            checkpoint.load_state_dict(state(0.5))

        assert (checkpoint.best_score, checkpoint.best_path) == (None, None)
        assert saves(checkpoint, math.nan, 0.7, 0.8) == [0.7]

    def test_damaged(self):
        """
        A damaged file is as good as none.
        """
        write("runs/best.pt", monitor="val_loss", mode="min", score=0.5)
        with open("runs/best.pt", "ab") as file:
            file.write(b"x")
        checkpoint = best_only()

        with pytest.warns(RuntimeWarning, match="is lost: it is damaged"):
            checkpoint.load_state_dict(state(0.5))

    @pytest.mark.parametrize(
        "manifest", [{"monitor": "val_acc", "score": 0.5}, {"monitor": "val_loss", "score": math.nan}, {}]
    )
    def test_does_not_tell(self, manifest):
        """
        Nor is a file that does not tell the metric: it is not the one that was saved.
        """
        write("runs/best.pt", **manifest)
        checkpoint = best_only()

        with pytest.warns(RuntimeWarning, match="it does not tell a finite val_loss"):
            checkpoint.load_state_dict(state(0.5))

    def test_saved_by_another(self):
        """
        A file judged by another metric may tell this one in its logs.
        """
        write("runs/best.pt", monitor="val_acc", score=0.9, logs={"val_loss": 0.5})
        checkpoint = best_only()

        checkpoint.load_state_dict(state(0.6))

        assert checkpoint.best_score == 0.5

    def test_other_ranks(self, monkeypatch):
        """
        Ranks that do not write do not look at the disk, which they may not share.
        """
        monkeypatch.setenv("RANK", "1")
        checkpoint = best_only()

        checkpoint.load_state_dict(state(0.5))

        assert checkpoint.best_path == "runs/best.pt"


class TestBestThere:
    """The state that another callback's checkpoint has of this one may be behind its files."""

    def resume(self, checkpoint, score, *, resumed=True, left_at=(9, 0)):
        """Load a state with a best of *score* and begin to train; return the best then."""
        handler = FakeHandler(resumed=resumed)
        handler.left_at = {"before": left_at}
        checkpoint.load_state_dict(state(score, "runs/1.pt" if score is not None else None))
        handler.add_callback(checkpoint)
        handler.bus.emit("train_begin", resumed=resumed)
        return checkpoint.best_score, checkpoint.best_path

    def files(self, checkpoint, *scores, **manifest):
        """Write what the run before has saved, of epochs from 1 on."""
        for number, score in enumerate(scores, 1):
            given = {"run_id": "before", "stream": checkpoint.state_key, "monitor": "val_loss", "mode": "min"}
            given |= {"score": score, "sequence": number, "epoch": number - 1} | manifest
            write(f"runs/{number}.pt", **given)

    def test_better_file(self, caplog):
        """The best of the files counts, and said once; a worse value is not saved any more."""
        caplog.set_level(logging.INFO, "trainbus")
        checkpoint = best_only("runs/{epoch}.pt", initial_value_threshold=0.9)
        self.files(checkpoint, 0.5, 0.2, 0.3)

        assert self.resume(checkpoint, 0.5) == (0.2, "runs/2.pt")
        assert caplog.text.count("'runs/2.pt' is there and is the best: val_loss 0.20000") == 1
        assert saves(checkpoint, 0.4, 0.1) == [0.1]

    @pytest.mark.parametrize("scores", [(0.5, 0.7), (0.5, math.nan), (0.5,)])
    def test_no_better_file(self, scores):
        """Others change nothing."""
        checkpoint = best_only("runs/{epoch}.pt")
        self.files(checkpoint, *scores)

        assert self.resume(checkpoint, 0.5) == (0.5, "runs/1.pt")

    @pytest.mark.parametrize(
        "manifest", [{"run_id": "other"}, {"stream": "other"}, {"monitor": "loss"}, {"mode": "max"}]
    )
    def test_files_of_others(self, manifest):
        """Files of other runs and callbacks, or judged otherwise, are none of its own."""
        checkpoint = best_only("runs/{epoch}.pt")
        self.files(checkpoint, 0.5)
        self.files(checkpoint, math.nan, 0.2, **manifest)
        self.files(checkpoint, 0.5)

        assert self.resume(checkpoint, 0.5) == (0.5, "runs/1.pt")

    @pytest.mark.parametrize(
        ("left_at", "best"), [((0, 2), 0.5), ((0, 3), 0.4), ((1, 4), 0.2), ((1, 3), 0.4)]
    )
    def test_abandoned_files(self, left_at, best):
        """What was saved behind the point at which the run was left does not count."""
        checkpoint = best_only("runs/{epoch}.pt")
        for epoch, step, score in ((0, 2, 0.5), (0, 3, 0.4), (1, 4, 0.2)):
            given = {"run_id": "before", "stream": checkpoint.state_key, "monitor": "val_loss", "mode": "min"}
            write(f"runs/{step}.pt", score=score, epoch=epoch, global_step=step, sequence=step, **given)
        write("runs/1.pt", monitor="val_loss", mode="min", score=0.5)

        assert self.resume(checkpoint, 0.5, left_at=left_at)[0] == best

    def test_abandoned_by_epochs(self):
        """So in loops that emit the ends of epochs and no batches, where no step is counted."""
        checkpoint = best_only("runs/{epoch}.pt")
        self.files(checkpoint, 0.5, 0.4, 0.1)

        assert self.resume(checkpoint, 0.5, left_at=(1, 0)) == (0.4, "runs/2.pt")

    def test_abandoned_under_the_only_name(self):
        """A file whose name is always the same counts all the same: the next save would overwrite it."""
        checkpoint = best_only()
        given = {"run_id": "before", "stream": checkpoint.state_key, "monitor": "val_loss", "mode": "min"}
        write("runs/best.pt", score=0.2, epoch=5, **given)

        assert self.resume(checkpoint, None, left_at=(3, 0)) == (0.2, "runs/best.pt")

    def test_abandoned_two_starts_ago(self):
        """A real run that was resumed after going back knows that what was abandoned then does not count."""
        losses = iter([0.9, 0.8, 0.1, 0.7, 0.75, 0.74, 0.6])
        for epochs, back_to in ((4, None), (4, "runs/each_2.pt"), (5, None)):
            with Handler(nn.Linear(1, 1)) as handler:
                handler.add_callback(ModelCheckpoint("runs/last.pt"))
                handler.add_callback(ModelCheckpoint("runs/each_{epoch}.pt"))
                best = handler.add_callback(best_only("runs/best_{epoch}_{val_loss}.pt"))
                if back_to is None:
                    handler.resume("runs")
                else:
                    handler.load(back_to)
                for _ in handler.epochs(epochs):
                    handler.log(val_loss=next(losses))

        assert (best.best_score, best.best_path) == (0.6, "runs/best_5_0.6.pt")

    def test_links_and_copies(self):
        """What somebody has linked or copied is not the best one's path."""
        checkpoint = best_only("runs/{epoch}.pt")
        self.files(checkpoint, 0.5, 0.2)
        os.symlink("2.pt", "runs/0.pt")
        shutil.copy("runs/2.pt", "runs/0 copy.pt")

        assert self.resume(checkpoint, 0.5) == (0.2, "runs/2.pt")

    def test_once(self):
        """A training that goes on in the same process looks no more: what it knows is newer."""
        checkpoint = best_only("runs/{epoch}.pt")
        self.files(checkpoint, 0.5)
        self.resume(checkpoint, 0.5)
        self.files(checkpoint, 0.5, 0.2)
        again = FakeHandler(resumed=True)
        again.left_at = {"before": (9, 0)}
        checkpoint.on_train_begin(again)

        assert checkpoint.best_score == 0.5

    def test_best_after_last(self, tmp_path):
        """A real run that resumes from last.pt knows the best file that came after it in that epoch."""
        for epochs in (2, 3):
            with Handler(nn.Linear(1, 1)) as handler:
                handler.add_callback(ModelCheckpoint("runs/last.pt"))
                best = best_only("runs/best_{epoch}.pt", save_weights_only=True)
                handler.add_callback(best)
                handler.resume("runs")
                for epoch in handler.epochs(epochs):
                    handler.log(val_loss=[0.5, 0.1, 0.3][epoch])

        assert (best.best_score, best.best_path) == (0.1, "runs/best_2.pt")
        assert sorted(os.listdir("runs")) == ["best_1.pt", "best_2.pt", "last.pt"]

    def test_unreadable_folder(self, caplog, monkeypatch):
        """Where the folder cannot be looked into the loaded best counts, and the log says so."""

        def scandir(path):
            raise OSError(errno.ESTALE, "Stale file handle", path)

        monkeypatch.setattr(os, "scandir", scandir)
        checkpoint = best_only("runs/{epoch}.pt")
        write("runs/1.pt", monitor="val_loss", mode="min", score=0.5)

        assert self.resume(checkpoint, 0.5) == (0.5, "runs/1.pt")
        assert "Cannot look into 'runs' for a better file than the loaded best" in caplog.text

    def test_written_with_a_dot(self):
        """The path is written as the files' names are made."""
        checkpoint = best_only("./{epoch}.pt")
        given = {"run_id": "before", "stream": checkpoint.state_key, "monitor": "val_loss", "mode": "min"}
        for number, score in ((1, 0.5), (2, 0.2)):
            write(f"{number}.pt", score=score, sequence=number, **given)

        assert self.resume(checkpoint, 0.5)[1] == "./2.pt"


class TestOtherArguments:
    """A callback whose arguments were changed before a resume has no state: its files tell what is best."""

    @pytest.mark.parametrize(
        "changed",
        [
            {"save_freq": Every(epochs=1) | Every(minutes=60)},
            {"save_weights_only": True},
            {"initial_value_threshold": 0.7},
            {"name": "the best"},
        ],
    )
    def test_worse_epoch_overwrites_no_better_file(self, changed):
        """Whichever argument is new in a real run: a worse epoch is not saved, a better one is."""
        losses = [0.5, 0.4, 0.6, 0.3]
        for epochs, options in ((2, {}), (3, changed)):
            with Handler(nn.Linear(1, 1)) as handler:
                best = handler.add_callback(best_only(**options))
                handler.add_callback(ModelCheckpoint("runs/last.pt"))
                handler.resume("runs")
                for epoch in handler.epochs(epochs):
                    handler.log(val_loss=losses[epoch])

        assert (best.best_score, best.best_path) == (0.4, "runs/best.pt")
        assert read_manifest("runs/best.pt").score == 0.4

    def found(self, checkpoint, *, others=()):
        """Begin to train after a resume without a state; return the best then."""
        handler = FakeHandler(resumed=True)
        handler.left_at = {"before": (0, 1)}
        for one in (checkpoint, *others):
            handler.add_callback(one)
        handler.bus.emit("train_begin", resumed=True)
        return checkpoint.best_score

    def write(self, path="runs/3.pt", **manifest):
        write(path, **{"run_id": "before", "monitor": "val_loss", "mode": "min", "score": 0.4} | manifest)

    @pytest.mark.parametrize("stream", ["", "as it was called before"])
    def test_any_stream(self, stream):
        """A file that is named as the callback names its own counts, whoever saved it."""
        self.write(stream=stream)

        assert self.found(best_only("runs/{epoch}.pt")) == 0.4

    @pytest.mark.parametrize(
        "manifest",
        [
            {"run_id": "other"},
            {"monitor": "loss"},
            {"mode": "max"},
            {"global_step": 2},
            {"path": "runs/best3.pt"},
            {"path": "3.pt"},
        ],
    )
    def test_files_of_others(self, manifest):
        """Files of other runs, names and folders, judged otherwise or abandoned, do not count."""
        self.write(**manifest)

        assert self.found(best_only("runs/{epoch}.pt")) is None

    def test_stream_of_another_callback(self):
        """Nor do those of a callback that this run still has, however alike the names are."""
        other = ModelCheckpoint("runs/{global_step}.pt", monitor="val_loss")
        self.write(stream=other.state_key)

        assert self.found(best_only("runs/{epoch}.pt"), others=[other]) is None

    def test_not_resumed(self):
        """A run that continues none has no best."""
        self.write()

        assert saves(best_only("runs/{epoch}.pt"), 0.5, handler=FakeHandler(run_id="before")) == [0.5]

    def test_threshold(self):
        """A threshold that the best file does not pass holds back what comes until something does."""
        self.write()
        checkpoint = best_only("runs/{epoch}.pt", initial_value_threshold=0.2)
        self.found(checkpoint)

        assert saves(checkpoint, 0.3, 0.1) == [0.1]


class TestOtherRuns:
    def test_warning(self):
        """
        A run that did not resume and finds another's files says so once, before it saves.
        """
        for sequence, score in enumerate([0.5, 0.31, 0.4], start=1):
            write(
                f"runs/m{sequence}.pt",
                run_id="other",
                sequence=sequence,
                epoch=sequence,
                global_step=100 * sequence,
                monitor="val_loss",
                mode="min",
                score=score,
            )
        handler = FakeHandler()

        with pytest.warns(RuntimeWarning) as caught:
            saves(best_only("runs/m{epoch}.pt"), 0.9, 0.8, handler=handler)

        assert [str(warning.message) for warning in caught] == [
            "This run did not resume, and 'runs' holds 3 checkpoints of another run under its name "
            "'m{epoch}.pt': the newest is 'm3.pt' (epoch 4, step 300), the best val_loss is 0.31000. "
            "They may be overwritten. To continue that run, call handler.resume('runs') before "
            "training; to keep its files, save to another folder."
        ]

    def test_before_the_first_save(self):
        """
        Without a train_begin it is said before the first save.
        """
        write("best.pt", run_id="other", epoch=2)
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("best.pt"))
        asked = []
        handler.save_async = lambda path, **options: asked.append(path)

        with pytest.warns(
            RuntimeWarning, match=r"holds 1 checkpoint of another run .* \(epoch 3, step 0\)\. They"
        ):
            handler.bus.emit("epoch_end")

        assert asked == ["best.pt"]

    def test_raised_before_the_first_save(self):
        """
        Where warnings are errors, nothing is overwritten.
        """
        write("best.pt", run_id="other")
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("best.pt"))

        with pytest.raises(RuntimeWarning):
            handler.bus.emit("epoch_end")

        assert handler.saves == []

    @pytest.mark.parametrize(("mode", "best"), [("min", "0.20000"), ("max", "0.70000")])
    def test_best(self, mode, best):
        """
        The best is that of the finite scores in the callback's direction.
        """
        for i, score in enumerate([0.7, 0.2, math.nan, None]):
            write(f"m{i}.pt", run_id="other", monitor="val_loss", mode=mode, score=score)

        with pytest.warns(RuntimeWarning, match=f"the best val_loss is {best}"):
            saves(best_only("m{epoch}.pt", mode=mode), 0.9, handler=FakeHandler())

    @pytest.mark.parametrize(
        ("name", "run_id", "resumed"),
        [("best.pt", "mine", False), ("best.pt", "other", True), ("last.pt", "other", False)],
    )
    def test_silence(self, name, run_id, resumed):
        """
        One's own files, a resumed run and files of other names give no warning.
        """
        write(name, run_id=run_id)

        saves(best_only("best.pt"), 0.9, handler=FakeHandler(run_id="mine", resumed=resumed))

        assert os.path.exists(name)

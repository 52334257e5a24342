"""Old checkpoints go when new ones are durable: with real files, slow and failing disks, and a restart."""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading

import pytest
from torch import nn

from trainbus import Handler
from trainbus.testing import FakeHandler, FaultyDisk, emit_run
from trainbus_callbacks import KeepBest, KeepEvery, KeepLast, ModelCheckpoint

WAIT = 60.0


def run(folder, losses, *, keep, resume=False, before=None, **options):
    """Train an epoch for each loss, saving each; return the names of the files afterwards."""
    with Handler(nn.Linear(1, 1), **options) as handler:
        handler.add_callback(ModelCheckpoint(folder / "{epoch}.pt", monitor="val_loss", keep=keep))
        if resume:
            handler.resume(folder)
        for epoch in handler.epochs(len(losses)):
            if before is not None:
                before(handler, epoch)
            handler.log(val_loss=losses[epoch])
    return sorted(os.listdir(folder))


class TestFiles:
    def test_stay_as_asked(self, tmp_path):
        """After each save only the newest two and the best are there."""
        assert run(tmp_path, [0.5, 0.1, 0.4, 0.3, 0.6], keep=KeepLast(2)) == ["2.pt", "4.pt", "5.pt"]

    def test_of_a_slow_disk_are_no_more(self, tmp_path):
        """However slow the disk is, no more files are there in the end, nor ever more than one beyond."""
        seen = []

        def slow(name, number):
            seen.append(len([one for one in os.listdir(tmp_path) if not one.startswith(".")]))

        with FaultyDisk(before=slow):
            names = run(tmp_path, [0.5, 0.4, 0.3, 0.2], keep=KeepLast(1), max_pending=2)

        assert names == ["4.pt"]
        assert max(seen) <= 2

    def test_removal_waits_for_the_new_one(self, tmp_path):
        """The old file is there until the new one is durable."""
        reached, go = threading.Event(), threading.Event()

        def hold(name, number):
            if number == 3:  # 1: can folders be synced here? 2: the first save. 3: the second.
                reached.set()
                assert go.wait(WAIT)

        def look(handler, epoch):
            if epoch == 2:
                assert reached.wait(WAIT)
                assert sorted(name for name in os.listdir(tmp_path) if name[0] != ".") == ["1.pt", "2.pt"]
                go.set()

        with FaultyDisk(calls=["fsync_folder"], before=hold):
            run(tmp_path, [0.5, 0.4, 0.3], keep=KeepLast(1), before=look)

        assert sorted(os.listdir(tmp_path)) == ["3.pt"]

    @pytest.mark.parametrize("keep", [KeepLast(1), KeepBest(1)])
    def test_links_and_copies_are_left_alone(self, tmp_path, keep):
        """What somebody has linked or copied stays, and keeps none of the real files from staying."""

        def look(handler, epoch):
            if epoch == 1:
                handler.flush()
                os.rename(tmp_path / "1.pt", tmp_path / "renamed.pt")
                shutil.copy(tmp_path / "renamed.pt", tmp_path / "1.pt")
            if epoch == 2:
                handler.flush()
                os.link(tmp_path / "1.pt", tmp_path / "0 hard.pt")
                for name in ("0 best.pt", "best.pt"):  # before and behind the file in order of names
                    (tmp_path / name).symlink_to("1.pt")
                shutil.copy(tmp_path / "1.pt", tmp_path / "0 copy.pt")

        names = run(tmp_path, [0.1, 0.5, 0.4, 0.3], keep=keep, before=look)

        assert names == ["0 best.pt", "0 copy.pt", "0 hard.pt", "1.pt", "4.pt", "best.pt", "renamed.pt"]

    def test_failed_save_costs_no_file(self, tmp_path):
        """Where new files could not be written, those before stay, however many saves were asked for."""
        run(tmp_path, [0.5, 0.4, 0.3], keep=KeepLast(2))
        with FaultyDisk(errno.EROFS, calls=["create"], times=math.inf):
            run(tmp_path, [0.5, 0.4, 0.3, 0.2, 0.1], keep=KeepLast(2), resume=True, on_write_error="warn")

        assert sorted(os.listdir(tmp_path)) == ["2.pt", "3.pt"]

    def test_are_counted_across_a_restart_in_a_moved_folder(self, tmp_path):
        """A run that is continued elsewhere counts the files of the run before."""
        run(tmp_path / "old", [0.5, 0.4, 0.3], keep=KeepLast(2))
        (tmp_path / "old").rename(tmp_path / "new")

        names = run(tmp_path / "new", [0.5, 0.4, 0.3, 0.2], keep=KeepLast(2), resume=True)
        assert names == ["3.pt", "4.pt"]

    def test_of_others_are_not_touched(self, tmp_path):
        """Files of another run, of another callback and of nobody's are neither counted nor removed."""
        run(tmp_path, [0.9, 0.8], keep=None)
        (tmp_path / "notes.txt").write_text("dear")
        with Handler(nn.Linear(1, 1)) as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "other_{epoch}.pt"))
            handler.add_callback(ModelCheckpoint(tmp_path / "mine_{epoch}.pt", keep=KeepLast(1)))
            for _ in handler.epochs(3):
                pass

        assert sorted(os.listdir(tmp_path)) == [
            "1.pt",
            "2.pt",
            "mine_3.pt",
            "notes.txt",
            "other_1.pt",
            "other_2.pt",
            "other_3.pt",
        ]

    def test_removed_ones_are_told_of(self, tmp_path):
        """Each removed file is an event of its callback."""
        removed = []
        with Handler(nn.Linear(1, 1)) as handler:
            handler.on("checkpoint_removed", lambda path: removed.append(os.path.basename(path)))
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt", keep=KeepLast(1)))
            for _ in handler.epochs(3):
                pass

        assert removed == ["1.pt", "2.pt"]

    def test_best_of_the_way_taken_stays(self, tmp_path):
        """After going back within one process the best file stays, though an abandoned one is better."""
        losses = iter([0.9, 0.8, 0.1, 0.5, 0.7, 0.6, 0.65])
        with Handler(nn.Linear(1, 1)) as handler:
            path = tmp_path / "{epoch}_{val_loss:.2f}.pt"
            checkpoint = handler.add_callback(ModelCheckpoint(path, monitor="val_loss", keep=KeepLast(2)))
            for epochs, back_to in ((3, "2_0.80.pt"), (6, None)):
                for _ in handler.epochs(epochs):
                    handler.log(val_loss=next(losses))
                if back_to is not None:
                    handler.flush()
                    handler.load(tmp_path / back_to)

        assert (checkpoint.best_score, checkpoint.best_path) == (0.5, str(tmp_path / "3_0.50.pt"))
        names = sorted(name for name in os.listdir(tmp_path) if name[0] != ".")
        assert names == ["3_0.10.pt", "3_0.50.pt", "5_0.60.pt", "6_0.65.pt"]

    def test_of_a_callback_of_the_same_name_are_not_touched(self, tmp_path):
        """Of two callbacks with one name each counts its own files."""
        for resume in (False, True):
            with Handler(nn.Linear(1, 1)) as handler:
                for letter in "ab":
                    path = tmp_path / f"{letter}_{{epoch}}.pt"
                    handler.add_callback(ModelCheckpoint(path, name="x", keep=KeepLast(2)))
                if resume:
                    handler.resume(tmp_path)
                for _ in handler.epochs(4 if resume else 3):
                    pass

        names = sorted(name for name in os.listdir(tmp_path) if name[0] != ".")
        assert names == ["a_3.pt", "a_4.pt", "b_3.pt", "b_4.pt"]


class TestRepr:
    @pytest.mark.parametrize(
        "keep",
        [KeepLast(3), KeepBest(2), KeepEvery(epochs=10), KeepEvery(steps=5), KeepLast(3) | KeepBest(2)],
    )
    def test_is_what_was_written(self, keep):
        """In messages a retention looks as it does in the script."""
        names = {"KeepLast": KeepLast, "KeepBest": KeepBest, "KeepEvery": KeepEvery}

        assert eval(repr(keep), names) == keep
        assert "=None" not in repr(keep) and "number" not in repr(keep)


class TestFake:
    def test_save_says_what_is_kept(self):
        """A test with fake events sees which retention goes with a save."""
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("{epoch}.pt", monitor="val_loss", keep=KeepBest(2)))
        emit_run(handler.bus, epochs=1, logs={"val_loss": 0.5})

        assert [save.keep for save in handler.saves] == [KeepBest(2)]

    @pytest.mark.parametrize("keep", [3, "all", KeepLast])
    def test_nonsense_is_refused(self, keep):
        """What is no retention is refused when the callback is made."""
        with pytest.raises(TypeError, match=r"keep must be KeepLast\(3\)"):
            ModelCheckpoint("{epoch}.pt", keep=keep)

"""Which checkpoints stay: pure functions of manifests."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from trainbus.checkpoint.folder import CheckpointFile
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.retention import KeepBest, KeepEvery, KeepLast, superfluous


def files(*scores, mode="min", monitor="val_loss"):
    """Return a run's files, one an epoch of ten steps, with these scores."""
    return [
        CheckpointFile(
            f"{number}.pt",
            Manifest(
                contents="state",
                sequence=number + 1,
                epoch=number,
                global_step=10 * (number + 1),
                monitor=monitor,
                mode=mode,
                score=score,
            ),
        )
        for number, score in enumerate(scores)
    ]


def unscored(count):
    return files(*[None] * count, monitor=None, mode=None)


class TestKeepLast:
    def test_newest_stay(self):
        """The newest stay, the others go, oldest first."""
        assert superfluous(unscored(5), KeepLast(2)) == ["0.pt", "1.pt", "2.pt"]

    def test_fewer_than_that(self):
        """Where there are no more, none goes."""
        assert superfluous(unscored(2), KeepLast(3)) == []

    def test_best_stays_too(self):
        """The best file stays whatever else is asked for."""
        assert superfluous(files(0.5, 0.1, 0.4, 0.3), KeepLast(1)) == ["0.pt", "2.pt"]

    @pytest.mark.parametrize("keep", [KeepBest(1), KeepEvery(epochs=9)])
    def test_newest_stays_too(self, keep):
        """The newest file stays whatever else is asked for, also where no rule keeps any."""
        assert superfluous(unscored(3), keep) == ["0.pt", "1.pt"]


class TestAbandoned:
    """Files that lie behind the point at which their run was left for another one."""

    def after_going_back(self, *scores):
        """Return three files of a run that is left at the second, and those of the run that went on there."""
        first = files(0.9, 0.8, 0.1)
        second = files(None, None, *scores)[2:]
        return [
            *(_of_run("first", file, number) for number, file in enumerate(first)),
            *(_of_run("second", file, 3 + number) for number, file in enumerate(second)),
        ]

    def test_count_as_if_never_left(self):
        """The best of them stays, and takes no place from the best of the files on the way."""
        found = self.after_going_back(0.5, 0.7, 0.6)

        assert superfluous(found, KeepBest(1), {"first": (1, 20)}) == [
            "first 0.pt",
            "first 1.pt",
            "second 3.pt",
        ]
        assert superfluous(found, KeepBest(1)) == ["first 0.pt", "first 1.pt", "second 2.pt", "second 3.pt"]

    def test_go_when_there_is_a_better_one(self):
        """One that would go if its run had not been left goes."""
        found = self.after_going_back(0.05, 0.7)

        assert superfluous(found, KeepLast(1), {"first": (1, 20)}) == [
            "first 0.pt",
            "first 1.pt",
            "first 2.pt",
        ]


def _of_run(run_id, file, sequence):
    manifest = replace(file.manifest, run_id=run_id, sequence=sequence)
    return replace(file, path=f"{run_id} {file.path}", manifest=manifest)


class TestKeepBest:
    @pytest.mark.parametrize(("mode", "gone"), [("min", ["0.pt", "2.pt"]), ("max", ["1.pt"])])
    def test_best_stay(self, mode, gone):
        """The best by the files' own mode stay, beside the newest."""
        assert superfluous(files(0.9, 0.2, 0.5, 0.1, mode=mode), KeepBest(2)) == gone

    def test_older_of_equals(self):
        """Of equal scores the older file stays."""
        assert superfluous(files(0.5, 0.5, 0.5), KeepBest(1)) == ["1.pt"]

    @pytest.mark.parametrize("score", [None, float("nan"), float("inf"), float("-inf")])
    def test_not_finite(self, score):
        """A score that is no finite number is never among the best."""
        assert superfluous(files(score, 0.5, score), KeepBest(2)) == ["0.pt"]

    def test_other_metrics_files(self):
        """What was judged by another metric cannot be compared, and is not among the best."""
        mixed = [*files(0.1, monitor="loss"), *files(None, 0.5)[1:]]

        assert superfluous(mixed, KeepBest(2)) == ["0.pt"]


class TestKeepEvery:
    def test_epochs(self):
        """Each third epoch's file stays, and the newest."""
        assert superfluous(unscored(7), KeepEvery(epochs=3)) == ["0.pt", "1.pt", "3.pt", "4.pt"]

    def test_steps(self):
        """Each so many steps' file stays."""
        assert superfluous(unscored(4), KeepEvery(steps=20)) == ["0.pt", "2.pt"]

    @pytest.mark.parametrize("given", [{}, {"epochs": 1, "steps": 1}])
    def test_takes_one(self, given):
        """Epochs or steps, not both."""
        with pytest.raises(TypeError, match="either epochs or steps"):
            KeepEvery(**given)


class TestCombination:
    def test_a_file_stays_if_any_says_so(self):
        """Of several, each keeps its own."""
        keep = KeepLast(1) | KeepEvery(epochs=3) | KeepBest(1)

        assert superfluous(files(0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5), keep) == ["1.pt", "3.pt", "4.pt"]

    @pytest.mark.parametrize("scores", list(itertools.permutations([0.1, 0.2, 0.3, 0.4])))
    def test_removing_one_by_one_or_at_the_end_is_the_same(self, scores):
        """What stays does not depend on how often it was looked."""
        keep, there = KeepLast(2) | KeepBest(2), []
        for file in files(*scores):
            there.append(file)
            gone = superfluous(there, keep)
            there = [file for file in there if file.path not in gone]

        assert set(superfluous(files(*scores), keep)) == {file.path for file in files(*scores)} - {
            file.path for file in there
        }

    def test_of_no_files(self):
        """Nothing goes where there is nothing."""
        assert superfluous([], KeepLast(1) | KeepBest(1) | KeepEvery(steps=1)) == []


class TestNumbers:
    @pytest.mark.parametrize("make", [KeepLast, KeepBest, lambda n: KeepEvery(epochs=n)])
    @pytest.mark.parametrize("number", [0, -1, 1.0, True, "2", None])
    def test_are_positive_ints(self, make, number):
        """Anything else is refused."""
        with pytest.raises((ValueError, TypeError), match=r"takes (a positive int|either)"):
            make(number)

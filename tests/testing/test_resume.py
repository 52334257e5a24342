"""assert_resumes_exactly finds what a resumed run lacks, names it, and is silent where there is nothing."""

from __future__ import annotations

import importlib
import math
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss

from trainbus import Callback, Handler
from trainbus.errors import UnknownEventError
from trainbus.testing import assert_resumes_exactly
from trainbus.testing.differences import file_differences, value_differences
from trainbus.testing.kill_moments import telling_moments
from trainbus_callbacks import ModelCheckpoint

LATE = [("train_batch_end", 4)]  # of 2 epochs with 3 batches


class Training:
    """A small run; subclasses make one mistake each."""

    epochs = 2
    seed: int | None = 0

    def __call__(self, folder):
        if self.seed is not None:
            torch.manual_seed(self.seed)
        self.folder = folder
        self.loader = [(x, x.sum(1, keepdim=True)) for x in torch.randn(3, 4, 2)]
        self.model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(), torch.nn.Linear(3, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.val_loader = self.loader[:2]
        self.prepare()
        with Handler(self.model, self.optimizer, **self.options()) as handler:
            self.attach(handler)
            self.resume(handler)
            for _ in handler.epochs(self.epochs):
                for x, y in handler.batches(self.loader):
                    self.step(handler, x, y)
                for x, y in handler.val_batches(self.val_loader):
                    handler.log(loss=mse_loss(self.model(x), y).detach())
                self.after_epoch(handler)

    def prepare(self):
        """Make what the mistake needs."""

    def options(self):
        return {}

    def attach(self, handler):
        handler.add_callback(ModelCheckpoint(self.folder / "last.pt", save_freq=2))

    def resume(self, handler):
        handler.resume(self.folder)

    def step(self, handler, x, y):
        loss = mse_loss(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        handler.log(loss=loss)

    def after_epoch(self, handler):
        """Do nothing by default."""


def failure(training, *arguments, **options):
    options.setdefault("kill_at", LATE)
    with pytest.raises(AssertionError) as info:
        assert_resumes_exactly(training, *arguments, **options)
    return str(info.value)


class TestExact:
    def test_every_kind_of_moment(self, tmp_path):
        """A training that resumes as it should passes, killed in a batch, a validation, an epoch's end."""
        assert_resumes_exactly(Training(), tmp_path)

        (runs,) = tmp_path.iterdir()
        killed = {path.name for path in runs.iterdir() if path.is_dir()} - {"undisturbed"}
        assert killed == {
            "killed-at-train_batch_end-4",
            "killed-at-val_batch_end-2",
            "killed-at-epoch_end-1",
            "killed-at-checkpoint_saved-2",
        }

    def test_of_a_process_that_has_trained(self, tmp_path):
        """What this process did before, its threads and its saves, does not matter."""
        Training()(tmp_path)

        assert_resumes_exactly(Training(), kill_at=LATE)

    def test_threads(self):
        """A training has one thread of torch: those of a forked parent are gone, and would be waited for."""
        threads = torch.get_num_threads()

        class Counted(Training):
            def prepare(self):
                assert torch.get_num_threads() == 1

        try:
            torch.set_num_threads(2)
            assert_resumes_exactly(Counted(), kill_at=LATE)
        finally:
            torch.set_num_threads(threads)

    def test_by_hand(self, tmp_path):
        """A loop that emits by hand is killed and compared like any other."""

        def train(folder):
            model = torch.nn.Linear(1, 1)
            with Handler(model) as handler:
                handler.add_callback(ModelCheckpoint(folder / "{epoch}.pt"))
                handler.resume(folder)
                handler.emit("train_begin")
                for epoch in range(handler.epoch, 3):
                    torch.nn.init.constant_(model.weight, epoch)
                    handler.emit("epoch_end", epoch=epoch, logs={"loss": epoch, "note": "none"})

        assert_resumes_exactly(train)

    def test_path_in_a_state(self):
        """All runs happen in the same folder, so that a path in a state is no difference."""

        class Placed(Training):
            def attach(self, handler):
                handler.add_callback(
                    ModelCheckpoint(self.folder / "best.pt", monitor="val_loss", save_best_only=True)
                )

        assert_resumes_exactly(Placed(), kill_at=[("epoch_end", 1)])

    @pytest.mark.full
    def test_spawn(self, tmp_path, monkeypatch):
        """A fresh interpreter does as well as a forked process, for a function that it can import."""
        (tmp_path / "spawned.py").write_text(Path(__file__).read_text())
        monkeypatch.syspath_prepend(tmp_path)
        training = importlib.import_module("spawned").Training()

        assert_resumes_exactly(training, kill_at=LATE, start_method="spawn")


class TestNotExact:
    def test_an_object_that_is_not_saved(self):
        """The first values that differ are named, where the run was killed, and what is usually missing."""

        class WarmUp(Training):
            def prepare(self):
                self.steps = 0

            def step(self, handler, x, y):
                self.steps += 1
                self.optimizer.param_groups[0]["lr"] = 0.01 * self.steps
                super().step(handler, x, y)

        text = failure(WarmUp())

        assert "killed at train_batch_end number 4 (epoch 2, global step 4)" in text
        assert "continued from last.pt (global step 4)" in text
        assert "epoch 2: logs['loss'] is " in text
        assert "last.pt: state['module']['0.weight'] differs in 6 of 6 values, by at most 0." in text
        assert " more\n" in text
        assert "is in no checkpoint" in text and "extra={...}" in text
        assert "give assert_resumes_exactly a folder" in text

    def test_after_the_last_save(self):
        """What differs only at the very end is found too, although no checkpoint holds it."""

        class Late(Training):
            def prepare(self):
                self.steps = 0

            def step(self, handler, x, y):
                self.steps += 1
                super().step(handler, x, y)

            def after_epoch(self, handler):
                if handler.epoch == 1:
                    torch.nn.init.constant_(self.model[2].bias, self.steps)

        text = failure(Late())

        assert "\n  at train_end: state['module']['2.bias'] differs in 1 of 1 values, by at most 4\n" in text

    def test_a_generator_of_ones_own(self):
        """Random numbers of a generator that is not saved are found, although the global ones are."""

        class Noisy(Training):
            def prepare(self):
                self.noise = torch.Generator().manual_seed(5)

            def step(self, handler, x, y):
                super().step(handler, x + torch.rand(2, generator=self.noise), y)

        assert "torch.Generator" in failure(Noisy())

    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
    def test_a_scheduler_stepped_before_a_save(self):
        """Where the scheduler is ahead, the hint says how it came to be."""

        class Scheduled(Training):
            def options(self):
                self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1)
                return {"scheduler": self.scheduler}

            def after_epoch(self, handler):
                self.scheduler.step()
                handler.save(self.folder / "last.pt")

        text = failure(Scheduled(), kill_at=[("epoch_begin", 2)])

        assert "scheduler.step() in the loop body before a save is done again" in text

    def test_a_callback_without_state(self):
        """Where only a callback differs, the hint is about its state."""

        class Forgetful(Callback):
            seen = 0

            def on_train_batch_end(self):
                self.seen += 1

            def state_dict(self):
                return {"seen": self.seen}

            def load_state_dict(self, state):
                """Take nothing over."""

        class Counted(Training):
            def attach(self, handler):
                handler.add_callback(Forgetful())
                super().attach(handler)

        text = failure(Counted())

        assert "state['callbacks']['Forgetful']['seen'] is 2 instead of 6" in text
        assert "load_state_dict()" in text

    def test_lengths(self):
        """Where the continued run is longer, the hint is about totals."""

        class More(Training):
            @property
            def epochs(self):
                return 1 if not any(self.folder.iterdir()) else 3

        assert "the run's total" in failure(More(), kill_at=[("train_batch_end", 2)])

    def test_data_that_is_not_seeded(self):
        """What the script draws before its loop is found by continuing with other random numbers."""

        class Unseeded(Training):
            seed = None

        assert "Seed it in train_fn" in failure(Unseeded())

    def test_a_training_that_is_not_repeatable(self):
        """A training that differs from itself is told from one that does not resume."""

        class Random(Training):
            def prepare(self):
                self.optimizer.param_groups[0]["lr"] = int.from_bytes(os.urandom(4)) / 2**32

        assert "does not do the same twice even if nobody kills it" in failure(Random())

    def test_ignored(self):
        """Names that may differ are passed over."""

        class Timed(Training):
            def after_epoch(self, handler):
                handler.log(seconds=int.from_bytes(os.urandom(4)))

        assert "logs['seconds']" in failure(Timed())
        assert_resumes_exactly(Timed(), kill_at=LATE, ignore=["seconds"])

    def test_what_trainbus_warned_of(self):
        """What trainbus itself says of the resume stands in the message."""

        class Workers(Training):
            def prepare(self):
                self.loader = torch.utils.data.DataLoader(Augmented(), 4, num_workers=1)

        text = failure(Workers())

        assert "Said while it resumed: The train loader continues with the right batches, but random" in text
        assert "num_workers=0" in text

    def test_files(self, tmp_path):
        """A file that one of the runs left and the other did not is a difference."""

        class Named(Training):
            def after_epoch(self, handler):
                handler.save(self.folder / ("first.pt" if not handler.resumed else "later.pt"))

        text = failure(Named(), tmp_path)

        assert "later.pt should not be there" in text
        (runs,) = tmp_path.iterdir()
        assert f"Files: {runs}/undisturbed, {runs}/killed-at-train_batch_end-4" in text


class Augmented(torch.utils.data.Dataset):
    """Samples to which each worker adds noise."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        x = torch.tensor([index / 12, 1.0]) + torch.rand(2)
        return x, x.sum(0, keepdim=True)


class TestNothingToCompare:
    @pytest.mark.filterwarnings("ignore:This run did not resume:RuntimeWarning")
    def test_not_resumed(self):
        """A script that begins anew is told what it lacks."""

        class Anew(Training):
            def resume(self, handler):
                """Forget to."""

        text = failure(Anew())

        assert "began anew after it was killed at train_batch_end number 4" in text
        assert "its folder held 'last.pt'. Call handler.resume(folder)" in text

    def test_nothing_saved(self):
        """A run without checkpoints proves nothing."""

        class Unsaved(Training):
            def attach(self, handler):
                """Forget to."""

        assert "saved nothing, so there is nothing to resume from" in failure(Unsaved(), kill_at=None)

    def test_nothing_saved_before(self):
        """Nor does one that is killed before its first."""
        text = failure(Training(), kill_at=[("train_batch_begin", 1)])

        assert "Nothing was saved before train_batch_begin number 1 (epoch 1, global step 0)" in text

    def test_no_events(self):
        """A function that does not train is told how to."""
        assert "emitted no event" in failure(lambda folder: None, kill_at=None)

    def test_failing(self):
        """What train_fn raises is in the message."""

        class Broken(Training):
            def prepare(self):
                raise RuntimeError("out of data")

        text = failure(Broken())

        assert "failed before anything was killed" in text and "RuntimeError: out of data" in text

    def test_failing_when_resumed(self):
        """So is what it raises when it is started again."""

        class Fragile(Training):
            def resume(self, handler):
                if super().resume(handler) or handler.resumed:
                    raise RuntimeError("too many files")

        text = failure(Fragile())

        assert "failed when it was started again after it was killed at train_batch_end number 4" in text
        assert "RuntimeError: too many files" in text

    def test_dying(self):
        """A process that ends without an exception is told from one that was killed here."""
        assert "ended with exit code 3" in failure(lambda folder: os._exit(3))

    def test_hanging(self):
        """A process that does not end is ended."""
        with pytest.raises(TimeoutError, match=r"did not end within timeout=0.2 seconds and was ended"):
            assert_resumes_exactly(lambda folder: threading.Event().wait(), timeout=0.2)

    def test_misspelt_moment(self):
        """An event that there is not is refused before anything runs."""
        with pytest.raises(UnknownEventError, match=r"'train_batch_ned'. Did you mean 'train_batch_end'"):
            assert_resumes_exactly(None, kill_at=[("train_batch_ned", 1)])

    @pytest.mark.parametrize("number", [0, 7])
    def test_moment_that_does_not_come(self, number):
        """So is a number of it that there is not, once that is known."""
        with pytest.raises(ValueError, match=r"the undisturbed run had 6 events of that name"):
            assert_resumes_exactly(Training(), kill_at=[("train_batch_end", number)])

    def test_local_function_spawned(self):
        """What cannot be taken to a new interpreter is refused with the remedy."""
        with pytest.raises(TypeError, match=r"Cannot start .*top level of a module"):
            assert_resumes_exactly(lambda folder: None, start_method="spawn")


class TestTellingMoments:
    def test_in_the_middle(self):
        """Of each kind one is taken after the first save, and no last batch of an epoch."""
        batch = ["train_batch_begin", "train_batch_end"]
        epoch = ["epoch_begin", *batch * 3, "epoch_end"]
        names = ["train_begin", *epoch, "checkpoint_saved", *epoch, *epoch, "train_end"]

        assert telling_moments(names) == [("checkpoint_saved", 1), ("train_batch_end", 5), ("epoch_end", 2)]


class TestDifferences:
    @pytest.mark.parametrize(
        ("expected", "actual", "said"),
        [
            (
                torch.tensor([1.0, 2.0]),
                torch.tensor([1.0, 2.5]),
                "x differs in 1 of 2 values, by at most 0.5",
            ),
            (torch.tensor(0.0), torch.tensor(-0.0), "x differs in 1 of 1 values, by at most 0"),
            (torch.tensor([1j]), torch.tensor([2j]), "x differs in 1 of 1 values, by at most 1"),
            (torch.tensor([True]), torch.tensor([False]), "x differs in 1 of 1 values, by at most 1"),
            (
                torch.ones(1),
                torch.ones(1, 1),
                "x is torch.float32 of shape (1, 1) instead of torch.float32 of shape (1,)",
            ),
            ({"a": 1}, {}, "x['a'] is missing"),
            ({}, {"a": 1}, "x['a'] should not be there"),
            ([None], [None, None], "x has 2 items instead of 1"),
            ((torch.ones(2),), (torch.ones(2), torch.ones(2)), "x has 2 items instead of 1"),
            ((1.0,), (torch.ones(2),), "x[0] is of type Tensor instead of 1.0"),
            ((1, 2), (1, 3), "x is (1, 3) instead of (1, 2)"),
            ([{"a": "b"}], [{"a": "c"}], "x[0]['a'] is 'c' instead of 'b'"),
            (1, 1.0, "x is 1.0 instead of 1"),
            (torch.ones(1), None, "x is None instead of of type Tensor"),
        ],
    )
    def test_values(self, expected, actual, said):
        """Each difference is told with its place and how large it is."""
        assert list(value_differences(expected, actual, "x", ())) == [said]

    @pytest.mark.parametrize(
        "value",
        [
            math.nan,
            (float("nan"), 4.0),
            [float("nan")],
            torch.tensor([math.nan]),
            torch.ones(2).to_sparse(),
            torch.ones(0),
            [math.inf],
            {"a": [None]},
        ],
    )
    def test_equal(self, value):
        """What is the same bit for bit is no difference, NaN included."""
        assert list(value_differences(value, pickle.loads(pickle.dumps(value)), "x", ())) == []

    def test_ignored(self):
        """Names to be ignored are, at any depth."""
        assert list(value_differences({"a": {"t": 1}, "t": 1}, {"a": {"t": 2}}, "x", ["t"])) == []

    def test_files_in_folders(self, tmp_path):
        """Files of folders in a folder are compared too, and what they say of themselves."""
        for name, loss in (("one", 0.5), ("other", 0.25)):
            with Handler(torch.nn.Linear(1, 1, bias=False)) as handler:
                torch.nn.init.ones_(handler.module.weight)
                handler.save_async(tmp_path / name / "deep" / "a.pt", logs={"loss": loss})

        assert list(file_differences(str(tmp_path / "one"), str(tmp_path / "other"), ["rng"])) == [
            "deep/a.pt: manifest.logs['loss'] is 0.25 instead of 0.5"
        ]

"""Handler: what it saves, loads, resumes, and how it is left."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import errno
import gc
import logging
import os
import re
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import trainbus
from trainbus import Callback, CheckpointSkipped, CheckpointWriteError, Handler, UnsavableStateError
from trainbus.checkpoint import disk
from trainbus.checkpoint.commit import commit
from trainbus.errors import HandlerClosedError, StateMismatchError
from trainbus.testing import EventRecorder, FaultyDisk
from trainbus_callbacks import EMA, ModelCheckpoint

KEYS = ["module", "optimizer", "scheduler", "scaler", "extra", "callbacks", "progress", "rng", "data"]


class Counter(Callback):
    """A callback with a state."""

    def __init__(self):
        self.count = 0

    def on_train_batch_end(self):
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


def make(**options):
    """Return a handler of a small model with AdamW."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    return Handler(model, torch.optim.AdamW(model.parameters()), **options)


def train(handler, epochs=1, batches=3):
    """Train a little, with real optimizer steps."""
    for _ in handler.epochs(epochs):
        for _ in handler.batches(range(batches)):
            handler.module(torch.randn(4, 2)).sum().backward()
            handler.optimizer.step()
            handler.optimizer.zero_grad()
            handler.log(loss=0.5)


@pytest.fixture
def failing_disk(monkeypatch):
    """Lets the file system fail: call it with an errno, and with None to heal it."""
    real = disk.Disk.fsync
    state = {"errno": None}

    def fsync(self, *args):
        if state["errno"] is not None:
            raise OSError(state["errno"], os.strerror(state["errno"]))
        return real(self, *args)

    monkeypatch.setattr(disk.Disk, "fsync", fsync)
    return lambda errno: state.update(errno=errno)


@pytest.fixture
def held_disk(monkeypatch):
    """A disk that does not finish a write before `release` is set."""
    release, real = threading.Event(), disk.Disk.fsync

    def fsync(self, *args):
        assert release.wait(30)
        return real(self, *args)

    monkeypatch.setattr(disk.Disk, "fsync", fsync)
    yield release
    release.set()


class TestSave:
    def test_has_the_whole_state(self, tmp_path):
        """A checkpoint has all nine parts and opens with plain torch.load."""
        with make(extra={"steps": Counter()}) as handler:
            handler.add_callback(Counter())
            train(handler)
            manifest = handler.save(tmp_path / "a.pt")

        state = torch.load(tmp_path / "a.pt", weights_only=True)
        assert list(state) == [*KEYS, "trainbus.numpy"] or list(state) == KEYS
        assert state["extra"] == {"steps": {"count": 0}}
        assert state["callbacks"] == {"Counter": {"count": 3}}
        assert manifest.contents == "state" and manifest.global_step == 3

    def test_weights_only_is_the_plain_state_dict(self, tmp_path):
        """A weights file is what model.load_state_dict takes."""
        with make() as handler:
            handler.save(tmp_path / "w.pt", weights_only=True)
            other = make()
            other.module.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))

    def test_several_modules(self, tmp_path):
        """A GAN: modules and optimizers by name."""
        g, d = nn.Linear(2, 2), nn.Linear(2, 1)
        optimizers = {"G": torch.optim.SGD(g.parameters(), 0.1), "D": torch.optim.Adam(d.parameters())}
        with Handler({"G": g, "D": d}, optimizers) as handler:
            handler.save(tmp_path / "gan.pt")
            weight = g.weight.clone()
            nn.init.zeros_(g.weight)
            handler.load(tmp_path / "gan.pt")

        assert torch.equal(g.weight, weight)

    def test_compiled_and_wrapped_modules_are_seen_through(self, tmp_path):
        """Names carry no prefix of a wrapper; model is what was given."""
        wrapped = nn.DataParallel(nn.Linear(1, 1))
        with Handler(wrapped) as handler:
            handler.save(tmp_path / "a.pt", weights_only=True)

        assert handler.model is wrapped and handler.module is wrapped.module
        assert set(torch.load(tmp_path / "a.pt", weights_only=True)) == {"weight", "bias"}
        compiled = torch.compile(nn.Linear(1, 1))
        assert Handler(compiled).module is compiled._orig_mod

    def test_async_copies_at_once(self, tmp_path, held_disk):
        """When save_async returns, the state may change in any way."""
        with make() as handler:
            before = copy.deepcopy(handler.module.state_dict())
            pending = handler.save_async(tmp_path / "a.pt")
            for parameter in handler.module.parameters():
                nn.init.constant_(parameter, 7.0)
            assert not pending.done() and handler.saves_in_flight == 1
            held_disk.set()
            pending.result(30)

        saved = trainbus.load(tmp_path / "a.pt")["module"]
        assert all(torch.equal(saved[name], before[name]) for name in before)

    def test_manifest_tells_of_the_run(self, tmp_path):
        """The manifest carries config, metrics, counters and who asked."""
        with make(config={"lr": 0.1}) as handler:
            train(handler, epochs=2)
            handler.save_async(
                tmp_path / "a.pt",
                stream="me",
                logs={"loss": 0.5, "name": "x"},
                monitor="loss",
                mode="min",
                score=0.5,
            )

        manifest = trainbus.read_manifest(tmp_path / "a.pt")
        assert (manifest.config, manifest.logs, manifest.stream) == ({"lr": 0.1}, {"loss": 0.5}, "me")
        assert (manifest.monitor, manifest.mode, manifest.score) == ("loss", "min", 0.5)
        assert (manifest.global_step, manifest.run_id) == (6, handler.run_id)

    def test_sequence_goes_on_in_a_folder(self, tmp_path):
        """A later run's files have greater sequence numbers, whatever their steps."""
        with make() as first:
            train(first)
            first.save(tmp_path / "a.pt")
            first.save(tmp_path / "b.pt")
        with make() as second:
            second.save(tmp_path / "c.pt")

        names = [Path(file.path).name for file in trainbus.CheckpointFolder(tmp_path)]
        assert names == ["a.pt", "b.pt", "c.pt"]

    def test_in_the_body_after_the_step_counts_the_batch(self, tmp_path):
        """The counters in the file agree with the weights in it."""
        with make() as handler:
            for _ in handler.epochs(1):
                for _ in handler.batches(range(2)):
                    handler.module(torch.randn(4, 2)).sum().backward()
                    handler.optimizer.step()
                    manifest = handler.save(tmp_path / "a.pt")
                    break

        progress = trainbus.load(tmp_path / "a.pt")["progress"]
        assert (manifest.global_step, progress["global_step"], progress["batches"]) == (1, 1, 1)

    def test_relative_path_survives_chdir(self, tmp_path, monkeypatch, held_disk):
        """The file goes where it was asked for, also if the script changes its folder meanwhile."""
        (tmp_path / "there").mkdir()
        monkeypatch.chdir(tmp_path)
        with make() as handler:
            handler.save_async("a.pt")
            monkeypatch.chdir("there")
            held_disk.set()

        assert (tmp_path / "a.pt").exists()

    def test_other_ranks_write_nothing(self, tmp_path, monkeypatch):
        """On ranks other than 0 a save is finished at once, without a path."""
        monkeypatch.setenv("RANK", "1")
        with make() as handler:
            pending = handler.save_async(tmp_path / "a.pt")

        assert (pending.path, pending.done(), pending.result()) == (None, True, None)
        assert list(tmp_path.iterdir()) == []

    def test_closed(self, tmp_path):
        """A closed handler says so."""
        handler = make()
        handler.close()
        handler.close()
        with pytest.raises(HandlerClosedError, match=r"Cannot save .*a.pt.*closed.*with handler"):
            handler.save(tmp_path / "a.pt")

    @pytest.mark.parametrize(
        ("options", "place"),
        [
            ({"optimizer": [1]}, "optimizer=[1]"),
            ({"extra": {"n": 3}}, "extra['n']=3"),
            ({"scaler": 1}, "scaler=1"),
        ],
    )
    def test_parts_must_have_a_state(self, options, place):
        """A part without a state is refused when the handler is made, by its name."""
        with pytest.raises(TypeError, match=re.escape(f"Cannot save {place}: it has no state_dict()")):
            Handler(nn.Linear(1, 1), **options)

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            (lambda m, o, s: Handler(o, m), "module=SGD(...): it is an optimizer"),
            (lambda m, o, s: Handler(m, m), "optimizer=Linear(...): it is a module"),
            (lambda m, o, s: Handler(m, s), "optimizer=StepLR(...): it is a scheduler"),
            (lambda m, o, s: Handler(m, {"o": s}), "optimizer['o']=StepLR(...): it is a scheduler"),
            (
                lambda m, o, s: Handler(m, torch.amp.GradScaler("cpu")),
                "optimizer=GradScaler(...): it is a sc",
            ),
            (lambda m, o, s: Handler(m, trainbus.Callback()), "optimizer=Callback(...): it has no step()"),
            (lambda m, o, s: Handler(m, o, scheduler=o), "scheduler=SGD(...): it is an optimizer"),
            (lambda m, o, s: Handler(m, o, scaler=s), "scaler=StepLR(...): it is a scheduler"),
            (lambda m, o, s: Handler(m, extra=[s]), "extra=[<torch.optim.lr_scheduler.StepLR object at "),
            (
                lambda m, o, s: Handler(m, extra=m),
                "extra=Linear(in_features=1, out_features=1, bias=True): it",
            ),
        ],
    )
    def test_parts_must_be_in_their_places(self, wrong, told):
        """What is given in the place of something else is refused when the handler is made, by its class."""
        module = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(module.parameters())
        with pytest.raises(TypeError, match=re.escape(f"Cannot take {told}")):
            wrong(module, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1))

    def test_parts_of_other_classes(self):
        """What trains need not be of torch's classes, and extras may be anything that has a state."""

        class Learned(nn.Linear):
            def step(self):
                pass

        module, own = nn.Linear(1, 1), Learned(1, 1)
        optimizer = torch.optim.SGD(module.parameters())
        with Handler(module, own, scheduler=own, extra={"o": optimizer, "m": own}) as handler:
            assert handler.optimizer is own

    def test_replaced_optimizer_is_seen(self, tmp_path):
        """The steps of an optimizer that was put in the place of another count."""
        with make() as handler:
            train(handler)
            handler.optimizer = torch.optim.SGD(handler.module.parameters(), 0.1)
            for _ in handler.epochs(2):
                for _ in handler.batches(range(2)):
                    handler.module(torch.randn(4, 2)).sum().backward()
                    handler.optimizer.step()
                    assert not handler.accumulating

    @pytest.mark.parametrize(
        "options", [{"max_pending": 0}, {"snapshot": "later"}, {"on_write_error": "?"}, {"extra": {"a": 1}}]
    )
    def test_refused_arguments_leave_nothing_behind(self, options):
        """A handler that was not made is neither on its bus nor on its optimizer."""
        bus, optimizer = trainbus.EventBus(), torch.optim.SGD(nn.Linear(1, 1).parameters())
        with pytest.raises((ValueError, TypeError)):
            Handler(nn.Linear(1, 1), optimizer, bus=bus, **options)
        assert bus.handler is None and not optimizer._optimizer_step_pre_hooks
        bus.emit("train_begin")

        with make(bus=bus) as handler:
            assert bus.handler is handler

    def test_config_must_be_json(self):
        """A config that cannot go into the manifest is refused when the handler is made."""
        with pytest.raises(TypeError, match=r"Cannot write config.*into a manifest.*It takes"):
            make(config={"path": Path("x")})

    def test_stats_tell_the_cost(self, tmp_path, caplog):
        """The cost of saving is summed up at the end of training."""
        caplog.set_level(logging.INFO, "trainbus")
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "a.pt", save_freq=1))
            train(handler)
            stats = handler.checkpoint_stats()

        assert (stats.saves, stats.failed) == (3, 0)
        assert stats.bytes >= 3 * (tmp_path / "a.pt").stat().st_size * 0.99
        assert 0 < stats.seconds_lost and 0 < stats.seconds_to_durable
        assert "3 checkpoints" in caplog.text and "saved a.pt (0.0 MB" in caplog.text


class TestCheck:
    def test_stops_the_run_in_its_first_second(self):
        """What could be saved and not loaded again is named before the first batch."""

        class Stateful:
            def state_dict(self):
                return {"when": Path("/x")}

            def load_state_dict(self, state):
                pass

        with pytest.raises(UnsavableStateError, match=r"state\['extra'\]\['clock'\]\['when'\].*str"):
            with make(extra={"clock": Stateful()}) as handler:
                for _ in handler.epochs(1):
                    pytest.fail("the run must not begin")

    def test_what_goes_bad_later_follows_the_error_policy(self, tmp_path):
        """A value that becomes unsavable fails that save, at the next event."""

        class Turns:
            bad = False

            def state_dict(self):
                return {"x": Path("/x") if self.bad else 1}

            def load_state_dict(self, state):
                pass

        extra = Turns()
        with pytest.raises(
            CheckpointWriteError, match=r"(?s)UnsavableStateError.*state\['extra'\]\['t'\]\['x'\]"
        ):
            with make(extra={"t": extra}) as handler:
                for _ in handler.epochs(1):
                    extra.bad = True
                    handler.save_async(tmp_path / "a.pt")

    def test_numpy_comes_back(self, tmp_path):
        """NumPy values in a state come back as NumPy."""

        class Stateful:
            def __init__(self):
                self.state = {"a": np.arange(3), "s": np.float64(0.5)}

            def state_dict(self):
                return self.state

            def load_state_dict(self, state):
                self.state = state

        thing = Stateful()
        with make(extra={"n": thing}) as handler:
            handler.save(tmp_path / "a.pt")
            thing.state = {}
            handler.load(tmp_path / "a.pt")

        assert isinstance(thing.state["s"], np.float64)
        assert thing.state["a"].tolist() == [0, 1, 2] and thing.state["a"].dtype == np.arange(3).dtype


class TestLoad:
    def test_round_trip(self, tmp_path):
        """Parameters, buffers, optimizer, callbacks and counters come back."""
        with make() as handler:
            handler.add_callback(Counter())
            train(handler, epochs=2)
            handler.save(tmp_path / "a.pt")
        with make() as other:
            counter = other.add_callback(Counter())
            other.load(tmp_path / "a.pt")

        assert (other.epoch, other.global_step, other.resumed, counter.count) == (2, 6, True, 6)
        assert (other.lineage, other.left_at) == ((handler.run_id,), {handler.run_id: (2, 6)})
        for mine, theirs in zip(
            other.module.state_dict().values(), handler.module.state_dict().values(), strict=True
        ):
            assert torch.equal(mine, theirs)
        mine, theirs = other.optimizer.state_dict(), handler.optimizer.state_dict()
        assert mine["state"][0]["step"] == theirs["state"][0]["step"] == 6

    def test_warm_start(self, tmp_path):
        """only=("module",) takes the weights and nothing else."""
        with make() as handler:
            train(handler)
            handler.save(tmp_path / "a.pt")
        with make() as other:
            other.load(tmp_path / "a.pt", only=("module",))

        assert torch.equal(other.module[0].weight, handler.module[0].weight)
        assert (other.global_step, other.resumed, other.lineage) == (0, False, ())
        assert other.optimizer.state_dict()["state"] == {}

    def test_plain_state_dict(self, tmp_path):
        """A state dict that anything saved is a warm start."""
        source = make()
        torch.save(source.module.state_dict(), tmp_path / "plain.pt")
        nn.init.zeros_(source.module[0].weight)
        with make() as handler:
            nn.init.ones_(handler.module[0].weight)
            assert handler.load(tmp_path / "plain.pt") is None

        assert not torch.equal(handler.module[0].weight, torch.ones(3, 2))
        assert not handler.resumed

    def test_finishes_pending_saves_of_the_file(self, tmp_path, held_disk):
        """Loading a file that is still being written waits for it."""
        with make() as handler:
            handler.save_async(tmp_path / "a.pt")
            threading.Timer(0.2, held_disk.set).start()
            assert handler.load(tmp_path / "a.pt").contents == "state"

    def test_weights_have_no_optimizer(self, tmp_path):
        """What a file of weights has not is asked for in vain, and that is said."""
        with make() as handler:
            handler.save(tmp_path / "w.pt", weights_only=True)
            with pytest.raises(StateMismatchError, match=r"Cannot load optimizer from .*w.pt.*weights only"):
                handler.load(tmp_path / "w.pt", only=("module", "optimizer"))

    def test_names_the_part_that_does_not_fit(self, tmp_path):
        """An object that refuses its state is named."""
        with Handler({"A": nn.Linear(1, 1), "B": nn.Linear(1, 1)}) as handler:
            handler.save(tmp_path / "a.pt")
        with Handler({"A": nn.Linear(1, 1), "B": nn.Linear(1, 2)}) as other:
            with pytest.raises(
                StateMismatchError, match=r"(?s)Cannot load module\['B'\] into Linear: .*size mismatch"
            ):
                other.load(tmp_path / "a.pt")

    def test_ends_a_stop(self, tmp_path, caplog):
        """A run that was stopped goes on from a loaded file; without the progress it stays stopped."""
        caplog.set_level("INFO", "trainbus")
        with make() as handler:
            handler.save(tmp_path / "a.pt")
            train(handler)
            handler.stop("the loss is nan")
            handler.load(tmp_path / "a.pt", only=("module", "optimizer"))
            assert handler.stopped and list(handler.epochs(1)) == []

            handler.load(tmp_path / "a.pt")
            assert (handler.stopped, handler.stop_reason) == (False, None)
            assert f"The stop is over (the loss is nan): {tmp_path / 'a.pt'} was loaded." in caplog.messages
            assert list(handler.epochs(1)) == [0]

    def test_keeps_a_stop_from_before_the_training(self, tmp_path):
        """A stop that comes before anything was trained, as by a signal at the start, holds for the run."""
        with make() as handler:
            handler.save(tmp_path / "a.pt")
            handler.stop()
            handler.resume(tmp_path)
            assert handler.stopped

    def test_callback_added_afterwards_takes_its_state(self, tmp_path):
        """The order of resume and add_callback does not matter."""
        with make() as handler:
            handler.add_callback(Counter()).count = 7
            handler.save(tmp_path / "a.pt")
        with make() as other:
            other.resume(tmp_path)
            assert other.add_callback(Counter()).count == 7

    def test_waits_for_another_handlers_save(self, tmp_path, held_disk):
        """A notebook cell run again resumes from what the first run is still writing."""
        first, second = make(), make()
        train(first)
        first.save_async(tmp_path / "a.pt")
        threading.Timer(0.2, held_disk.set).start()
        second.resume(tmp_path)

        assert second.global_step == 3
        first.close()
        second.close()

    def test_refuses_other_parts(self, tmp_path):
        """A file without what the run has is refused before anything is changed."""
        model = nn.Linear(1, 1)
        with Handler(model) as handler:
            handler.save(tmp_path / "a.pt")
        other = Handler(nn.Linear(1, 1), torch.optim.SGD(model.parameters(), 0.1))
        weight = other.module.weight.clone()
        with pytest.raises(
            StateMismatchError, match=r"Cannot load optimizer: the run has it and the file has not.*only="
        ):
            other.load(tmp_path / "a.pt")
        assert torch.equal(other.module.weight, weight)
        other.load(tmp_path / "a.pt", strict=False)
        assert torch.equal(other.module.weight, model.weight)

    def test_names_what_is_left_out(self, tmp_path, caplog):
        """Names that a module or its file alone has are told with strict=False, and the rest is loaded."""
        with Handler(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, bias=False))) as handler:
            handler.save(tmp_path / "a.pt", weights_only=True)
        other = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.PReLU())
        with Handler(other) as run:
            run.load(tmp_path / "a.pt", strict=False)

        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
            "Not loaded into module: 1.bias, 2.weight, which the file has not."
        ]
        caplog.clear()
        torch.save(other.state_dict(), tmp_path / "b.pt")
        with Handler(nn.Sequential(nn.Linear(1, 1))) as run:
            run.load(tmp_path / "b.pt", strict=False)
        assert "into module: 1.weight, 1.bias, 2.weight, which the run has not." in caplog.text
        assert torch.equal(other[0].weight, handler.module[0].weight)

    def test_refuses_other_names(self, tmp_path):
        """Names of extra objects must agree; the nearest is named."""
        with make(extra={"counter": Counter()}) as handler:
            handler.save(tmp_path / "a.pt")
        with make(extra={"countr": Counter()}) as other:
            with pytest.raises(StateMismatchError, match=r"extra\['counter'\].*Did you mean 'countr'"):
                other.load(tmp_path / "a.pt")

    @pytest.mark.parametrize("only", ["module", ("modul",)])
    def test_refuses_unknown_parts(self, tmp_path, only):
        """only is a tuple of known names."""
        with (
            make() as handler,
            pytest.raises(ValueError, match="only must be a tuple of names out of module, optimizer"),
        ):
            handler.load(tmp_path / "a.pt", only=only)

    def test_restores_random_numbers(self, tmp_path):
        """After a load the random numbers go on as they did after the save."""
        with make() as handler:
            handler.save(tmp_path / "a.pt")
            expected = torch.rand(3), np.random.rand()
            handler.load(tmp_path / "a.pt")
            assert torch.equal(torch.rand(3), expected[0]) and np.random.rand() == expected[1]


class TestResume:
    def test_first_run(self, tmp_path):
        """With nothing to resume the run begins at the start."""
        with make() as handler:
            assert handler.resume(tmp_path / "missing") is None
            assert not handler.resumed

    def test_takes_the_newest(self, tmp_path):
        """The newest full state is taken, whatever it is called; weights files are not."""
        with make() as handler:
            train(handler)
            handler.save(tmp_path / "z.pt")
            train(handler, epochs=2)
            handler.save(tmp_path / "a.pt")
            handler.save(tmp_path / "weights.pt", weights_only=True)
        with make() as other:
            assert other.resume(tmp_path).epoch == handler.epoch
            assert other.global_step == 6

    def test_passes_over_damaged_files(self, tmp_path, caplog):
        """A damaged newest file is named and the one before it is taken."""
        with make() as handler:
            handler.save(tmp_path / "a.pt")
            train(handler)
            handler.save(tmp_path / "b.pt")
        damaged = bytearray((tmp_path / "b.pt").read_bytes())
        damaged[len(damaged) // 2] ^= 1
        (tmp_path / "b.pt").write_bytes(damaged)
        with make() as other:
            other.resume(tmp_path)

        assert other.global_step == 0 and other.resumed
        assert "b.pt" in caplog.text and "damaged" in caplog.text

    def test_passes_over_interrupted_files(self, tmp_path):
        """A file that was taken while leaving by an exception is not gone on from by itself."""
        with make() as handler:
            handler.save(tmp_path / "a.pt")
        state, manifest = trainbus.load(tmp_path / "a.pt"), trainbus.read_manifest(tmp_path / "a.pt")
        newer = dataclasses.replace(manifest, interrupted=True, sequence=99)
        commit(tmp_path / "b.pt", newer, lambda stream: torch.save(state, stream))
        with make() as other:
            assert other.resume(tmp_path).sequence == manifest.sequence

    @pytest.mark.parametrize("event", ["epoch_end", "train_end"])
    def test_the_next_epoch_begins_without_metrics(self, tmp_path, event):
        """A file taken at the end of an epoch holds no metrics of it: they are not the next one's."""
        with make() as handler:
            handler.on(event, lambda: handler.save(tmp_path / "a.pt"))
            train(handler)

        progress = trainbus.load(tmp_path / "a.pt")["progress"]
        assert (progress["epoch"], progress["batches"], progress["metrics"]["means"]) == (1, 0, {})

    def test_validation_by_hand_is_done_again(self, tmp_path):
        """Also in a loop that emits by hand, a save in a validation holds the random state before it."""
        with make() as handler:
            handler.emit("val_begin")
            before = torch.get_rng_state()
            torch.rand(3)
            handler.save(tmp_path / "a.pt")
            handler.emit("val_end")

        assert torch.equal(trainbus.load(tmp_path / "a.pt")["rng"]["torch"], before)

    def test_finished_run_does_nothing(self, tmp_path):
        """A finished run that is started again yields no epoch."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "a.pt"))
            train(handler, epochs=2)
        with make() as other:
            other.resume(tmp_path)
            assert list(other.epochs(2)) == []

    def test_events_of_a_run_are_emitted_once(self, tmp_path):
        """The trace of a resumed run is the tail of the whole run's, after its own train_begin."""
        whole = self.trace(tmp_path / "whole", ["train_batch_end"])
        for step in range(1, 7):
            folder = tmp_path / str(step)
            self.trace(folder, ["train_batch_end"], leave_at=("train_batch_begin", step + 1))
            self.assert_tail(self.trace(folder, ["train_batch_end"]), whole)

    @pytest.mark.parametrize(
        ("event", "number"), [("epoch_begin", 2), ("train_batch_begin", 2), ("val_end", 2), ("epoch_end", 1)]
    )
    def test_also_when_saved_elsewhere(self, tmp_path, event, number):
        """The same for a checkpoint that was taken at another event, left at that event."""
        whole = self.trace(tmp_path / "whole", [event])
        self.trace(tmp_path / "part", [event], leave_at=(event, number))
        self.assert_tail(self.trace(tmp_path / "part", [event]), whole)

    def test_validation_is_done_again_as_a_whole(self, tmp_path):
        """A checkpoint taken in a validation stands before it."""
        whole = self.trace(tmp_path / "whole", ["val_batch_end"])
        self.trace(tmp_path / "part", ["val_batch_end"], leave_at=("val_batch_end", 3))
        trace = self.trace(tmp_path / "part", ["val_batch_end"])

        assert trace[1] == "val_begin"
        self.assert_tail(trace, whole)

    def trace(self, folder, save_at, leave_at=None):
        """Return the names of the events of a run that saves at some and is left at another."""
        with make() as handler, contextlib.suppress(InterruptedError):
            for event in save_at:
                handler.on(event, lambda: handler.save_async(folder / "a.pt"), priority=100)
            if leave_at is not None:
                name, number = leave_at
                handler.on(name, self.interrupt, after=number - 1, priority=200)
            handler.resume(folder)
            recorder = EventRecorder(handler.bus)
            for _ in handler.epochs(2):
                for _ in handler.batches(range(3)):
                    pass
                for _ in handler.val_batches(range(2)):
                    pass
        return [name for name in recorder.names if not name.startswith("checkpoint")]

    @staticmethod
    def interrupt():
        raise InterruptedError

    @staticmethod
    def assert_tail(trace, whole):
        assert trace[0] == "train_begin" and len(trace) > 2
        assert trace[1:] == whole[-len(trace) + 1 :]


class TestAccumulation:
    """Gradients are not in a checkpoint, so saves wait for an optimizer step."""

    def steps(self, handler, when):
        for _ in handler.epochs(1):
            for batch in handler.batches(range(4)):
                handler.module(torch.randn(4, 2)).sum().backward()
                if batch in when:
                    handler.optimizer.step()
                    handler.optimizer.zero_grad()
                yield batch

    def capture_step(self, handler, monkeypatch):
        """Step as in the capture of a CUDA graph."""
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_available", lambda: True)
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            # Or a torch built for CUDA asks a device that is not there.
            for check in ("_cuda_graph_capture_health_check", "_accelerator_graph_capture_health_check"):
                capture.setattr(handler.optimizer, check, lambda: None, raising=False)
            handler.optimizer.step()

    def test_save_waits_for_the_next_step(self, tmp_path):
        """A save asked for in a batch without a step is taken in the next one with a step."""
        with make() as handler:
            for batch in self.steps(handler, when={1, 3}):
                if batch == 2:
                    pending = handler.save_async(tmp_path / "a.pt")
                    assert handler.accumulating and not pending.done() and handler.saves_in_flight == 1
            assert pending.result(30).global_step == 4

    def test_also_before_the_first_step(self, tmp_path):
        """Gradients that wait for the run's first step are waited for as well."""
        with make() as handler:
            for batch in self.steps(handler, when={2}):
                if batch == 0:
                    pending = handler.save_async(tmp_path / "a.pt")
            assert pending.result(30).global_step == 3

    def test_stop_waits_for_the_step(self):
        """stop() ends the loop after the step that uses the gradients, so that none are lost."""
        with make() as handler:
            for batch in self.steps(handler, when={1, 3}):
                if batch == 0:
                    handler.stop()

        assert handler.global_step == 2

    def test_stop_without_gradients(self):
        """stop() ends the loop at once where no step came and no gradients are left."""
        with make() as handler:
            for _ in handler.epochs(1):
                for batch in handler.batches(range(20)):
                    if batch < 2:
                        handler.module(torch.randn(4, 2)).sum().backward()
                        handler.optimizer.step()
                    if batch == 4:
                        handler.stop()
                    handler.optimizer.zero_grad()

        assert handler.global_step == 5

    def test_save_before_the_step(self, tmp_path):
        """A save asked for in the body waits for that batch's step, also before there are gradients."""
        with make() as handler:
            for _ in handler.epochs(1):
                for batch in handler.batches(range(3)):
                    handler.optimizer.zero_grad()
                    if batch == 1:
                        pending = handler.save_async(tmp_path / "a.pt")
                        assert handler.saves_in_flight == 1 and not pending.done()
                    handler.module(torch.randn(4, 2)).sum().backward()
                    handler.optimizer.step()
            assert pending.result(30).global_step == 2

    @pytest.mark.parametrize("resumed", [False, True])
    def test_steps_that_stay_away(self, tmp_path, resumed):
        """Where steps do not come any more, as with a scaler that leaves them out, nothing waits for them."""
        with make() as handler:
            for _ in self.steps(handler, when={0, 1, 2, 3}):
                handler.save(tmp_path / "a.pt")
        with make() as handler:
            if resumed:
                handler.load(tmp_path / "a.pt")
            for _ in handler.epochs(2):
                for _ in handler.batches(range(99)):
                    handler.module(torch.randn(4, 2)).sum().backward()
                    if handler.global_step == 0:
                        handler.optimizer.step()
                    else:
                        handler.stop()

        assert 0 < handler.global_step < 20

    def test_at_the_latest_at_the_end_of_the_epoch(self, tmp_path):
        """Without another step the save is taken when the epoch ends."""
        with make() as handler:
            for batch in self.steps(handler, when={0}):
                if batch == 2:
                    pending = handler.save_async(tmp_path / "a.pt")
            assert pending.result(30).global_step == 4

    def test_replayed_steps_are_not_waited_for(self, tmp_path, monkeypatch):
        """
        A step captured in a CUDA graph, of whose replays nobody hears, counts as done in every batch.
        """
        with make() as handler:
            handler.module(torch.randn(4, 2)).sum().backward()
            self.capture_step(handler, monkeypatch)
            saves = []
            handler.on("train_batch_end", lambda: saves.append(handler.save_async(tmp_path / "a.pt")))
            for _ in handler.steps(3, range(3)):
                pass

        assert [save.result(30).global_step for save in saves] == [1, 2, 3]

    def test_captured_step_is_none(self, monkeypatch):
        """
        The capture of a step is no step, and a real one after it is seen as before.
        """
        with make() as handler:
            seen = []
            handler.optimizer.register_step_pre_hook(lambda *_: seen.append(handler.is_stepping))
            self.capture_step(handler, monkeypatch)
            handler.optimizer.step()

        assert seen == [False, True]

    def test_at_once_where_no_optimizer_ever_stepped(self, tmp_path):
        """A loop that learns nothing, such as one of fake events, has nothing to wait for."""
        with make() as handler:
            handler.on("train_batch_end", lambda: handler.save_async(tmp_path / "a.pt"), once=True)
            for _ in handler.epochs(1):
                for _ in handler.batches(range(4)):
                    pass

        assert trainbus.read_manifest(tmp_path / "a.pt").global_step == 1

    def test_blocking_save_does_not_wait(self, tmp_path, caplog):
        """save() cannot wait for a later step; it saves and says what is missing."""
        with make() as handler:
            for batch in self.steps(handler, when={0}):
                if batch == 1:
                    handler.save(tmp_path / "a.pt")

        assert "gradients accumulated so far are not in it" in caplog.text

    def test_is_skipped_when_no_step_comes(self, tmp_path):
        """A loop that dies first says that the save was not taken, also to those who asked."""
        with pytest.raises(KeyError):
            with make() as handler:
                recorder = EventRecorder(handler.bus, only=["checkpoint_skipped"])
                for batch in self.steps(handler, when={0}):
                    if batch == 1:
                        pending = handler.save_async(tmp_path / "a.pt")
                        raise KeyError
        with pytest.raises(CheckpointSkipped, match="before the next optimizer step"):
            pending.result()
        assert recorder.names == ["checkpoint_skipped"]

    def test_model_checkpoint_names_the_step_it_holds(self, tmp_path):
        """The file's name and its content agree on the step."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{global_step}.pt", save_freq=3))
            for _ in self.steps(handler, when={1, 3}):
                pass

        assert [p.name for p in tmp_path.iterdir()] == ["4.pt"]
        assert trainbus.read_manifest(tmp_path / "4.pt").global_step == 4


class TestWriting:
    def test_rests_while_an_optimizer_steps(self, tmp_path, until_writing_rests):
        """A file of several chunks that is being written when a step begins waits for it."""
        model = nn.Linear(4000, 4000)  # four chunks
        optimizer = torch.optim.SGD(model.parameters())
        with Handler(model, optimizer) as handler:
            optimizer.register_step_pre_hook(until_writing_rests)
            handler.on("train_batch_end", lambda: handler.save_async(tmp_path / "a.pt"), once=True)
            for _ in handler.steps(2, range(2)):
                if handler.global_step == 1:
                    optimizer.step()

        assert trainbus.load(tmp_path / "a.pt")["module"]["weight"].equal(model.weight.detach())


class TestErrors:
    def test_reach_the_loop_at_the_next_event_once(self, tmp_path, failing_disk):
        """A failed save is raised at the next event, and not again."""
        failing_disk(28)
        with make() as handler:
            recorder = EventRecorder(handler.bus, only=["epoch_begin", "checkpoint_failed"])
            epochs = handler.epochs(3)
            next(epochs)
            handler.save_async(tmp_path / "a.pt")
            handler.finish_writing()
            failing_disk(None)
            with pytest.raises(
                CheckpointWriteError, match=r"Cannot write checkpoint .*a.pt.*No space left"
            ) as info:
                next(epochs)
            handler.flush()

        assert info.value.errno == 28
        assert recorder.names == ["epoch_begin", "checkpoint_failed"]

    def test_seen_in_the_result_is_not_raised_again(self, tmp_path, failing_disk):
        """Who looks at the result has seen the error."""
        failing_disk(5)
        with make() as handler:
            with pytest.raises(CheckpointWriteError):
                handler.save(tmp_path / "a.pt")
            handler.flush()

        assert list(tmp_path.iterdir()) == []

    def test_raise_on_leaving(self, tmp_path, failing_disk):
        """A save that fails in the last moment is raised when the handler is left."""
        failing_disk(28)
        with pytest.raises(CheckpointWriteError, match="No space left"):
            with make() as handler:
                handler.save_async(tmp_path / "a.pt")

    def test_warn_only(self, tmp_path, failing_disk, caplog):
        """on_write_error="warn" logs a failed save and trains on."""
        failing_disk(28)
        with make(on_write_error="warn") as handler:
            handler.save_async(tmp_path / "a.pt")
            handler.flush()

        assert "Cannot write checkpoint" in caplog.text
        with pytest.raises(ValueError, match="on_write_error must be 'raise' or 'warn', got 'ignore'"):
            make(on_write_error="ignore")

    def test_never_mask_the_loops_own(self, tmp_path, failing_disk):
        """An exception of the loop comes out as it is; a failed save becomes a note on it."""
        failing_disk(28)
        with pytest.raises(KeyError) as info:
            with make() as handler:
                handler.save_async(tmp_path / "a.pt")
                raise KeyError("mine")

        assert any("No space left" in note for note in info.value.__notes__)

    def test_rolls_the_best_back(self, tmp_path, failing_disk):
        """A best that could not be written is not the best."""
        with make(on_write_error="warn") as handler:
            best = handler.add_callback(
                ModelCheckpoint(tmp_path / "b.pt", monitor="val_loss", save_best_only=True)
            )
            for epoch in handler.epochs(3):
                handler.flush()  # the save of the epoch before, while the disk is as it was then
                failing_disk(28 if epoch == 1 else None)
                handler.log(val_loss=[0.9, 0.5, 0.7][epoch])

        assert best.best_score == 0.7
        assert trainbus.read_manifest(tmp_path / "b.pt").score == 0.7


class TestBestThatIsThere:
    """What lies under the best one's name counts, also where its save was reported as failed."""

    def train(self, folder, losses, before_epoch=lambda handler, epoch: handler.flush(), **options):
        """Keep the best of an epoch for each loss; return its metric as the file has it."""
        with make(on_write_error="warn", **options) as handler:
            best = ModelCheckpoint(folder / "best.pt", monitor="val_loss", save_best_only=True)
            handler.add_callback(best)
            for epoch in handler.epochs(len(losses)):
                before_epoch(handler, epoch)
                handler.log(val_loss=losses[epoch])
        assert best.best_score == trainbus.read_manifest(folder / "best.pt").score
        return best.best_score

    def test_whose_name_was_not_synced(self, tmp_path, caplog):
        """A worse one does not replace a file of which only the name could not be synced."""
        with FaultyDisk(errno.EROFS, calls=["fsync_folder"], at=2):  # 1: can folders be synced here?
            assert self.train(tmp_path, [0.1, 0.5]) == 0.1
        assert "the new file is there" in caplog.text

    def test_that_came_late(self, tmp_path, caplog):
        """Nor one whose write hung, was given up, and went on."""
        go, came = threading.Event(), threading.Event()

        def hold(name, number):
            if number == 2:  # 1: that of the file with 0.9
                assert go.wait(30)

        def look(handler, epoch):
            if epoch == 1:
                handler.finish_writing()
            if epoch == 2:
                handler.on("checkpoint_saved", came.set)
                handler.finish_writing()  # returns once the write is given up
                go.set()
                for _ in range(3000):
                    handler.bus.drain()
                    if came.wait(0.01):
                        break
                assert came.is_set()

        with FaultyDisk(calls=["fsync"], before=hold):
            assert self.train(tmp_path, [0.9, 0.1, 0.5], look, write_timeout=0.5) == 0.1
        assert "was written after all" in caplog.text


class TestLeaving:
    def test_announces_an_exception(self):
        """The exit emits exception, flushes, and emits train_end."""
        error = KeyError("x")
        with pytest.raises(KeyError):
            with make() as handler:
                recorder = EventRecorder(handler.bus)
                for _ in handler.epochs(1):
                    raise error

        assert recorder.names == ["train_begin", "epoch_begin", "exception", "train_end"]
        assert recorder.of("exception")[0]["error"] is error

    def test_receiver_of_an_exception_may_log(self):
        """After an exception amid a validation a metric belongs to the epoch: its batch is lost."""
        error = ValueError("lost")
        with pytest.raises(ValueError, match="lost") as caught, make() as handler:
            handler.on("exception", lambda: handler.log(ended_by=1.0))
            for _ in handler.epochs(1):
                for _ in handler.val_batches(range(2)):
                    raise error

        assert not getattr(caught.value, "__notes__", [])
        assert handler.collect(weights_only=False)["progress"]["metrics"]["given"] == {"ended_by": 1.0}

    def test_return_from_the_body(self):
        """A return from the middle ends the training properly."""

        def main(handler):
            with handler:
                for _ in handler.epochs(3):
                    for _ in handler.batches([1, 2]):
                        return

        handler = make()
        recorder = EventRecorder(handler.bus)
        main(handler)

        assert recorder.names[-1] == "train_end" and handler.closed

    def test_pending_saves_are_finished(self, tmp_path):
        """Leaving waits for the disk."""
        with make() as handler:
            pending = handler.save_async(tmp_path / "a.pt")

        assert pending.done() and trainbus.verify(tmp_path / "a.pt")

    def test_saved_event_comes_before_train_end(self, tmp_path):
        """Whoever listens to train_end knows of every file."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "a.pt"))
            recorder = EventRecorder(handler.bus, only=["checkpoint_saved", "train_end"])
            train(handler)

        assert recorder.names == ["checkpoint_saved", "train_end"]

    def test_lets_go(self, tmp_path):
        """A closed handler is freed, and its callbacks hear nothing more."""
        handler = make()
        bus, counter = handler.bus, handler.add_callback(Counter())
        handler.save(tmp_path / "a.pt")
        handler.close()
        bus.emit("train_batch_end")
        reference = weakref.ref(handler)
        del handler
        gc.collect()

        assert counter.count == 0 and reference() is None

    def test_lets_go_without_being_closed(self, tmp_path):
        """A handler that a notebook drops is freed, although its writer's thread lives on."""
        handler = make()
        handler.save_async(tmp_path / "a.pt").result(30)
        references = [weakref.ref(handler), weakref.ref(handler.module)]
        del handler
        gc.collect()

        assert [reference() for reference in references] == [None, None]

    def test_second_handler_on_a_file_closes_the_first(self, tmp_path, caplog):
        """A notebook cell run again: the new handler takes over, the old one is finished."""
        first, second = make(), make()
        first.save_async(tmp_path / "a.pt")
        second.save(tmp_path / "a.pt")

        assert first.closed and not second.closed
        assert "the earlier one is closed" in caplog.text
        second.close()

    def test_second_handler_on_a_template_closes_the_first(self, tmp_path, caplog):
        """A cell run again with a ModelCheckpoint: the new run has the template, the old one is finished."""
        first, second = make(), make()
        for handler in (first, second):
            handler.add_callback(ModelCheckpoint(tmp_path / "{epoch}.pt"))
            handler.emit("train_begin")

        assert first.closed and not second.closed
        second.close()

    def test_callback_of_two_handlers(self, tmp_path):
        """When one handler is closed, its callbacks go on serving another one."""
        checkpoint, counter, ema = ModelCheckpoint(tmp_path / "{global_step}.pt"), Counter(), EMA(0.5)
        handlers = []
        for _ in range(2):  # as a notebook cell that is run twice; the second one's lock closes the first
            handler = make()
            for callback in (checkpoint, counter, ema):
                handler.add_callback(callback)
            train(handler)
            handler.flush()
            handlers.append(handler)
        first, second = handlers

        assert first.closed and not second.closed
        assert [one.checkpoint_stats().saves for one in handlers] == [1, 1] and counter.count == 6
        second.close()
        assert counter._attached == ()

    def test_second_handler_on_a_bus_closes_the_first(self):
        """One bus has one run at a time."""
        bus = trainbus.EventBus()
        first = make(bus=bus)
        counter = first.add_callback(Counter())
        with make(bus=bus):
            bus.emit("train_batch_end")

        assert first.closed and counter.count == 0


class TestCallbacks:
    def test_equal_keys_do_not_collide(self, tmp_path):
        """Two callbacks of one class have a state each."""
        with make() as handler:
            a, b = handler.add_callback(Counter()), handler.add_callback(Counter())
            a.count, b.count = 1, 2
            handler.save(tmp_path / "a.pt")
            a.count = b.count = 0
            handler.load(tmp_path / "a.pt")

        assert (a.count, b.count) == (1, 2)
        assert list(handler.callbacks) == ["Counter", "Counter#2"]

    def test_callback_nobody_keeps_still_works(self, tmp_path):
        """ModelCheckpoint saves although the script has no name for it."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "a.pt"))
            gc.collect()
            train(handler)

        assert (tmp_path / "a.pt").exists()

    def test_file_holds_the_state_as_it_will_be(self, tmp_path):
        """The file of the best knows that it is the best."""
        with make() as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "b.pt", monitor="val_loss", save_best_only=True))
            for _ in handler.epochs(1):
                handler.log(val_loss=0.5)

        (state,) = trainbus.load(tmp_path / "b.pt")["callbacks"].values()
        assert (state["best_score"], state["best_path"]) == (0.5, str(tmp_path / "b.pt"))

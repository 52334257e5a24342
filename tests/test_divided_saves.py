"""A handler whose module is divided among ranks, in a world of one; ``tests/distributed`` has the others."""

from __future__ import annotations

import contextlib
import errno
import gc
import math
import os
import threading
import time
import weakref

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import trainbus
from trainbus import CheckpointFolder, CheckpointWriteError, Handler, ranks
from trainbus.checkpoint import sharded, staging_memory
from trainbus.checkpoint.staging_memory import map_pages
from trainbus.errors import CheckpointCorruptError, StateMismatchError, UnsavableStateError
from trainbus.testing import FaultyDisk
from trainbus_callbacks import KeepLast, ModelCheckpoint


@pytest.fixture(autouse=True)
def _world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Numbers:
    """Something of the user's own, with NumPy in its state."""

    def __init__(self, value: int) -> None:
        self.value = np.full(3, value)

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


@contextlib.contextmanager
def hanging_disk():
    """Yield what lets the disk go on; until then no file is synced."""
    go = threading.Event()

    def hold(name, number):
        assert go.wait(60)

    with FaultyDisk(calls=["fsync"], before=hold):
        yield go


def build(seed: int = 0, width: int = 4):
    """Return two divided modules and their optimizers, by name."""
    torch.manual_seed(seed)
    mesh = init_device_mesh("cpu", (1,))
    modules = {"one": nn.Linear(width, 4), "two": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}
    for module in modules.values():
        fully_shard(module, mesh=mesh)
    optimizers = {
        "one": torch.optim.AdamW(modules["one"].parameters(), lr=0.1),
        "two": torch.optim.SGD(modules["two"].parameters(), lr=0.1),
    }
    return modules, optimizers


def train(handler, modules, optimizers, epochs=1):
    """Train three batches an epoch."""
    for _ in handler.epochs(epochs):
        for x in handler.batches([torch.full((8, 4), float(n)) + torch.eye(8, 4) for n in range(3)]):
            modules["two"](modules["one"](x)).square().mean().backward()
            modules["one"](x).sum().backward()
            for optimizer in optimizers.values():
                optimizer.step()
                optimizer.zero_grad()


class TestGroup:
    def test_ends_with_the_handler(self, monkeypatch, tmp_path):
        """The group that was made for the saves is gone once the handler is closed, also twice."""
        made = []

        def separate_group(seconds):
            made.append(weakref.ref(real(seconds)))
            return made[0]()

        real = ranks.separate_group
        modules, optimizers = build()
        monkeypatch.setattr(ranks, "separate_group", separate_group)
        kept = dist.group.WORLD
        with Handler(modules, optimizers) as handler:
            handler.save(tmp_path / "a")
            assert made[0]() is not None
        handler.close()
        gc.collect()

        assert made[0]() is None
        assert dist.group.WORLD is kept


def whole(state):
    """Return the state of modules or optimizers with whole tensors, flat."""
    tensors = {}
    for name, one in state.items():
        for key, tensor in one.state_dict().items() if isinstance(one, nn.Module) else moments(one):
            tensors[f"{name}.{key}"] = getattr(tensor, "full_tensor", lambda tensor=tensor: tensor)().clone()
    return tensors


def moments(optimizer):
    for number, state in optimizer.state_dict()["state"].items():
        yield from (
            (f"{number}.{key}", value) for key, value in state.items() if isinstance(value, torch.Tensor)
        )


def equal(a, b):
    """Tell whether two of those are equal bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestPrepare:
    @pytest.mark.parametrize("full_state", [False, True])
    def test_first_save(self, tmp_path, monkeypatch, full_state):
        """The first save of parts goes into the memory made for it; for whole files none is made."""
        mapped = []
        monkeypatch.setattr(staging_memory, "map_pages", lambda size: mapped.append(size) or map_pages(size))
        modules, optimizers = build(width=1000)
        with Handler(modules, optimizers) as handler:
            for _ in handler.epochs(1):
                for x in handler.batches([torch.ones(8, 1000)] * 3):
                    modules["one"](x).sum().backward()
                    optimizers["one"].step()
                    if handler.global_step == 1:
                        handler.prepare_saves(full_state=full_state)
                        assert len(mapped) == (not full_state)
            handler.save(tmp_path / "a", full_state=full_state)

        assert len(mapped) == 1 and mapped[0] > 3 * 4 * 4000


@pytest.fixture
def trained(tmp_path):
    """Return modules and optimizers that were trained and saved, divided and whole, and where."""
    modules, optimizers = build()
    with Handler(modules, optimizers, extra={"numbers": Numbers(5)}) as handler:
        train(handler, modules, optimizers)
        handler.save(tmp_path / "divided")
        handler.save(tmp_path / "whole.pt", full_state=True)
        handler.save(tmp_path / "weights", weights_only=True)
        handler.save(tmp_path / "weights.pt", weights_only=True, full_state=True)
    return modules, optimizers, tmp_path


class TestLoad:
    @pytest.mark.parametrize("name", ["divided", "whole.pt"])
    def test_all(self, trained, name):
        """A folder and a whole file bring back several modules and optimizers, NumPy values and counters."""
        modules, optimizers, folder = trained
        others, their_optimizers = build(seed=1)
        numbers = Numbers(0)
        with Handler(others, their_optimizers, extra={"numbers": numbers}) as handler:
            handler.load(folder / name)
            assert handler.global_step == 3

        assert equal(whole(modules), whole(others))
        assert equal(whole(optimizers), whole(their_optimizers)) and len(whole(optimizers)) == 6
        assert (numbers.value == 5).all()

    @pytest.mark.parametrize("name", ["divided", "whole.pt", "weights", "weights.pt"])
    def test_weights_alone(self, trained, name):
        """The warm start leaves the optimizer as it is."""
        modules, _, folder = trained
        others, their_optimizers = build(seed=1)
        with Handler(others, their_optimizers) as handler:
            handler.load(folder / name, only=("module",))

        assert equal(whole(modules), whole(others))
        assert not their_optimizers["one"].state

    def test_into_undivided(self, trained):
        """A plain run takes the folder, its optimizer's state by names included."""
        modules, optimizers, folder = trained
        plain = {"one": nn.Linear(4, 4), "two": nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))}
        theirs = {name: type(optimizers[name])(one.parameters(), lr=0.5) for name, one in plain.items()}
        with Handler(plain, theirs, extra={"numbers": Numbers(0)}) as handler:
            handler.load(folder / "divided")

        assert equal(whole(modules), whole(plain)) and equal(whole(optimizers), whole(theirs))
        assert theirs["one"].param_groups[0]["lr"] == 0.1

    def test_undivided_into_divided(self, tmp_path):
        """A divided run takes a plain run's file, whose optimizer state is by numbers."""
        plain = nn.Linear(4, 4)
        plain_optimizer = torch.optim.AdamW(plain.parameters(), lr=0.3)
        plain(torch.ones(2, 4)).sum().backward()
        plain_optimizer.step()
        with Handler(plain, plain_optimizer) as handler:
            handler.save(tmp_path / "plain.pt")
        module = fully_shard(nn.Linear(4, 4), mesh=init_device_mesh("cpu", (1,)))
        optimizer = torch.optim.AdamW(module.parameters())
        with Handler(module, optimizer) as handler:
            handler.load(tmp_path / "plain.pt")

        assert equal(whole({"": plain}), whole({"": module}))
        assert equal(whole({"": plain_optimizer}), whole({"": optimizer}))
        assert optimizer.param_groups[0]["lr"] == 0.3

    def test_plain_torch(self, trained):
        """Plain torch opens the whole file, and plain modules take it."""
        modules, _, folder = trained
        state = torch.load(folder / "whole.pt", weights_only=True)
        plain = nn.Linear(4, 4)
        plain.load_state_dict(state["module"]["one"])

        assert torch.equal(plain.weight, modules["one"].weight.full_tensor())
        assert all(type(one) is torch.Tensor for one in trainbus.load(folder / "weights.pt")["one"].values())


class TestRefused:
    def test_other_shape(self, trained):
        """A model of another width is refused before anything has changed."""
        _, _, folder = trained
        others, their_optimizers = build(seed=1, width=5)
        before = whole(others)
        with (
            Handler(others, their_optimizers, extra={"numbers": Numbers(0)}) as handler,
            pytest.raises(StateMismatchError, match=r"Cannot load module\.one\.weight .*\(4, 4\) there"),
        ):
            handler.load(folder / "divided")

        assert equal(before, whole(others))

    def test_other_parts(self, trained):
        """A run with other parts than the folder is refused before anything has changed."""
        _, _, folder = trained
        others, their_optimizers = build(seed=1)
        before = whole(others)
        with (
            Handler(others, their_optimizers) as handler,
            pytest.raises(StateMismatchError, match=r"Cannot load extra\['numbers'\]"),
        ):
            handler.load(folder / "divided")

        assert equal(before, whole(others))

    @pytest.mark.parametrize("name", ["divided", "whole.pt", "weights", "weights.pt"])
    def test_missing_names(self, trained, name, caplog):
        """A layer that the checkpoint has not is refused; with strict=False it stays, and is named."""
        modules, _, folder = trained
        others, _ = build(seed=1)
        others["two"] = fully_shard(
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            mesh=init_device_mesh("cpu", (1,)),
        )
        added = others["two"][2].weight.full_tensor().clone()
        with Handler(others) as handler:
            with pytest.raises(StateMismatchError, match=r"2\.weight"):
                handler.load(folder / name, only=("module",))
            handler.load(folder / name, only=("module",), strict=False)

        assert equal(whole({"": modules["two"][0]}), whole({"": others["two"][0]}))
        assert torch.equal(added, others["two"][2].weight.full_tensor())
        assert "2.weight, 2.bias, which the file has not" in caplog.text

    @pytest.mark.parametrize("only", [("optimizer",), ("module", "optimizer")])
    def test_more_than_weights(self, tmp_path, only):
        """Of a folder of weights nothing is read into the model where more is asked for."""
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            handler.save(tmp_path / "weights", weights_only=True)
        others, other_optimizers = build(seed=1)
        before = whole(others)
        with Handler(others, other_optimizers) as handler:
            with pytest.raises(StateMismatchError, match="it holds weights only"):
                handler.load(tmp_path / "weights", only=only)

        after = whole(others)
        assert all(torch.equal(before[name], after[name]) for name in before)

    def test_damaged(self, trained):
        """A damaged part is found before anything has changed."""
        _, _, folder = trained
        others, their_optimizers = build(seed=1)
        before = whole(others)
        with open(folder / "divided/__0_0.distcp", "r+b") as file:
            file.seek(50)
            file.write(b"damage")
        with (
            Handler(others, their_optimizers) as handler,
            pytest.raises(CheckpointCorruptError, match="__0_0"),
        ):
            handler.load(folder / "divided", only=("module",))

        assert equal(before, whole(others))

    @pytest.mark.parametrize("on_busy", ["skip", "replace"])
    def test_on_busy(self, on_busy):
        """Each rank alone cannot know whether all have room."""
        with pytest.raises(ValueError, match="on_busy must be 'wait' where the state is divided among ranks"):
            Handler(*build(), max_pending=2, on_busy=on_busy)

    def test_divided_too_late(self):
        """A handler that was made before fully_shard says so when training begins."""
        module = nn.Linear(4, 4)
        with Handler(module) as handler:
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
            with pytest.raises(UnsavableStateError, match=r"make the Handler after fully_shard\(module\)"):
                handler.check()


class TestSave:
    def test_before_the_first_step(self, tmp_path):
        """A save changes nothing: an optimizer without a state keeps none, also through a load."""
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            handler.save(tmp_path / "fresh")
            assert not optimizers["one"].state
            train(handler, modules, optimizers)
            handler.load(tmp_path / "fresh")

        assert not optimizers["one"].state

    def test_amid_forward_and_backward(self, tmp_path):
        """A save between a forward and a backward pass, when FSDP2 holds whole weights, is as any other."""
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            loss = modules["one"](torch.ones(2, 4)).sum()
            handler.save(tmp_path / "a")
            loss.backward()

        assert trainbus.load(tmp_path / "a")["optimizer"]["one"]["param_groups"][0]["params"] == [
            "one.weight",
            "one.bias",
        ]

    def test_rests_while_an_optimizer_steps(self, tmp_path, until_writing_rests):
        """What a rank writes of a state that is being saved when a step begins waits for it."""
        modules, optimizers = build(width=4_000_000)  # 61 MiB: four chunks
        with Handler(modules, optimizers) as handler:
            optimizers["one"].register_step_pre_hook(until_writing_rests)
            handler.on("train_batch_end", lambda: handler.save_async(tmp_path / "a"), once=True)
            for _ in handler.steps(2, range(2)):
                if handler.global_step == 1:
                    optimizers["one"].step()

        assert trainbus.verify(tmp_path / "a").global_step == 1

    def test_model_checkpoint(self, tmp_path):
        """ModelCheckpoint, its events, retention and resume work on folders."""
        saved, removed = [], []
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{global_step}", save_freq=1, keep=KeepLast(1)))
            handler.on("checkpoint_saved", lambda path: saved.append(os.path.basename(path)))
            handler.on("checkpoint_removed", lambda path: removed.append(os.path.basename(path)))
            train(handler, modules, optimizers)
        assert saved == ["1", "2", "3"] and removed == ["1", "2"]
        (found,) = CheckpointFolder(tmp_path)
        assert found.is_sharded and trainbus.verify(found.path).global_step == 3
        assert handler.checkpoint_stats().saves == 3

        others, their_optimizers = build(seed=1)
        with Handler(others, their_optimizers) as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "{global_step}", save_freq=1, keep=KeepLast(1)))
            assert handler.resume(tmp_path).global_step == 3
            assert equal(whole(modules), whole(others))

    def test_hanging_disk(self, tmp_path):
        """A save that hangs keeps neither the next one nor the end of the handler waiting; that one fails."""
        modules, optimizers = build()
        with hanging_disk() as go:
            handler = Handler(modules, optimizers, write_timeout=0.3, rank_timeout=0.3, on_write_error="warn")
            saves = [handler.save_async(tmp_path / name) for name in "ab"]
            handler.close()
            assert not go.is_set()
            go.set()
        for save in saves:
            with pytest.raises(CheckpointWriteError, match=r"without progress|hangs"):
                save.result(0)
        deadline = time.monotonic() + 30
        while not (tmp_path / "a").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert trainbus.verify(tmp_path / "a") and not (tmp_path / "b").exists()

    def test_closed_in_time(self, tmp_path):
        """close(timeout) of a handler whose disk is slow lets go of all it can, and says what it left."""
        modules, optimizers = build()
        with hanging_disk() as go:
            handler = Handler(modules, optimizers)
            handler.save_async(tmp_path / "a")
            group = weakref.ref(handler._divided._group)
            with pytest.raises(TimeoutError, match=r"Still unfinished after 0\.1 s"):
                handler.close(timeout=0.1)
            assert handler._divided._group is None and group() is not None
            go.set()
            handler._divided._saver.wait()
        for _ in range(20):  # by the thread that has written, as its last act
            gc.collect()
            if group() is None:
                break
            time.sleep(0.1)
        assert group() is None

    def test_interrupted_while_it_is_copied(self, tmp_path, monkeypatch):
        """Ctrl-C while the state is copied gives the memory back, so that the next save has it."""
        modules, optimizers = build()
        with Handler(modules, optimizers, on_write_error="warn") as handler:
            with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):

                def shard(*args):
                    raise KeyboardInterrupt

                interrupted.setattr(sharded, "Shard", shard)
                handler.save_async(tmp_path / "a")
            assert handler.save(tmp_path / "b") is not None

    def test_gathering_that_fails(self, tmp_path, monkeypatch):
        """A tensor that cannot be made whole fails the save, and not the training."""

        def full_tensor(tensor):
            raise RuntimeError("out of memory")

        modules, optimizers = build()
        with Handler(modules, optimizers, on_write_error="warn") as handler:
            with monkeypatch.context() as full:
                full.setattr(DTensor, "full_tensor", full_tensor)
                save = handler.save_async(tmp_path / "a.pt", full_state=True)
            with pytest.raises(CheckpointWriteError, match="out of memory"):
                save.result(30)

    def test_whole_by_model_checkpoint(self, tmp_path):
        """With full_state it writes files."""
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "last.pt", full_state=True))
            train(handler, modules, optimizers)

        assert os.path.isfile(tmp_path / "last.pt") and trainbus.verify(tmp_path / "last.pt").global_step == 3

    def test_full_disk(self, tmp_path):
        """A disk that refuses fails the save with its number, and the checkpoint before is whole."""
        modules, optimizers = build()
        with Handler(modules, optimizers) as handler:
            handler.save(tmp_path / "a")
            with FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf):
                with pytest.raises(
                    CheckpointWriteError, match=r"rank 0: \[Errno 28\] No space left"
                ) as caught:
                    handler.save(tmp_path / "a")

        assert caught.value.errno == errno.ENOSPC
        trainbus.verify(tmp_path / "a")

    @pytest.mark.parametrize("full_state", [False, True])
    def test_state_that_cannot_be_saved(self, tmp_path, full_state):
        """What cannot be collected fails the save, with the place in the state."""
        modules, optimizers = build()
        numbers = Numbers(0)
        numbers.value = object()
        with (
            Handler(modules, optimizers, extra={"numbers": numbers}) as handler,
            pytest.raises(
                CheckpointWriteError,
                match=r"(?s)it failed on rank 0: .*state\['extra'\]\['numbers'\]\['value'\]",
            ),
        ):
            handler.save(tmp_path / "a", full_state=full_state)

        assert os.listdir(tmp_path) == []

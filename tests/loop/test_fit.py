"""Handler.fit: the same numbers as the loop by hand."""

from __future__ import annotations

import contextlib
from collections import defaultdict, namedtuple

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler
from trainbus.errors import TrainbusError
from trainbus.loop.fit import to_device
from trainbus.testing import EventRecorder
from trainbus_callbacks import EMA, Every, ModelCheckpoint


def make(scheduler=None, **options):
    """Return a handler and two loaders, the same each time."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(10, 2), torch.randn(10, 1))
    model = nn.Sequential(nn.Linear(2, 4), nn.Dropout(0.2), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    handler = Handler(model, optimizer, scheduler=scheduler and scheduler(optimizer), **options)
    return handler, DataLoader(data, 2, shuffle=True), DataLoader(data, 5)


class IterableOf:
    """The batches of a loader, without a length."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)


class WrongLength(IterableOf):
    """The same, with a length that is not theirs."""

    def __len__(self):
        return 7


def weights(handler):
    """Return all parameters as one vector."""
    return nn.utils.parameters_to_vector(handler.module.parameters()).detach().clone()


class TestFit:
    def test_equals_the_loop_by_hand(self):
        """Same seeds, same weights, same losses, bit for bit."""
        handler, train, val = make()
        recorder = EventRecorder(handler.bus, only=["epoch_end"])
        with handler:
            handler.fit(train, val, epochs=2, loss_fn=mse_loss)

        other, train, val = make()
        model, optimizer, losses = other.module, other.optimizer, []
        for _ in range(2):
            model.train()
            for x, y in train:
                mse_loss(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                losses.append([mse_loss(model(x), y).item() for x, y in val])

        assert torch.equal(weights(handler), weights(other))
        assert [p["logs"]["val_loss"] for p in recorder.of("epoch_end")] == [sum(pair) / 2 for pair in losses]

    def test_accumulates(self):
        """accumulate=k steps every k batches, and with the rest at the end of the epoch."""
        handler, train, _ = make()
        steps = []
        handler.optimizer.register_step_post_hook(lambda *_: steps.append(handler.batch))
        with handler:
            handler.fit(train, epochs=1, loss_fn=mse_loss, accumulate=2)

        assert steps == [1, 3, 4]

    @pytest.mark.parametrize(
        ("kind", "kept_local"),
        [
            ("loader", [True, True, False, True, False]),
            ("list", [True, True, False, True, False]),
            ("without a length", [False] * 5),
            ("with a wrong one", [False] * 5),
        ],
    )
    def test_accumulates_over_ranks(self, kind, kept_local):
        """DDP averages the gradients of each step over the ranks, also of the shorter one at the end."""

        class Distributed(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module, self.local, self.seen = module, False, []

            def forward(self, x):
                self.seen.append(self.local)
                return self.module(x)

            @contextlib.contextmanager
            def no_sync(self):
                self.local = True
                yield
                self.local = False

        _, train, _ = make()
        loader = {
            "loader": train,
            "list": list(train),
            "without a length": IterableOf(train),
            "with a wrong one": WrongLength(train),
        }[kind]
        model = Distributed(nn.Linear(2, 1))
        with Handler(model, torch.optim.SGD(model.parameters())) as handler:
            steps = []
            handler.optimizer.register_step_post_hook(lambda *_: steps.append(len(model.seen)))
            handler.fit(loader, epochs=1, loss_fn=mse_loss, accumulate=3)

        assert model.seen == kept_local and steps == [3, 5]

    @pytest.mark.parametrize("place", ["sampler", "batch_sampler"])
    def test_sampler_without_a_length(self, place):
        """A DataLoader whose sampler has no length is trained on to its end, with the step of the rest."""
        indices = {"sampler": range(5), "batch_sampler": [[0], [1], [2], [3], [4]]}[place]
        handler, train, _ = make()
        steps = []
        handler.optimizer.register_step_post_hook(lambda *_: steps.append(handler.global_step))
        with handler:
            loader = DataLoader(train.dataset, **{place: IterableOf(indices)})
            handler.fit(loader, epochs=1, loss_fn=mse_loss, accumulate=2)

        assert steps == [1, 3, 5]

    def test_the_last_step_is_seen_at_its_batch(self):
        """The step with the rest of an epoch is made before its last batch is told of."""
        handler, train, _ = make()
        ema = handler.add_callback(EMA())
        with handler:
            handler.fit(train, epochs=2, loss_fn=mse_loss, accumulate=3)

        assert ema.state_dict()["updates"] == 4

    def test_train_step_gives_metrics(self):
        """A step may return a dict of metrics whose loss is trained on; val_step is asked in validation."""
        handler, train, val = make()
        recorder = EventRecorder(handler.bus, only=["epoch_end"])

        def step(model, batch):
            loss = mse_loss(model(batch[0]), batch[1])
            return {"loss": loss, "twice": 2 * loss.detach()}

        with handler:
            handler.fit(train, val, epochs=1, train_step=step, val_step=lambda model, batch: torch.ones(()))

        logs = dict(recorder.of("epoch_end")[0]["logs"])
        assert set(logs) == {"loss", "twice", "val_loss"}
        assert logs["twice"] == pytest.approx(2 * logs["loss"]) and logs["val_loss"] == 1.0

    def test_modes_and_gradients(self):
        """Training runs in train mode with gradients, validation in eval mode without."""
        handler, train, val = make()
        seen = set()

        def step(model, batch):
            seen.add((model.training, torch.is_grad_enabled()))
            return mse_loss(model(batch[0]), batch[1])

        with handler:
            handler.fit(train, val, epochs=1, train_step=step)

        assert seen == {(True, True), (False, False)}

    def test_clips(self):
        """clip_norm bounds the gradients that the optimizer sees."""
        handler, train, _ = make()
        norms = []
        parameters = list(handler.module.parameters())
        handler.optimizer.register_step_pre_hook(
            lambda *_: norms.append(torch.nn.utils.get_total_norm([p.grad for p in parameters]).item())
        )
        with handler:
            handler.fit(train, epochs=1, loss_fn=mse_loss, clip_norm=1e-3)

        assert max(norms) <= 1e-3 * 1.001

    def test_scheduler_steps_before_the_checkpoint(self, tmp_path):
        """The epoch's file holds the scheduler as the next epoch needs it."""
        handler, train, _ = make(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.1))
        with handler:
            handler.add_callback(ModelCheckpoint(tmp_path / "a.pt"))
            handler.fit(train, epochs=1, loss_fn=mse_loss)

        state = torch.load(tmp_path / "a.pt", weights_only=True)
        assert state["scheduler"]["last_epoch"] == 1
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.001)

    def test_scheduler_per_batch(self):
        """step_scheduler="batch" steps it after each optimizer step."""
        handler, train, _ = make(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5))
        with handler:
            handler.fit(train, epochs=1, loss_fn=mse_loss, accumulate=2, step_scheduler="batch")

        assert handler.scheduler.last_epoch == 3

    def test_plateau_gets_its_metric(self):
        """ReduceLROnPlateau is given the metric, and an error names those there are."""
        handler, train, val = make(
            lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10)
        )
        with handler:
            handler.fit(train, val, epochs=3, loss_fn=mse_loss)
        assert handler.optimizer.param_groups[0]["lr"] < 0.01

        handler, train, val = make(torch.optim.lr_scheduler.ReduceLROnPlateau)
        with pytest.raises(
            ValueError, match=r"'val_acc' is not among this epoch's metrics \(loss, val_loss\)"
        ):
            with handler:
                handler.fit(train, val, epochs=1, loss_fn=mse_loss, scheduler_metric="val_acc")

    def test_scaler_and_autocast(self):
        """Mixed precision runs with a scaler; its state is saved."""
        handler, train, _ = make(scaler=torch.amp.GradScaler("cpu"))
        with handler:
            handler.fit(train, epochs=1, loss_fn=mse_loss, autocast=torch.bfloat16, device="cpu")

        assert handler.scaler.state_dict()["_growth_tracker"] == 5

    def test_resumes_bit_for_bit(self, tmp_path):
        """Stopped in the middle of accumulation and started again, it ends in the same weights."""
        whole, train, val = make()
        with whole:
            whole.fit(train, val, epochs=2, loss_fn=mse_loss, accumulate=2)
        for stop in range(1, 10):
            first, train, val = make()
            with first:
                first.add_callback(ModelCheckpoint(tmp_path / f"{stop}" / "a.pt", save_freq=1))
                first.on("train_batch_end", first.stop, after=stop - 1, once=True)
                first.fit(train, val, epochs=2, loss_fn=mse_loss, accumulate=2)
            second, train, val = make()
            with second:
                second.resume(tmp_path / f"{stop}")
                torch.rand(stop)
                second.fit(train, val, epochs=2, loss_fn=mse_loss, accumulate=2)

            assert torch.equal(weights(second), weights(whole)), stop

    @pytest.mark.parametrize("batch", [3, 4, 5])
    @pytest.mark.parametrize("validates", [True, False])
    @pytest.mark.parametrize("has_length", [True, False])
    def test_stop_near_the_end_of_an_epoch(self, tmp_path, batch, validates, has_length):
        """The step with the rest of an epoch is made after a stop too, and the next run goes on behind it."""
        results = []
        for stops in (False, True):
            folder = tmp_path / str(stops)
            for _ in range(2):
                handler, train, val = make()
                with handler:
                    handler.add_callback(ModelCheckpoint(folder / "a.pt", save_freq=Every(steps=1)))
                    if handler.resume(folder) is None and stops:
                        handler.on("train_batch_end", handler.stop, after=batch - 1, once=True)
                    loader = train if has_length else IterableOf(train)
                    handler.fit(loader, val if validates else None, epochs=2, loss_fn=mse_loss, accumulate=3)
            results.append(weights(handler))

        assert torch.equal(*results)

    @pytest.mark.usefixtures("unconfigured_logging")
    def test_prints_what_happens_to_checkpoints(self, tmp_path, capsys):
        """Without configured logging fit prints the best and the saved."""
        handler, train, val = make()
        with handler:
            best = ModelCheckpoint(tmp_path / "best.pt", monitor="val_loss", save_best_only=True)
            handler.add_callback(best)
            handler.fit(train, val, epochs=1, loss_fn=mse_loss)

        printed = capsys.readouterr().out
        assert "epoch 1: val_loss is" in printed and "saved best.pt (" in printed

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "either loss_fn or train_step"),
            ({"loss_fn": mse_loss, "train_step": print}, "either loss_fn or train_step"),
            ({"loss_fn": mse_loss, "accumulate": 0}, "accumulate must be an int of at least 1, got 0"),
            ({"loss_fn": mse_loss, "clip_norm": 0}, "clip_norm must be more than 0, .* got 0"),
            ({"loss_fn": mse_loss, "clip_norm": -1.0}, "clip_norm must be more than 0, .* got -1.0"),
            ({"loss_fn": mse_loss, "clip_norm": float("nan")}, "clip_norm must be more than 0, .* got nan"),
            ({"loss_fn": mse_loss, "step_scheduler": "step"}, "must be 'epoch' or 'batch', got 'step'"),
            (
                {"train_step": lambda model, batch: {"loss": torch.ones(()), "weight": 1}},
                "A step's metric cannot be named 'weight', .*'weight': 1.* another name",
            ),
            ({"train_step": lambda model, batch: 0.5}, "must return the loss as a tensor.*got 0.5"),
        ],
    )
    def test_refuses(self, options, message):
        """Arguments that make no sense are refused, each with its rule."""
        handler, train, _ = make()
        with pytest.raises(ValueError, match=message), handler:
            handler.fit(train, epochs=1, **options)

    def test_refuses_a_plateau_per_batch(self):
        """What is given the epoch's metric is not stepped by batch; that is said before all training."""
        handler, train, _ = make(torch.optim.lr_scheduler.ReduceLROnPlateau)
        with pytest.raises(ValueError, match="step_scheduler='batch' does not go with ReduceLROnPlateau"):
            handler.fit(train, epochs=1, loss_fn=mse_loss, step_scheduler="batch")
        assert handler.global_step == 0

    @pytest.mark.parametrize(("loader", "epoch"), [([], 1), (lambda train: iter(list(train)), 2)])
    def test_refuses_an_epoch_without_batches(self, loader, epoch):
        """An empty loader, and one that is used up, ends the training with an error."""
        handler, train, _ = make()
        with pytest.raises(TrainbusError, match=rf"Cannot train epoch {epoch}: the loader .* gave no batch"):
            with handler:
                handler.fit(loader(train) if callable(loader) else loader, epochs=3, loss_fn=mse_loss)
        assert handler.epoch == epoch - 1

    def test_a_continued_epoch_may_be_over(self, tmp_path):
        """A run that was saved with an epoch's last batch has none to come in it, nor has a stopped one."""
        handler, train, val = make()
        with handler:
            handler.on("train_batch_end", lambda batch: batch == 4 and handler.save(tmp_path / "a.pt"))
            handler.fit(train, val, epochs=1, loss_fn=mse_loss)
            handler.on("epoch_begin", handler.stop)
            handler.fit(train, val, epochs=2, loss_fn=mse_loss)
        handler, train, val = make()
        with handler:
            handler.load(tmp_path / "a.pt")
            handler.fit(train, val, epochs=1, loss_fn=mse_loss)

        assert (handler.epoch, handler.global_step) == (1, 5)

    def test_refuses_several_modules(self):
        """fit trains one module; for more there are the generators."""
        with pytest.raises(ValueError, match=r"fit\(\) trains one module, this handler has several: G, D"):
            Handler({"G": nn.Linear(1, 1), "D": nn.Linear(1, 1)}).fit([], epochs=1, loss_fn=mse_loss)


class Named(dict):
    """A batch whose entries are attributes too."""

    def __getattr__(self, name):
        return self[name]


class Movable:
    """A batch that is no container and can be moved."""

    def __init__(self, device="cpu", *, in_place=False):
        self.device, self.in_place = device, in_place

    def to(self, device):
        if not self.in_place:
            return Movable(device)
        self.device = device


class TestToDevice:
    def test_containers_keep_their_class(self):
        """Tuples, lists and dicts of any class are made again with what is in them on the device."""
        pair = namedtuple("pair", "x y")
        batch = Named(a=[torch.ones(1)], b=pair(torch.ones(1), "text"), c=defaultdict(list, d=torch.ones(1)))
        moved = to_device(batch, "meta")

        assert type(moved) is Named and moved.a[0].is_meta and not batch.a[0].is_meta
        assert type(moved.b) is pair and moved.b.x.is_meta and moved.b.y == "text"
        assert type(moved.c) is defaultdict and moved.c["d"].is_meta and moved.c["e"] == []

    def test_packed_sequence(self):
        """Packed sequences know themselves what of them goes to a device."""
        packed = to_device(nn.utils.rnn.pack_sequence([torch.ones(3), torch.ones(2)]), "meta")

        assert packed.data.is_meta and not packed.batch_sizes.is_meta

    @pytest.mark.parametrize("in_place", [True, False])
    def test_what_can_be_moved(self, in_place):
        """What has a ``to`` is moved by it, whether it returns something or not."""
        assert to_device([Movable(in_place=in_place)], "meta")[0].device == "meta"

    @pytest.mark.parametrize("batch", [5, "text", None, Movable, torch.float32])
    def test_others(self, batch):
        """All else stays as it is."""
        assert to_device(batch, "meta") is batch

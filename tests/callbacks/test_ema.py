"""EMA: what the average is, which weights a receiver and a file see, and what a resumed run has."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import mse_loss

import trainbus
from trainbus import Handler
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import EMA, ModelCheckpoint


def weights(module):
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()]).clone()


def counting(**options):
    """
    Return a handler of one weight, which each batch sets to the number of batches done, its EMA, and a
    dict that collects the weight at each event.
    """
    handler = FakeHandler(module=torch.nn.Linear(1, 1, bias=False))
    handler.module.weight.data.fill_(0.0)
    ema = handler.add_callback(EMA(**options))

    def train(global_step):
        handler.module.weight.data.fill_(global_step + 1)

    handler.bus.on("train_batch_begin", train)
    return handler, ema


class TestAverage:
    def test_formula(self):
        """The first update takes the weights, each later one (1 - decay) of them."""
        handler, ema = counting(decay=0.75)
        emit_run(handler.bus, epochs=1, batches=3)

        assert ema.averaged().weight.item() == 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3

    def test_every(self):
        """Batches between two updates do not count."""
        handler, ema = counting(decay=0.5, every=2)
        emit_run(handler.bus, epochs=1, batches=5)

        assert ema.averaged().weight.item() == 0.5 * 2 + 0.5 * 4

    def test_start_step(self):
        """The first steps of a run, whose weights are far away, may be left out."""
        handler, ema = counting(decay=0.5, start_step=3)
        emit_run(handler.bus, epochs=1, batches=5)

        assert ema.averaged().weight.item() == 0.5 * 4 + 0.5 * 5

    def test_follows_the_module(self):
        """An average that was loaded before the module moved goes to where the module is."""
        handler, ema = counting()
        ema.load_state_dict(
            {"weights": {"": {"weight": torch.ones(1, 1)}}, "counts": {"": torch.tensor(3)}, "updates": 3}
        )
        assert ema.averaged().weight.device.type == "cpu"
        handler.module.to("meta")
        handler.bus.emit("train_begin")

        assert ema.averaged().weight.device.type == "meta"

    @pytest.mark.parametrize("is_loaded", [False, True])
    def test_added_amid_a_training(self, is_loaded):
        """One that is added while a training goes on averages from the next batch on, and is shown."""
        handler, _ = counting()
        handler.bus.emit("train_begin")
        ema = handler.add_callback(EMA(decay=0.5, use_buffers=True))
        if is_loaded:
            first = {"": {"weight": torch.zeros(1, 1)}}
            ema.load_state_dict({"weights": first, "counts": {"": torch.tensor(0)}, "updates": 0})
        for step in range(1, 4):
            handler.module.weight.data.fill_(step)
            handler.bus.emit("train_batch_end", global_step=step)
        seen = []
        handler.bus.on("val_begin", lambda: seen.append(handler.module.weight.item()))
        handler.bus.emit("val_begin")

        assert seen == [0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 3]

    def test_while_accumulating(self):
        """A batch in which no optimizer stepped does not count."""
        handler, ema = counting(decay=0.5)
        handler.bus.on(
            "train_batch_end",
            lambda global_step: setattr(handler, "accumulating", global_step == 2),
            priority=-20,
        )
        emit_run(handler.bus, epochs=1, batches=3)

        assert ema.averaged().weight.item() == 0.5 * 1 + 0.5 * 3

    @pytest.mark.parametrize("use_buffers", [True, False])
    def test_buffers(self, use_buffers):
        """Buffers are averaged and exchanged where that is asked for, and left alone else."""
        handler = FakeHandler(module=torch.nn.BatchNorm1d(1))
        handler.add_callback(EMA(0.5, use_buffers=use_buffers))
        mean, seen = handler.module.running_mean, []
        handler.bus.on("train_batch_begin", lambda global_step: mean.fill_(global_step))
        handler.bus.on("epoch_end", lambda: seen.append(mean.item()))
        emit_run(handler.bus, epochs=1, batches=3)

        assert seen == [0.5 * (0.5 * 0 + 0.5 * 1) + 0.5 * 2 if use_buffers else 2]
        assert mean.item() == 2

    def test_several_modules(self):
        """Each of several modules has an average of its own."""
        modules = {"a": torch.nn.Linear(1, 1), "b": torch.nn.Linear(2, 1)}
        handler = FakeHandler(module=modules)
        ema = handler.add_callback(EMA())
        emit_run(handler.bus, epochs=1)

        assert ema.averaged("b").weight.shape == (1, 2)

    @pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
    def test_decay(self, decay):
        """A decay that is no share is refused."""
        with pytest.raises(ValueError, match=f"decay must be a number from 0 to 1.* got {decay}"):
            EMA(decay)

    @pytest.mark.parametrize("argument", ["every", "start_step"])
    def test_count(self, argument):
        """A count that is none is refused."""
        with pytest.raises(ValueError, match=argument):
            EMA(**{argument: -1})


class TestExchange:
    def test_which_weights_are_seen(self):
        """In validations and at epoch_end the module holds the average, at any other event the weights."""
        handler, ema = counting(decay=0.5)
        seen = {}
        for event in ("train_batch_end", "val_begin", "val_batch_end", "val_end", "epoch_end", "train_end"):
            handler.bus.on(event, lambda event=event: seen.update({event: handler.module.weight.item()}))
        emit_run(handler.bus, epochs=1, batches=2, val_batches=1)

        trained, averaged = 2.0, 1.5
        assert seen == {
            "train_batch_end": trained,
            "val_begin": averaged,
            "val_batch_end": averaged,
            "val_end": averaged,
            "epoch_end": averaged,
            "train_end": trained,
        }
        assert handler.module.weight.item() == trained and ema.averaged().weight.item() == averaged

    def test_before_the_first_update(self):
        """While there is no average the weights themselves are validated."""
        handler, _ = counting(start_step=10)
        seen = []
        handler.bus.on("epoch_end", lambda: seen.append(handler.module.weight.item()))
        emit_run(handler.bus, epochs=1, batches=2)

        assert seen == [2.0]

    def test_in_place(self):
        """The module's tensors stay the same ones, and tied ones tied."""
        module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        module[1].weight = module[0].weight
        handler = FakeHandler(module=module)
        handler.add_callback(EMA(0.5))
        addresses, seen = [one.data_ptr() for one in module.parameters()], []
        handler.bus.on("epoch_end", lambda: seen.extend(one.data_ptr() for one in module.parameters()))
        emit_run(handler.bus, epochs=1)

        assert seen == addresses and module[0].weight is module[1].weight

    @pytest.mark.parametrize("names", [["gen", "dis"], ["whole", "gen", "part"]])
    def test_modules_that_share(self, names):
        """A parameter of several modules has one average, which all of them show, and it comes back."""
        shared = torch.nn.Linear(1, 1)
        gen, dis = (torch.nn.Sequential(shared, torch.nn.Linear(1, 1)) for _ in range(2))
        modules = {"gen": gen, "dis": dis, "whole": torch.nn.ModuleList([gen, dis]), "part": shared}
        handler = FakeHandler(module={name: modules[name] for name in names})
        ema = handler.add_callback(EMA(0.5))
        seen, own = [], [gen[1].weight, shared.weight]
        handler.bus.on(
            "train_batch_begin", lambda global_step: [one.data.fill_(global_step + 1) for one in own]
        )
        handler.bus.on("val_batch_end", lambda: seen.append([one.item() for one in own]))
        emit_run(handler.bus, epochs=1, batches=2, val_batches=1)

        assert seen == [[1.5, 1.5]] and [one.item() for one in own] == [2.0, 2.0]
        averages = {id(one): one for name in names for one in ema.averaged(name).parameters()}
        assert len(averages) == len({id(one) for name in names for one in modules[name].parameters()})
        assert sorted(one.item() for one in averages.values()).count(1.5) >= 2

    @pytest.mark.parametrize("use_buffers", [True, False])
    def test_views(self, use_buffers):
        """Tensors that are views of the same memory come back too, parameters and buffers."""
        module = torch.nn.Module()
        module.whole = torch.nn.Parameter(torch.zeros(2))
        module.again = torch.nn.Parameter(module.whole.detach())
        module.register_buffer("part", module.whole.detach()[1:])
        handler = FakeHandler(module=module)
        handler.add_callback(EMA(0.5, use_buffers=use_buffers))
        seen = []
        handler.bus.on("train_batch_begin", lambda global_step: module.whole.data.fill_(global_step + 1))
        handler.bus.on("val_batch_end", lambda: seen.append(module.whole.tolist()))
        emit_run(handler.bus, epochs=1, batches=2, val_batches=1)

        assert seen == [[1.5, 1.5]] and module.whole.tolist() == [2.0, 2.0]

    @pytest.mark.parametrize("event", ["train_batch_end", "exception", "train_end"])
    def test_validation_cut_short(self, event):
        """After a validation without an end the weights in training are back at the next event."""
        handler, _ = counting(decay=0.5)
        for name in ("train_begin", "train_batch_begin", "train_batch_end"):
            handler.bus.emit(name, global_step=0 if name.endswith("begin") else 1)
        handler.module.weight.data.fill_(7.0)
        handler.bus.emit("val_begin")
        assert handler.module.weight.item() == 1.0

        fields = {"error": KeyboardInterrupt()} if event == "exception" else {}
        seen = []
        handler.bus.on(event, lambda: seen.append(handler.module.weight.item()))
        handler.bus.emit(event, **fields)
        assert seen == [7.0]

    def test_second_run(self):
        """Trained again with the same callback, each event exchanges once."""
        handler, _ = counting(decay=0.5)
        seen = []
        handler.bus.on("epoch_end", lambda: seen.append(handler.module.weight.item()))
        emit_run(handler.bus, epochs=1, batches=2)
        emit_run(handler.bus, epochs=1, batches=2)

        assert seen[0] == 1.5 and handler.module.weight.item() != seen[1]


def train(folder, *, epochs, stop_at=None, event="epoch_end", with_ema=True):
    """Train, saving at *event*; return the handler and the EMA. *stop_at*: the step after which it ends."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
    ema = EMA(0.5) if with_ema else None
    with Handler(model, optimizer) as handler:
        if ema is not None:
            handler.add_callback(ema)
        handler.on(event, lambda handler: handler.save_async(folder / "last.pt"), priority=100)
        handler.resume(folder)
        if stop_at is not None:
            handler.on("train_batch_end", lambda global_step: global_step == stop_at and handler.stop())
            handler.on("val_batch_end", lambda global_step: global_step == stop_at and handler.stop())
        handler.fit(data, data[:2], epochs=epochs, loss_fn=mse_loss)
    return handler, ema


class TestCheckpoints:
    @pytest.mark.parametrize("event", ["epoch_end", "train_batch_end", "val_batch_end", "val_end"])
    def test_resume(self, tmp_path, event):
        """Wherever it was saved, the resumed run ends in the weights and the average of a whole one."""
        whole, average = train(tmp_path / "whole", epochs=3, event=event)
        train(tmp_path / "cut", epochs=2, event=event)
        resumed, resumed_average = train(tmp_path / "cut", epochs=3, event=event)

        assert torch.equal(weights(resumed.module), weights(whole.module))
        assert torch.equal(weights(resumed_average.averaged()), weights(average.averaged()))

    def test_stopped_in_validation(self, tmp_path):
        """A run that was stopped and saved amid a validation goes on exactly."""
        whole, average = train(tmp_path / "whole", epochs=2)
        train(tmp_path / "cut", epochs=2, stop_at=4, event="val_batch_end")
        resumed, resumed_average = train(tmp_path / "cut", epochs=2)

        assert torch.equal(weights(resumed.module), weights(whole.module))
        assert torch.equal(weights(resumed_average.averaged()), weights(average.averaged()))

    @pytest.mark.parametrize(
        "event, average_is_in_module", [("epoch_end", True), ("val_end", True), ("train_batch_end", False)]
    )
    def test_which_weights_a_file_holds(self, tmp_path, event, average_is_in_module):
        """A file of a validation or an epoch's end has the average as its module, others the weights."""
        handler, ema = train(tmp_path, epochs=1, event=event)
        state = trainbus.load(tmp_path / "last.pt")
        other = state["callbacks"]["EMA"]["weights"][""]

        trained, averaged = handler.module.state_dict(), ema.averaged().state_dict()
        in_module, beside = (averaged, trained) if average_is_in_module else (trained, averaged)
        assert all(torch.equal(state["module"][name], in_module[name]) for name in in_module)
        assert all(torch.equal(other[name], beside[name]) for name in beside)

    def test_weights_only(self, tmp_path):
        """The best weights that ModelCheckpoint saves are those that were judged: the average."""
        model = torch.nn.Linear(3, 1)
        data = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(4)]
        with Handler(model, torch.optim.SGD(model.parameters(), lr=0.1)) as handler:
            ema = handler.add_callback(EMA(0.5))
            handler.add_callback(
                ModelCheckpoint(tmp_path / "best.pt", monitor="val_loss", save_weights_only=True)
            )
            handler.fit(data, data, epochs=1, loss_fn=mse_loss)

        assert torch.equal(trainbus.load(tmp_path / "best.pt")["weight"], ema.averaged().weight)

    @pytest.mark.parametrize("event", ["epoch_end", "train_batch_end"])
    def test_modules_that_share(self, tmp_path, event):
        """Both sets of modules with a shared parameter come out of a file as they were."""

        def run(epochs):
            torch.manual_seed(0)
            shared = torch.nn.Linear(2, 2)
            modules = {name: torch.nn.Sequential(shared, torch.nn.Linear(2, 1)) for name in ("gen", "dis")}
            data = torch.randn(4, 8, 2)
            parameters = torch.nn.ModuleDict(modules).parameters()
            optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
            with Handler(modules, optimizer) as handler:
                ema = handler.add_callback(EMA(0.5))
                handler.on(event, lambda handler: handler.save_async(tmp_path / "last.pt"), priority=100)
                handler.resume(tmp_path)
                for _ in handler.epochs(epochs):
                    for x in handler.batches(data):
                        sum(module(x).square().mean() for module in modules.values()).backward()
                        optimizer.step()
                        optimizer.zero_grad()
            return [weights(one) for one in (*modules.values(), ema.averaged("gen"), ema.averaged("dis"))]

        before = run(1)
        assert all(torch.equal(one, other) for one, other in zip(before, run(1), strict=True))
        assert torch.equal(before[2][:6], before[3][:6])

    def test_file_without_an_average(self, tmp_path):
        """Added to a run that went on without one, it begins with the weights that were loaded."""
        train(tmp_path, epochs=1, with_ema=False)
        _, ema = train(tmp_path, epochs=2)

        assert torch.isfinite(weights(ema.averaged())).all()

    def test_added_after_resume(self, tmp_path):
        """It takes its state over also when it is added after the file was loaded."""
        handler, ema = train(tmp_path, epochs=1)
        model = torch.nn.Linear(3, 1)
        with Handler(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)) as later:
            later.resume(tmp_path)
            added = later.add_callback(EMA(0.5))

        assert torch.equal(weights(model), weights(handler.module))
        assert torch.equal(weights(added.averaged()), weights(ema.averaged()))

"""An optimizer's state comes back in the types it was saved in, whatever those of its parameters are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

from trainbus import Handler
from trainbus.state.named_optimizer import NamedOptimizer
from trainbus.state.optimizer_types import load_exactly, types_saved


class Mixed(torch.optim.Optimizer):
    """An optimizer that keeps a master copy in float32, a mask, and a history."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for one in self.param_groups[0]["params"]:
            state = self.state[one]
            if not state:
                state["master"] = one.float()
                state["mask"] = {"bool": torch.rand_like(one) > 0.5}
                state["history"] = []
            state["history"].append(torch.tensor(len(state["history"]) + 2**40))
            state["master"] -= self.param_groups[0]["lr"] * one.grad.float() / 3
            one[state["mask"]["bool"]] = state["master"].to(one.dtype)[state["mask"]["bool"]]


KINDS = [Mixed, torch.optim.NAdam, torch.optim.ASGD, torch.optim.AdamW, torch.optim.LBFGS]


def make(kind, dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = nn.Linear(8, 8).to(dtype)
    return model, kind(model.parameters())


def train(model, optimizer, steps):
    for step in range(steps):
        inputs = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs.to(model.weight.dtype)).float().square().mean()
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)


def tensors(state):
    """Return the tensors in a state, nested as it may be."""
    if isinstance(state, torch.Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [tensor for part in parts for tensor in tensors(part)]


def assert_same(one, other):
    for a, b in zip(tensors(one), tensors(other), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


class TestLoad:
    @pytest.mark.parametrize("kind", KINDS)
    def test_types_and_bits(self, tmp_path, kind):
        """The state that is loaded is the one that was saved, and training goes on from it bit for bit."""
        model, optimizer = make(kind)
        train(model, optimizer, 3)
        with Handler(model, optimizer) as handler:
            handler.save(tmp_path / "a.pt")
        again, loaded = make(kind)
        with Handler(again, loaded) as handler:
            handler.load(tmp_path / "a.pt")

        assert_same(loaded.state_dict(), optimizer.state_dict())
        train(model, optimizer, 3)
        train(again, loaded, 3)
        assert_same(loaded.state_dict(), optimizer.state_dict())
        assert torch.equal(again.weight, model.weight)

    def test_several(self, tmp_path):
        """Optimizers by name are loaded so too, and an optimizer whose module is not loaded with it."""
        model, optimizer = make(Mixed)
        train(model, optimizer, 1)
        with Handler({"m": model}, {"o": optimizer}) as handler:
            handler.save(tmp_path / "a.pt")
        again, loaded = make(Mixed)
        with Handler({"m": again}, {"o": loaded}) as handler:
            handler.load(tmp_path / "a.pt", only=("optimizer",))

        assert_same(loaded.state_dict(), optimizer.state_dict())

    def test_by_names(self):
        """A state by the names of parameters keeps its types."""
        model, optimizer = make(Mixed)
        train(model, optimizer, 1)
        again, loaded = make(Mixed)
        NamedOptimizer(loaded, again).load_state_dict(NamedOptimizer(optimizer, model).state_dict())

        assert_same(loaded.state_dict(), optimizer.state_dict())

    def test_parameters_of_another_type(self, tmp_path):
        """What had its parameter's type follows it into another one, so that a step is possible."""
        model, optimizer = make(torch.optim.AdamW, torch.float32)
        train(model, optimizer, 1)
        with Handler(model, optimizer) as handler:
            handler.save(tmp_path / "a.pt")
        again, loaded = make(torch.optim.AdamW)
        with Handler(again, loaded) as handler:
            handler.load(tmp_path / "a.pt")
        train(again, loaded, 1)

        assert loaded.state[again.weight]["exp_avg"].dtype == torch.bfloat16
        assert loaded.state[again.weight]["step"].dtype == torch.float32

    def test_hooks_come_last(self, tmp_path):
        """What an optimizer's own hook makes of the loaded state stays; no hook of ours does."""
        model, optimizer = make(Mixed)
        train(model, optimizer, 1)
        with Handler(model, optimizer) as handler:
            handler.save(tmp_path / "a.pt")
            seen = []

            def halve(loaded):
                state = loaded.state[model.weight]
                seen.append(state["master"].dtype)
                state["master"] = state["master"].half()

            optimizer.register_load_state_dict_post_hook(halve)
            handler.load(tmp_path / "a.pt")

        assert seen == [torch.float32] and optimizer.state[model.weight]["master"].dtype == torch.float16
        assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1
        assert not optimizer._optimizer_load_state_dict_pre_hooks

    def test_wrapper_without_hooks(self):
        """An optimizer that stands for another one, without __init__ of torch, is loaded as it says."""

        class Wrapper(torch.optim.Optimizer):
            def __init__(self, optimizer):
                self.optimizer = optimizer

            param_groups = property(lambda self: self.optimizer.param_groups)

            def state_dict(self):
                return self.optimizer.state_dict()

            def load_state_dict(self, state):
                self.optimizer.load_state_dict(state)

        model, optimizer = make(torch.optim.AdamW)
        train(model, optimizer, 1)
        _, loaded = make(torch.optim.AdamW)
        load_exactly(Wrapper(loaded), Wrapper(optimizer).state_dict(), {})

        assert_same(loaded.state_dict(), optimizer.state_dict())


class TestRoom:
    def test_has_the_type_that_is_loaded(self):
        """A sharded state is read in its type, or that of its parameter now if it had it there."""
        model, optimizer = make(Mixed, torch.float32)
        train(model, optimizer, 1)
        outline = NamedOptimizer(optimizer, model).state_dict()
        again, loaded = make(Mixed)

        room = NamedOptimizer(loaded, again).room_for(outline, model.state_dict())["state"]["weight"]
        assert room["master"].dtype == torch.bfloat16
        room = NamedOptimizer(loaded, again).room_for(outline, again.state_dict())["state"]["weight"]
        assert room["master"].dtype == torch.float32


class TestTypesSaved:
    def test_names(self):
        """Wrappers in names are seen through, and what is no tensor is left out."""
        model = nn.Sequential(nn.Linear(1, 1))
        saved = {"_orig_mod.0.weight": torch.zeros(1, 1, dtype=torch.half), "0.bias": "?", "x": None}

        assert types_saved(model, saved) == {model[0].weight: torch.half}
        assert types_saved({"m": model, "n": model}, {"m": saved}) == {model[0].weight: torch.half}
        assert types_saved(object(), saved) == types_saved(model, None) == {}


class TestFit:
    def test_keeps_the_types(self, tmp_path):
        """fit(device=...) takes a resumed optimizer's state to the device, and leaves it its types."""
        model, optimizer = make(Mixed)
        train(model, optimizer, 1)
        before = {**optimizer.state[model.weight]}
        data = [(torch.randn(4, 8).bfloat16(), torch.randn(4, 8).bfloat16())]
        with Handler(model, optimizer) as handler:
            handler.fit(data, epochs=0, loss_fn=mse_loss, device="cpu")

        assert_same(optimizer.state[model.weight], before)

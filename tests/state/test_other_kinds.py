"""A state of another kind of optimizer or scheduler is refused; one of another version of torch is not."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as lr

from trainbus import Handler
from trainbus.errors import StateMismatchError
from trainbus.state.optimizer_types import load_exactly

OPTIMIZERS = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.NAdam,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.ASGD,
    torch.optim.Rprop,
    torch.optim.RMSprop,
    torch.optim.LBFGS,
    torch.optim.Adafactor,
]
SCHEDULERS = {
    "StepLR": lambda o: lr.StepLR(o, 1),
    "CosineAnnealingLR": lambda o: lr.CosineAnnealingLR(o, 3),
    "LinearLR": lr.LinearLR,
    "ConstantLR": lr.ConstantLR,
    "PolynomialLR": lr.PolynomialLR,
    "CosineAnnealingWarmRestarts": lambda o: lr.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr.OneCycleLR(o, 1.0, total_steps=9),
    "ReduceLROnPlateau": lr.ReduceLROnPlateau,
    "SequentialLR": lambda o: lr.SequentialLR(o, [lr.StepLR(o, 1), lr.LinearLR(o)], [1]),
}
PAIRS = [(one, other) for one in SCHEDULERS for other in SCHEDULERS if one != other]


def make(optimizer=torch.optim.SGD, scheduler=None, **options):
    model = nn.Linear(2, 1)
    made = optimizer(model.parameters(), lr=0.1, **options)
    return Handler(model, made, scheduler=scheduler and scheduler(made))


def reload(tmp_path, one, other):
    """Save the first handler's state and load it into the second."""
    with one, other:
        one.save(tmp_path / "a.pt")
        other.load(tmp_path / "a.pt")


class TestOptimizers:
    @pytest.mark.parametrize("kind", OPTIMIZERS)
    @pytest.mark.parametrize("other", [torch.optim.SGD, torch.optim.AdamW])
    def test_without_what_a_step_needs(self, tmp_path, kind, other):
        """A state is loaded if it has what the optimizer's step needs, and refused by name if not."""
        try:
            reload(tmp_path, make(kind), handler := make(other))
        except StateMismatchError as error:
            assert re.search(rf"Cannot load optimizer into {other.__name__}: .* of another kind", str(error))
            assert {kind, other} != {torch.optim.Adam, torch.optim.AdamW} and kind is not other
        else:
            handler.module(torch.ones(1, 2)).sum().backward()
            handler.optimizer.step()

    def test_stays_as_it_was(self, tmp_path):
        """An optimizer that refused a state goes on with its own."""
        handler = make(torch.optim.AdamW)
        with pytest.raises(StateMismatchError, match=r"it has dampening, .* and not betas, eps\. "):
            reload(tmp_path, make(), handler)
        handler.module(torch.ones(1, 2)).sum().backward()
        handler.optimizer.step()

        assert handler.optimizer.state[handler.module.weight]["step"] == 1

    def test_of_another_version(self):
        """Options that one version of torch has and another has not, and those of schedulers, are no kind."""
        optimizer = make(torch.optim.Adam).optimizer
        state = optimizer.state_dict()
        for name in ("maximize", "foreach", "capturable", "differentiable", "fused"):
            del state["param_groups"][0][name]
        load_exactly(optimizer, state, {})
        assert "maximize" in optimizer.param_groups[0]

        optimizer = make(torch.optim.LBFGS).optimizer
        state = optimizer.state_dict()
        del state["param_groups"][0]["history_size"]
        state["param_groups"][0] |= {"initial_lr": 0.1, "max_lr": 1.0}
        load_exactly(optimizer, state, {})

    def test_names_of_the_script(self):
        """A script may give groups entries of its own."""
        model = nn.Linear(2, 1)
        optimizer = torch.optim.LBFGS([{"params": [model.weight], "layer": 3}])
        state = optimizer.state_dict()
        del state["param_groups"][0]["history_size"]
        load_exactly(optimizer, state, {})

        assert optimizer.param_groups[0]["layer"] == 3


class TestSchedulers:
    @pytest.mark.parametrize(("one", "other"), PAIRS)
    def test_of_another_kind(self, tmp_path, one, other):
        """One kind of scheduler does not take another's state."""
        with pytest.raises(StateMismatchError, match=f"Cannot load scheduler into {other}: the state is of"):
            reload(
                tmp_path,
                make(scheduler=SCHEDULERS[one], momentum=0.9),
                make(scheduler=SCHEDULERS[other], momentum=0.9),
            )

    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_of_the_same_kind(self, tmp_path, name):
        """Each takes its own."""
        one, other = (make(scheduler=SCHEDULERS[name], momentum=0.9) for _ in range(2))
        one.scheduler.last_epoch = 5
        reload(tmp_path, one, other)

        assert other.scheduler.last_epoch == 5

    @pytest.mark.parametrize(("count", "other"), [(2, 3), (3, 2)])
    def test_number_in_a_sequence(self, tmp_path, count, other):
        """A sequence takes the state of as many schedulers as it has."""

        def sequence(number):
            return lambda o: lr.SequentialLR(
                o, [lr.StepLR(o, 1) for _ in range(number)], list(range(1, number))
            )

        with pytest.raises(
            StateMismatchError, match=f"it has {other} schedulers, and the state is of {count}"
        ):
            reload(tmp_path, make(scheduler=sequence(count)), make(scheduler=sequence(other)))

    def test_kind_in_a_sequence(self, tmp_path):
        """The schedulers in a sequence are looked at too."""

        def sequence(second):
            return lambda o: lr.ChainedScheduler([lr.StepLR(o, 1), second(o)])

        with pytest.raises(StateMismatchError, match="its scheduler 1 is a ConstantLR, and the state is of"):
            reload(tmp_path, make(scheduler=sequence(lr.LinearLR)), make(scheduler=sequence(lr.ConstantLR)))

    def test_of_another_version(self, tmp_path):
        """What torch has dropped, and private names, are no kind."""
        handler = make(scheduler=SCHEDULERS["StepLR"])
        with handler:
            handler.save(tmp_path / "a.pt")
            state = torch.load(tmp_path / "a.pt", weights_only=True)
            state["scheduler"] = {"verbose": False, "step_size": 7, "_old": 1, "last_epoch": 3, "gamma": 0.5}
            torch.save(state, tmp_path / "b.pt")
            handler.load(tmp_path / "b.pt")

        assert handler.scheduler.step_size == 7

    def test_own_class(self, tmp_path):
        """A scheduler of the script decides itself what it takes."""

        class Old(lr.StepLR):
            def __init__(self, optimizer):
                super().__init__(optimizer, 1)
                self.warmup = 1

        class New(lr.StepLR):
            def __init__(self, optimizer):
                super().__init__(optimizer, 1)
                self.warmup_steps = 2

        handler = make(scheduler=New)
        reload(tmp_path, make(scheduler=Old), handler)
        assert handler.scheduler.warmup_steps == 2


class Raising:
    """An extra whose state cannot be taken back."""

    def __init__(self, error):
        self.error = error

    def state_dict(self):
        return {"a": 1}

    def load_state_dict(self, state):
        raise self.error


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "told"),
        [
            (TypeError("bad kind"), "TypeError: bad kind"),
            (AssertionError(), "AssertionError"),
            (IndexError("out of range"), "IndexError: out of range"),
            (KeyError("name"), "KeyError: 'name'"),
            (ValueError("It has 3."), "It has 3"),
        ],
    )
    def test_are_told_with_the_part(self, tmp_path, error, told):
        """Whatever a part raises about its state comes with the part's name, and as the cause."""
        with Handler(nn.Linear(1, 1), extra={"mine": Raising(error)}) as handler:
            handler.save(tmp_path / "a.pt")
            with pytest.raises(
                StateMismatchError, match=rf"Cannot load extra\['mine'\] into Raising: {told}\. What"
            ) as raised:
                handler.load(tmp_path / "a.pt")

        assert raised.value.__cause__ is error

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), torch.OutOfMemoryError("no memory"), FileNotFoundError("x"), KeyboardInterrupt()],
    )
    def test_that_say_nothing_of_the_state(self, tmp_path, error):
        """A lack of memory, of a file, or of patience comes as it is."""
        with Handler(nn.Linear(1, 1), extra={"mine": Raising(error)}) as handler:
            handler.save(tmp_path / "a.pt")
            with pytest.raises(type(error)) as raised:
                handler.load(tmp_path / "a.pt")

        assert raised.value is error

    def test_warning_made_an_error(self, tmp_path):
        """So does a warning that the script makes an error of."""
        with Handler(nn.Linear(1, 1), extra={"mine": Raising(UserWarning("old"))}) as handler:
            handler.save(tmp_path / "a.pt")
            with pytest.raises(UserWarning, match="old"):
                handler.load(tmp_path / "a.pt")

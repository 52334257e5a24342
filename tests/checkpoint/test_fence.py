from __future__ import annotations

import gc
import inspect
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from trainbus.checkpoint import fence
from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove, Watched
from trainbus.checkpoint.copy_thread import CopyThread
from trainbus.errors import SnapshotChangedError

from .forked import holds_in_child

TOO_LONG = 30
A_MOMENT = 0.1  # given to a step that should wait and would not
OPTIMIZERS = [
    kind
    for kind in vars(torch.optim).values()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and kind is not Optimizer
]


@pytest.fixture(autouse=True)
def _nobody_elses_fence(monkeypatch) -> None:
    """A fence and torch's hooks as a new process has them; one serves all, other tests' handlers too."""
    for name in ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks"):
        monkeypatch.setattr(torch_optimizer, name, OrderedDict())
    monkeypatch.setattr(fence, "_users", 0)
    for name in ("_held", "_hooks"):
        monkeypatch.setattr(fence, name, [])
    for name in ("_stepping", "_captured", "_seen"):
        monkeypatch.setattr(fence, name, type(getattr(fence, name))())


@pytest.fixture(name="lower")
def _lower() -> Iterator[Callable[[], None]]:
    """The fence is raised; what it is lowered with."""
    lower = fence.raise_fence()
    yield lower
    lower()


class Asked(BackgroundCopy):
    """A copy that does no more than to be asked; calls *then* when it is."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        super().__init__([])
        self.times = 0
        self.then = then

    def let_change(self) -> None:
        self.times += 1
        self.then()


def held(then: Callable[[], None] = lambda: None) -> Asked:
    """Return a copy that the fence holds."""
    copy = Asked(then)
    fence.hold(copy, lambda seconds: None)
    return copy


class Custom(SGD):
    """A class of the user's, which may write to its parameters wherever it likes."""


class Own(Optimizer):
    """An optimizer from scratch."""

    def __init__(self, params) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad)


def weight(*shape: int, frozen: bool = False) -> nn.Parameter:
    parameter = nn.Parameter(torch.ones(*(shape or (3, 3))), requires_grad=not frozen)
    if not frozen:
        parameter.grad = torch.arange(float(parameter.numel())).view_as(parameter) - 2
    return parameter


def take_step(optimizer: Optimizer, parameter: nn.Parameter) -> None:
    if isinstance(optimizer, torch.optim.SparseAdam):
        parameter.grad = parameter.grad.to_sparse()
    # LBFGS has no step without a closure.
    optimizer.step(lambda: parameter.detach().sum())


def is_raised() -> tuple[int, int]:
    hooks = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    return len(hooks[0]), len(hooks[1])


class TestStep:
    @pytest.mark.parametrize("kind", [*OPTIMIZERS, Custom, Own])
    @pytest.mark.usefixtures("lower")
    def test_waits(self, kind):
        """
        A step of any optimizer waits before it writes: of each of torch's, of a subclass, of one's own.
        """
        parameter = weight()
        before = parameter.detach().clone()
        seen = []
        copy = held(lambda: seen.append(parameter.detach().clone()))

        take_step(kind([parameter]), parameter)

        assert copy.times == 1
        assert seen[0].equal(before)
        assert not parameter.equal(before)

    @pytest.mark.usefixtures("lower")
    def test_of_an_optimizer_made_before(self):
        """
        An optimizer that was there and had stepped before the fence was raised waits as well.
        """
        lower, parameter = fence.raise_fence(), weight()
        lower()
        optimizer = SGD([parameter], lr=1)
        optimizer.step()
        copy = held()

        optimizer.step()

        assert copy.times == 1

    @pytest.mark.usefixtures("lower")
    def test_on_another_thread(self):
        """
        A copy made by another thread is complete, with the values from before, when the step writes.
        """
        parameter = weight()
        target = torch.zeros_like(parameter).detach()
        written, early = threading.Event(), []

        class Slow(HostMove):
            def begin(self) -> None:
                early.append(written.wait(A_MOMENT))
                super().begin()

        copy = BackgroundCopy([Slow([target], [parameter])], Watched([parameter], [target]))
        thread = CopyThread()
        thread.start()
        fence.hold(copy, lambda seconds: None)
        thread.carry_out(copy)

        SGD([parameter], lr=1).step()
        written.set()
        copy.wait()
        thread.close()

        assert early == [False]
        assert target.eq(1).all()
        assert not parameter.eq(1).all()

    @pytest.mark.usefixtures("lower")
    def test_nothing_held(self):
        """
        A step with nothing to wait for is a step.
        """
        parameter = weight()

        SGD([parameter], lr=1).step()

        assert not parameter.eq(1).all()

    @pytest.mark.usefixtures("lower")
    def test_once(self):
        """
        What was waited for is not waited for again.
        """
        copy, optimizer = held(), SGD([weight()])

        optimizer.step()
        optimizer.step()

        assert copy.times == 1

    @pytest.mark.usefixtures("lower")
    def test_all_that_are_held(self):
        """
        A step waits for every copy, whoever holds it, the oldest first.
        """
        order: list[int] = []
        for number in range(3):
            held(lambda number=number: order.append(number))

        SGD([weight()]).step()

        assert order == [0, 1, 2]

    @pytest.mark.usefixtures("lower")
    def test_held_while_waiting(self):
        """
        What is held while a step waits is left to the next.
        """
        later: list[Asked] = []
        held(lambda: later.append(held()))
        optimizer = SGD([weight()])

        optimizer.step()
        assert later[0].times == 0
        optimizer.step()

        assert later[0].times == 1

    @pytest.mark.usefixtures("lower")
    def test_changed_by_hand(self):
        """
        What a checked copy found out comes out of the step, which has not written by then.
        """
        parameter = weight()

        def find_changed() -> None:
            raise SnapshotChangedError(["there"])

        held(find_changed)
        optimizer = SGD([parameter], lr=1)

        with pytest.raises(SnapshotChangedError, match="there changed"):
            optimizer.step()

        assert parameter.eq(1).all()
        assert not fence.is_stepping()
        optimizer.step()

    @pytest.mark.usefixtures("lower")
    def test_error_leaves_the_others_held(self):
        """
        What one copy found out lets nobody change what the copies behind it still read.
        """

        def find_changed() -> None:
            raise SnapshotChangedError(["there"])

        failing, other = held(find_changed), held()
        optimizer = SGD([weight()])
        with pytest.raises(SnapshotChangedError):
            optimizer.step()

        optimizer.step()

        assert (failing.times, other.times) == (1, 1)

    @pytest.mark.usefixtures("lower")
    def test_interrupted(self):
        """
        A wait that Ctrl-C ended is waited for again by the next step: the copy goes on.
        """
        to_come: list[BaseException] = [KeyboardInterrupt()]

        def interrupted_once() -> None:
            if to_come:
                raise to_come.pop()

        copy = held(interrupted_once)
        optimizer = SGD([weight()])
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()

        optimizer.step()
        optimizer.step()

        assert copy.times == 2


class TestWait:
    def test_by_hand(self):
        """
        Waiting is for everyone, not for steps alone, and needs no raised fence.
        """
        copy = held()

        fence.wait()
        fence.wait()

        assert copy.times == 1

    def test_charge(self, monkeypatch):
        """
        Each copy is charged with the seconds that it alone was waited for.
        """
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(fence, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        charged: list[tuple[str, float]] = []

        def takes(seconds: float) -> Callable[[], None]:
            return lambda: setattr(clock, "now", clock.now + seconds)

        fence.hold(Asked(takes(2)), lambda seconds: charged.append(("first", seconds)))
        fence.hold(Asked(takes(3)), lambda seconds: charged.append(("second", seconds)))
        fence.wait()

        assert charged == [("first", 2), ("second", 3)]

    def test_charge_of_an_error(self, monkeypatch):
        """
        A wait that ends in an error is charged too.
        """
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(fence, "time", SimpleNamespace(perf_counter=lambda: clock.now))
        charged: list[float] = []

        def fail() -> None:
            clock.now += 2
            raise SnapshotChangedError(["there"])

        fence.hold(Asked(fail), charged.append)
        with pytest.raises(SnapshotChangedError):
            fence.wait()

        assert charged == [2]


class TestRaiseFence:
    def test_lowered(self):
        """
        When the last who raised it lowers the fence, torch has no hook of ours and steps are free.
        """
        assert is_raised() == (0, 0)
        lowers = [fence.raise_fence() for _ in range(2)]
        assert is_raised() == (1, 1)

        lowers[0]()
        assert is_raised() == (1, 1)
        lowers[1]()

        assert is_raised() == (0, 0)
        copy = held()
        SGD([weight()]).step()
        assert copy.times == 0

    def test_lowered_twice(self):
        """
        Lowering twice counts once: the fence of another stays.
        """
        first, second = fence.raise_fence(), fence.raise_fence()

        first()
        first()
        assert is_raised() == (1, 1)
        second()
        second()

        assert is_raised() == (0, 0)

    def test_raised_again(self):
        """
        A fence that was lowered can be raised again.
        """
        fence.raise_fence()()
        lower = fence.raise_fence()
        copy = held()

        SGD([weight()]).step()
        lower()

        assert copy.times == 1
        assert is_raised() == (0, 0)

    def test_others_hooks(self):
        """
        Hooks of others on all optimizers stay and are called.
        """
        calls: list[str] = []
        hook = torch_optimizer.register_optimizer_step_pre_hook(lambda *args: calls.append("before"))
        fence.raise_fence()()

        SGD([weight()]).step()
        hook.remove()

        assert calls == ["before"]


class TestIsStepping:
    @pytest.mark.parametrize("kind", [SGD, Adam, torch.optim.LBFGS, Custom])
    @pytest.mark.usefixtures("lower")
    def test_inside_of_a_step(self, kind):
        """
        It is true inside of a step, as its closure sees, and before and after it is not.
        """
        parameter, seen = weight(), []

        def closure() -> torch.Tensor:
            seen.append(fence.is_stepping())
            return parameter.detach().sum()

        optimizer = kind([parameter])
        assert not fence.is_stepping()
        optimizer.step(closure)

        assert set(seen) == {True}
        assert not fence.is_stepping()

    @pytest.mark.usefixtures("lower")
    def test_one_in_another(self):
        """
        A step inside of another's ends its own alone.
        """
        inner, parameter, seen = SGD([weight()]), weight(), []

        def closure() -> torch.Tensor:
            inner.step()
            seen.append(fence.is_stepping())
            return parameter.detach().sum()

        SGD([parameter]).step(closure)

        assert seen == [True]
        assert not fence.is_stepping()

    @pytest.mark.usefixtures("lower")
    def test_step_that_raised(self):
        """
        A step that raised counts as not ended, until that optimizer makes a whole one.
        """
        optimizer, other = SGD([weight()]), SGD([weight()])

        def broken() -> float:
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            optimizer.step(broken)
        other.step()
        assert fence.is_stepping()
        optimizer.step()

        assert not fence.is_stepping()

    @pytest.mark.usefixtures("lower")
    def test_optimizer_that_is_gone(self):
        """
        An optimizer whose step raised counts no longer than it exists.
        """

        def broken() -> float:
            raise ArithmeticError

        with pytest.raises(ArithmeticError):
            SGD([weight()]).step(broken)
        gc.collect()

        assert not fence.is_stepping()

    def test_lowered_in_a_step(self):
        """
        A fence that is lowered inside of a step, whose end it does not see, forgets that step.
        """
        lower, parameter = fence.raise_fence(), weight()
        optimizer = SGD([parameter])

        def closure() -> torch.Tensor:
            lower()
            return parameter.detach().sum()

        optimizer.step(closure)

        assert not fence.is_stepping()


def owned(*optimizers: object) -> set[int]:
    found = fence.owned_tensors(optimizers)
    assert all(tensor.data_ptr() == address for address, tensor in found.items())
    return {id(tensor) for tensor in found.values()}


def ids(*tensors: torch.Tensor) -> set[int]:
    return {id(tensor) for tensor in tensors}


class TestOwnedTensors:
    def test_parameters(self):
        """
        An optimizer owns the parameters that require grad, in all of its groups, and no frozen ones.
        """
        trained, frozen, other = weight(), weight(frozen=True), weight()

        optimizer = SGD([{"params": [trained, frozen]}, {"params": other, "lr": 1}])

        assert owned(optimizer) == ids(trained, other)

    def test_frozen_later(self):
        """
        What requires grad is asked anew each time.
        """
        parameter = weight()
        optimizer = SGD([parameter])
        assert owned(optimizer) == ids(parameter)

        parameter.requires_grad_(False)

        assert owned(optimizer) == set()

    def test_plain_tensor(self):
        """
        A tensor that requires grad without being a parameter is owned as well.
        """
        tensor = torch.ones(3, requires_grad=True)

        assert owned(SGD([tensor])) == ids(tensor)

    @pytest.mark.parametrize("kind", [Adam, AdamW, torch.optim.Adagrad, torch.optim.RMSprop])
    def test_state(self, kind):
        """
        The tensors of an optimizer's state are owned, from when there are some.
        """
        parameter = weight()
        optimizer = kind([parameter])
        optimizer.step()
        state = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
        assert len(state) >= 2

        assert owned(optimizer) == ids(parameter, *state)

    def test_state_in_lists(self):
        """
        What LBFGS keeps in lists is left out; its other tensors and the parameters are owned.
        """
        parameter = weight()
        optimizer = torch.optim.LBFGS([parameter], max_iter=2)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = parameter.square().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        state = optimizer.state[parameter]
        assert state["old_dirs"]
        in_lists = ids(*(t for t in state["old_dirs"] + state["old_stps"] + state["ro"]))

        found = owned(optimizer)

        assert found >= ids(parameter, state["d"], state["prev_flat_grad"])
        assert not found & in_lists

    def test_state_that_is_no_mapping(self):
        """
        A state of another form than torch's optimizers have is left out.
        """
        parameter = weight()
        optimizer = SGD([parameter])
        optimizer.state["of the user"] = [torch.ones(3)]

        assert owned(optimizer) == ids(parameter)

    def test_added_group(self):
        """
        A parameter that is added later is owned from then on.
        """
        first, second = weight(), weight()
        optimizer = SGD([first])
        assert owned(optimizer) == ids(first)

        optimizer.add_param_group({"params": [second]})

        assert owned(optimizer) == ids(first, second)

    def test_several(self):
        """
        Several optimizers own what each of them does, together.
        """
        one, two, both = weight(), weight(), weight()

        assert owned(SGD([one, both]), Adam([two, both])) == ids(one, two, both)

    def test_none(self):
        """
        No optimizers own nothing.
        """
        assert fence.owned_tensors(()) == {}

    @pytest.mark.parametrize("kind", [Custom, Own])
    def test_custom_class(self, kind):
        """
        An optimizer of another class than torch's owns nothing, also one derived from one of them.
        """
        one, two = weight(), weight()

        assert owned(kind([one]), SGD([two])) == ids(two)

    def test_no_optimizer(self):
        """
        What only looks like an optimizer owns nothing.
        """
        looks_like_one = SimpleNamespace(param_groups=[{"params": [weight()]}], state={})

        assert owned(looks_like_one, None) == set()

    def test_custom_tensors(self):
        """
        A parameter of a class of the user's is left out: its bytes may lie anywhere.
        """

        class Mine(nn.Parameter):
            pass

        mine, plain = Mine(torch.ones(3)), weight()
        assert type(mine) is Mine

        assert owned(SGD([mine, plain])) == ids(plain)

    def test_without_memory(self):
        """
        Tensors without elements or without data are left out.
        """
        parameter = weight()
        meta = nn.Parameter(torch.ones(3, device="meta"))

        assert owned(SGD([nn.Parameter(torch.zeros(0)), meta, parameter])) == ids(parameter)

    def test_sparse_parameter(self):
        """
        A sparse parameter is left out, and no reason to fail.
        """
        parameter, sparse = weight(), nn.Parameter(torch.eye(3).to_sparse())

        assert owned(SGD([sparse, parameter])) == ids(parameter)

    def test_sparse_state(self):
        """
        A sparse tensor of a state is left out.
        """
        parameter = weight()
        optimizer = SGD([parameter])
        optimizer.state[parameter]["odd"] = torch.eye(3).to_sparse()

        assert owned(optimizer) == ids(parameter)


class TestStrangers:
    @pytest.mark.parametrize("kind", [Custom, Own])
    @pytest.mark.usefixtures("lower")
    def test_shared_tensor(self, kind):
        """
        What an optimizer of another class was seen to step is not owned, from then on.
        """
        shared, alone = weight(), weight()
        optimizer, stranger = SGD([shared, alone]), kind([shared])
        assert owned(optimizer) == ids(shared, alone)

        stranger.step()

        assert owned(optimizer) == ids(alone)

    @pytest.mark.usefixtures("lower")
    def test_known_ones_share(self):
        """
        Two optimizers of torch may share a tensor: both write in their steps alone.
        """
        shared = weight()
        one, two = SGD([shared]), SGD([shared])

        one.step()
        two.step()

        assert owned(one) == ids(shared)

    @pytest.mark.usefixtures("lower")
    def test_stranger_that_is_gone(self):
        """
        A stranger that does not exist any more writes nowhere.
        """
        shared = weight()
        stranger = Custom([shared])
        stranger.step()

        del stranger
        gc.collect()

        assert owned(SGD([shared])) == ids(shared)

    @pytest.mark.usefixtures("lower")
    def test_captured_in_a_graph(self, monkeypatch):
        """
        A step in the capture of a CUDA graph waits for nothing, and its tensors are owned no more.
        """
        captured, shared, alone = weight(), weight(), weight()
        optimizer, other = SGD([captured, shared]), SGD([shared, alone])
        copy = held()
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            fence._before_step(optimizer, (), {})

        assert copy.times == 0
        assert not fence.is_stepping()
        assert owned(optimizer, other) == ids(alone)
        other.step()
        assert copy.times == 1


class TestKnows:
    @pytest.mark.parametrize(
        ("optimizers", "known"),
        [
            (lambda: (), False),
            (lambda: [Custom([weight()])], False),
            (lambda: [Own([weight()])], False),
            (lambda: [object(), None], False),
            (lambda: [Custom([weight()]), Adam([weight()])], True),
        ],
    )
    def test_one_of_torch(self, optimizers, known):
        """
        Optimizers are known if one of them is exactly of one of torch's classes.
        """
        assert fence.knows(optimizers()) is known

    @pytest.mark.parametrize("kind", OPTIMIZERS)
    def test_each_of_torch(self, kind):
        """
        Each of torch's own is known.
        """
        assert fence.knows([kind([weight()])])


# torch's compiler starts threads of its own, and has warnings of its own making.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("lower")
class TestCompiled:
    def test_compiled_step(self):
        """
        A compiled step waits as any other does, also when it was compiled before there was anything held.
        """
        parameter = weight()
        optimizer = SGD([parameter], lr=0.1)
        step = torch.compile(lambda: optimizer.step(), backend="eager")
        step()
        before, seen = parameter.detach().clone(), []
        copy = held(lambda: seen.append(parameter.detach().clone()))

        step()

        assert copy.times == 1
        assert seen[0].equal(before)
        assert not parameter.equal(before)
        assert not fence.is_stepping()

    def test_full_graph(self):
        """
        A step compiled as one graph is refused by torch with our reason and what to do.
        """
        optimizer = SGD([weight()])
        step = torch.compile(lambda: optimizer.step(), backend="eager", fullgraph=True)

        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"trainbus waits here .* without fullgraph=True"
        ):
            step()


# Python warns of every fork beside threads; torch has some.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.usefixtures("lower")
class TestFork:
    def test_child_begins_open(self):
        """
        A forked child does not wait for what its parent was copying; the parent still does.
        """
        copy, optimizer = held(), SGD([weight()])

        def steps() -> bool:
            optimizer.step()
            return copy.times == 0

        assert holds_in_child(steps)
        optimizer.step()
        assert copy.times == 1

    def test_child_forked_in_a_step(self):
        """
        A child forked inside of a step is not inside of one.
        """
        parameter, children = weight(), []

        def closure() -> torch.Tensor:
            children.append(holds_in_child(lambda: not fence.is_stepping()))
            return parameter.detach().sum()

        SGD([parameter]).step(closure)

        assert children == [True]

    def test_child_is_fenced(self):
        """
        What a child holds itself is waited for there, also if the parent's fence was in use at the fork.
        """
        optimizer = SGD([weight()])

        def waits() -> bool:
            copy = held()
            optimizer.step()
            return copy.times == 1

        with fence._lock:
            assert holds_in_child(waits)

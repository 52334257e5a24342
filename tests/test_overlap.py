"""Runs whose saves are copied while training goes on: each file holds the state of one moment, or is none.

The background copies half of each tensor and goes on only when something is about to change them, so that
whatever a script does between a save and the next step falls into the middle of the copy.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from trainbus import Handler
from trainbus.checkpoint import fence, staging_copy
from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove, Watched
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.errors import CheckpointError, SnapshotChangedError
from trainbus_callbacks import EMA

WAIT = 30
"""Seconds after which a test that hangs fails."""
PARTS = ("module", "optimizer", "scheduler", "scaler", "extra")
BATCHES = 4

# -- the slowed copy


class HalfMove:
    """Copies the first half of each tensor, and the second when the gate is open."""

    def __init__(self, move: HostMove, gate: threading.Event) -> None:
        self.halves = [
            (target.view(-1), source.detach().view(-1), target.numel() // 2)
            for target, source in zip(move.targets, move.sources, strict=True)
        ]
        self.gate = gate

    def begin(self) -> None:
        for target, source, half in self.halves:
            target[:half].copy_(source[:half])
        assert self.gate.wait(WAIT), "no fence came"
        for target, source, half in self.halves:
            target[half:].copy_(source[half:])

    def hold_back(self) -> None: ...

    def finish(self) -> None: ...


class SlowCopy(BackgroundCopy):
    """Lasts until a fence, or until the training thread waits for it otherwise."""

    all: ClassVar[weakref.WeakSet[SlowCopy]] = weakref.WeakSet()
    made: ClassVar[int] = 0
    overtaken: ClassVar[int] = 0  # those at whose second half the training thread was elsewhere
    places: ClassVar[set[str]] = set()  # of what waited in any of them

    def __init__(
        self, moves: Any, watched: Watched, place_of: Callable[[Any], str] = repr, **options: Any
    ) -> None:
        self.gate = threading.Event()
        super().__init__([HalfMove(move, self.gate) for move in moves], watched, place_of, **options)
        SlowCopy.made += 1
        SlowCopy.places |= {place_of(one) for one in watched.copies}
        SlowCopy.all.add(self)

    @classmethod
    def open_all(cls) -> None:
        for copy in list(cls.all):
            copy.gate.set()

    def let_change(self) -> None:
        SlowCopy.overtaken += not self.gate.is_set()
        # The one that is let go may stand behind others.
        self.open_all()
        super().let_change()

    def wait_until_arrived(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.open_all()
        super().wait_until_arrived()


@pytest.fixture(autouse=True)
def _slow_copies(monkeypatch):
    SlowCopy.made = SlowCopy.overtaken = 0
    SlowCopy.places = set()
    monkeypatch.setattr(staging_copy, "BackgroundCopy", SlowCopy)
    torch.manual_seed(0)
    yield
    SlowCopy.open_all()


# -- what is compared


def cloned(state: Any) -> Any:
    """Return a deep copy made at once."""
    if isinstance(state, torch.Tensor):
        return state.detach().clone()
    if isinstance(state, Mapping):
        return {key: cloned(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [cloned(value) for value in state]
    return state


def differences(left: Any, right: Any, path: str = "state") -> list[str]:
    """Return where two states are not the same, bit for bit."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        same = left.dtype == right.dtype and left.shape == right.shape
        return [] if same and bits(left).equal(bits(right)) else [path]
    if isinstance(left, Mapping) and isinstance(right, Mapping) and left.keys() == right.keys():
        return [place for key in left for place in differences(left[key], right[key], f"{path}[{key!r}]")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [place for n, (one, two) in pairs for place in differences(one, two, f"{path}[{n}]")]
    return [] if type(left) is type(right) and left == right else [path]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Run:
    """
    A training that saves at the end of each batch, and clones what it saves on the spot.

    Attributes:
        wanted: The clones by global step.
        saves: What was asked for.
        raised: What a fence raised, if it did.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = options
        self.wanted: dict[int, Any] = {}
        self.saves: list[PendingSave] = []
        self.raised: SnapshotChangedError | None = None

    def handler(
        self, module: Any, optimizer: Any, around: Any = contextlib.nullcontext, **more: Any
    ) -> Handler:
        """Return a handler that saves at each ``train_batch_end``, inside of the context *around*."""
        handler = Handler(module, optimizer, on_write_error="warn", **{**self.options, **more})

        @handler.on("train_batch_end")
        def save() -> None:
            with around():
                self.save(handler)

        return handler

    def save(self, handler: Handler) -> PendingSave:
        state = handler.collect(weights_only=False)
        wanted = {part: cloned(state[part]) for part in PARTS}
        self.saves.append(handler.save_async(self.folder / f"{len(self.saves)}.pt"))
        self.wanted[self.saves[-1].global_step] = wanted
        return self.saves[-1]

    def play(self, script: Callable[[Run], None]) -> Run:
        try:
            script(self)
        except SnapshotChangedError as error:
            self.raised = error
        return self

    def failures(self) -> list[CheckpointError]:
        """Return why saves failed, in the order they were asked for."""
        found = []
        for save in self.saves:
            try:
                save.result(WAIT)
            except CheckpointError as error:
                found.append(error)
        return found

    def named(self) -> set[str]:
        """Return the places that were said to be changed."""
        errors = [self.raised, *self.failures(), *(error.__cause__ for error in self.failures())]
        return {
            place for error in errors if isinstance(error, SnapshotChangedError) for place in error.places
        }

    def unsound(self) -> dict[str, list[str]]:
        """Return the files that are not what was asked for, with the places."""
        found = {}
        for name in sorted(os.listdir(self.folder)):
            state, manifest = load_file(self.folder / name)
            places = differences({part: state[part] for part in PARTS}, self.wanted[manifest.global_step])
            if places:
                found[name] = places
        return found

    def assert_sound(self, files: int | None = None) -> None:
        """Require that every save succeeded, and with the values of its moment."""
        assert self.raised is None
        assert self.failures() == []
        assert self.unsound() == {}
        assert len(os.listdir(self.folder)) == (len(self.saves) if files is None else files) > 0


# -- what is trained


class Net(nn.Module):
    """Two matrices large enough to wait, and much that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(128, 160)
        self.norm = nn.BatchNorm1d(160)
        self.down = nn.Linear(160, 128)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.norm(self.up(x)).relu())


MATRICES = {"state['module']['up.weight']", "state['module']['down.weight']"}


def batches(n: int = BATCHES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 128, generator=generator) for _ in range(n)]


def backward(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss = (model(batch) - batch).square().mean()
    loss.backward()
    return loss


def learn(model: nn.Module, optimizer: Any, batch: torch.Tensor) -> None:
    backward(model, batch)
    optimizer.step()
    optimizer.zero_grad()


def momentum(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


# -- the scripts


def plain(run: Run) -> None:
    model = Net()
    optimizer = momentum(model)
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(2):
            for batch in handler.batches(batches()):
                learn(model, optimizer, batch)


def wgan(run: Run) -> None:
    """Clamps the critic through .data at the top of a batch."""
    critic = Net()
    optimizer = torch.optim.RMSprop(critic.parameters(), lr=0.01)
    with run.handler(critic, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                for parameter in critic.parameters():
                    parameter.data.clamp_(-0.01, 0.01)
                learn(critic, optimizer, batch)


def decay_by_hand(run: Run) -> None:
    model = Net()
    optimizer = momentum(model)
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.mul_(0.99)
                learn(model, optimizer, batch)


class SAM(torch.optim.Optimizer):
    """Goes uphill by hand before it steps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {})
        self.base = momentum(model)

    @torch.no_grad()
    def climb(self) -> None:
        self.uphill = [0.05 * parameter.grad for parameter in self.param_groups[0]["params"]]
        torch._foreach_add_(self.param_groups[0]["params"], self.uphill)
        self.zero_grad()

    @torch.no_grad()
    def descend(self) -> None:
        torch._foreach_sub_(self.param_groups[0]["params"], self.uphill)
        self.base.step()
        self.zero_grad()

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        self.climb()
        closure()
        self.descend()


def sam(run: Run) -> None:
    model = Net()
    optimizer = SAM(model)
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                optimizer.step(lambda batch=batch: backward(model, batch))


def sam_whose_base_is_saved(run: Run) -> None:
    """As many do: the handler is given the inner optimizer, which is torch's."""
    model = Net()
    optimizer = SAM(model)
    with run.handler(model, optimizer.base) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                optimizer.step(lambda batch=batch: backward(model, batch))


def sam_in_two_steps(run: Run) -> None:
    """The same, climbing by a method of its own that no hook sees."""
    model = Net()
    optimizer = SAM(model)
    with run.handler(model, optimizer.base) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                backward(model, batch)
                optimizer.climb()
                backward(model, batch)
                optimizer.descend()


class ScheduleFree(torch.optim.Optimizer):
    """Averages its weights, and lends them to the model between eval() and train()."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["average"] = parameter.detach().clone()

    @torch.no_grad()
    def step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.sub_(parameter.grad, alpha=0.1)
            self.state[parameter]["average"].lerp_(parameter, 0.5)

    def train(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            average = self.state[parameter]["average"]
            swapped = parameter.detach().clone()
            parameter.data.copy_(average)
            average.copy_(swapped)

    eval = train


def schedule_free(run: Run) -> None:
    model = Net()
    optimizer = ScheduleFree(model.parameters())

    @contextlib.contextmanager
    def evaluating() -> Iterator[None]:
        optimizer.eval()
        yield
        optimizer.train()

    with run.handler(model, optimizer, evaluating) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                learn(model, optimizer, batch)


class Average:
    """An average of a model's weights that it takes for a while."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = list(model.parameters())
        self.values = [parameter.detach() * 0.5 for parameter in self.parameters]

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self.assign(self.values)
        yield
        self.assign(kept)

    @torch.no_grad()
    def assign(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)


class AverageThroughData(Average):
    """Copies where the tensor does not notice."""

    def assign(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.data.copy_(value)


class AverageByExchange(Average):
    """Gives the parameters other memory and that of before back."""

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        kept = [parameter.data for parameter in self.parameters]
        for parameter, value in zip(self.parameters, self.values, strict=True):
            parameter.data = value
        yield
        for parameter, value in zip(self.parameters, kept, strict=True):
            parameter.data = value


def saved_within(kind: type[Average]) -> Callable[[Run], None]:
    """Return the script that saves the averaged weights."""

    def script(run: Run) -> None:
        model = Net()
        optimizer = momentum(model)
        with run.handler(model, optimizer, kind(model).swapped) as handler:
            for _ in handler.epochs(1):
                for batch in handler.batches(batches()):
                    learn(model, optimizer, batch)

    return script


def loaded_between_batches(run: Run) -> None:
    model = Net()
    optimizer = momentum(model)
    best = cloned(model.state_dict())
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                model.load_state_dict(best)
                learn(model, optimizer, batch)


class Scaled(Net):
    """Has a temperature for each of many classes, which forward keeps small."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(20_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.temperature.data.clamp_(max=1.0)
        return super().forward(x) * self.temperature.mean()


def temperature(run: Run) -> None:
    model = Scaled()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                # Upwards, so that the next pass clamps it.
                model.temperature.sum().neg().backward()
                learn(model, optimizer, batch)


def moco(run: Run) -> None:
    """Moves an encoder without gradients behind the one that is trained."""
    model = nn.ModuleDict({"query": Net(), "key": Net()})
    model["key"].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with run.handler(model, optimizer) as handler:
        for _ in handler.epochs(1):
            for batch in handler.batches(batches()):
                with torch.no_grad():
                    pairs = zip(model["key"].parameters(), model["query"].parameters(), strict=True)
                    for slow, fast in pairs:
                        slow.lerp_(fast, 0.5)
                learn(model["query"], optimizer, batch)


SOUND = {
    "plain": plain,
    "moco": moco,
    "sam": sam,
    "sam whose base is saved": sam_whose_base_is_saved,
    "schedule-free": schedule_free,
}
TRIPPED = {
    "decay by hand": (decay_by_hand, MATRICES),
    "saved within an average": (saved_within(Average), MATRICES),
    "saved within exchanged memory": (saved_within(AverageByExchange), MATRICES),
    "loaded between batches": (loaded_between_batches, MATRICES),
    "sam in two steps": (sam_in_two_steps, MATRICES),
}
UNNOTICED = {
    "wgan": (wgan, MATRICES),
    "temperature": (temperature, {"state['module']['temperature']"}),
    "saved within an average through data": (saved_within(AverageThroughData), MATRICES),
}
SCRIPTS = {
    **SOUND,
    **{name: script for name, (script, _) in TRIPPED.items()},
    **{name: script for name, (script, _) in UNNOTICED.items()},
}


class TestScripts:
    @pytest.mark.parametrize("name", list(SCRIPTS))
    def test_auto(self, tmp_path, name):
        """
        Under "auto", whatever a script does, each file is what was asked for.
        """
        run = Run(tmp_path, snapshot="auto").play(SCRIPTS[name])

        run.assert_sound()
        assert SlowCopy.made == 0

    @pytest.mark.parametrize("check", [False, True])
    @pytest.mark.parametrize("name", list(SOUND))
    def test_that_keep_the_promise(self, tmp_path, name, check):
        """
        Where only known optimizers change what waits, each file is what was asked for, and no check objects.
        """
        run = Run(tmp_path, snapshot="overlap", check_snapshots=check).play(SCRIPTS[name])

        run.assert_sound()

    @pytest.mark.parametrize(
        ("name", "waiting"),
        [
            ("plain", MATRICES),
            ("moco", {f"state['module']['query.{which}.weight']" for which in ("up", "down")}),
            ("sam", set()),
            ("sam whose base is saved", set()),
            ("schedule-free", set()),
        ],
    )
    def test_what_waits(self, tmp_path, name, waiting):
        """
        Weights wait that an optimizer of torch trains, unless one of another class has stepped them.
        """
        Run(tmp_path, snapshot="overlap").play(SCRIPTS[name])

        assert {place for place in SlowCopy.places if place.startswith("state['module']")} == waiting
        assert (SlowCopy.overtaken > 0) == (len(SlowCopy.places) > 0)

    @pytest.mark.parametrize("name", list(TRIPPED))
    def test_that_trip_the_wire(self, tmp_path, name, caplog):
        """
        A save whose weights were changed by hand fails and names them; those after it are sound.
        """
        script, places = TRIPPED[name]

        run = Run(tmp_path, snapshot="overlap").play(script)

        assert run.raised is None
        assert len(run.failures()) == 1
        assert run.named() == places
        assert run.unsound() == {}
        assert len(os.listdir(tmp_path)) == len(run.saves) - 1 == BATCHES - 1
        assert caplog.text.count("Saves copy everything at once from now on") == 1

    @pytest.mark.parametrize("name", list(UNNOTICED))
    def test_that_leave_no_trace(self, tmp_path, name):
        """
        Writing through .data breaks the promise unnoticed, as the documentation says ...
        """
        script, places = UNNOTICED[name]

        run = Run(tmp_path, snapshot="overlap").play(script)

        assert run.failures() == []
        torn = run.unsound()
        assert torn
        assert all(places <= set(found) for found in torn.values())

    @pytest.mark.parametrize("name", [*TRIPPED, *UNNOTICED])
    def test_checked(self, tmp_path, name):
        """
        ... but not check_snapshots: it names the tensors, and no file is other than what was asked for.
        """
        script, places = {**TRIPPED, **UNNOTICED}[name]

        run = Run(tmp_path, snapshot="overlap", check_snapshots=True).play(script)

        assert places <= run.named()
        assert run.unsound() == {}


# -- optimizers


def each_parameter(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    return {name: torch.optim.SGD([p], lr=0.1, momentum=0.9) for name, p in model.named_parameters()}


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "SGD": momentum,
    "SGD fused": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, fused=True),
    "Adam foreach": lambda model: torch.optim.Adam(model.parameters(), foreach=True),
    "Adam loop": lambda model: torch.optim.Adam(model.parameters(), foreach=False, amsgrad=True),
    "Adam fused": lambda model: torch.optim.Adam(model.parameters(), fused=True),
    "AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
    "AdamW loop": lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
    "AdamW fused": lambda model: torch.optim.AdamW(model.parameters(), fused=True),
    "Adagrad": lambda model: torch.optim.Adagrad(model.parameters()),
    "RMSprop": lambda model: torch.optim.RMSprop(model.parameters(), momentum=0.9, centered=True),
}


@pytest.mark.parametrize("check", [False, True])
class TestOptimizers:
    @pytest.mark.parametrize("name", list(OPTIMIZERS))
    def test_step(self, tmp_path, name, check):
        """
        Weights and the optimizer's state wait, and are written as they were before the next step.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = OPTIMIZERS[name](model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    learn(model, optimizer, batch)

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(2 * BATCHES)

        assert SlowCopy.overtaken > BATCHES
        assert MATRICES < SlowCopy.places
        assert any(place.startswith("state['optimizer']") for place in SlowCopy.places)

    def test_lbfgs(self, tmp_path, check):
        """
        A step that calls a closure waits before it first does.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(BATCHES, batches()):

                    def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                        optimizer.zero_grad()
                        return backward(model, batch)

                    optimizer.step(closure)

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(BATCHES)

        assert SlowCopy.overtaken > 0

    def test_two(self, tmp_path, check):
        """
        With two optimizers that take turns, either's step waits for the weights of both.
        """

        def script(run: Run) -> None:
            model = nn.ModuleDict({"a": Net(), "b": Net()})
            optimizers = {name: momentum(part) for name, part in model.items()}
            with run.handler(model, optimizers) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    name = "ab"[handler.global_step % 2]
                    learn(model[name], optimizers[name], batch)

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(2 * BATCHES)

        assert {"state['module']['a.up.weight']", "state['module']['b.up.weight']"} < SlowCopy.places

    def test_in_backward(self, tmp_path, check):
        """
        Optimizers that step within the backward pass wait there.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizers = each_parameter(model)
            names = {parameter: name for name, parameter in model.named_parameters()}

            def step(parameter: torch.Tensor) -> None:
                optimizers[names[parameter]].step()
                optimizers[names[parameter]].zero_grad()

            for parameter in model.parameters():
                parameter.register_post_accumulate_grad_hook(step)
            with run.handler(model, optimizers) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    backward(model, batch)

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(BATCHES)

        assert SlowCopy.overtaken > 0

    def test_skipped_by_a_scaler(self, tmp_path, check):
        """
        A step that a GradScaler skips because of infinities holds nothing up.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            with run.handler(model, optimizer, scaler=scaler, max_pending=2) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    loss = (model(batch) - batch).square().mean()
                    if handler.batch == 2:
                        loss = loss * float("inf")
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
            assert scaler.get_scale() == 1.0

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(2 * BATCHES)

        assert SlowCopy.overtaken > 0

    def test_accumulation(self, tmp_path, check):
        """
        Saves that are put off until gradients are used are copied in the background as well.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    backward(model, batch)
                    if handler.batch % 2:
                        optimizer.step()
                        optimizer.zero_grad()

        run = Run(tmp_path, snapshot="overlap", check_snapshots=check, max_pending=3).play(script)
        run.assert_sound(2 * BATCHES)

        assert {save.global_step for save in run.saves} == set(range(2, 2 * BATCHES + 1, 2))
        assert SlowCopy.overtaken > 0

    def test_frozen(self, tmp_path, check):
        """
        A frozen weight may be changed by hand, also after it was trained.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    if not model.up.weight.requires_grad:
                        model.up.weight.data.mul_(0.5)
                    learn(model, optimizer, batch)
                    if handler.global_step == 2:
                        model.up.weight.requires_grad_(False)

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(2 * BATCHES)

        assert SlowCopy.overtaken > 0

    def test_grows(self, tmp_path, check):
        """
        Weights given to the optimizer in the middle of a run wait from then on.
        """

        def script(run: Run) -> None:
            model = nn.ModuleDict({"old": Net(), "new": Net()})
            optimizer = momentum(model["old"])
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    learn(model["old"], optimizer, batch)
                    backward(model["new"], batch)
                    if handler.global_step == 2:
                        assert not any("new" in place for place in SlowCopy.places)
                        optimizer.add_param_group({"params": model["new"].parameters()})

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(2 * BATCHES)

        assert "state['module']['new.up.weight']" in SlowCopy.places

    def test_nobody_told_of(self, tmp_path, check):
        """
        The step of an optimizer that the handler does not have waits too.
        """

        def script(run: Run) -> None:
            model = Net()
            mine, other = momentum(model), torch.optim.SGD(model.parameters(), lr=0.1)
            with run.handler(model, mine) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    backward(model, batch)
                    other.step()
                    mine.step()
                    mine.zero_grad()

        Run(tmp_path, snapshot="overlap", check_snapshots=check).play(script).assert_sound(BATCHES)

        assert SlowCopy.overtaken > 0


class TestSurroundings:
    def test_compiled(self, tmp_path):
        """
        A compiled model is trained and saved like any other.
        """

        def script(run: Run) -> None:
            model = torch.compile(Net(), backend="eager")
            optimizer = momentum(model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    learn(model, optimizer, batch)

        Run(tmp_path, snapshot="overlap").play(script).assert_sound(BATCHES)

        assert SlowCopy.places > MATRICES

    def test_exchanged_module(self, tmp_path):
        """
        A module that took another's place in the middle is what is saved from then on.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(2 * BATCHES, batches()):
                    if handler.global_step == 2:
                        model = Net()
                        optimizer = momentum(model)
                        handler.module, handler.optimizer = model, optimizer
                    learn(model, optimizer, batch)

        Run(tmp_path, snapshot="overlap").play(script).assert_sound(2 * BATCHES)

    # Workers are forked; the parent's other threads are those of torch and ours, which they do not use.
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine of one core
    def test_workers(self, tmp_path):
        """
        Workers may be forked while weights are copied, at each epoch's begin and within one.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            loader = DataLoader(batches(), batch_size=None, num_workers=2)
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(2):
                    for batch in handler.batches(loader):
                        if handler.batch == 1:
                            assert len(list(DataLoader(batches(2), batch_size=None, num_workers=1))) == 2
                        learn(model, optimizer, batch)

        Run(tmp_path, snapshot="overlap").play(script).assert_sound(2 * BATCHES)

        assert SlowCopy.overtaken > 0

    def test_two_pending(self, tmp_path):
        """
        Several saves under way at once are each of their own moment.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer, max_pending=2) as handler:
                handler.on("train_batch_end", lambda: run.save(handler))
                for batch in handler.steps(2 * BATCHES, batches()):
                    learn(model, optimizer, batch)

        run = Run(tmp_path, snapshot="overlap").play(script)

        run.assert_sound(4 * BATCHES)

    def test_replaced(self, tmp_path):
        """
        A save whose place a newer one takes is given up, and what is written is sound.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer, max_pending=2, on_busy="replace") as handler:
                for _ in range(2):
                    handler.on("train_batch_end", lambda: run.save(handler))
                for batch in handler.steps(2 * BATCHES, batches()):
                    learn(model, optimizer, batch)

        run = Run(tmp_path, snapshot="overlap").play(script)

        failures = run.failures()
        assert len(run.saves) == 6 * BATCHES
        assert len(failures) > 0
        assert all("a newer save took its place" in str(error) for error in failures)
        assert run.unsound() == {}
        assert len(os.listdir(tmp_path)) == len(run.saves) - len(failures)
        run.saves[-1].result(WAIT)


class TestUnknownOptimizer:
    def test_step_by_hand(self, tmp_path):
        """
        What an object that is no optimizer of torch trains is copied at once.
        """

        class Descent:
            def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
                self.parameters = list(parameters)

            @torch.no_grad()
            def step(self) -> None:
                for parameter in self.parameters:
                    parameter.data.sub_(0.1 * parameter.grad)

            def zero_grad(self) -> None:
                for parameter in self.parameters:
                    parameter.grad = None

            def state_dict(self) -> dict[str, Any]:
                return {"lr": 0.1}

            def load_state_dict(self, state: Any) -> None: ...

        def script(run: Run) -> None:
            model = Net()
            optimizer = Descent(model.parameters())
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    learn(model, optimizer, batch)

        Run(tmp_path, snapshot="overlap").play(script).assert_sound(BATCHES)
        assert SlowCopy.made == 0


class TestBackgroundError:
    def test_training_goes_on(self, tmp_path, monkeypatch):
        """
        A copy that fails in the background fails its save, which says why; all others are there.
        """
        begin = HalfMove.begin

        def begin_or_fail(move: HalfMove) -> None:
            if SlowCopy.made == 2:
                raise MemoryError("no more of it")
            begin(move)

        monkeypatch.setattr(HalfMove, "begin", begin_or_fail)
        steps = []

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    learn(model, optimizer, batch)
                steps.append(handler.global_step)

        run = Run(tmp_path, snapshot="overlap").play(script)

        assert steps == [BATCHES]
        (failure,) = run.failures()
        assert "no more of it" in str(failure)
        assert run.unsound() == {}
        assert len(os.listdir(tmp_path)) == BATCHES - 1


# -- fences


class TestFences:
    """Behind each of these, weights are changed where nothing else would notice."""

    def sound(self, folder: Path, script: Callable[[Run, Net, Any], None]) -> Run:
        def whole(run: Run) -> None:
            model = Net()
            script(run, model, momentum(model))

        run = Run(folder, snapshot="overlap").play(whole)
        run.assert_sound()
        assert SlowCopy.overtaken > 0
        return run

    def test_validation_with_averaged_weights(self, tmp_path):
        """
        Receivers of val_begin, and the body of a validation, may exchange weights, also within a batch.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            average = AverageThroughData(model)
            with run.handler(model, optimizer) as handler, contextlib.ExitStack() as stack:
                handler.on("val_begin", lambda: stack.enter_context(average.swapped()))
                handler.on("val_end", stack.close)
                for batch in handler.steps(2 * BATCHES, batches()):
                    if handler.global_step:
                        for held_out in handler.val_batches(batches(2)):
                            model(held_out)
                    learn(model, optimizer, batch)

        self.sound(tmp_path, script)

    def test_validation_asked_for_by_a_receiver(self, tmp_path):
        """
        So they may when a receiver of the same event validates behind the save.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            average = AverageThroughData(model)
            with run.handler(model, optimizer) as handler:

                @handler.on("train_batch_end")
                def validate() -> None:
                    for held_out in handler.val_batches(batches(2)):
                        with average.swapped():
                            model(held_out)

                for batch in handler.steps(BATCHES, batches()):
                    learn(model, optimizer, batch)

        self.sound(tmp_path, script)

    def test_averaged_weights_of_the_callback(self, tmp_path):
        """
        `EMA` exchanges weights for each validation, and averages behind each step.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                handler.add_callback(EMA(decay=0.5))
                for _ in handler.epochs(2):
                    for batch in handler.batches(batches()):
                        learn(model, optimizer, batch)
                    for held_out in handler.val_batches(batches(2)):
                        model(held_out)

        self.sound(tmp_path, script)

    def test_end_of_batches(self, tmp_path):
        """
        Behind the loop over batches, weights may be changed by hand.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            average = AverageThroughData(model)
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(2):
                    for batch in handler.batches(batches(2)):
                        learn(model, optimizer, batch)
                    with average.swapped():
                        model(batches(1)[0])

        self.sound(tmp_path, script)

    def test_break(self, tmp_path):
        """
        So they may behind a break.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(2):
                    for batch in handler.batches(batches()):
                        if handler.batch == 2:
                            break
                        learn(model, optimizer, batch)
                    model.up.weight.data.fill_(9)

        assert len(self.sound(tmp_path, script).saves) == 4

    def test_break_after_a_step(self, tmp_path):
        """
        The save of a batch that was left after its step is copied at once: anything may come next.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(2):
                    for batch in handler.batches(batches()):
                        learn(model, optimizer, batch)
                        if handler.batch == 2:
                            break
                    handler.log(loss=1.0)  # the batch's end, and the save
                    assert len(run.saves) % 3 == 0
                    model.up.weight.data.fill_(9)

        assert len(self.sound(tmp_path, script).saves) == 6

    def test_exception(self, tmp_path):
        """
        So they may where an exception has led out of the loop.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(1):
                    with contextlib.suppress(LookupError):
                        for batch in handler.batches(batches()):
                            if handler.batch == 2:
                                raise LookupError
                            learn(model, optimizer, batch)
                    model.up.weight.data.fill_(9)

        self.sound(tmp_path, script)

    def test_load(self, tmp_path):
        """
        Weights may be loaded into the handler between two batches.
        """
        start = tmp_path / "start.pt"
        (tmp_path / "saves").mkdir()

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                handler.save(start)
                for batch in handler.steps(BATCHES, batches()):
                    handler.load(start, only=("module", "optimizer"))
                    learn(model, optimizer, batch)

        self.sound(tmp_path / "saves", script)

    def test_by_hand(self, tmp_path):
        """
        Behind Handler.fence(), weights may be changed by hand.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                for batch in handler.steps(BATCHES, batches()):
                    handler.fence()
                    for parameter in model.parameters():
                        parameter.data.clamp_(-0.01, 0.01)
                    learn(model, optimizer, batch)

        self.sound(tmp_path, script)

    def test_by_hand_is_no_barrier_for_files(self, tmp_path, monkeypatch):
        """
        Handler.fence() waits for the copy alone, not for the file.
        """
        write = threading.Event()

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                for _ in handler.epochs(1):
                    for batch in handler.batches(batches(2)):
                        handler.fence()
                        if handler.global_step:
                            assert not run.saves[0].done()
                            write.set()
                        learn(model, optimizer, batch)

        from trainbus.checkpoint import saver

        commit = saver.commit
        monkeypatch.setattr(saver, "commit", lambda *a, **kw: write.wait(WAIT) and commit(*a, **kw))
        self.sound(tmp_path, script)

    @pytest.mark.parametrize("event", ["epoch_end", "val_begin"])
    def test_loop_by_hand(self, tmp_path, event):
        """
        A loop without the generators is fenced by the events that it emits.
        """

        def script(run: Run, model: Net, optimizer: Any) -> None:
            with run.handler(model, optimizer) as handler:
                handler.on(event, lambda: model.up.weight.data.fill_(9))
                handler.emit("train_begin")
                for epoch in range(2):
                    handler.emit("epoch_begin", epoch=epoch)
                    for batch in batches(2):
                        learn(model, optimizer, batch)
                        handler.emit("train_batch_end")
                    if event == "val_begin":
                        handler.emit("val_begin")
                        handler.emit("val_end")
                    handler.emit("epoch_end", epoch=epoch)
                handler.emit("train_end")

        self.sound(tmp_path, script)

    @pytest.mark.parametrize("moment", ["body", "epoch_begin", "epoch_end", "val_begin", "val_end"])
    def test_saves_at_other_moments(self, tmp_path, moment):
        """
        A save asked for anywhere else is copied at once.
        """

        def script(run: Run) -> None:
            model = Net()
            optimizer = momentum(model)
            with Handler(model, optimizer, **run.options) as handler:

                def save() -> None:
                    run.save(handler)
                    model.up.weight.data.fill_(9)

                if moment != "body":
                    handler.on(moment, save)
                for _ in handler.epochs(2):
                    for batch in handler.batches(batches(2)):
                        learn(model, optimizer, batch)
                        if moment == "body":
                            save()
                    for _ in handler.val_batches(batches(1)):
                        pass

        Run(tmp_path, snapshot="overlap").play(script).assert_sound()
        assert SlowCopy.made == 0


# -- many saves


class Constant(nn.Module):
    """All of its values are the number of steps it has made, two tensors of them not an optimizer's."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(elements) for _ in range(3))
        self.small = nn.Parameter(torch.zeros(10))
        self.register_buffer("buffer", torch.zeros(elements))
        self.register_buffer("count", torch.zeros(3))


def add_one(model: Constant, optimizer: torch.optim.Optimizer) -> None:
    """Change everything in place, weights in the step."""
    for buffer in model.buffers():
        buffer.add_(1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -1.0)
    optimizer.step()


def count_steps(folder: Path, *, saves: int, elements: int) -> tuple[int, int, int]:
    """Train, save after each step, and return how many files are sound, how many torn, how many failed."""
    model = Constant(elements)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    sound = torn = failed = 0
    with Handler(model, optimizer, snapshot="overlap", on_write_error="warn") as handler:

        @handler.on("checkpoint_saved")
        def look(path: str, global_step: int) -> None:
            nonlocal sound, torn
            state, _ = load_file(path)
            os.unlink(path)
            bounds = [bound for tensor in state["module"].values() for bound in torch.aminmax(tensor)]
            if {float(bound) for bound in bounds} == {float(global_step)}:
                sound += 1
            else:
                torn += 1

        @handler.on("checkpoint_failed")
        def count() -> None:
            nonlocal failed
            failed += 1

        handler.on(
            "train_batch_end",
            lambda global_step: handler.save_async(folder / f"{global_step}.pt", weights_only=False),
        )
        for _ in handler.steps(saves, [None] * 20):
            add_one(model, optimizer)
            # What no fence has opened: too late.
            SlowCopy.open_all()
    return sound, torn, failed


class TestManySaves:
    @pytest.mark.parametrize(
        ("saves", "elements"), [(60, 1 << 18), pytest.param(1000, 1 << 20, marks=pytest.mark.full)]
    )
    def test_none_is_torn(self, tmp_path, saves, elements):
        """
        Of many saves of weights that the next step changes in place, none is torn and none fails.
        """
        assert count_steps(tmp_path, saves=saves, elements=elements) == (saves, 0, 0)

        assert SlowCopy.overtaken == saves
        assert os.listdir(tmp_path) == []

    def test_without_the_hook(self, tmp_path, monkeypatch):
        """
        That is the hook's doing: without it, saves fail.
        """
        monkeypatch.setattr(fence, "raise_fence", lambda: lambda: None)

        sound, torn, failed = count_steps(tmp_path, saves=20, elements=1 << 15)

        assert torn + failed > 0
        assert sound + torn + failed == 20

    def test_without_the_hook_and_the_tripwire(self, tmp_path, monkeypatch):
        """
        Without the tripwire either, files are torn, and this is seen.
        """
        monkeypatch.setattr(fence, "raise_fence", lambda: lambda: None)
        monkeypatch.setattr(Watched, "changed", lambda self: [])

        _, torn, failed = count_steps(tmp_path, saves=20, elements=1 << 15)

        assert torn > 0
        assert failed == 0

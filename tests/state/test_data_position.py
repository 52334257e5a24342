"""A run that is stopped anywhere and continued hands out what it would have without the stop."""

from __future__ import annotations

import io
import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    WeightedRandomSampler,
)
from torchdata.stateful_dataloader import StatefulDataLoader  # type: ignore[import-untyped]

from trainbus.errors import StateMismatchError
from trainbus.state import rng
from trainbus.state.data_position import DataPositions
from trainbus.state.plain_types import from_plain, to_plain

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # Workers are forked; the parent's other threads are those of torch, which the workers do not use.
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork.*:DeprecationWarning"),
]

EPOCHS = 3
Loader = Any
Make = Callable[[int], Loader]


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def scramble(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Samples(Dataset[Any]):
    """Eleven samples; an augmented one draws random numbers when it is read."""

    def __init__(self, *, augmented: bool = True, size: int = 11) -> None:
        self.augmented = augmented
        self.size = size
        self.read: list[int] = []

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        return (index, *draw()) if self.augmented else index


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return ((index, *draw()) for index in range(11))


class ShuffledBatches:
    """A user's batch sampler. Draws the whole order from NumPy when it is asked for its iterator."""

    def __init__(self, count: int = 11) -> None:
        self.count = count

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.permutation(self.count).tolist()
        return iter([order[i : i + 2] for i in range(0, self.count, 2)])

    def __len__(self) -> int:
        return (self.count + 1) // 2


class DrawnBatches(ShuffledBatches):
    """Draws each batch when it is asked for it."""

    def __iter__(self) -> Iterator[list[int]]:
        return (random.sample(range(self.count), 2) for _ in range(len(self)))


class Moved(DataLoader[Any]):
    """As libraries do it: a loader whose ``__iter__`` is a generator."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        for batch in super().__iter__():
            yield ["moved", batch]


class Bookmarked:
    """A loader that is no DataLoader and knows its position."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {"order": [], "next": 0}
        self.loaded = False

    def __iter__(self) -> Iterator[Any]:
        if not self.loaded or not self.state["order"]:
            self.state = {"order": torch.randperm(6).tolist(), "next": 0}
        self.loaded = False
        while self.state["next"] < 6:
            self.state["next"] += 1
            yield (self.state["order"][self.state["next"] - 1], *draw())
        self.state["order"] = []

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state, self.loaded = dict(state), True


WEIGHTS = [1.0, 5.0, 2.0, 1.0, 1.0, 9.0, 1.0, 1.0, 3.0, 1.0, 1.0]

EXACT: dict[str, Make] = {
    "in order": lambda seed: DataLoader(Samples(), 2),
    "shuffled by the global state": lambda seed: DataLoader(Samples(), 2, shuffle=True),
    "shuffled by the loader's generator": lambda seed: DataLoader(
        Samples(), 2, shuffle=True, generator=generator(seed)
    ),
    "shuffled by the sampler's generator": lambda seed: DataLoader(
        Samples(), 2, sampler=RandomSampler(range(11), generator=generator(seed))
    ),
    "with replacement": lambda seed: DataLoader(
        Samples(), 16, sampler=RandomSampler(range(11), replacement=True, num_samples=100)
    ),
    "with replacement by a generator": lambda seed: DataLoader(
        Samples(),
        16,
        sampler=RandomSampler(range(11), replacement=True, num_samples=100, generator=generator(seed)),
    ),
    "weighted": lambda seed: DataLoader(Samples(), 2, sampler=WeightedRandomSampler(WEIGHTS, 11)),
    "weighted by a generator": lambda seed: DataLoader(
        Samples(), 2, sampler=WeightedRandomSampler(WEIGHTS, 11, generator=generator(seed))
    ),
    "no batches": lambda seed: DataLoader(Samples(size=5), batch_size=None, shuffle=True),
    "drop_last": lambda seed: DataLoader(Samples(), 2, shuffle=True, drop_last=True),
    "batch sampler, drawn at once": lambda seed: DataLoader(Samples(), batch_sampler=ShuffledBatches()),
    "batch sampler, drawn one by one": lambda seed: DataLoader(Samples(), batch_sampler=DrawnBatches()),
    "subclass": lambda seed: Moved(Samples(), 2, shuffle=True),
    "IterableDataset": lambda seed: DataLoader(Stream(), 2),
    "list": lambda seed: [[0, 1], [2, 3], [4, 5]],
    "StatefulDataLoader": lambda seed: StatefulDataLoader(Samples(), 2, shuffle=True),
    "StatefulDataLoader with a generator": lambda seed: StatefulDataLoader(
        Samples(), 2, shuffle=True, generator=generator(seed)
    ),
    "StatefulDataLoader with a plain sampler": lambda seed: StatefulDataLoader(
        Samples(), 2, sampler=RandomSampler(range(11))
    ),
    "own state": lambda seed: Bookmarked(),
}

WORKERS: dict[str, Make] = {
    "workers": lambda seed: DataLoader(Samples(augmented=False), 2, shuffle=True, num_workers=2),
    "workers and a generator": lambda seed: DataLoader(
        Samples(augmented=False),
        2,
        num_workers=2,
        sampler=RandomSampler(range(11), replacement=True, num_samples=70, generator=generator(seed)),
    ),
    "persistent workers": lambda seed: DataLoader(
        Samples(augmented=False), 2, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "IterableDataset with workers": lambda seed: DataLoader(Stream(), 2, num_workers=2),
    "StatefulDataLoader with workers": lambda seed: StatefulDataLoader(
        Samples(augmented=False), 2, shuffle=True, num_workers=2
    ),
}


class Run:
    """
    A training as a user writes it, traced, and saved at all points where a save can fall.

    Attributes:
        trace: Each batch, and random numbers drawn in the body and after each pass.
        saves: ``(label, index of the trace that a continued run begins with, file)``.
    """

    def __init__(self, train: Callable[[int], Loader], val: Callable[[int], Loader]) -> None:
        self.train, self.val = train, val
        self.trace: list[Any] = []
        self.saves: list[tuple[str, int, bytes]] = []
        self.positions = DataPositions()
        self.epoch = 0
        self.begun = False
        self.validated = False
        self.rng: Any = None

    def load(self, file: bytes) -> None:
        state = from_plain(torch.load(io.BytesIO(file), weights_only=True), "a.pt")
        self.positions.load_state_dict(state["data"])
        self.epoch, self.begun, self.rng = state["epoch"], state["begun"], state["rng"]

    def play(self, *, saving: bool = False) -> None:
        while self.epoch < EPOCHS:
            if not self.begun:
                self.positions.new_epoch()
            self.begun = True
            self.one_pass("train", self.train(self.epoch), saving)
            self.trace.append(("trained", draw()))
            self.one_pass("val", self.val(self.epoch), saving)
            self.epoch += 1
            self.begun = False
            self.trace.append(("epoch", self.epoch, draw()))
            self.save(saving, "boundary")

    def one_pass(self, role: Any, loader: Loader, saving: bool) -> None:
        start = len(self.trace)
        iterator = self.positions.open(loader, role, restore_rng=self.restore_rng)
        self.save(saving, f"{role} open")
        for count, batch in enumerate(iterator):
            self.trace.append((role, plain(batch), draw()))
            self.save(saving, f"{role} {count}", None if role == "train" else start, completed=1)
            self.positions.advanced(role)
        self.positions.closed(role)
        self.save(saving, f"{role} over")

    def save(self, saving: bool, label: str, start: int | None = None, completed: int = 0) -> None:
        if not saving:
            return
        state = {
            "data": self.positions.state_dict(completed=completed),
            "rng": rng.capture(),
            "epoch": self.epoch,
            "begun": self.begun,
        }
        file = io.BytesIO()
        torch.save(to_plain(state), file)
        index = len(self.trace) if start is None else start
        self.saves.append((f"{label} of epoch {self.epoch}", index, file.getvalue()))

    def restore_rng(self) -> None:
        if self.rng is not None:
            rng.restore(self.rng)


def plain(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    return [plain(item) for item in batch] if isinstance(batch, (list, tuple)) else batch


def always(loader: Loader) -> Callable[[int], Loader]:
    return lambda epoch: loader


def build(train: Make, val: Make | None, seed: int) -> Run:
    # A script seeds a loader that was not opened before the stop as the first run did.
    scramble(5)
    validation = [] if val is None else val(5)
    scramble(seed)
    return Run(always(train(seed)), always(validation))


def assert_exact(make: Callable[[int], Run], wanted: Callable[[str], bool] = lambda label: True) -> None:
    whole = make(1)
    scramble(2)
    whole.play(saving=True)
    saves = [save for save in whole.saves if wanted(save[0])]
    assert saves
    for label, index, file in saves:
        continued = make(77)
        scramble(78)
        continued.load(file)
        continued.play()
        # The code between a finished training pass and the validation runs again.
        again = 1 if label.startswith("val") else 0
        assert continued.trace[again:] == whole.trace[index:], f"stopped at {label}"


class TestExactResume:
    @pytest.mark.parametrize("name", EXACT)
    def test_without_workers(self, name: str) -> None:
        """Without workers, batches, augmentation and all random numbers are those of the whole run."""
        assert_exact(
            lambda seed: build(EXACT[name], EXACT["shuffled by the global state"], seed),
            # Before the first batch such a loader has drawn nothing, and nobody saves there.
            lambda label: name != "subclass" or not label.startswith("train open"),
        )

    @pytest.mark.parametrize(
        "name",
        [
            name
            if name in ("shuffled by the loader's generator", "list", "StatefulDataLoader", "own state")
            else pytest.param(name, marks=pytest.mark.full)
            for name in EXACT
        ],
    )
    def test_validation(self, name: str) -> None:
        """A validation under way is begun anew as it was begun, whatever its loader is."""
        assert_exact(
            lambda seed: build(EXACT["shuffled by the global state"], EXACT[name], seed),
            lambda label: label.startswith("val") or label.startswith("boundary"),
        )

    @pytest.mark.parametrize("name", WORKERS)
    def test_workers(self, name: str) -> None:
        """With workers the order and all random numbers of the main process are exact."""
        stops = ("train open of epoch 0", "train 2 of epoch 1", "train 5 of epoch 1", "boundary of epoch 1")
        assert_exact(lambda seed: build(WORKERS[name], None, seed), lambda label: label in stops)

    @pytest.mark.full
    @pytest.mark.parametrize("name", WORKERS)
    def test_workers_stopped_anywhere(self, name: str) -> None:
        """With workers the order is exact wherever the run was stopped, in validation too."""
        assert_exact(lambda seed: build(WORKERS[name], WORKERS[name], seed))

    @pytest.mark.parametrize(
        "name",
        ["with replacement by a generator", "StatefulDataLoader", "list", "batch sampler, drawn at once"],
    )
    def test_stopped_twice(self, name: str) -> None:
        """A continued run that is stopped again continues as exactly."""

        def make(seed: int) -> Run:
            return build(EXACT[name], EXACT["in order"], seed)

        whole = make(1)
        whole.play(saving=True)
        file = next(file for label, _, file in whole.saves if label == "train 1 of epoch 1")

        def continued(seed: int) -> Run:
            run = make(seed)
            if seed == 1:
                run.load(file)
            return run

        assert_exact(continued)

    @pytest.mark.parametrize("passes", [2, 3])
    def test_several_passes_in_an_epoch(self, passes: int) -> None:
        """Passes over the same and over other loaders of an epoch are told apart by their order."""

        class Several(Run):
            def one_pass(self, role: Any, loader: Loader, saving: bool) -> None:
                for index in range(passes):
                    super().one_pass(role, loader[index % 2], saving)

        def make(seed: int) -> Run:
            pair = [DataLoader(Samples(size=5), 2, shuffle=True, generator=generator(n)) for n in (3, 4)]
            return Several(always(pair), always([[1], [2]]))

        whole = make(1)
        whole.play(saving=True)
        for label, index, file in whole.saves:
            if label.startswith(("train", "boundary")):
                continued = make(2)
                scramble(3)
                continued.load(file)
                continued.play()
                assert continued.trace == whole.trace[index:], f"stopped at {label}"

    def test_validation_inside_a_training_pass(self) -> None:
        """A validation in a batch's body is not done again, and hides none that comes later."""

        class Nested(Run):
            def one_pass(self, role: Any, loader: Loader, saving: bool) -> None:
                iterator = self.positions.open(loader, role, restore_rng=self.restore_rng)
                for count, batch in enumerate(iterator):
                    self.trace.append((role, plain(batch), draw()))
                    if role == "train":
                        super().one_pass("val", self.val(self.epoch), False)
                        self.save(saving, f"train {count}", completed=1)
                    self.positions.advanced(role)
                self.positions.closed(role)

        assert_exact(
            lambda seed: Nested(
                always(DataLoader(Samples(), 2, shuffle=True, generator=generator(seed))),
                always(DataLoader(Samples(size=4), 2, shuffle=True, generator=generator(5))),
            )
        )

    def test_save_in_a_nested_validation(self) -> None:
        """A save within such a validation belongs to the training batch around it."""
        positions = DataPositions()
        training = DataLoader(Samples(), 2)
        next(positions.open(training, "train"))
        next(positions.open([1, 2, 3], "val"))
        state = positions.state_dict(completed=1)

        later = DataPositions()
        later.load_state_dict(state)

        assert next(later.open(training, "train"))[0].tolist() == [2, 3]
        assert list(later.open([1, 2, 3], "val")) == [1, 2, 3]

    def test_augmentation_in_workers(self) -> None:
        """Augmentation inside workers is exact from the next epoch on."""

        def make(seed: int) -> Run:
            return Run(always(DataLoader(Samples(), 2, shuffle=True, num_workers=2)), always([]))

        whole = make(1)
        whole.play(saving=True)
        index, file = next((i, f) for label, i, f in whole.saves if label == "train 2 of epoch 1")
        continued = make(1)
        scramble(2)
        continued.load(file)
        continued.play()

        def order(trace: list[Any]) -> list[Any]:
            return [entry[1][0] if entry[0] == "train" else entry for entry in trace]

        next_epoch = whole.trace.index(next(entry for entry in whole.trace if entry[:2] == ("epoch", 2)))
        assert order(continued.trace) == order(whole.trace[index:])
        assert continued.trace[next_epoch - index :] == whole.trace[next_epoch:]

    def test_generator_shared_by_two_loaders(self) -> None:
        """One generator of two loaders goes on once, not once for each of them."""

        def make(seed: int) -> Run:
            shared = generator(seed)
            loaders = [DataLoader(Samples(), 2, shuffle=True, generator=shared) for _ in range(2)]
            return Run(always(loaders[0]), always(loaders[1]))

        assert_exact(make)

    def test_generator_seeded_for_each_epoch(self) -> None:
        """A generator that the script seeds for each epoch stays as the script seeded it."""

        def make(seed: int) -> Run:
            mine = generator(0)
            loader = DataLoader(Samples(), 2, shuffle=True, generator=mine)

            def seeded(epoch: int) -> Loader:
                mine.manual_seed(100 + epoch)
                return loader

            return Run(seeded, always([]))

        assert_exact(make, lambda label: label != "boundary of epoch 1")

    def test_iterator_made_for_each_epoch(self) -> None:
        """A one-shot generator is read up to the position."""

        def batches(epoch: int) -> Iterator[Any]:
            return ((epoch, number, draw()) for number in range(4))

        assert_exact(lambda seed: Run(batches, always([])))

    def test_left_stateful_loader(self) -> None:
        """A pass that was left early does not go on in the next epoch."""

        class Short(Run):
            def one_pass(self, role: Any, loader: Loader, saving: bool) -> None:
                for batch in self.positions.open(loader, role, restore_rng=self.restore_rng):
                    self.trace.append((plain(batch), draw()))
                    break
                self.positions.closed(role)

        def make(seed: int) -> Run:
            loader = StatefulDataLoader(Samples(), 2, shuffle=True, generator=generator(seed))
            return Short(always(loader), always([]))

        assert_exact(make)


def moved_on(loader: Loader, batches: int) -> dict[str, Any]:
    """Return the state after some batches of the first pass over *loader*."""
    positions = DataPositions()
    iterator = positions.open(loader, "train")
    for _ in range(batches):
        next(iterator)
        positions.advanced("train")
    return positions.state_dict()


def continued(loader: Loader, state: dict[str, Any]) -> Iterator[Any]:
    positions = DataPositions()
    positions.load_state_dict(state)
    return positions.open(loader, "train")


class TestOpen:
    def test_data_left_out_is_not_read(self) -> None:
        """Continuing a DataLoader reads no sample of the batches before."""
        state = moved_on(DataLoader(Samples(), 2), 4)
        samples = Samples()

        list(continued(DataLoader(samples, 2), state))

        assert samples.read == [8, 9, 10]

    def test_length(self) -> None:
        """The continued iterator reports the length of the whole pass, as the first one did."""
        state = moved_on(DataLoader(Samples(), 2), 4)

        assert len(continued(DataLoader(Samples(), 2), state)) == 6  # type: ignore[arg-type]

    @pytest.mark.parametrize("stop", [0, 3])
    def test_restores_once(self, stop: int) -> None:
        """The checkpoint's random states are set once in a pass, and not in the passes after it."""
        restored: list[int] = []
        positions = DataPositions()
        positions.load_state_dict(moved_on([1, 2, 3], stop))

        for _ in range(2):
            list(positions.open([1, 2, 3], "train", restore_rng=lambda: restored.append(1)))
            positions.closed("train")

        assert restored == [1]

    @pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
    def test_load_in_the_middle_of_a_run(self, options: dict[str, Any]) -> None:
        """A state loaded while a pass is under way is applied in full, and the pass is over."""
        loader = DataLoader(Samples(augmented=False), 2, **options)
        state = moved_on(loader, 4)
        positions = DataPositions()
        next(positions.open(loader, "train"))
        positions.load_state_dict(state)

        for rest in ([[8, 9], [10]], [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]):
            assert [batch.tolist() for batch in positions.open(loader, "train")] == rest

    @pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
    def test_batch_in_hand_comes_again_once(self, options: dict[str, Any]) -> None:
        """A batch that was in hand is handed out again, and not in the passes after that one."""
        positions = DataPositions()
        iterator = positions.open(DataLoader(Samples(augmented=False), 2, **options), "train")
        next(iterator), positions.advanced("train"), next(iterator)
        state = positions.state_dict(in_hand=1)
        loader = DataLoader(Samples(augmented=False), 2, **options)
        positions = DataPositions()
        positions.load_state_dict(state)

        everything = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
        for expected in (everything[1:], everything, everything):
            assert [batch.tolist() for batch in positions.open(loader, "train")] == expected
            positions.new_epoch()

    def test_new_epoch_after_a_load(self) -> None:
        """A pass that was under way is not continued in another epoch."""
        positions = DataPositions()
        positions.load_state_dict(moved_on([1, 2, 3], 2))

        positions.new_epoch()

        assert list(positions.open([1, 2, 3], "train")) == [1, 2, 3]

    def test_generators_are_told_apart(self) -> None:
        """A generator that several parts of a loader share is one, and a second one is another."""
        shared, own = generator(1), generator(2)
        one = DataLoader(Samples(), 2, shuffle=True, generator=shared)
        two = DataLoader(Samples(), 2, sampler=RandomSampler(range(11), generator=own), generator=shared)

        assert [len(moved_on(loader, 1)["train 0"]["generators"]) for loader in (one, two)] == [1, 2]

    @pytest.mark.parametrize("short", [DataLoader(Samples(size=4), 2), [1, 2]])
    def test_too_short(self, short: Loader) -> None:
        """A loader that ends before the position is refused."""
        state = moved_on([1, 2, 3, 4], 3)

        with pytest.raises(StateMismatchError, match="after batch 3: the loader now ends after 2"):
            list(continued(short, state))

    def test_unread_slots_are_kept(self) -> None:
        """What no pass has used since a load is saved as it was loaded."""
        positions = DataPositions()
        loaded = moved_on(DataLoader(Samples(), 2, shuffle=True, generator=generator(3)), 2)
        positions.load_state_dict(loaded)

        assert same(positions.state_dict(), loaded)

    def test_state_does_not_change(self) -> None:
        """A state that was taken stays what it is while the run goes on."""
        loader = DataLoader(Samples(), 2, shuffle=True, generator=generator(3))
        positions = DataPositions()
        iterator = positions.open(loader, "train")
        next(iterator)
        state = positions.state_dict(completed=1)
        before = torch.load(saved(state), weights_only=True)

        positions.advanced("train")
        list(iterator)
        positions.closed("train")
        positions.new_epoch()

        assert same(state, before)

    def test_stream_of_unknown_length(self) -> None:
        """A stream is not asked for its length, which torch would then hold it to."""

        class Guessing(Stream):
            def __len__(self) -> int:
                return 3

        assert len(list(DataPositions().open(DataLoader(Guessing(), 2), "train"))) == 6

    def test_nothing_open(self) -> None:
        """Counting and closing without an open pass do nothing, for loops written with events."""
        positions = DataPositions()

        positions.advanced("train")
        positions.closed("val")

        assert positions.state_dict(completed=1) == {}

    def test_finished(self) -> None:
        """A role is finished while none of its passes is open."""
        positions = DataPositions()
        positions.open([1], "train")
        assert not positions.finished("train")

        positions.closed("train")

        assert positions.finished("train")


class TestWarnings:
    def test_exact(self, caplog: pytest.LogCaptureFixture) -> None:
        """Where everything is exact, nothing is said."""
        list(continued(DataLoader(Samples(), 2), moved_on(DataLoader(Samples(), 2), 2)))
        list(continued([1, 2, 3], moved_on([1, 2, 3], 2)))

        assert messages(caplog) == []

    def test_read_again(self, caplog: pytest.LogCaptureFixture) -> None:
        """Reading up to the position is said, with the number of batches and seconds."""
        state = moved_on(DataLoader(Stream(), 2), 2)

        list(continued(DataLoader(Stream(), 2), state))

        (message,) = messages(caplog)
        assert "first 2 batches were read again and discarded, which took 0." in message

    def test_changed(self, caplog: pytest.LogCaptureFixture) -> None:
        """A loader of another size is named with what changed."""
        state = moved_on(DataLoader(Samples(), 2), 2)

        list(continued(DataLoader(Samples(size=12), 3), state))

        (message,) = messages(caplog)
        assert "batches 6 then, 4 now; batch size 2 then, 3 now; samples 11 then, 12 now" in message

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({}, ["until the next epoch. Use num_workers=0"]),
            ({"persistent_workers": True}, ["in this run, because they are kept"]),
            ({"in_order": False}, ["num_workers=0", "Use in_order=True"]),
        ],
    )
    def test_workers(
        self, caplog: pytest.LogCaptureFixture, options: dict[str, Any], said: list[str]
    ) -> None:
        """What workers do not reproduce is said once, with the remedy."""
        loader = DataLoader(Samples(), 2, num_workers=1, **options)
        state = moved_on(DataLoader(Samples(), 2), 2)

        list(continued(loader, state))

        given = messages(caplog)
        assert len(given) == len(said)
        assert all(part in message for part, message in zip(said, given, strict=True))

    def test_workers_at_the_start(self, caplog: pytest.LogCaptureFixture) -> None:
        """Before the first batch even workers are exact."""
        state = moved_on(DataLoader(Samples(), 2), 0)

        list(continued(DataLoader(Samples(), 2, num_workers=1), state))

        assert messages(caplog) == []

    def test_other_seed(self, caplog: pytest.LogCaptureFixture) -> None:
        """A generator whose seed differs goes on from the checkpoint, and that is said."""
        first, second = (DataLoader(Samples(), 2, shuffle=True, generator=generator(n)) for n in (1, 2))
        positions = DataPositions()
        list(positions.open(first, "train"))
        positions.closed("train")
        later = DataPositions()
        later.load_state_dict(positions.state_dict())
        later.new_epoch()

        later.open(second, "train")

        (message,) = messages(caplog)
        assert "seeded with 2 here and with 1 in the checkpoint" in message
        assert torch.equal(second.generator.get_state(), first.generator.get_state()) is False  # base seed
        assert second.generator.initial_seed() == 1


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def saved(state: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)

"""A loader that is wrapped, by a progress bar or a prefetcher, continues like one that is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset
from tqdm import tqdm

from trainbus import Handler
from trainbus.state.loader_rebuild import generators_of
from trainbus.state.wrapped_loaders import loaders_in


class Prefetcher:
    """A wrapper as scripts have them, whose iterator makes the loader's at once."""

    def __init__(self, loader):
        self.loader = loader

    def __iter__(self):
        return iter(self.loader)

    def __len__(self):
        return len(self.loader)


class Lazy(Prefetcher):
    """The same, whose iterator makes the loader's with the first batch."""

    def __iter__(self):
        yield from self.loader


WRAPPERS = {
    "progress bar": lambda loader: tqdm(loader, disable=True),
    "prefetcher": Prefetcher,
    "lazy": Lazy,
    "one in the other": lambda loader: tqdm(Prefetcher(loader), disable=True),
}


def generator():
    return torch.Generator().manual_seed(7)


def shuffled():
    return DataLoader(range(12), 3, shuffle=True, generator=generator())


def drawn():
    sampler = RandomSampler(range(12), replacement=True, num_samples=70, generator=generator())
    return DataLoader(range(12), 16, sampler=sampler)


class TestLoadersIn:
    def test_names(self):
        """Wrappers are seen through by the usual names of attributes, however deep they are."""
        loader = shuffled()
        for wrap in WRAPPERS.values():
            assert loaders_in(wrap(loader))[-1] is loader
        assert loaders_in(loader) == [loader] and loaders_in(5) == [5]

    def test_circle(self):
        """Wrappers that hold each other are each found once."""
        one = Prefetcher(None)
        other = one.loader = Prefetcher(one)

        assert loaders_in(one) == [one, other]

    def test_datasets(self):
        """A dataset is none, wherever it is: its own generator draws no order."""

        class Drawing(Dataset):
            generator = generator()

        held = Prefetcher(None)
        held.dataset = Drawing()
        assert generators_of(held) == [] == generators_of(DataLoader(Drawing(), sampler=range(3)))

    def test_runs_no_code(self):
        """Looking asks no property, which might do anything."""

        class Busy:
            @property
            def loader(self):
                raise AssertionError

            def __getattr__(self, name):
                if name in ("iterable", "dataset"):
                    raise AssertionError
                raise AttributeError(name)

        busy = Busy()
        assert loaders_in(busy) == [busy]

    def test_own_state(self):
        """A wrapper that saves its position itself is left to do so."""

        class Bookmark(Prefetcher):
            def state_dict(self):
                return {}

            def load_state_dict(self, state):
                pass

        assert generators_of(Bookmark(shuffled())) == [] and len(generators_of(Prefetcher(shuffled()))) == 1


class TestResume:
    @pytest.mark.parametrize("name", WRAPPERS)
    @pytest.mark.parametrize("make", [shuffled, drawn])
    @pytest.mark.parametrize("moment", ["in the body", "train_batch_end", "epoch_end"])
    def test_draws_the_same_order(self, tmp_path, name, make, moment):
        """Saved anywhere and continued, it hands out the batches that a run without a stop does."""

        def run(path=None, folder=None):
            torch.manual_seed(0)
            loader, seen, saved = make(), [], []
            model = nn.Linear(1, 1)
            with Handler(model, torch.optim.SGD(model.parameters())) as handler:

                def save():
                    if folder is not None:
                        begins = len(seen) - (moment == "in the body")
                        saved.append((folder / f"{len(saved)}.pt", begins))
                        handler.save(saved[-1][0])

                if moment != "in the body":
                    handler.on(moment, save)
                if path is not None:
                    handler.load(path)
                for _ in handler.epochs(3):
                    for batch in handler.batches(WRAPPERS[name](loader)):
                        seen.append(batch.tolist())
                        if moment == "in the body":
                            save()
                        model(torch.ones(1, 1)).sum().backward()
                        handler.optimizer.step()
            return seen, saved

        whole, saved = run(folder=tmp_path)
        assert len(saved) >= 3
        for path, begins in saved:
            assert run(path)[0] == whole[begins:], path

    def test_shared_with_the_validation(self, tmp_path):
        """One generator of both loaders is set once."""

        def run(path=None):
            shared, seen = generator(), []
            train, val = (
                DataLoader(TensorDataset(torch.arange(6)), 2, shuffle=True, generator=shared)
                for _ in range(2)
            )
            with Handler(nn.Linear(1, 1)) as handler:
                handler.on("epoch_end", lambda epoch: epoch == 0 and handler.save(tmp_path / "a.pt"))
                if path is not None:
                    handler.load(path)
                for _ in handler.epochs(3):
                    seen += [batch[0].tolist() for batch in handler.batches(tqdm(train, disable=True))]
                    seen += [batch[0].tolist() for batch in handler.val_batches(Prefetcher(val))]
            return seen

        whole = run()
        assert run(tmp_path / "a.pt") == whole[6:]

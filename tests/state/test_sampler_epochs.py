"""Samplers that shuffle by epoch are told it, unless the script does that."""

from __future__ import annotations

import gc
import weakref

import pytest
from torch import nn
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler
from tqdm import tqdm

from trainbus import Handler
from trainbus.state.sampler_epochs import SamplerEpochs


def sampler():
    return DistributedSampler(range(8), num_replicas=2, rank=0, seed=3)


class TestTell:
    @pytest.mark.parametrize(
        "loader",
        [
            lambda one: DataLoader(range(8), batch_size=2, sampler=one),
            lambda one: DataLoader(range(8), batch_sampler=BatchSampler(one, 2, False)),
            lambda one: tqdm(DataLoader(range(8), batch_size=2, sampler=one), disable=True),
        ],
    )
    def test_each_epoch_has_its_order(self, loader):
        """The order is that of the epoch, also in the first one that a resumed run tells."""
        one = sampler()
        epochs, orders = SamplerEpochs(), []
        for epoch in (4, 5):
            epochs.tell(loader(one), epoch)
            orders.append(list(one))

        for epoch, order in zip((4, 5), orders, strict=True):
            expected = sampler()
            expected.set_epoch(epoch)
            assert order == list(expected)
        assert orders[0] != orders[1]

    def test_script_that_counts_by_itself(self):
        """An epoch that the script has set stays."""
        one, epochs = sampler(), SamplerEpochs()
        for epoch in range(3):
            one.set_epoch(100 + epoch)
            epochs.tell(DataLoader(range(8), sampler=one), epoch)
            assert one.epoch == 100 + epoch

    def test_unhashable(self):
        """A sampler need not be hashable, nor say which epoch it has."""

        class Sampler:
            __hash__ = None

            def set_epoch(self, epoch):
                told.append(epoch)

        class Loader:
            sampler = Sampler()

        told = []
        epochs = SamplerEpochs()
        epochs.tell(Loader, 1)
        epochs.tell(Loader, 2)
        assert told == [1, 2]

    def test_lets_go(self):
        """Samplers of earlier epochs, and the data they hold, are freed; one that is still used is known."""
        epochs, kept, refers = SamplerEpochs(), sampler(), []
        for epoch in range(3):
            one = sampler()
            refers.append(weakref.ref(one))
            for loader in (DataLoader(range(8), sampler=one), DataLoader(range(8), sampler=kept)):
                epochs.tell(loader, epoch)
            assert one.epoch == kept.epoch == epoch
            del one, loader
            gc.collect()

        assert [refer() for refer in refers] == [None] * 3

    def test_others(self):
        """Loaders without such a sampler are left alone."""
        epochs = SamplerEpochs()
        epochs.tell([1, 2], 1)
        epochs.tell(DataLoader(range(8), shuffle=True), 1)

    def test_loop_tells(self):
        """A loop of the handler tells its training loader, which has another order in each epoch."""
        data = list(range(32))
        loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=1, rank=0))
        with Handler(nn.Linear(1, 1)) as handler:
            orders = [[batch.item() for batch in handler.batches(loader)] for _ in handler.epochs(2)]

        assert sorted(orders[0]) == sorted(orders[1]) == data and orders[0] != orders[1]

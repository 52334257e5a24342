from __future__ import annotations

import pytest
import torch

from trainbus.checkpoint.snapshot_plan import addresses_of, make_plan
from trainbus.checkpoint.snapshot_views import Views, numbers_of, views_of
from trainbus.checkpoint.staging_memory import StagingMemory


def cut_up(tensors: list[torch.Tensor], waiting: tuple[int, ...] = ()) -> Views:
    plan = make_plan(tensors, waiting)
    return views_of(StagingMemory(1).acquire(plan.size), plan)


base = torch.arange(100_000.0)
large = torch.zeros(40_000)


class TestPlaces:
    @pytest.mark.parametrize(
        "tensors",
        [
            pytest.param([torch.zeros(7), torch.ones(3, 4), torch.tensor(1)], id="whole"),
            pytest.param([base[10:20]], id="in the middle of a storage"),
            pytest.param([base[50:60], base[10:20], base[30:31]], id="the first is not in front"),
            pytest.param([base.view(1000, 100).t()], id="not contiguous"),
            pytest.param([base[::3]], id="with gaps"),
            pytest.param([base[20:40], base.view(torch.int32)[5:9]], id="one storage under two dtypes"),
            pytest.param([torch.empty(0), torch.zeros(2), torch.ones(2).to_sparse()], id="beside odd ones"),
            pytest.param([torch.zeros(3).expand(5, 3), torch.zeros(1).expand(9)], id="expanded"),
            pytest.param([torch.complex(base[:4], base[:4]).conj()], id="conjugated"),
        ],
    )
    def test_are_those_of_the_pairs(self, tensors):
        """
        What is copied lies where its place says, byte for byte, and so does what it is copied to.
        """
        views = cut_up(tensors)

        for section in views.plan.sections:
            targets, sources = views.pairs(section, tensors)
            places = views.places(section, numbers_of(addresses_of(tensors)))

            assert places.targets.tolist() == [one.data_ptr() for one in targets]
            assert places.sources.tolist() == [one.data_ptr() for one in sources]
            assert places.sizes.tolist() == [one.nbytes for one in targets] == [one.nbytes for one in sources]

    def test_of_each_section(self):
        """
        What waits and what is copied at once have places of their own.
        """
        tensors = [torch.zeros(5), large, torch.zeros(6)]
        views = cut_up(tensors, waiting=(1,))
        addresses = addresses_of(tensors)

        found = [
            (section.waits, views.places(section, numbers_of(addresses)).sources.tolist())
            for section in views.plan.sections
        ]

        assert found == [(False, [addresses[0], addresses[2]]), (True, [addresses[1]])]

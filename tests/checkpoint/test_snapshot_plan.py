from __future__ import annotations

import pytest
import torch

from trainbus.checkpoint.snapshot_plan import make_plan


def sizes(*tensors: torch.Tensor) -> list[tuple[int, int]]:
    return [(part.start, part.size) for part in make_plan(tensors).ranges]


class TestRanges:
    def test_small_view_of_a_large_buffer(self):
        """
        Ten numbers do not drag a million along.
        """
        assert sizes(torch.zeros(1_000_000)[500:510]) == [(2000, 40)]

    def test_one_range_for_a_storage(self):
        """
        Views of one storage lie on one range, from the first byte of any to the last.
        """
        base = torch.zeros(1000)

        plan = make_plan([base[100:110], base[105:200], base[50:60]])

        assert [(part.start, part.size) for part in plan.ranges] == [(200, 600)]
        assert [layout.range for layout in plan.layouts] == [0, 0, 0]
        assert [layout.offset for layout in plan.layouts] == [50, 55, 0]

    def test_one_range_for_a_type(self):
        """
        A storage seen as two types has a range for each.
        """
        base = torch.zeros(16)

        plan = make_plan([base, base.view(torch.int32)[4:8]])

        assert [(part.start, part.size) for part in plan.ranges] == [(0, 64), (16, 16)]
        assert [part.tensor for part in plan.ranges] == [0, 1]

    def test_strides(self):
        """
        A range reaches from the first to the last element, also with gaps, transposed and expanded.
        """
        base = torch.zeros(10, 10)

        assert sizes(base[:, 3]) == [(12, 364)]
        assert sizes(base[2:4].t()) == [(80, 80)]
        assert sizes(torch.zeros(1).expand(1000)) == [(0, 4)]
        assert sizes(torch.tensor(1.0)) == [(0, 4)]

    def test_positions_are_aligned(self):
        """
        Each range begins at a multiple of 64 bytes of the buffer, without overlap.
        """
        plan = make_plan([torch.zeros(n, dtype=torch.int8) for n in (1, 64, 65, 3)])

        assert [part.position for part in plan.ranges] == [0, 64, 128, 256]
        assert plan.size == 320

    def test_nothing_to_copy(self):
        """
        A tensor without elements has a layout and no range.
        """
        plan = make_plan([torch.zeros(0, 3), torch.zeros(100)[50:50]])

        assert plan.ranges == ()
        assert plan.size == 0
        assert [layout.shape for layout in plan.layouts] == [(0, 3), (0,)]

    def test_freed_storage(self):
        """
        A tensor whose memory was freed is refused, and its storage stays as it is.
        """
        tensor = torch.zeros(10)
        tensor.untyped_storage().resize_(0)

        with pytest.raises(ValueError, match=r"shape \(10,\) .* needs 40 bytes of a storage that has 0"):
            make_plan([tensor])
        assert tensor.untyped_storage().nbytes() == 0


class TestLayouts:
    def test_without_plain_storage(self):
        """
        Tensors whose bytes do not lie on one plain storage are left to be copied through their parts.
        """

        class Wrapped(torch.Tensor):
            pass

        odd = [
            torch.eye(3).to_sparse(),
            torch.zeros(3, device="meta"),
            torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged),
            torch.ones(3).as_subclass(Wrapped),
        ]

        assert make_plan(odd).layouts == (None,) * 4

    def test_equal_structure_equal_plan(self):
        """
        Two states of one structure have equal plans; any difference in it makes them differ.
        """

        def state(**change):
            base = torch.zeros(4, 4, dtype=change.get("dtype", torch.float32))
            tied = base if change.get("tied", True) else base.clone()
            return [base, tied.t(), torch.nn.Parameter(base[1], requires_grad=change.get("grad", True))]

        assert make_plan(state()) == make_plan(state())
        for change in ({"dtype": torch.float64}, {"tied": False}, {"grad": False}):
            assert make_plan(state()) != make_plan(state(**change))

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from trainbus.checkpoint import snapshot_plan
from trainbus.checkpoint.snapshot_plan import (
    ALIGNMENT,
    SMALLEST_WAITING,
    addresses_of,
    check_bounds,
    fingerprint,
    make_plan,
)


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

    @pytest.mark.parametrize(
        ("tensors", "whole"),
        [
            (lambda t: [t], [True]),
            (lambda t: [t[2:4]], [True]),
            (lambda t: [t, t.detach()], [True]),
            (lambda t: [t, t.view(-1)], [True]),
            (lambda t: [t, t[2:4]], [False]),
            (lambda t: [t[2:4], t], [False]),
            (lambda t: [t[:2], t[2:]], [False]),
            (lambda t: [t, t.t()], [False]),
            (lambda t: [t.t(), t], [False]),
            (lambda t: [t.t()], [False]),
            (lambda t: [t[:, 1]], [False]),
            (lambda t: [t[:1].expand(3, 4)], [False]),
            (lambda t: [t.to(torch.complex64).conj()], [False]),
            (lambda t: [torch._neg_view(t)], [False]),
            (lambda t: [t.to(torch.uint16)], [False]),
            (lambda t: [t.to(torch.float8_e4m3fn)], [False]),
            (lambda t: [t.to(torch.bool)], [True]),
            (lambda t: [t, t.view(torch.int32)], [True, True]),
        ],
    )
    def test_whole(self, tensors, whole):
        """
        A range is whole if each tensor on it is contiguous, plainly stored, and all there is on it.
        """
        plan = make_plan(tensors(torch.zeros(4, 4)))

        assert [part.whole for part in plan.ranges] == whole


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


def bytes_of(size: int, fill: int = 0, device: str = "cpu") -> torch.Tensor:
    return torch.full((size,), fill, dtype=torch.uint8, device=device)


class TestSections:
    @pytest.mark.parametrize(("size", "waits"), [(SMALLEST_WAITING - 1, False), (SMALLEST_WAITING, True)])
    def test_smallest_that_waits(self, size, waits):
        """
        A range waits from that size on.
        """
        (section,) = make_plan([bytes_of(size)], {0}).sections

        assert section.waits is waits

    def test_only_what_may(self):
        """
        A range that is not named as waiting does not wait, whatever its size.
        """
        plan = make_plan([bytes_of(10 * SMALLEST_WAITING), bytes_of(SMALLEST_WAITING)], {1})

        assert [(section.waits, section.size) for section in plan.sections] == [
            (False, 10 * SMALLEST_WAITING),
            (True, SMALLEST_WAITING),
        ]
        assert [part.tensor for part in plan.ranges] == [0, 1]

    @pytest.mark.parametrize(("waiting", "waits"), [({0, 1}, True), ({0}, False), ({1}, False), ((), False)])
    def test_all_tensors_of_a_range(self, waiting, waits):
        """
        A range waits if every tensor on it may.
        """
        base = bytes_of(2 * SMALLEST_WAITING)

        (section,) = make_plan([base, base[10:20]], waiting).sections

        assert section.waits is waits

    def test_size_of_the_range_counts(self):
        """
        Small tensors that share a large range wait with it.
        """
        base = bytes_of(SMALLEST_WAITING)

        (section,) = make_plan([base[:10], base[-10:]], {0, 1}).sections

        assert section.waits

    def test_without_a_range(self):
        """
        Tensors without plain storage or without elements are in no section, named as waiting or not.
        """
        plan = make_plan([torch.eye(300).to_sparse(), bytes_of(0), bytes_of(5)], {0, 1})

        assert [(section.waits, section.size) for section in plan.sections] == [(False, 5)]

    def test_side_by_side(self, monkeypatch):
        """
        Each section holds the ranges of one device and one time, one after the other in the buffer.
        """
        # Meta tensors have storages of their own too: enough of another device for a plan.
        monkeypatch.setattr(snapshot_plan, "COPIED_DEVICES", frozenset(("cpu", "meta")))
        large = SMALLEST_WAITING + 1
        tensors = [bytes_of(size, device=device) for size in (large, 7, large) for device in ("meta", "cpu")]

        plan = make_plan(tensors, {0, 1, 2, 3})

        assert [(str(s.device), s.waits, list(s.ranges)) for s in plan.sections] == [
            ("cpu", False, [0, 1]),
            ("cpu", True, [2]),
            ("meta", False, [3, 4]),
            ("meta", True, [5]),
        ]
        end = 0
        for section in plan.sections:
            parts = [plan.ranges[index] for index in section.ranges]
            assert section.start == parts[0].position >= end
            assert section.start % ALIGNMENT == 0
            assert section.start + section.size == parts[-1].position + parts[-1].size
            assert {str(tensors[part.tensor].device) for part in parts} == {str(section.device)}
            end = section.start + section.size
        assert end <= plan.size

    def test_one_for_each_device(self, monkeypatch):
        """
        Ranges of two devices are never in one section.
        """
        monkeypatch.setattr(snapshot_plan, "COPIED_DEVICES", frozenset(("cpu", "meta")))

        plan = make_plan([bytes_of(5), bytes_of(5, device="meta")])

        assert [(str(s.device), list(s.ranges)) for s in plan.sections] == [("cpu", [0]), ("meta", [1])]

    def test_nothing_to_copy(self):
        """
        A plan without ranges has no sections.
        """
        assert make_plan([bytes_of(0)]).sections == ()


class Wrapped(torch.Tensor):
    pass


def structures() -> dict[str, list[torch.Tensor]]:
    """Lists of two tensors, no two of which one plan fits."""
    base, complex_base = torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.complex64)
    other = torch.ones(4, 4)
    return {
        "two": [base, other],
        "tied": [base, base.detach()],
        "tied, other order of sizes": [base[1:], base],
        "overlapping": [base[:3], base[1:]],
        "apart": [base[:2], base[2:]],
        "view of a larger": [torch.zeros(5, 4)[1:], other],
        "other shape": [base.view(2, 8), other],
        "fewer rows": [base[:3], other],
        "other strides": [base.t(), other],
        "other dtype": [base.view(torch.int32), other],
        "smaller dtype": [base.half(), other],
        "seen as two dtypes": [base, base.view(torch.int32)],
        "grad": [torch.zeros(4, 4, requires_grad=True), other],
        "parameter": [nn.Parameter(base), other],
        "frozen parameter": [nn.Parameter(base, requires_grad=False), other],
        "complex": [complex_base, other],
        "conj": [complex_base.conj(), other],
        "neg": [torch._neg_view(base), other],
        "sparse": [base.to_sparse(), other],
        "empty": [torch.zeros(0, 3), other],
        "empty, other shape": [torch.zeros(0, 5), other],
        "empty, other dtype": [torch.zeros(0, 3).int(), other],
        "empty, parameter": [nn.Parameter(torch.zeros(0, 3)), other],
        "empty, grad": [torch.zeros(0, 3, requires_grad=True), other],
    }


def print_of(tensors: Sequence[torch.Tensor]) -> list[Any]:
    return fingerprint(tensors, addresses_of(tensors))


class TestFingerprint:
    @pytest.mark.parametrize("name", structures())
    def test_fits(self, name):
        """
        Tensors that lie elsewhere and hold other values, in the same structure, have an equal fingerprint.
        """
        one, other = structures()[name], structures()[name]
        if one[0].layout is torch.strided and one[0].numel():
            other[0].detach().add_(1)

        assert print_of(one) == print_of(other)
        assert make_plan(one) == make_plan(other)

    @pytest.mark.parametrize("name", structures())
    def test_does_not_fit(self, name):
        """
        Tensors that another plan fits have another fingerprint.
        """
        tensors, others = structures()[name], structures()
        del others[name]

        assert [other for other in others if make_plan(others[other]) == make_plan(tensors)] == []
        assert [other for other in others if print_of(others[other]) == print_of(tensors)] == []

    @pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
    def test_device(self, device):
        """
        Tensors on another device have another fingerprint.
        """
        assert print_of([torch.zeros(3)]) != print_of([torch.zeros(3, device=device)])

    def test_more_tensors(self):
        """
        A list of more tensors has another fingerprint.
        """
        tensors = [torch.zeros(3), torch.zeros(3)]

        assert print_of(tensors) != print_of(tensors[:1])


class TestAddressesOf:
    def test_first_element(self):
        """
        The address of a tensor is that of its first element, not of its storage.
        """
        base = torch.zeros(10)

        assert addresses_of([base, base[3:]]) == [base.data_ptr(), base.data_ptr() + 12]

    def test_without_plain_storage(self):
        """
        What does not lie on a plain storage has no address; what has no elements has the address 0.
        """
        odd = [torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.ones(3).as_subclass(Wrapped)]

        assert addresses_of([*odd, torch.zeros(0), torch.zeros(9)[4:4]]) == [None, None, None, 0, 0]


class TestCheckBounds:
    @pytest.mark.parametrize(
        "tensor",
        [
            torch.zeros(10),
            torch.zeros(10)[9:],
            torch.zeros(10)[10:],
            torch.zeros(4, 4).t(),
            torch.zeros(1).expand(1000),
            torch.eye(3).to_sparse(),
            torch.zeros(3, device="meta"),
        ],
    )
    def test_inside(self, tensor):
        """
        A tensor that its storage has room for is fine, and so is one that has none.
        """
        check_bounds(tensor)

    @pytest.mark.parametrize("left", [0, 20, 39])
    def test_beyond(self, left):
        """
        A tensor is refused whose storage was freed or became too small for it, though it looks as before.
        """
        tensor = torch.zeros(10)
        before = fingerprint([tensor], [tensor.data_ptr()])
        tensor.untyped_storage().resize_(left)

        with pytest.raises(ValueError, match=f"needs 40 bytes of a storage that has {left}"):
            check_bounds(tensor)
        if left:
            assert fingerprint([tensor], [tensor.data_ptr()]) == before

    def test_last_of_a_view(self):
        """
        It is the last element that must be inside.
        """
        view = torch.zeros(10, 10)[:, 3]
        view.untyped_storage().resize_(4 * 94)
        check_bounds(view)

        view.untyped_storage().resize_(4 * 93)
        with pytest.raises(ValueError, match="needs 376 bytes of a storage that has 372"):
            check_bounds(view)

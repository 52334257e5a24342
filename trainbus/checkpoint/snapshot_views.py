"""A staging buffer cut up as a plan says: where each tensor is copied to, and from where it is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainbus.checkpoint.archive import Image
from trainbus.checkpoint.host_copy import Places
from trainbus.checkpoint.kinds_kept import keep_kinds
from trainbus.checkpoint.page_locking import pieces
from trainbus.checkpoint.snapshot_plan import ByteRange, Layout, Section, SnapshotPlan
from trainbus.checkpoint.staging_memory import StagingBuffer

__all__ = ["Views", "numbers_of", "views_of"]


@dataclass(frozen=True)
class Views:
    """
    A buffer cut up as a plan says.

    Attributes:
        targets: For each range, what it is copied into.
        tensors: For each tensor of the state, its place; None if it is copied by its parts.
        ranges: For each range, its bytes.
        spans: For each device, the bytes of all of its sections, which lie side by side.
        image: All of it, to write a file from.
        numbers: Of each range, as columns of uint64: where it lies here, its bytes, its tensor's index,
            and how many bytes that begins behind it.
    """

    plan: SnapshotPlan
    targets: list[torch.Tensor]
    tensors: list[torch.Tensor | None]
    ranges: list[torch.Tensor]
    spans: dict[torch.device, torch.Tensor]
    image: Image
    numbers: np.ndarray

    def sources(self, section: Section, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what is copied to the ranges of a section, out of the state's *tensors*."""
        found = []
        for index in section.ranges:
            part = self.plan.ranges[index]
            tensor = tensors[part.tensor]
            found.append(tensor if part.whole else _bytes_of(tensor, part))
        return found

    def pairs(
        self, section: Section, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what the ranges of a section are copied into, and what is copied there."""
        return [self.targets[index] for index in section.ranges], self.sources(section, tensors)

    def places(self, section: Section, addresses: np.ndarray) -> Places:
        """Return where `pairs` lie, if the state's tensors lie at *addresses*, see `numbers_of`."""
        to, sizes, tensors, leads = self.numbers[:, section.ranges.start : section.ranges.stop]
        return Places(to, addresses[tensors] - leads, sizes)

    def cut_pairs(
        self, section: Section, tensors: Sequence[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Do what `pairs` does, with ranges cut where a device may not copy on."""
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        for index, target, source in zip(section.ranges, *self.pairs(section, tensors), strict=True):
            part = self.plan.ranges[index]
            cuts = list(pieces(part.position, part.size))
            if len(cuts) == 1:
                targets.append(target)
                sources.append(source)
            else:
                whole = _bytes_of(tensors[part.tensor], part)
                targets += [self.ranges[index][offset : offset + size] for offset, size in cuts]
                sources += [whole[offset : offset + size] for offset, size in cuts]
        return targets, sources


def numbers_of(addresses: Sequence[int | None]) -> np.ndarray:
    """Return *addresses* as uint64, 0 for what has none."""
    return np.array([address or 0 for address in addresses], dtype=np.uint64)


def views_of(buffer: StagingBuffer, plan: SnapshotPlan) -> Views:
    """Return *buffer* as *plan* cuts it up; made once for each of the kinds of states that take turns."""
    kept: list[Views] = buffer.views if isinstance(buffer.views, list) else []
    views = next((one for one in kept if one.plan is plan or one.plan == plan), None)
    if views is None:
        views = _cut_up(buffer, plan)
    buffer.views = keep_kinds(views, kept)
    return views


def _cut_up(buffer: StagingBuffer, plan: SnapshotPlan) -> Views:
    # A storage of its own for each range: torch.save writes whole storages.
    ranges = [_bytes_in(buffer, part.position, part.size) for part in plan.ranges]
    tensors = [None if layout is None else _view(layout, ranges) for layout in plan.layouts]
    targets = [_target(part, ranges[index], tensors) for index, part in enumerate(plan.ranges)]
    assert buffer.mapping is not None
    placed = [tensor for tensor in tensors if tensor is not None]
    image = Image(memoryview(buffer.mapping)[: plan.size], placed, len(plan.ranges))
    return Views(plan, targets, tensors, ranges, _spans(buffer, plan), image, _numbers(plan, image.address))


def _numbers(plan: SnapshotPlan, address: int) -> np.ndarray:
    rows = [(address + part.position, part.size, part.tensor, _lead(plan, part)) for part in plan.ranges]
    return np.array(rows, dtype=np.uint64).reshape(-1, 4).T.copy()


def _lead(plan: SnapshotPlan, part: ByteRange) -> int:
    layout = plan.layouts[part.tensor]
    return 0 if layout is None else layout.offset * layout.dtype.itemsize


def _spans(buffer: StagingBuffer, plan: SnapshotPlan) -> dict[torch.device, torch.Tensor]:
    spans = {}
    for device, sections in plan.by_device():
        first, last = sections[0], sections[-1]
        spans[device] = _bytes_in(buffer, first.start, last.start + last.size - first.start)
    return spans


def _bytes_in(buffer: StagingBuffer, start: int, size: int) -> torch.Tensor:
    return torch.frombuffer(buffer.mapping, dtype=torch.uint8, count=size, offset=start)


def _target(
    part: ByteRange, whole_range: torch.Tensor, tensors: Sequence[torch.Tensor | None]
) -> torch.Tensor:
    tensor = tensors[part.tensor]
    return whole_range if tensor is None or not part.whole else tensor.detach()


def _bytes_of(tensor: torch.Tensor, part: ByteRange) -> torch.Tensor:
    source = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    source.set_(tensor.untyped_storage(), part.start, (part.size,), (1,))
    return source


def _view(layout: Layout, ranges: Sequence[torch.Tensor]) -> torch.Tensor:
    view = torch.empty(0, dtype=layout.dtype, device="cpu")
    if layout.range is None:
        view = view.as_strided(layout.shape, layout.stride)
    else:
        storage = ranges[layout.range].untyped_storage()
        view.set_(storage, layout.offset, layout.shape, layout.stride)
    if layout.conj:
        view = view.conj()
    if layout.negative:
        view = torch._neg_view(view)
    if layout.parameter:
        return torch.nn.Parameter(view, requires_grad=layout.requires_grad)
    return view.requires_grad_(layout.requires_grad)

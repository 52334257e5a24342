"""Which bytes a snapshot copies, which of them may wait, and how tensors lie on the copy. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch

__all__ = [
    "ALIGNMENT",
    "COPIED_DEVICES",
    "SMALLEST_WAITING",
    "ByteRange",
    "Layout",
    "Section",
    "SnapshotPlan",
    "addresses_of",
    "check_bounds",
    "fingerprint",
    "make_plan",
]

COPIED_DEVICES = frozenset(("cpu", "cuda"))
"""Kinds of devices whose memory is copied by ranges; tensors on others are copied one by one."""

SMALLEST_WAITING = 64 << 10
"""Bytes of a range below which waiting is not worth its care."""

ALIGNMENT = 64
"""Bytes at whose multiples ranges begin in a buffer; enough for every type."""

# Subclasses may keep their data anywhere; only these two are known not to.
_PLAIN_TYPES = frozenset((torch.Tensor, torch.nn.Parameter))

# What every copying kernel of torch knows; ranges of other types are copied as bytes.
_COPIED_AS_THEY_ARE = frozenset(
    (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.complex64,
        torch.complex128,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
    )
)


@dataclass(frozen=True, slots=True)
class ByteRange:
    """
    The smallest range of one storage that covers all of the state's tensors of one dtype on it.

    Attributes:
        tensor: Index of a tensor that lies on that storage.
        start: First byte inside the storage.
        size: Bytes, at least 1.
        position: First byte inside the staging buffer, a multiple of 64.
        whole: Whether that tensor is contiguous and all there is on the range, so that copying
            it copies the range.
    """

    tensor: int
    start: int
    size: int
    position: int
    whole: bool


@dataclass(frozen=True, slots=True)
class Section:
    """
    The ranges of one device that are copied at the same time; they lie side by side in the buffer.

    Attributes:
        waits: Whether they may be copied after the request.
        ranges: Their indices, one after the other.
        start, size: Bytes inside the staging buffer.
    """

    device: torch.device
    waits: bool
    ranges: range
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """
    How one tensor lies on its range.

    Attributes:
        range: Index of the range, or None for a tensor without elements.
        offset: Of the tensor's first element, in elements from the range's start.
        conj: Whether the stored numbers stand for their conjugates.
        negative: Whether they stand for their negatives.
        parameter: Whether it is a ``torch.nn.Parameter``.
    """

    range: int | None
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    conj: bool
    negative: bool
    requires_grad: bool
    parameter: bool


@dataclass(frozen=True, slots=True)
class SnapshotPlan:
    """
    Two states with equal plans have the same structure and fit the same copies.

    Attributes:
        ranges: What to copy.
        sections: The ranges by device and time.
        layouts: One for each tensor; None for one that has no plain storage and is copied
            through its parts.
        size: Bytes of the staging buffer.
    """

    ranges: tuple[ByteRange, ...]
    sections: tuple[Section, ...]
    layouts: tuple[Layout | None, ...]
    size: int

    def by_device(self) -> list[tuple[torch.device, list[Section]]]:
        """Return the sections of each device, which lie side by side."""
        grouped = groupby(self.sections, lambda section: section.device)
        return [(device, list(sections)) for device, sections in grouped]


@dataclass(slots=True)
class _Extent:
    """What is known of a range while the tensors are gone through."""

    tensor: int
    device: torch.device
    low: int
    high: int
    whole: bool
    waits: bool


def make_plan(
    tensors: Sequence[torch.Tensor], waiting: Collection[int] = (), *, room: int = 0
) -> SnapshotPlan:
    """
    Plan the copy of *tensors* (any device, shape, dtype), none of which appears twice.

    Tensors on one storage stay on one, as long as they have one dtype: ``torch.save``
    refuses to write a storage under several.

    Args:
        tensors: What to copy.
        waiting: Indices of those that nothing changes for a while. A range waits if all of its
            tensors may and it has at least `SMALLEST_WAITING` bytes.
        room: Bytes that stay free behind each range, for whoever writes them to a file from there.

    Raises:
        ValueError: A tensor reaches beyond its storage, as one does whose memory was freed.
    """
    keys = [_storage_key(tensor) for tensor in tensors]
    found: dict[tuple[int, torch.dtype], _Extent] = {}
    for index, (tensor, key) in enumerate(zip(tensors, keys, strict=True)):
        if key is not None:
            _extend(found, key, index, tensor, index in waiting)
    for extent in found.values():
        extent.waits = extent.waits and extent.high - extent.low >= SMALLEST_WAITING
    ordered = sorted(found.items(), key=lambda item: (str(item[1].device), item[1].waits))
    extents = [extent for _, extent in ordered]
    ranges, size = _ranges(extents, room)
    number = {key: index for index, (key, _) in enumerate(ordered)}
    layouts = [
        _layout(tensor, None if key is None else number[key], 0 if key is None else found[key].low)
        if _has_plain_storage(tensor)
        else None
        for tensor, key in zip(tensors, keys, strict=True)
    ]
    return SnapshotPlan(tuple(ranges), tuple(_sections(extents, ranges)), tuple(layouts), size)


def addresses_of(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    """Return where each tensor's first element lies; None for those without plain storage."""
    if _all_have_plain_storage(tensors):
        return list(map(torch.Tensor.data_ptr, tensors))
    return [tensor.data_ptr() if _has_plain_storage(tensor) else None for tensor in tensors]


def fingerprint(tensors: Sequence[torch.Tensor], addresses: Sequence[int | None]) -> list[Any]:
    """
    Return what is equal for two lists of tensors if one plan fits both.

    Costs a tenth of a plan: almost always, nothing has changed since the save before. That two
    tensors share a storage is told by where it begins. What has moved is to be given to
    `check_bounds`.
    """
    plain = [tensor for tensor, address in zip(tensors, addresses, strict=True) if address is not None]
    odd = [
        (index, type(tensor), tensor.layout, tensor.dtype, tensor.device)
        for index, (tensor, address) in enumerate(zip(tensors, addresses, strict=True))
        if address is None
    ]
    # Attribute by attribute, not tensor by tensor: so the loops run in C.
    offsets = list(map(torch.Tensor.storage_offset, plain))
    starts = [
        address - offset * size
        for address, offset, size in zip(
            (address for address in addresses if address is not None),
            offsets,
            map(attrgetter("itemsize"), plain),
            strict=True,
        )
    ]
    first_at: dict[int, int] = {}
    return [
        [first_at.setdefault(start, index) for index, start in enumerate(starts)],
        offsets,
        list(map(type, plain)),
        *(list(map(attrgetter(name), plain)) for name in ("dtype", "shape", "device", "requires_grad")),
        list(map(torch.Tensor.stride, plain)),
        list(map(torch.Tensor.is_conj, plain)),
        list(map(torch.Tensor.is_neg, plain)),
        odd,
    ]


def check_bounds(tensor: torch.Tensor) -> None:
    """Raise ValueError if *tensor* reaches beyond its storage."""
    if _storage_key(tensor) is not None:
        _bounds(tensor)


def _all_have_plain_storage(tensors: Sequence[torch.Tensor]) -> bool:
    """Tell whether `_has_plain_storage` is true of all, in a third of the time."""
    return (
        set(map(type, tensors)) <= _PLAIN_TYPES
        and set(map(attrgetter("layout"), tensors)) <= {torch.strided}
        and not any(map(attrgetter("is_quantized"), tensors))
        and not any(map(attrgetter("is_nested"), tensors))
        and not any(map(torch.Tensor._is_zerotensor, tensors))
        and {device.type for device in set(map(attrgetter("device"), tensors))} <= COPIED_DEVICES
    )


def _has_plain_storage(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and not tensor._is_zerotensor()  # which has bytes and no memory, as a tangent of forward AD may be
        and tensor.device.type in COPIED_DEVICES
    )


def _storage_key(tensor: torch.Tensor) -> tuple[int, torch.dtype] | None:
    if not _has_plain_storage(tensor) or tensor.numel() == 0:
        return None
    # The same identity that torch.save goes by when it decides what is shared.
    return tensor.untyped_storage()._cdata, tensor.dtype


def _extend(
    found: dict[tuple[int, torch.dtype], _Extent],
    key: tuple[int, torch.dtype],
    index: int,
    tensor: torch.Tensor,
    waits: bool,
) -> None:
    start, stop = _bounds(tensor)
    extent = found.get(key)
    if extent is None:
        found[key] = _Extent(index, tensor.device, start, stop, _is_whole(tensor), waits)
    else:
        whole = extent.whole and _is_whole(tensor) and (extent.low, extent.high) == (start, stop)
        extent.low, extent.high = min(extent.low, start), max(extent.high, stop)
        extent.whole, extent.waits = whole, extent.waits and waits


def _bounds(tensor: torch.Tensor) -> tuple[int, int]:
    offset = int(tensor.storage_offset())
    last = offset + sum(
        (int(n) - 1) * int(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    start, stop = offset * tensor.itemsize, (last + 1) * tensor.itemsize
    available = tensor.untyped_storage().nbytes()
    if stop > available:
        raise ValueError(
            f"Cannot copy a tensor of shape {tuple(tensor.shape)} and {tensor.dtype}: it needs {stop} bytes "
            f"of a storage that has {available}. Its memory was freed; save the state before that."
        )
    return start, stop


def _is_whole(tensor: torch.Tensor) -> bool:
    return (
        tensor.dtype in _COPIED_AS_THEY_ARE
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _ranges(extents: Sequence[_Extent], room: int) -> tuple[list[ByteRange], int]:
    ranges, position = [], 0
    for extent in extents:
        size = extent.high - extent.low
        ranges.append(ByteRange(extent.tensor, extent.low, size, position, extent.whole))
        position += -(-(size + room) // ALIGNMENT) * ALIGNMENT
    return ranges, position


def _sections(extents: Sequence[_Extent], ranges: Sequence[ByteRange]) -> list[Section]:
    sections: list[Section] = []
    first = 0
    for index, extent in enumerate(extents):
        following = extents[index + 1] if index + 1 < len(extents) else None
        if following is None or (following.device, following.waits) != (extent.device, extent.waits):
            start, stop = ranges[first].position, ranges[index].position + ranges[index].size
            sections.append(
                Section(extent.device, extent.waits, range(first, index + 1), start, stop - start)
            )
            first = index + 1
    return sections


def _layout(tensor: torch.Tensor, number: int | None, start: int) -> Layout:
    return Layout(
        range=number,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()),
        offset=0 if number is None else int(tensor.storage_offset()) - start // tensor.itemsize,
        conj=tensor.is_conj(),
        negative=tensor.is_neg(),
        requires_grad=tensor.requires_grad,
        parameter=type(tensor) is torch.nn.Parameter,
    )

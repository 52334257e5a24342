"""Which bytes a snapshot copies, and how tensors lie on the copy. Pure, over tensors' metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

__all__ = ["ByteRange", "Layout", "SnapshotPlan", "make_plan"]

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class ByteRange:
    """
    The smallest range of one storage that covers all of the state's tensors of one dtype on it.

    Attributes:
        tensor: Index of a tensor that lies on that storage.
        device: Where it is.
        start: First byte inside the storage.
        size: Bytes, at least 1.
        position: First byte inside the staging buffer, a multiple of 64.
    """

    tensor: int
    device: torch.device
    start: int
    size: int
    position: int


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
        layouts: One for each tensor; None for one that has no plain storage and is copied
            through its parts.
        size: Bytes of the staging buffer.
    """

    ranges: tuple[ByteRange, ...]
    layouts: tuple[Layout | None, ...]
    size: int


def make_plan(tensors: Sequence[torch.Tensor]) -> SnapshotPlan:
    """
    Plan the copy of *tensors* (any device, shape, dtype), none of which appears twice.

    Tensors on one storage stay on one, as long as they have one dtype: ``torch.save``
    refuses to write a storage under several.

    Raises:
        ValueError: A tensor reaches beyond its storage, as one does whose memory was freed.
    """
    keys = [_storage_key(tensor) for tensor in tensors]
    extents: dict[tuple[int, torch.dtype], tuple[int, int, int]] = {}
    for index, (tensor, key) in enumerate(zip(tensors, keys, strict=True)):
        if key is not None:
            start, stop = _extent(tensor)
            first, low, high = extents.get(key, (index, start, stop))
            extents[key] = (first, min(low, start), max(high, stop))
    ranges = []
    position = 0
    for first, low, high in extents.values():
        ranges.append(ByteRange(first, tensors[first].device, low, high - low, position))
        position += -(-(high - low) // _ALIGNMENT) * _ALIGNMENT
    number = {key: index for index, key in enumerate(extents)}
    layouts = [
        _layout(tensor, None if key is None else number[key], 0 if key is None else extents[key][1])
        if _has_plain_storage(tensor)
        else None
        for tensor, key in zip(tensors, keys, strict=True)
    ]
    return SnapshotPlan(tuple(ranges), tuple(layouts), position)


def _has_plain_storage(tensor: torch.Tensor) -> bool:
    # Subclasses may keep their data anywhere; only these two are known not to.
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type != "meta"
    )


def _storage_key(tensor: torch.Tensor) -> tuple[int, torch.dtype] | None:
    if not _has_plain_storage(tensor) or tensor.numel() == 0:
        return None
    # The same identity that torch.save goes by when it decides what is shared.
    return tensor.untyped_storage()._cdata, tensor.dtype


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
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

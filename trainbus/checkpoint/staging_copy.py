"""Carries out a plan: a consistent copy of a state in reused host memory."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainbus.checkpoint.snapshot_plan import ByteRange, Layout, SnapshotPlan, make_plan
from trainbus.checkpoint.staging_memory import StagingBuffer, StagingMemory

__all__ = ["Snapshot", "take_snapshot"]

_MAPPINGS = (dict, OrderedDict, Counter)
_SEQUENCES = (list, tuple, set)


class Snapshot:
    """
    A copy of a state that stays as it is until it is released.

    Attributes:
        state: The same nesting; its tensors lie in the staging memory. None once released.
    """

    def __init__(self, state: Any, memory: StagingMemory, buffer: StagingBuffer) -> None:
        self.state = state
        self._memory = memory
        self._buffer = buffer

    def release(self) -> None:
        """
        Give the memory back for the next snapshot. Any thread may call it, also twice.

        Tensors taken out of `state` must not be used any more: their values will change.
        """
        self.state = None
        self._memory.release(self._buffer)


def take_snapshot(state: Any, memory: StagingMemory) -> Snapshot:
    """
    Copy all tensors of *state*; when this returns, they may change in any way.

    Blocks for the copy, and on CUDA until it and what was queued before it on the current
    stream have finished. Tied tensors stay tied and overlapping views overlap. Parameter
    class, ``requires_grad``, strides, conj and neg bits survive; a tensor's Python
    attributes, hooks and ``grad`` do not.

    Args:
        state: Tensors on any device, in dict, OrderedDict, Counter, list, tuple and set.
            What else it holds is shared with the copy, so it must not change any more.
        memory: Where a buffer is taken from; `Snapshot.release` gives it back.

    Raises:
        TypeError: Another kind of container, whose tensors would go unnoticed.
        RuntimeError: Every buffer of *memory* holds a snapshot that is not released.
    """
    tensors = list({id(tensor): tensor for tensor in _tensors(state)}.values())
    # Inference tensors could neither require grad nor be reused outside of inference mode.
    with torch.inference_mode(False), torch.no_grad():
        plan = make_plan(tensors)
        buffer = memory.acquire(plan.size)
        try:
            views = _views(buffer, plan)
            _copy_ranges(plan.ranges, tensors, views.ranges)
            copies = {
                id(tensor): _copy_parts(tensor) if view is None else view
                for tensor, view in zip(tensors, views.tensors, strict=True)
            }
            return Snapshot(_rebuild(state, copies), memory, buffer)
        except BaseException:
            memory.release(buffer)
            raise


@dataclass(frozen=True)
class _Views:
    """A buffer cut up as a plan says. Reused as long as the plan stays equal."""

    plan: SnapshotPlan
    ranges: list[torch.Tensor]
    tensors: list[torch.Tensor | None]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif type(value) in _MAPPINGS:
        for item in value.values():
            yield from _tensors(item)
        yield from _tensors(getattr(value, "__dict__", ()))
    elif type(value) in _SEQUENCES:
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict | list | tuple | set | frozenset) and not isinstance(value, torch.Size):
        raise TypeError(
            f"Cannot copy a {type(value).__qualname__}: of containers only dict, OrderedDict, Counter, "
            "list, tuple and set can be. Turn it into one of these first."
        )


def _rebuild(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return copies[id(value)]
    kind = type(value)
    if kind in _SEQUENCES:
        return kind(_rebuild(item, copies) for item in value)
    if kind not in _MAPPINGS:
        return value
    copy: dict[Any, Any] = kind()
    for key, item in value.items():
        copy[key] = _rebuild(item, copies)
    if hasattr(value, "__dict__"):
        # A module's state dict carries its `_metadata` there.
        copy.__dict__.update(_rebuild(value.__dict__, copies))
    return copy


def _views(buffer: StagingBuffer, plan: SnapshotPlan) -> _Views:
    views = buffer.views
    if isinstance(views, _Views) and views.plan == plan:
        return views
    # A storage of its own for each range: torch.save writes whole storages.
    ranges = [
        torch.frombuffer(buffer.mapping, dtype=torch.uint8, count=part.size, offset=part.position)
        for part in plan.ranges
    ]
    tensors = [None if layout is None else _view(layout, ranges) for layout in plan.layouts]
    buffer.views = _Views(plan, ranges, tensors)
    return buffer.views


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


def _copy_ranges(
    ranges: Sequence[ByteRange], tensors: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]
) -> None:
    groups: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for part, target in zip(ranges, targets, strict=True):
        source = torch.empty(0, dtype=torch.uint8, device=part.device)
        storage = tensors[part.tensor].untyped_storage()
        source.set_(storage, part.start, (part.size,), (1,))
        into, outof = groups.setdefault(part.device, ([], []))
        into.append(target)
        outof.append(source)
    for device, (into, outof) in groups.items():
        # One call for all: a Python loop over small tensors would take far longer than their bytes.
        torch._foreach_copy_(into, outof, non_blocking=device.type == "cuda")
    for device in groups:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def _copy_parts(tensor: torch.Tensor) -> torch.Tensor:
    detached = tensor.detach()
    # A meta tensor has no bytes to copy. Elsewhere `copy=True` matters: for a CPU tensor
    # `.cpu()` would return the tensor itself.
    copy = detached if tensor.device.type == "meta" else detached.to("cpu", copy=True)
    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)

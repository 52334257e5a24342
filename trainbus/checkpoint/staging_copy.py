"""Carries out a plan: a consistent copy of a state in reused host memory."""

from __future__ import annotations

import logging
import operator
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove, Move, Watched
from trainbus.checkpoint.copy_thread import CopyThread, copy_together
from trainbus.checkpoint.cuda import Cuda
from trainbus.checkpoint.device_copy import DeviceStaging
from trainbus.checkpoint.kinds_kept import keep_kinds
from trainbus.checkpoint.nesting import path_to, tensors_in, with_tensors
from trainbus.checkpoint.page_locking import is_locked, lock
from trainbus.checkpoint.snapshot import Snapshot
from trainbus.checkpoint.snapshot_plan import (
    COPIED_DEVICES,
    Section,
    SnapshotPlan,
    addresses_of,
    check_bounds,
    fingerprint,
    make_plan,
)
from trainbus.checkpoint.snapshot_views import Views, numbers_of, views_of
from trainbus.checkpoint.staging_memory import StagingBuffer, StagingMemory
from trainbus.checkpoint.zip_records import ROOM

__all__ = ["Stager", "take_snapshot"]

_log = logging.getLogger("trainbus")

_MANY_CHANGES = 6  # a run's first saves differ too: before the first step, of weights alone, with averages


class _Moved(NamedTuple):
    """
    How far a copy has come on the thread that asked for it.

    Attributes:
        later: Moves that are left.
        unread: The ranges that they read from tensors which must not change until then.
        seconds: Spent copying within the host.
    """

    later: list[Move]
    unread: set[int | None]
    seconds: float


@dataclass
class _Kind:
    """
    States with one plan: what their fingerprint is, and where the tensors of the last one lay.

    Attributes:
        waiting: Indices of those that may be copied later.
    """

    prints: list[Any]
    waiting: set[int]
    plan: SnapshotPlan
    addresses: list[int | None]


class Stager:
    """
    Takes snapshots, one after the other, of states that mostly have the same structure.

    Args:
        memory: Where buffers are taken from; `Snapshot.release` gives them back.
        device_snapshot: Whether CUDA tensors are copied on their device first: ``"auto"``, True, False.
        check: Compare each background copy with the values of the request.
        cuda: The door to devices; by default the real one.

    Attributes:
        thread: Copies what is left of a snapshot when `take` returns.
    """

    def __init__(
        self,
        memory: StagingMemory,
        *,
        device_snapshot: str | bool = "auto",
        check: bool = False,
        cuda: Cuda | None = None,
    ) -> None:
        self.thread = CopyThread()
        self._memory = memory
        self._devices = DeviceStaging(device_snapshot, cuda)
        self._last_copy: BackgroundCopy | None = None
        self._check = check
        self._kinds: list[_Kind] = []  # of states that were seen, the last one first
        self._odd_devices: set[str] = set()
        self._new_in_a_row = 0
        self._said_that_it_changes = False

    def take(self, state: Any, owners: Mapping[int, torch.Tensor] | None = None) -> Snapshot:
        """
        Copy *state*; what is left to be copied when this returns is `Snapshot.copy`, not yet begun.

        Blocks for what is copied at once. Tied tensors stay tied and overlapping views overlap.
        Parameter class, ``requires_grad``, strides, conj and neg bits survive; a tensor's Python
        attributes, hooks and ``grad`` do not.

        Args:
            state: Tensors on any device, in dict, OrderedDict, Counter, list, tuple and set.
                What else it holds is shared with the copy, so it must not change any more.
            owners: By address, the tensors that nothing but an optimizer's step changes. They
                may be copied later. Everything else may change in any way once this returns.

        Raises:
            TypeError: Another kind of container, whose tensors would go unnoticed.
            RuntimeError: Every buffer of the memory holds a snapshot that is not released.
            OSError: There is no memory for it.
        """
        tensors = tensors_in(state)
        # Inference tensors could neither require grad nor be reused outside of inference mode.
        with torch.inference_mode(False), torch.no_grad():
            addresses = addresses_of(tensors)
            waiting = _find_waiting(tensors, addresses, owners) if owners else {}
            kind = self._kind_of(tensors, addresses, set(waiting))
            buffer = self._memory.acquire(kind.plan.size)
            try:
                return self._take_into(buffer, kind, state, tensors, waiting)
            except BaseException:
                try:  # before others have the memory that devices may be writing into
                    self._wait_for({section.device for section in kind.plan.sections})
                finally:
                    self._memory.release(buffer)
                raise

    def begin(self, snapshot: Snapshot) -> None:
        """Have the thread copy what is left of *snapshot*, into page-locked memory where a device copies."""
        if snapshot.copy is None:
            return
        self.thread.start()
        self._last_copy = snapshot.copy
        buffer, device = snapshot.buffer, self._device_to_copy_from()
        if device is not None and not is_locked(buffer):
            # A step that has to wait for the copy is not helped by pauses.
            gently = not snapshot.waits
            self.thread.call(lambda: lock(buffer, device, self._devices.cuda, gently=gently))
        self.thread.carry_out(snapshot.copy)

    def lock(self, buffer: StagingBuffer, stop: threading.Event) -> None:
        """Have *buffer* page-locked, gently, if the state that it was planned for lies on such a device."""
        device = self._device_to_copy_from()
        if device is not None:
            lock(buffer, device, self._devices.cuda, gently=True, stop=stop)

    def _device_to_copy_from(self) -> torch.device | None:
        devices = [section.device for kind in self._kinds[:1] for section in kind.plan.sections]
        return next((one for one in devices if self._devices.cuda.serves(one)), None)

    def buffer_for(self, state: Any) -> StagingBuffer | None:
        """Plan a snapshot of *state* and take a buffer fit for it; None if all are taken. See `give_back`."""
        tensors = tensors_in(state)
        with torch.inference_mode(False), torch.no_grad():
            kind = self._kind_of(tensors, addresses_of(tensors), set())
        try:
            return self._memory.acquire(kind.plan.size)
        except RuntimeError:
            return None

    def give_back(self, buffer: StagingBuffer) -> None:
        """Let snapshots have what `buffer_for` returned. Any thread may call it."""
        self._memory.release(buffer)

    def _kind_of(
        self, tensors: Sequence[torch.Tensor], addresses: list[int | None], waiting: set[int]
    ) -> _Kind:
        prints = fingerprint(tensors, addresses)
        kind = next((one for one in self._kinds if one.prints == prints and one.waiting == waiting), None)
        if kind is None:
            kind = _Kind(prints, waiting, make_plan(tensors, waiting, room=ROOM), addresses)
            self._warn_of_odd_devices(tensors)
            self._warn_of_changes(len(tensors))
        else:
            self._new_in_a_row = 0
            for tensor, address, before in zip(tensors, addresses, kind.addresses, strict=True):
                if address != before:
                    check_bounds(tensor)
            kind.addresses = addresses
        self._kinds = keep_kinds(kind, self._kinds)
        return kind

    def _take_into(
        self,
        buffer: StagingBuffer,
        kind: _Kind,
        state: Any,
        tensors: Sequence[torch.Tensor],
        waiting: Mapping[int, torch.Tensor],
    ) -> Snapshot:
        plan = kind.plan
        views = views_of(buffer, plan)
        # Of what may wait the owner is held, not what ``state_dict()`` made of it: thousands of tensors that
        # end with the copy would be as many turns at the interpreter's lock, on a thread others wait for.
        held = [waiting.get(index, tensor) for index, tensor in enumerate(tensors)] if waiting else tensors
        moved = self._move(kind, held, views, buffer)
        copies = {
            id(tensor): _copy_parts(tensor) if view is None else view
            for tensor, view in zip(tensors, views.tensors, strict=True)
        }
        copied = with_tensors(state, copies)
        snapshot = Snapshot(
            copied, views.image, self._memory, buffer, size=plan.size, seconds_at_once=moved.seconds
        )
        if not moved.later:
            return snapshot
        late = [
            index
            for index in waiting
            if (layout := plan.layouts[index]) is not None and layout.range in moved.unread
        ]
        watched = Watched(
            [waiting[index] for index in late],
            [copies[id(tensors[index])] for index in late],
            checked=self._check,
        )
        snapshot.waits = bool(watched)
        snapshot.copy = BackgroundCopy(
            moved.later,
            watched,
            lambda tensor: path_to(copied, tensor),
            checked=self._check and snapshot.waits,
        )
        return snapshot

    def _move(
        self, kind: _Kind, tensors: Sequence[torch.Tensor], views: Views, buffer: StagingBuffer
    ) -> _Moved:
        """Copy what must be copied at once."""
        plan, seconds = kind.plan, 0.0
        later: list[Move] = []
        unread: set[int | None] = set()
        cuda = self._devices.cuda
        addresses = numbers_of(kind.addresses)
        # Devices first: they copy while this thread goes on to the next.
        for device, sections in sorted(plan.by_device(), key=lambda one: not cuda.serves(one[0])):
            span = views.spans[device]
            # What is to be proved is the way without that room.
            proves = self._check and any(section.waits for section in sections)
            if cuda.serves(device) and not proves and self._devices.has_room(device, span.numel()):
                self._wait_for_last_fetch()
                sources = [one for section in sections for one in views.sources(section, tensors)]
                later.append(self._devices.put_aside(plan, sections, sources, span))
                continue
            for section in sections:
                if section.waits:
                    unread.update(section.ranges)
                if cuda.serves(device):
                    later += self._from_device(section, *views.cut_pairs(section, tensors), buffer)
                else:
                    begun = time.monotonic()
                    places = views.places(section, addresses)
                    later += self._from_host(section, HostMove(*views.pairs(section, tensors), places))
                    seconds += time.monotonic() - begun
        return _Moved(later, unread, seconds)

    def _from_host(self, section: Section, move: HostMove) -> list[Move]:
        if section.waits:
            return [move]
        copy_together(move, self.thread)
        return []

    def _from_device(
        self,
        section: Section,
        targets: list[torch.Tensor],
        sources: list[torch.Tensor],
        buffer: StagingBuffer,
    ) -> list[Move]:
        if section.waits:
            return [self._devices.fetch_later(section.device, sources, targets)]
        lock(buffer, section.device, self._devices.cuda)
        return [self._devices.fetch_in_line(section.device, sources, targets)]

    def _wait_for(self, devices: Iterable[torch.device]) -> None:
        cuda = self._devices.cuda
        for device in devices:
            if cuda.serves(device):
                cuda.current_stream(device).synchronize()

    def _wait_for_last_fetch(self) -> None:
        # Its place on the device is written to next, behind an event that its fetch records.
        if self._last_copy is not None:
            self._last_copy.wait_until_begun()

    def _warn_of_odd_devices(self, tensors: Sequence[torch.Tensor]) -> None:
        odd = {tensor.device.type for tensor in tensors} - COPIED_DEVICES - self._odd_devices - {"meta"}
        self._odd_devices |= odd
        for kind in sorted(odd):
            _log.warning("Tensors on %r are copied one by one: saves take longer there.", kind)

    def _warn_of_changes(self, count: int) -> None:
        self._new_in_a_row += 1
        if self._new_in_a_row == _MANY_CHANGES and not self._said_that_it_changes:
            self._said_that_it_changes = True
            before = len(self._kinds[0].addresses)
            _log.warning(
                "The state has had other tensors, shapes or types at each of the last %d saves (%d tensors, "
                "%d before): each save plans its copy anew, which takes longer. Give what grows its full "
                "size from the start, or keep it as numbers.",
                _MANY_CHANGES,
                count,
                before,
            )


def take_snapshot(state: Any, memory: StagingMemory) -> Snapshot:
    """Copy *state* as a new `Stager` does; when this returns, it may change in any way."""
    stager = Stager(memory)
    snapshot = stager.take(state)
    stager.begin(snapshot)
    stager.thread.close()
    return snapshot


def _find_waiting(
    tensors: Sequence[torch.Tensor], addresses: Sequence[int | None], owners: Mapping[int, torch.Tensor]
) -> dict[int, torch.Tensor]:
    """Return by index the owners of those tensors that are all of what their owner is."""
    found = {
        index: owner
        for index, address in enumerate(addresses)
        if address is not None and (owner := owners.get(address)) is not None
    }
    pairs = [tensors[index] for index in found], list(found.values())
    dtypes = (map(attrgetter("dtype"), side) for side in pairs)
    # Storage, offset, shape and strides in one call for each pair; False where a bit says conj or negative.
    same = map(operator.and_, map(torch.Tensor.is_set_to, *pairs), map(operator.is_, *dtypes))
    return {
        index: owner
        for (index, owner), is_same in zip(found.items(), same, strict=True)
        if is_same or _extent(tensors[index]) == _extent(owner)
    }


def _extent(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride()


def _copy_parts(tensor: torch.Tensor) -> torch.Tensor:
    detached = tensor.detach()
    # A meta tensor has no bytes to copy. Elsewhere `copy=True` matters: for a CPU tensor
    # `.cpu()` would return the tensor itself.
    copy = detached if tensor.device.type == "meta" else detached.to("cpu", copy=True)
    if type(tensor) is torch.nn.Parameter:
        return torch.nn.Parameter(copy, requires_grad=tensor.requires_grad)
    return copy.requires_grad_(tensor.requires_grad)

"""From CUDA devices to the host: the copy put aside on the device, and side streams."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainbus.checkpoint.cuda import Cuda
from trainbus.checkpoint.kinds_kept import keep_kinds
from trainbus.checkpoint.page_locking import pieces
from trainbus.checkpoint.snapshot_plan import Section, SnapshotPlan

__all__ = ["DeviceStaging"]

_log = logging.getLogger("trainbus")

RESERVED_SHARE = 0.1  # of a device's memory, left to a training that grows


class DeviceStaging:
    """
    Side streams and, where there is room, a second copy of the state on each device.

    Args:
        mode: ``"auto"`` for a copy on the device if a tenth of its memory stays free, True for
            one if it can be had at all, False for none.
        cuda: The door to the devices.
    """

    def __init__(self, mode: str | bool = "auto", cuda: Cuda | None = None) -> None:
        if mode not in ("auto", True, False):
            raise ValueError(f"device_snapshot must be 'auto', True or False, got {mode!r}.")
        self.cuda = cuda or Cuda()
        self._mode = mode
        self._devices: dict[torch.device, _Device] = {}

    def has_room(self, device: torch.device, size: int) -> bool:
        """Make sure of *size* bytes on *device* for a copy; False: copy straight to the host."""
        return self._mode is not False and self._on(device).reserve(size, careful=self._mode == "auto")

    def put_aside(
        self,
        plan: SnapshotPlan,
        sections: Sequence[Section],
        sources: list[torch.Tensor],
        target: torch.Tensor,
    ) -> Fetch:
        """
        Copy *sources* on the device, in line with the work given to it so far. Does not wait.

        What was put aside before must have been begun to be fetched.

        Args:
            plan: Where they lie on the sections.
            sections: All of that device.
            sources: One for each of their ranges.
            target: The sections' bytes on the host, where the move brings them.
        """
        return self._on(sections[0].device).put_aside(plan, sections, sources, target)

    def fetch_later(
        self, device: torch.device, sources: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> Fetch:
        """Return the move that copies *sources* as the work given to the device so far leaves them."""
        return self._on(device).fetch(sources, targets, in_place=True)

    def fetch_in_line(
        self, device: torch.device, sources: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> Arrival:
        """
        Copy to the host in line with the device's work: what is given to it from now on comes after.

        Waits for the device only where *targets* are not page-locked.
        """
        self.cuda.copy(targets, sources)
        arrived = self.cuda.event()
        arrived.record(self.cuda.current_stream(device))
        return Arrival(self.cuda, device, arrived, sources)

    def _on(self, device: torch.device) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(device, self.cuda)
        return self._devices[device]


class _Device:
    """One device's side stream, and the copy put aside there. Training thread."""

    def __init__(self, device: torch.device, cuda: Cuda) -> None:
        self._device = device
        self._cuda = cuda
        self._stream = cuda.stream(device)
        self._aside: torch.Tensor | None = None
        self._refused: int | None = None  # bytes that could not be had
        self._fetched: Any = None  # the event after which the copy put aside may be written over
        # Where the ranges go, for each kind of states that take turns, the last one first.
        self._places: list[tuple[SnapshotPlan, list[torch.Tensor]]] = []

    def reserve(self, size: int, *, careful: bool) -> bool:
        if self._aside is not None and self._aside.numel() >= size:
            return True
        if self._refused is not None and size >= self._refused:
            return False
        # The memory goes back to this stream's pool, so what comes next there must wait for the fetch.
        self._wait_until_fetched()
        self._aside, self._places = None, []
        if not careful or self._leaves_enough(size):
            try:
                self._aside = self._cuda.allocate(size, self._device)
            except torch.OutOfMemoryError as error:
                _log.warning("No memory for a copy of the state on %s: %s", self._device, error)
            else:
                return True
        self._refused = size
        _log.info(
            "%s has no room for a copy of the state (%.1f GB): saves copy straight to the host.",
            self._device,
            size / 1e9,
        )
        return False

    def _leaves_enough(self, size: int) -> bool:
        unused, total = self._cuda.unused_bytes(self._device)
        return unused - size >= RESERVED_SHARE * total

    def put_aside(
        self,
        plan: SnapshotPlan,
        sections: Sequence[Section],
        sources: list[torch.Tensor],
        target: torch.Tensor,
    ) -> Fetch:
        assert self._aside is not None
        places = self._places_for(plan, sections, self._aside)
        self._wait_until_fetched()
        for into, outof in _by_dtype(places, sources):
            self._cuda.copy(into, outof)
        cuts = list(pieces(sections[0].start, target.numel()))
        fetch = self.fetch(
            [self._aside[offset : offset + size] for offset, size in cuts],
            [target[offset : offset + size] for offset, size in cuts],
            in_place=False,
        )
        self._fetched = fetch.fetched
        return fetch

    def _places_for(
        self, plan: SnapshotPlan, sections: Sequence[Section], aside: torch.Tensor
    ) -> list[torch.Tensor]:
        kind = next((one for one in self._places if one[0] is plan), None)
        if kind is None:
            kind = plan, list(_places(plan, sections, aside))
        self._places = keep_kinds(kind, self._places)
        return kind[1]

    def fetch(self, sources: list[torch.Tensor], targets: list[torch.Tensor], *, in_place: bool) -> Fetch:
        ready, fetched = self._cuda.event(), self._cuda.event()
        ready.record(self._cuda.current_stream(self._device))
        return Fetch(self._cuda, self._device, self._stream, ready, fetched, sources, targets, in_place)

    def _wait_until_fetched(self) -> None:
        # On the device; the host goes on.
        if self._fetched is not None:
            self._cuda.current_stream(self._device).wait_event(self._fetched)
            self._fetched = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """
    A move from a device to the host, beside the work of other streams.

    Attributes:
        stream: Where it goes on.
        ready: The device's work up to which its sources are as they are to be copied.
        fetched: Recorded by `begin`.
        in_place: Whether the sources are the training's own tensors, which must not change meanwhile.
    """

    cuda: Cuda
    device: torch.device
    stream: Any
    ready: Any
    fetched: Any
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]
    in_place: bool

    def begin(self) -> None:
        """Give the copy to the side stream."""
        with self.cuda.use(self.stream):
            self.stream.wait_event(self.ready)
            try:
                self.cuda.copy(self.targets, self.sources)
            finally:  # of one that failed, a part may be under way
                self.fetched.record(self.stream)

    def hold_back(self) -> None:
        """Let the calling thread's later work on the device wait, if it could change the sources."""
        if self.in_place:
            self.cuda.current_stream(self.device).wait_event(self.fetched)

    def finish(self) -> None:
        """Return when the bytes have arrived."""
        self.fetched.synchronize()


@dataclass(frozen=True, slots=True)
class Arrival:
    """
    A move that the device has among its work already.

    Attributes:
        arrived: Recorded behind it.
        sources: Held until then, because they may be of another stream, which would use their memory anew.
    """

    cuda: Cuda
    device: torch.device
    arrived: Any
    sources: list[torch.Tensor]

    def begin(self) -> None:
        """Let the thread that will wait for it do so as one of that device."""
        self.cuda.work_for(self.device)

    def hold_back(self) -> None:
        """Do nothing: later work comes behind it."""

    def finish(self) -> None:
        """Return when the bytes have arrived."""
        self.arrived.synchronize()


def _places(plan: SnapshotPlan, sections: Sequence[Section], aside: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the place of each range, as far behind the beginning of *aside* as of the first section."""
    first = sections[0].start
    for section in sections:
        for index in section.ranges:
            part = plan.ranges[index]
            place = aside[part.position - first : part.position - first + part.size]
            layout = plan.layouts[part.tensor]
            # In the tensor's own type and shape: torch copies many tensors in one kernel only between equals.
            yield place if not part.whole or layout is None else place.view(layout.dtype).view(layout.shape)


def _by_dtype(
    into: Sequence[torch.Tensor], outof: Sequence[torch.Tensor]
) -> Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(into, outof, strict=True):
        targets, sources = groups.setdefault(target.dtype, ([], []))
        targets.append(target)
        sources.append(source)
    return groups.values()

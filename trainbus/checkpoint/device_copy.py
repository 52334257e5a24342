"""From CUDA devices to the host: the copy put aside on the device, side streams, pinned memory."""

from __future__ import annotations

import contextlib
import logging
import mmap
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainbus.checkpoint.snapshot_plan import Section, SnapshotPlan
from trainbus.checkpoint.staging_memory import StagingBuffer

__all__ = ["DeviceStaging", "pin"]

_log = logging.getLogger("trainbus")

PIECE_BYTES = 256 << 20
RESERVED_SHARE = 0.1  # of a device's memory, left to a training that grows


class DeviceStaging:
    """
    Side streams and, where there is room, a second copy of the state on each device.

    Args:
        mode: ``"auto"`` for a copy on the device if a tenth of its memory stays free, True for
            one if it can be had at all, False for none.
    """

    def __init__(self, mode: str | bool = "auto") -> None:
        if mode not in ("auto", True, False):
            raise ValueError(f"device_snapshot must be 'auto', True or False, got {mode!r}.")
        self._mode = mode
        self._devices: dict[torch.device, _Device] = {}

    def has_room(self, device: torch.device, size: int) -> bool:
        """Make sure of *size* bytes on *device* for a copy; False: copy straight to the host."""
        return self._mode is not False and self._on(device).reserve(size, careful=self._mode == "auto")

    def put_aside(
        self,
        plan: SnapshotPlan,
        section: Section,
        sources: list[torch.Tensor],
        target: torch.Tensor,
        position: int,
    ) -> _FetchFromAside:
        """
        Copy *sources* on the device, in line with the work given to it so far. Does not wait.

        Args:
            plan: Where they lie on the section.
            section: What they are.
            sources: One for each range of the section.
            target: The section's bytes on the host, where the move brings them.
            position: First byte for it in the device's copy.
        """
        return self._on(section.device).put_aside(plan, section, sources, target, position)

    def fetch_later(
        self, device: torch.device, sources: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> _FetchInPlace:
        """Return the move that copies *sources* as the work given to the device so far leaves them."""
        return self._on(device).fetch_later(sources, targets)

    def fetch_now(
        self, device: torch.device, sources: list[torch.Tensor], targets: list[torch.Tensor]
    ) -> None:
        """Copy to the host in line with the work given to the device so far, and wait for it."""
        torch._foreach_copy_(targets, sources, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()

    def _on(self, device: torch.device) -> _Device:
        if device not in self._devices:
            self._devices[device] = _Device(device)
        return self._devices[device]


class _Device:
    """One device's side stream, and the copy put aside there. Training thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._aside: torch.Tensor | None = None
        self._refused: int | None = None  # bytes that could not be had
        self._fetched: list[torch.cuda.Event] = []  # of the copies put aside last
        self._plan: SnapshotPlan | None = None
        self._places: dict[Section, list[torch.Tensor]] = {}

    def reserve(self, size: int, *, careful: bool) -> bool:
        if self._aside is not None and self._aside.numel() >= size:
            return True
        if self._refused is not None and size >= self._refused:
            return False
        # The memory goes back to this stream's pool, so what comes next there must wait for the fetch.
        self._wait_until_fetched()
        self._aside, self._plan = None, None
        if not careful or self._leaves_enough(size):
            try:
                self._aside = torch.empty(size, dtype=torch.uint8, device=self._device)
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
        free, total = torch.cuda.mem_get_info(self._device)
        unused = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
        return free + unused - size >= RESERVED_SHARE * total

    def put_aside(
        self,
        plan: SnapshotPlan,
        section: Section,
        sources: list[torch.Tensor],
        target: torch.Tensor,
        position: int,
    ) -> _FetchFromAside:
        assert self._aside is not None
        places = self._places_of(plan, section, position)
        with torch.cuda.device(self._device):
            self._wait_until_fetched()
            for into, outof in _by_dtype(places, sources):
                torch._foreach_copy_(into, outof)
            ready, fetched = _event(), _event()
            ready.record()
        aside = self._aside[position : position + section.size]
        self._fetched.append(fetched)
        return _FetchFromAside(self._device, self._stream, ready, fetched, aside, target)

    def fetch_later(self, sources: list[torch.Tensor], targets: list[torch.Tensor]) -> _FetchInPlace:
        with torch.cuda.device(self._device):
            ready, fetched = _event(), _event()
            ready.record()
        return _FetchInPlace(self._device, self._stream, ready, fetched, sources, targets)

    def _wait_until_fetched(self) -> None:
        # On the device; the host goes on. Recorded by now: a save is admitted when the one before is fetched.
        for event in self._fetched:
            torch.cuda.current_stream(self._device).wait_event(event)
        self._fetched.clear()

    def _places_of(self, plan: SnapshotPlan, section: Section, position: int) -> list[torch.Tensor]:
        if self._plan is not plan:
            self._plan, self._places = plan, {}
        if section not in self._places:
            assert self._aside is not None
            self._places[section] = [
                _place(plan, index, self._aside, position - section.start) for index in section.ranges
            ]
        return self._places[section]


@dataclass(frozen=True, slots=True)
class _FetchFromAside:
    """Brings what was put aside to the host, in one piece."""

    device: torch.device
    stream: torch.cuda.Stream
    ready: torch.cuda.Event
    fetched: torch.cuda.Event
    source: torch.Tensor
    target: torch.Tensor

    def begin(self) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(self.ready)
            self.target.copy_(self.source, non_blocking=True)
            self.fetched.record()

    def hold_back(self) -> None:
        """Nothing changes what was put aside."""

    def finish(self) -> None:
        self.fetched.synchronize()


@dataclass(frozen=True, slots=True)
class _FetchInPlace:
    """Copies the tensors themselves, beside the device's work, which must not change them meanwhile."""

    device: torch.device
    stream: torch.cuda.Stream
    ready: torch.cuda.Event
    fetched: torch.cuda.Event
    sources: list[torch.Tensor]
    targets: list[torch.Tensor]

    def begin(self) -> None:
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            self.stream.wait_event(self.ready)
            torch._foreach_copy_(self.targets, self.sources, non_blocking=True)
            self.fetched.record()

    def hold_back(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.fetched)

    def finish(self) -> None:
        self.fetched.synchronize()


def pin(buffer: StagingBuffer) -> None:
    """
    Page-lock a buffer's memory, piece by piece, so that devices write into it by themselves.

    Takes about half a second a gigabyte, without the GIL; not for the training thread. Memory
    that cannot be locked is warned of and used as it is.
    """
    mapping = buffer.mapping
    if mapping is None or buffer.pins is not None:
        return
    pins = _Pins(mapping)
    if buffer.mapping is mapping:
        buffer.pins = pins


class _Pins:
    """The page-locked pieces of a mapping; unlocked when this is dropped, before the mapping is."""

    def __init__(self, mapping: mmap.mmap) -> None:
        address = torch.frombuffer(mapping, dtype=torch.uint8).data_ptr()
        locked: list[int] = []
        weakref.finalize(self, _unlock, mapping, locked)
        for start in range(0, len(mapping), PIECE_BYTES):
            size = min(PIECE_BYTES, len(mapping) - start)
            status = _runtime().cudaHostRegister(address + start, size, 0)
            if int(status) != 0:
                _log.warning(
                    "Cannot page-lock the host memory of snapshots (%s, after %d of %d MiB): copies from the "
                    "device will be slower. Raise the limit of locked memory (ulimit -l).",
                    status,
                    start >> 20,
                    len(mapping) >> 20,
                )
                return
            locked.append(address + start)


def _unlock(mapping: mmap.mmap, addresses: Iterable[int]) -> None:
    # The mapping is an argument so that it lives until here.
    with contextlib.suppress(RuntimeError):
        for address in addresses:
            _runtime().cudaHostUnregister(address)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _event() -> torch.cuda.Event:
    # Whoever waits for it sleeps: a spinning thread would take a core from training.
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


def _place(plan: SnapshotPlan, index: int, aside: torch.Tensor, shift: int) -> torch.Tensor:
    part = plan.ranges[index]
    place = aside[part.position + shift : part.position + shift + part.size]
    layout = plan.layouts[part.tensor]
    if not part.whole or layout is None:
        return place
    # In the tensor's own type and shape: torch copies many tensors in one kernel only between equals.
    return place.view(layout.dtype).view(layout.shape)


def _by_dtype(
    into: Sequence[torch.Tensor], outof: Sequence[torch.Tensor]
) -> Iterable[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for target, source in zip(into, outof, strict=True):
        targets, sources = groups.setdefault(target.dtype, ([], []))
        targets.append(target)
        sources.append(source)
    return groups.values()

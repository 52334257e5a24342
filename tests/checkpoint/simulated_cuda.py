"""A device whose work is done some time later, in any order that its streams and events allow.

Its tensors are the CPU's, so nothing is computed differently; only the order is open, and decided by
chance. What the real one answers with an error, or with wrong bytes, shows here as well: copies to
memory that is page-locked in part, work that did not wait for what it reads.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from random import Random

import torch

from trainbus.checkpoint.cuda import Cuda

MEMORY_BYTES = 1 << 20
EAGERNESS = (0, 1, 4)  # how much a device does of its own accord each time it is given something, at most


class Stream:
    """Work in the order in which it was given."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda
        self.work: deque[tuple[Event, int] | Callable[[], None]] = deque()
        self.given = self.done = 0

    def wait_event(self, event: Event) -> None:
        """Let what is given from now on wait for what *event* stands for now: nothing, if not recorded."""
        self.give((event, event.recorded))

    def synchronize(self) -> None:
        """Return when all that was given is done."""
        target = self.given
        self._cuda.work_until(lambda: self.done >= target)

    def give(self, work: tuple[Event, int] | Callable[[], None]) -> None:
        """Add to the work."""
        with self._cuda.lock:
            self.given += 1
            self.work.append(work)
            self._cuda.work_a_little()


class Event:
    """Stands for a stream's work up to where it was recorded last."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self._cuda = cuda
        self.recorded = self.reached = 0

    def record(self, stream: Stream) -> None:
        """Stand for what *stream* was given so far."""
        self.recorded += 1
        number = self.recorded
        stream.give(lambda: setattr(self, "reached", number))

    def synchronize(self) -> None:
        """Return when it is over."""
        number = self.recorded
        self._cuda.work_until(lambda: self.reached >= number)


class SimulatedCuda(Cuda):
    """
    The CPU as a device that is asked for its work and does it later.

    Args:
        random: Decides.
        room: Bytes of memory it has for copies.
        refuses_locks_after: Pieces of memory that it page-locks; it refuses all later ones.
    """

    def __init__(self, random: Random, *, room: int = 1 << 40, refuses_locks_after: int = 1 << 40) -> None:
        self._random = random
        self._eagerness = random.choice(EAGERNESS)
        self._room = room
        self._locks_left = refuses_locks_after
        self._current = threading.local()
        self._streams: list[Stream] = []
        self.memory = torch.empty(MEMORY_BYTES, dtype=torch.uint8)
        self.lock = threading.RLock()
        self.locked: dict[int, int] = {}  # sizes by address
        self.pageable = 0  # copies to memory of the host that was not locked
        self.trouble: list[str] = []
        self.worked_for: set[tuple[str, torch.device]] = set()  # which threads, for which devices
        self._default = self.stream(torch.device("cpu"))

    # -- the door

    def serves(self, device: torch.device) -> bool:
        return True

    def stream(self, device: torch.device) -> Stream:
        stream = Stream(self)
        self._streams.append(stream)
        return stream

    def current_stream(self, device: torch.device) -> Stream:
        return getattr(self._current, "stream", self._default)

    def work_for(self, device: torch.device) -> None:
        self.worked_for.add((threading.current_thread().name, device))

    @contextlib.contextmanager
    def use(self, stream: Stream) -> Iterator[None]:
        self.work_for(torch.device("cpu"))
        before, self._current.stream = self.current_stream(torch.device("cpu")), stream
        try:
            yield
        finally:
            self._current.stream = before

    def event(self) -> Event:
        return Event(self)

    def copy(self, into: list[torch.Tensor], outof: list[torch.Tensor]) -> None:
        stream = self.current_stream(torch.device("cpu"))
        for target, source in zip(into, outof, strict=True):
            stream.give(lambda target=target, source=source: target.copy_(source))
            if not self._is_own(target) and not self._is_locked(target):
                self.pageable += 1
                stream.synchronize()  # as the real one does for pageable memory

    def allocate(self, size: int, device: torch.device) -> torch.Tensor:
        if size > self._room:
            raise torch.OutOfMemoryError(f"{size} bytes")
        # What was given back is given out again at once, as a stream's pool does.
        return self.memory[:size]

    def unused_bytes(self, device: torch.device) -> tuple[int, int]:
        return self._room, self._room

    def lock_pages(self, address: int, size: int, device: torch.device) -> str | None:
        with self.lock:
            if self._locks_left == 0:
                return "no more"
            self._locks_left -= 1
            self.locked[address] = size
            return None

    def unlock_pages(self, address: int) -> None:
        with self.lock:
            del self.locked[address]

    # -- the device

    def launch(self, work: Callable[[], None]) -> None:
        """Give a kernel to the calling thread's stream."""
        self.current_stream(torch.device("cpu")).give(work)

    def work_a_little(self) -> None:
        """Do a few things that are due."""
        for _ in range(self._random.randint(0, self._eagerness)):
            self._step()

    def work_until(self, is_over: Callable[[], bool]) -> None:
        """Do what is due, in any order, until *is_over*."""
        while not is_over():
            time.sleep(0)  # so that other threads come in between
            with self.lock:
                if not is_over() and not self._step():
                    raise RuntimeError("the device waits for what nobody has given to it")

    def _step(self) -> bool:
        with self.lock:
            due = [stream for stream in self._streams if stream.work and _is_due(stream.work[0])]
            if not due:
                return False
            stream = self._random.choice(due)
            work = stream.work.popleft()
            if not isinstance(work, tuple):
                with torch.no_grad():
                    work()
            stream.done += 1
            return True

    def _is_own(self, target: torch.Tensor) -> bool:
        return target.untyped_storage().data_ptr() == self.memory.data_ptr()

    def _is_locked(self, target: torch.Tensor) -> bool:
        start = target.data_ptr()
        end = start + target.numel() * target.itemsize
        with self.lock:
            touched = [
                (begin, begin + size)
                for begin, size in self.locked.items()
                if begin < end and start < begin + size
            ]
        if not touched:
            return False
        if len(touched) > 1 or not (touched[0][0] <= start and end <= touched[0][1]):
            self.trouble.append("a copy to memory that is page-locked in part, or in two pieces")
        return True


def _is_due(work: tuple[Event, int] | Callable[[], None]) -> bool:
    return not isinstance(work, tuple) or work[0].reached >= work[1]

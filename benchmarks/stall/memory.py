"""
Peak memory of this process and of those it started, without disturbing what is timed.

The kernel keeps the peak of the resident memory by itself (``VmHWM``; what is written to
``clear_refs`` makes it begin anew), so nothing is sampled here unless there are child processes
or a GPU, whose driver's pinned pages need not count as resident. The page cache never counts.
"""

from __future__ import annotations

import contextlib
import os
import threading
from types import TracebackType

__all__ = ["PeakMemory"]

_INTERVAL = 0.05  # seconds between two samples


class PeakMemory:
    """
    Measures peaks between `restart` and `peaks`; a context manager.

    Args:
        children: Add the private memory of child processes.
        system: Watch what the whole machine has available, too.
    """

    def __init__(self, *, children: bool, system: bool) -> None:
        self._children = children
        self._system = system
        self._of_children = 0
        self._least_available = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)

    def __enter__(self) -> PeakMemory:
        self._at_start = _field("/proc/meminfo", "MemAvailable")
        self.restart()
        if self._children or self._system:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()

    def restart(self) -> None:
        """Forget the peaks so far."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
        self._of_children = 0
        self._least_available = _field("/proc/meminfo", "MemAvailable")

    def peaks(self) -> tuple[int, int]:
        """
        Return the greatest bytes since `restart`: resident, and taken from the whole machine (or 0).

        Only the difference of two of them means something; that of the second alone sees memory
        which a driver pins without its counting as resident.
        """
        resident = _field("/proc/self/status", "VmHWM") + self._of_children
        return resident, self._at_start - self._least_available if self._system else 0

    def _sample(self) -> None:
        while not self._stop.wait(_INTERVAL):
            if self._children:
                # Private memory only: what is shared counts in this process already.
                private = sum(_field(f"/proc/{pid}/status", "RssAnon") for pid in _descendants())
                self._of_children = max(self._of_children, private)
            if self._system:
                available = _field("/proc/meminfo", "MemAvailable")
                self._least_available = min(self._least_available, available)


def _descendants() -> list[int]:
    found = [os.getpid()]
    for pid in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{task}/children") as file:
                    found += [int(child) for child in file.read().split()]
    return found[1:]


def _field(path: str, name: str) -> int:
    """Return a field of a /proc file in bytes; 0 if file or field is gone."""
    with contextlib.suppress(OSError), open(path) as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) << 10
    return 0

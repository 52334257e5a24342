"""One peer on one workload in this process: ``python -m benchmarks.stall.measure JOB RESULT``."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import traceback
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.stall import limits, pauses, peers
from benchmarks.stall.loop import Loop, Request
from benchmarks.stall.memory import PeakMemory
from benchmarks.stall.peers.base import Peer, flat
from benchmarks.stall.workloads import WORKLOADS, Unavailable, Workload

__all__ = ["LIMITS", "Job"]

_Peaks = tuple[int, int, int]  # bytes: resident, taken from the machine, on the device

LIMITS = "limits"  # in place of a peer: what bounds all of them


@dataclass(frozen=True)
class Job:
    """
    What to measure.

    Attributes:
        peer, workload: By name.
        folder: Where saves go.
        size_mib: State of the workloads that can choose.
        save_every: Steps from a save to the next.
        saves: After the first, which is apart.
        warmup: Steps before anything is timed, of the training alone and again with the peer.
        baseline: Steps without saves, half of them before, half after.
        pause_saves: Saves with a thread that looks at the clock.
        checks: Saves whose file is compared with a copy.
    """

    peer: str
    workload: str
    folder: str
    size_mib: int
    save_every: int
    saves: int
    warmup: int
    baseline: int
    pause_saves: int
    checks: int


class Measurement:
    """
    Carries out a job with a peer and a loop.

    Attributes:
        record: What was measured, as JSON values; times in seconds, sizes in bytes.
    """

    def __init__(self, job: Job, workload: Workload, peer: Peer, memory: PeakMemory, own: _Peaks) -> None:
        self.record: dict[str, Any] = {"fsync": peer.fsync, "state_bytes": workload.state_bytes()}
        self._own = own
        self._job = job
        self._workload = workload
        self._peer = peer
        self._memory = memory
        self._loop = Loop(workload, peer)
        self._count = 0
        self._kept: list[Request] = []

    def run(self) -> None:
        """Measure everything."""
        job, loop, record = self._job, self._loop, self.record
        loop.steps(job.warmup)
        before = loop.steps(job.baseline // 2)
        # What the first save costs must not fall on the second, nor that of the last on nobody.
        windows = [self._window(whole=number in (0, job.saves)) for number in range(job.saves + 1)]
        over = [peak - own for peak, own in zip(_peaks(self._memory), self._own, strict=True)]
        record.update(host_bytes=max(over[:2]), resident_bytes=over[0], device_bytes=over[2])
        loop.steps(2)
        after = loop.steps(job.baseline - job.baseline // 2)
        record["step"] = median = statistics.median(before + after)
        for window in windows:
            steps = window.pop("steps")
            window.update(lost=sum(steps) - len(steps) * median, wall=sum(steps), longest=max(steps))
        record["first"], *record["saves"] = windows
        record["timeline"] = [round(seconds, 6) for seconds in loop.durations]
        if job.peer != peers.NO_SAVES:
            record["pauses"] = self._pauses()
            record["idle_pauses"] = _percentiles(pauses.idle())
            record["checked"], record["torn"] = self._check()

    def _window(self, *, whole: bool) -> dict[str, Any]:
        """Save, and train up to where the next save is due; if *whole*, also until this one is complete."""
        loop, request = self._loop, self._request()
        first = len(loop.durations)
        loop.step(request.start)
        loop.steps(self._job.save_every - 1)
        while whole and not request.done():
            loop.step()
        steps = loop.durations[first:]
        self._clean_up()
        loop.steps(self._workload.settling)
        return {"request": request, "call": request.returned, "at": first, "steps": steps}

    def _request(self) -> Request:
        self._count += 1
        request = Request(self._peer, os.path.join(self._job.folder, f"save-{self._count:04}"))
        self._kept.append(request)
        return request

    def _clean_up(self) -> None:
        """Remove what a later complete save has made superfluous; between steps, so that nobody times it."""
        while len(self._kept) > 1 and self._kept[0].done() and self._kept[1].done():
            self._peer.remove(self._kept.pop(0).path)

    def _pauses(self) -> dict[str, Any]:
        """Return what a thread that never leaves Python notices of saves, and they of it."""
        found: list[float] = []
        complete: list[float | None] = []

        def watch(request: Request) -> None:
            pauses_of_one, seconds = pauses.watch(request, background=self._peer.background)
            found.extend(pauses_of_one)
            complete.append(seconds)

        for _ in range(self._job.pause_saves):
            request = self._request()
            self._loop.step(lambda request=request: watch(request))
            request.result()
            self._clean_up()
        return {**_percentiles(found), "per_save": sum(found) / len(complete), "complete": complete}

    def _check(self) -> tuple[int, int]:
        """Return how many files were read back and how many of them are no state the training was in."""
        checked = torn = 0
        if self._workload.constant:
            for request in self._kept:
                request.result()
                checked, torn = checked + 1, torn + _is_mixed(self._peer.load(request.path))
        for _ in range(self._job.checks):
            expected: dict[str, torch.Tensor] = {}
            request = self._request()

            def save(expected: dict[str, torch.Tensor] = expected, request: Request = request) -> None:
                live = flat(self._workload.state())
                expected.update(
                    (place, tensor.detach().to("cpu", copy=True)) for place, tensor in live.items()
                )
                request.start()

            self._loop.step(save)
            self._loop.steps(3)  # these change what is still being read
            request.result()
            self._clean_up()
            checked, torn = checked + 1, torn + _differs(self._peer.load(request.path), expected)
        return checked, torn

    def finish(self) -> None:
        """Fill in what is known only when everything is written."""
        for window in [self.record["first"], *self.record["saves"]]:
            request: Request = window.pop("request")
            request.result()
            window["complete"] = request.complete


def _peaks(memory: PeakMemory) -> _Peaks:
    return *memory.peaks(), torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def _train_alone(workload: Workload, steps: int, memory: PeakMemory) -> _Peaks:
    """Return the peaks of the training without the peer, which may prepare before its first save."""
    memory.restart()
    for number in range(steps):
        workload.step(number, lambda: None)
        workload.settle()
    return _peaks(memory)


def _percentiles(values: list[float]) -> dict[str, float]:
    ordered = sorted(values) or [0.0]
    return {"p99": ordered[int(0.99 * (len(ordered) - 1))], "max": ordered[-1]}


def _is_mixed(tensors: dict[str, torch.Tensor]) -> bool:
    """Tell whether parameters that are one number at each moment are more than one in a file."""
    values = [tensor for place, tensor in tensors.items() if place.startswith("/module")]
    return not values or not all(bool((tensor == values[0].flatten()[0]).all()) for tensor in values)


def _differs(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return tensors.keys() != expected.keys() or not all(
        torch.equal(tensor, expected[place]) for place, tensor in tensors.items()
    )


def run(job: Job) -> dict[str, Any]:
    """Carry out *job* in this process and return what was measured."""
    workload = WORKLOADS[job.workload].build(job.size_mib)
    if job.peer == LIMITS:
        return limits.measure(workload, job.folder)
    peer = peers.make(job.peer, workload, job.folder)
    with PeakMemory(children=peer.processes, system=torch.cuda.is_available()) as memory:
        own = _train_alone(workload, job.warmup, memory)
        with peer:
            measurement = Measurement(job, workload, peer, memory, own)
            measurement.run()
        measurement.finish()
    return measurement.record


def main() -> None:
    """Read the job, write the result."""
    job_path, result_path = sys.argv[1:]
    with open(job_path) as file:
        job = Job(**json.load(file))
    # Shared memory costs a descriptor a tensor; the usual 1,024 would end before the benchmark does.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    result: dict[str, Any] = asdict(job)
    try:
        result.update(run(job))
    except Unavailable as error:
        result["error"] = str(error)
    except Exception as error:
        traceback.print_exc()
        result["error"] = f"{type(error).__name__}: {error}"
    with open(result_path, "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()

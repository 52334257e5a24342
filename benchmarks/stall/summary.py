"""From the runs to rows: medians with intervals, and who lost more."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.stall import peers
from benchmarks.stall.measure import LIMITS

__all__ = ["EQUAL", "Interval", "limits", "median_interval", "percentile", "rows"]

EQUAL = "equal within noise"


@dataclass(frozen=True)
class Interval:
    """A median and its 95 % interval."""

    median: float
    low: float
    high: float

    def against(self, ours: Interval) -> str:
        """Return ``more``, ``less``, or that the two intervals overlap."""
        if self.low > ours.high:
            return "more"
        return "less" if self.high < ours.low else EQUAL


def median_interval(values: list[float]) -> Interval:
    """
    Return the median of *values* and its 95 % interval from order statistics.

    Whatever the distribution, the number of values below its median is binomial. With fewer
    than six values even the range covers less than 95 %; it is what is returned then.
    """
    ordered = sorted(values)
    count = len(ordered)
    outside, below = 0.0, 0  # below: values that may be left out at each end
    while below < count // 2:
        outside += math.comb(count, below) / 2**count
        if 2 * outside > 0.05:
            break
        below += 1
    below = max(below - 1, 0)
    return Interval(statistics.median(ordered), ordered[below], ordered[count - 1 - below])


def percentile(values: list[float], share: float) -> float:
    """Return the value that *share* of all are not above."""
    return sorted(values)[math.ceil(share * len(values)) - 1]


def rows(runs: list[dict[str, Any]], workload: str) -> list[dict[str, Any]]:
    """Return one row for each peer on *workload*, in the order of their first runs; JSON values."""
    of_workload = [run for run in runs if run["workload"] == workload and run["peer"] != LIMITS]
    names = list(dict.fromkeys(run["peer"] for run in of_workload))
    by_peer = {name: _row(name, [run for run in of_workload if run["peer"] == name]) for name in names}
    limit = limits(runs, workload)
    for row in by_peer.values():
        if "error" not in row:
            _compare(row, by_peer, limit)
    return list(by_peer.values())


def _row(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {"peer": name, "workload": runs[0]["workload"], "rounds": len(runs)}
    errors = [run["error"] for run in runs if "error" in run]
    if errors:
        return {**row, "error": errors[0]}
    saves = [save for run in runs for save in run["saves"]]
    calls = [save["call"] for save in saves]
    row.update(
        fsync=runs[0]["fsync"],
        save_every=runs[0]["save_every"],
        saves=len(saves),
        state_bytes=runs[0]["state_bytes"],
        step=statistics.median(run["step"] for run in runs),
        lost=asdict(median_interval([save["lost"] for save in saves])),
        lost_share=statistics.median(save["lost"] / save["wall"] for save in saves),
        first_lost=statistics.median(run["first"]["lost"] for run in runs),
        call_p50=percentile(calls, 0.5),
        call_p99=percentile(calls, 0.99),
        longest_step=max(save["longest"] for save in saves),
        complete=asdict(median_interval([save["complete"] for save in saves])),
        host_bytes=max(run["host_bytes"] for run in runs),
        device_bytes=max(run["device_bytes"] for run in runs),
    )
    if name != peers.NO_SAVES:
        row.update(
            pause_p99=statistics.median(run["pauses"]["p99"] for run in runs),
            pause_max=max(run["pauses"]["max"] for run in runs),
            pause_per_save=statistics.median(run["pauses"]["per_save"] for run in runs),
            beside_python=_median_of_known([one for run in runs for one in run["pauses"]["complete"]]),
            checked=sum(run["checked"] for run in runs),
            torn=sum(run["torn"] for run in runs),
        )
    return row


def _median_of_known(values: list[float | None]) -> float | None:
    """Return the median of *values*, of which None is the largest; None if it is that."""
    median = statistics.median_high(math.inf if value is None else value for value in values)
    return median if math.isfinite(median) else None


def _compare(row: dict[str, Any], by_peer: dict[str, dict[str, Any]], limit: dict[str, Any] | None) -> None:
    row["host_per_state"] = row["host_bytes"] / row["state_bytes"]
    ours = by_peer.get(peers.OURS, {}).get("lost")
    if ours is not None and row["peer"] not in (peers.OURS, peers.NO_SAVES):
        row["lost_against_ours"] = Interval(**row["lost"]).against(Interval(**ours))
        if ours["median"] > 0:
            row["lost_per_ours"] = row["lost"]["median"] / ours["median"]
    if row["peer"] == peers.NO_SAVES:
        return
    row["bytes_per_second"] = row["state_bytes"] / row["complete"]["median"]
    durable = by_peer.get("torch-save-fsync", {}).get("complete")
    if durable is not None:
        row["complete_per_fsync"] = row["complete"]["median"] / durable["median"]
    if limit is not None and "disk" in limit:
        row["share_of_disk"] = row["bytes_per_second"] / limit["disk"]


def limits(runs: list[dict[str, Any]], workload: str) -> dict[str, Any] | None:
    """
    Return the medians of what bounds all peers on *workload*; None if it was not measured.

    ``disk`` is the better of one thread and four; the bounds of ``torch.save`` are in bytes a
    second, with the disk's work after its own and beside it.
    """
    measured = [run for run in runs if run["workload"] == workload and run["peer"] == LIMITS]
    measured = [run for run in measured if "error" not in run]
    if not measured:
        return None

    def median(key: str, part: str | None = None) -> float:
        return statistics.median(run[key][part] if part else run[key] for run in measured)

    found: dict[str, Any] = {
        "sink_crc": median("sink_crc"),
        "sink_no_crc": median("sink_no_crc"),
        "load_per_torch": median("load", "trainbus") / median("load", "torch"),
        "fork_per_without": median("fork", "with") / median("fork", "without"),
        "fork_stepped_per_without": median("fork", "stepped") / median("fork", "without"),
        "fork_call": median("fork", "without"),
    }
    if any("error" in run["disk"] for run in measured):
        return {**found, "disk_error": measured[0]["disk"].get("error", "failed in some rounds")}
    disk = max(median("disk", threads) for threads in ("1", "4"))
    found.update(disk=disk, disk_1=median("disk", "1"), disk_4=median("disk", "4"))
    for crc in ("sink_crc", "sink_no_crc"):
        found[f"{crc}_then_disk"] = 1 / (1 / found[crc] + 1 / disk)
        found[f"{crc}_beside_disk"] = min(found[crc], disk)
    return found

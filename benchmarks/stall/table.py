"""Rows as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.stall.pauses import WATCHED_SECONDS

__all__ = ["table"]

_Row = Mapping[str, Any]


def table(rows: list[dict[str, Any]], limits: dict[str, Any] | None) -> str:
    """Return one workload's rows and bounds as text."""
    measured = [row for row in rows if "error" not in row]
    lines = [_title(measured[0]) if measured else f"{rows[0]['workload']}"]
    cells = [[header for header, _ in _COLUMNS]]
    cells += [[_cell(make, row) for _, make in _COLUMNS] for row in measured]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    for line in cells:
        padded = [text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)]
        lines.append("  ".join([line[0].ljust(widths[0]), *padded]).rstrip())
    lines += [f"{row['peer']}: not measured: {row['error']}" for row in rows if "error" in row]
    if limits is not None:
        lines += _bounds(limits)
    return "\n".join(lines)


def _title(row: _Row) -> str:
    size = row["state_bytes"] / 2**20
    return (
        f"{row['workload']}: a state of {size:,.1f} MiB, a save every {row['save_every']} steps "
        f"of {row['step'] * 1000:,.1f} ms; {row['rounds']} rounds, {row['saves']} saves "
        "and the first of each round apart"
    )


def _cell(make: Callable[[_Row], str], row: _Row) -> str:
    try:
        return make(row)
    except KeyError:  # what does not apply to this row
        return "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.{0 if abs(seconds) >= 0.1 else 1}f}"


def _lost(row: _Row) -> str:
    lost = row["lost"]
    return f"{_ms(lost['median'])} [{_ms(lost['low'])}, {_ms(lost['high'])}]"


def _complete(row: _Row) -> str:
    row["bytes_per_second"]  # nothing is written without saves
    complete = row["complete"]
    return f"{complete['median']:.2f} [{complete['low']:.2f}, {complete['high']:.2f}]"


def _pauses(row: _Row) -> str:
    p99, longest, total = (row[f"pause_{key}"] * 1000 for key in ("p99", "max", "per_save"))
    return f"{p99:.2f}/{longest:.1f}/{total:.0f}"


def _beside_python(row: _Row) -> str:
    seconds = row["beside_python"]
    return f"> {WATCHED_SECONDS:.0f}" if seconds is None else f"{seconds:.2f}"


_COLUMNS: list[tuple[str, Callable[[_Row], str]]] = [
    ("peer", lambda row: str(row["peer"])),
    ("fsync", lambda row: str(row["fsync"])),
    ("lost ms [95 %]", _lost),
    ("than ours", lambda row: str(row["lost_against_ours"])),
    ("/ ours", lambda row: f"{row['lost_per_ours']:.1f}"),
    ("% of time", lambda row: f"{row['lost_share'] * 100:.1f}"),
    ("first ms", lambda row: _ms(row["first_lost"])),
    ("call p50/p99 ms", lambda row: f"{_ms(row['call_p50'])}/{_ms(row['call_p99'])}"),
    ("longest step ms", lambda row: _ms(row["longest_step"])),
    ("complete s [95 %]", _complete),
    ("/ fsync", lambda row: f"{row['complete_per_fsync']:.2f}"),
    ("MB/s", lambda row: f"{row['bytes_per_second'] / 1e6:,.0f}"),
    ("% of disk", lambda row: f"{row['share_of_disk'] * 100:.0f}"),
    ("host MiB (/ state)", lambda row: f"{row['host_bytes'] / 2**20:,.0f} ({row['host_per_state']:.2f})"),
    ("device MiB", lambda row: f"{row['device_bytes'] / 2**20:,.0f}"),
    ("pause p99/max/sum ms", _pauses),
    ("beside Python s", _beside_python),
    ("torn", lambda row: f"{row['torn']} of {row['checked']}"),
]


def _bounds(limits: _Row) -> list[str]:
    def rate(key: str) -> str:
        return f"{limits[key] / 1e9:.2f}"

    lines = []
    if "disk" in limits:
        lines.append(
            f"disk, O_DIRECT writes of this size and fsync: {rate('disk_1')} GB/s by one thread, "
            f"{rate('disk_4')} by four"
        )
    else:
        lines.append(f"disk: {limits['disk_error']}")
    lines.append(
        f"torch.save into a sink: {rate('sink_crc')} GB/s with the zip's CRC, {rate('sink_no_crc')} without"
    )
    if "disk" in limits:
        lines[-1] += (
            f"; with the disk beside it at most {rate('sink_crc_beside_disk')} (without CRC "
            f"{rate('sink_no_crc_beside_disk')}), with the disk after it {rate('sink_crc_then_disk')} "
            f"({rate('sink_no_crc_then_disk')})"
        )
    lines.append(
        f"trainbus.load, verified, of a cached file takes {limits['load_per_torch']:.2f} times torch.load; "
        f"a save right after a DataLoader has forked {limits['fork_per_without']:.2f} times one without "
        f"({limits['fork_call'] * 1000:.1f} ms), a step later {limits['fork_stepped_per_without']:.2f} times"
    )
    return lines

"""The steps of a loop as a picture, each save marked: one panel a peer, ours first."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.stall import peers

__all__ = ["draw"]

_COLUMNS = 2
_BEFORE = 8  # steps without saves, to the left of the first save shown
_SAVES = 4
_OURS, _PEER, _SAVE = "#0b6e4f", "#5b6472", "#d1495b"


def draw(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: str) -> None:
    """Draw the first round of one workload, whose *rows* are given, into a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = sorted(
        (row for row in rows if "error" not in row and row["peer"] != peers.NO_SAVES),
        key=lambda row: not _is_ours(row["peer"]),
    )
    if not shown:
        return
    first = {run["peer"]: run for run in reversed(runs) if run["workload"] == shown[0]["workload"]}
    lines = -(-len(shown) // _COLUMNS)
    figure, grid = pyplot.subplots(
        lines,
        _COLUMNS,
        figsize=(13, 1.6 + 1.7 * lines),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    top = 1.25 * max(_usual_peak(first[row["peer"]]) for row in shown)
    for axes, row in zip(grid.flat, shown, strict=False):
        _panel(axes, first[row["peer"]], row, top)
    for axes in list(grid.flat)[len(shown) :]:
        axes.axis("off")
    grid[0, 0].set_ylim(0, top)
    figure.supxlabel("step")
    figure.supylabel("ms a step")
    figure.suptitle(_title(shown[0]), fontsize=12, x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _is_ours(name: str) -> bool:
    return name.startswith("trainbus")


def _title(row: dict[str, Any]) -> str:
    return (
        f"{row['workload']}: {row['state_bytes'] / 2**20:,.0f} MiB saved every {row['save_every']} steps "
        f"of {row['step'] * 1000:,.0f} ms. Red: a save. What stands out above the line is lost time."
    )


def _usual_peak(run: dict[str, Any]) -> float:
    """Return the longest step of a usual save in ms; one bad moment must not flatten all panels."""
    return 1000 * statistics.median(save["longest"] for save in run["saves"][:_SAVES])


def _panel(axes: Any, run: dict[str, Any], row: dict[str, Any], top: float) -> None:
    ours = _is_ours(row["peer"])
    color = _OURS if ours else _PEER
    marks = [save["at"] for save in run["saves"][:_SAVES]]
    begin = max(marks[0] - _BEFORE, 0)
    end = marks[-1] + run["save_every"]
    steps = [seconds * 1000 for seconds in run["timeline"][begin:end]]
    places = range(len(steps))
    axes.fill_between(places, steps, run["step"] * 1000, step="mid", color=color, alpha=0.35, linewidth=0)
    axes.step(places, steps, where="mid", color=color, linewidth=1.1)
    if max(steps) > top:
        label = {"ha": "center", "va": "top", "fontsize": 8, "color": color, "backgroundcolor": "white"}
        axes.text(steps.index(max(steps)), top, f"{max(steps):,.0f}", **label)
    for mark in marks:
        axes.axvline(mark - begin, color=_SAVE, linewidth=0.8, alpha=0.5, zorder=0)
        axes.plot(mark - begin, 0, marker="^", color=_SAVE, markersize=6, clip_on=False, zorder=3)
    durable = {"yes": "durable", "files": "files synced", "no": "not synced"}[row["fsync"]]
    torn = f", {row['torn']} of {row['checked']} torn" if row["torn"] else ""
    lost = f"{row['lost']['median'] * 1000:,.0f} ms lost a save"
    weight = "bold" if ours else "normal"
    axes.set_title(f"{row['peer']}: {lost} ({durable}{torn})", loc="left", fontsize=10, weight=weight)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(axis="y", alpha=0.25)

"""The metrics of a run over its steps, with the checkpoints marked on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from trainbus.cli.report.chart import (
    BLUE,
    CROWD,
    GREEN,
    GREY,
    MOST_SEAMS,
    ORANGE,
    PALE_BLUE,
    PINK,
    RED,
    SEAM,
    Legend,
    described,
    named,
    put_title,
    stacked,
)
from trainbus.cli.report.run_data import Checkpoint, Curve, RunData
from trainbus.cli.report.words import counted, in_chart, lane, number

__all__ = ["MOST_PANELS", "metrics_figure"]

MOST_PANELS = 12
MOST_POINTS = 2_000  # of a curve: more than a screen has columns
_MOST_LANES = 12

_MARKS = {
    "best": ("best", "star", PINK, 13),
    "kept": ("checkpoint, still there", "circle", GREEN, 8),
    "gone": ("replaced or removed", "circle-open", GREY, 7),
    "lost": ("failed or skipped", "x", RED, 8),
}


def metrics_figure(data: RunData) -> go.Figure | None:
    """Return the curves over steps, a panel for each metric, and a lane for each series of files."""
    panels = _panels(data)[:MOST_PANELS]
    lanes = _lanes(data.checkpoints)
    if not panels and not lanes:
        return None
    heights = [190.0] * len(panels) + ([28.0 * len(lanes) + 12] if lanes else [])
    figure, tops = stacked(heights, shared_x=True)
    legend = Legend(figure)
    for row, (base, curves) in enumerate(panels, 1):
        marked = _marks_on(data, base)
        best = marked.pop("best", None)
        for kind, marks in marked.items():
            legend.add(row, kind, marks)
        for curve in curves:
            legend.add(row, *_curve_trace(curve, data.global_step > 0))
        if best is not None:
            legend.add(row, "best", best)
        put_title(figure, tops[row - 1], _panel_title(curves))
        figure.update_yaxes(row=row, col=1, automargin=True)
    if lanes:
        row = len(panels) + 1
        for level, saves in enumerate(reversed(lanes)):
            for kind, marks in _by_mark(saves).items():
                steps = [data.place_of(one) for one in marks]
                legend.add(row, kind, _marks(kind, steps, [level] * len(marks), map(described, marks)))
        names = [in_chart(lane(saves), 24) for saves in reversed(lanes)]
        figure.update_yaxes(
            row=row,
            col=1,
            tickvals=list(range(len(lanes))),
            ticktext=names,
            range=[-0.6, len(lanes) - 0.4],
            automargin=True,
        )
        put_title(figure, tops[-1], "Checkpoints")
    figure.update_xaxes(showticklabels=False)
    title = "training batches completed" if data.global_step else "epochs completed"
    figure.update_xaxes(row=len(heights), col=1, title_text=title, tickformat=",d", showticklabels=True)
    if (data.global_step or data.epoch) <= 10:
        figure.update_xaxes(dtick=1)
    for part in data.parts[1:MOST_SEAMS] if data.global_step else ():
        figure.add_vline(part.first_step, line=SEAM)
    return figure


def _panels(data: RunData) -> list[tuple[str, list[Curve]]]:
    """Group ``loss`` with ``val_loss``; what the run is judged by comes first."""
    panels: dict[str, list[Curve]] = {}
    for curve in data.curves:
        panels.setdefault(curve.name.removeprefix("val_"), []).append(curve)
    judged = data.monitor.removeprefix("val_") if data.monitor else None
    # Batches first, so that what matters is drawn over them.
    for curves in panels.values():
        curves.sort(key=lambda curve: (curve.scope != "batch", curve.name.startswith("val_")))
    return sorted(panels.items(), key=lambda panel: panel[0] != judged)


def _panel_title(curves: Sequence[Curve]) -> str:
    names = list(dict.fromkeys(in_chart(curve.name) for curve in curves))
    odd = sum(not math.isfinite(value) for curve in curves for value in curve.values)
    return " · ".join(names) + (f"  ({counted(odd, 'value')} not finite, left out)" if odd else "")


def _curve_trace(curve: Curve, counts_steps: bool) -> tuple[str, go.Scatter]:
    validation = curve.name.startswith("val_")
    kind = "batch" if curve.scope == "batch" else "validation" if validation else "training"
    label, color, width = {
        "batch": ("training batches", PALE_BLUE, 1.2),
        "training": ("mean of the epoch", BLUE, 2.2),
        "validation": ("validation", ORANGE, 2.2),
    }[kind]
    chosen = _thinned(curve.values)
    values = [curve.values[i] for i in chosen]
    text = [
        f"{in_chart(curve.name)} <b>{number(curve.values[i])}</b><br>"
        f"epoch {curve.epochs[i] + 1}" + (f", step {curve.steps[i]:,}" if counts_steps else "")
        for i in chosen
    ]
    few = len(chosen) <= 60 and kind != "batch"
    return kind, go.Scatter(
        x=[curve.steps[i] for i in chosen],
        y=[value if math.isfinite(value) else None for value in values],
        name=label,
        mode="lines+markers" if few or len(chosen) == 1 else "lines",
        line={"color": color, "width": width},
        marker={"size": 5},
        hovertext=text,
        hoverinfo="text",
    )


def _thinned(values: Sequence[float]) -> list[int]:
    """Return which values to draw: all, or of each stretch the least and the greatest, so peaks stay."""
    if len(values) <= MOST_POINTS:
        return list(range(len(values)))
    chosen: set[int] = {0, len(values) - 1}
    stretch = math.ceil(2 * len(values) / MOST_POINTS)
    for start in range(0, len(values), stretch):
        indices = range(start, min(start + stretch, len(values)))
        finite = [i for i in indices if math.isfinite(values[i])] or [start]
        chosen |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(chosen)


def _marks_on(data: RunData, base: str) -> dict[str, go.Scatter]:
    """Return the marks of the checkpoints in the panel of *base*, by kind."""
    found = {}
    for kind, saves in _by_mark(data.checkpoints).items():
        placed = [(one, name) for one in saves if (name := _metric(one, base, data.monitor)) is not None]
        if placed and kind != "lost":
            steps = [data.place_of(one) for one, _ in placed]
            values = [one.logs[name] for one, name in placed]
            texts = [
                f"{named(one)}<br>{in_chart(name)} <b>{number(one.logs[name])}</b>" for one, name in placed
            ]
            found[kind] = _marks(kind, steps, values, texts)
    return found


def _metric(one: Checkpoint, base: str, monitor: str | None) -> str | None:
    """Return by which metric a checkpoint stands in the panel of *base*; None: by none."""
    names = [f"val_{base}", base]
    if monitor in names:
        names.insert(0, monitor)
    return next((name for name in names if math.isfinite(one.logs.get(name, math.nan))), None)


def _lanes(checkpoints: Sequence[Checkpoint]) -> list[list[Checkpoint]]:
    streams: dict[str, list[Checkpoint]] = {}
    for one in checkpoints:
        streams.setdefault(one.stream, []).append(one)
    lanes = list(streams.values())
    rest = list(itertools.chain.from_iterable(lanes[_MOST_LANES:]))
    return [*lanes[:_MOST_LANES], *([rest] if rest else [])]


def _by_mark(checkpoints: Sequence[Checkpoint]) -> dict[str, list[Checkpoint]]:
    kinds: dict[str, list[Checkpoint]] = {"gone": [], "lost": [], "kept": [], "best": []}
    for one in checkpoints:
        if one.best:
            kinds["best"].append(one)
        elif one.fate in ("failed", "skipped", "damaged"):
            kinds["lost"].append(one)
        else:
            kinds["kept" if one.fate in ("kept", "elsewhere") else "gone"].append(one)
    return {kind: found for kind, found in kinds.items() if found}


def _marks(kind: str, x: Sequence[float], y: Sequence[float], texts: Iterable[str]) -> go.Scatter:
    label, symbol, color, width = _MARKS[kind]
    return go.Scatter(
        x=list(x),
        y=list(y),
        name=label,
        mode="markers",
        marker={
            "symbol": symbol,
            "color": color,
            "size": width if len(x) <= CROWD else 4,
            "line": {"color": color, "width": 1.5 if len(x) <= CROWD else 0.5},
        },
        hovertext=list(texts),
        hoverinfo="text",
    )

"""What the report's charts have in common: stacked panels, one legend, colours, what is said of a save."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from trainbus.cli.report.run_data import Checkpoint
from trainbus.cli.report.words import FATES, duration, in_chart, number, size

__all__ = [
    "BLUE",
    "CROWD",
    "GREEN",
    "GREY",
    "MOST_SEAMS",
    "ORANGE",
    "PALE_BLUE",
    "PALE_GREY",
    "PINK",
    "RED",
    "SEAM",
    "Legend",
    "described",
    "named",
    "put_title",
    "stacked",
]

# Told apart also by those who see no red or no green, and readable on white and on near-black.
BLUE, ORANGE, GREEN, PINK, GREY, RED = "#3584c8", "#e08214", "#1a9e77", "#c0479d", "#8a94a6", "#d1495b"
PALE_BLUE, PALE_GREY = "rgba(53,132,200,.55)", "rgba(138,148,166,.35)"

SEAM = {"color": GREY, "width": 1, "dash": "dot"}
"""The line where a run was interrupted and continued."""
MOST_SEAMS = 50
CROWD = 200
"""From so many on, marks are made smaller, and what is narrow is not widened."""
_LEGEND = (
    *("batch", "training", "validation", "gone", "lost", "kept", "best"),
    *("waiting", "copying", "fenced", "writing", "durable", "size"),
)


class Legend:
    """Adds traces; those of one kind have one entry in the legend and are switched on and off together."""

    def __init__(self, figure: go.Figure) -> None:
        self.figure = figure
        self._known: set[str] = set()

    def add(self, row: int, kind: str, trace: Any) -> None:
        # In the order of the kinds, and not of what is drawn over what.
        rank = _LEGEND.index(kind)
        trace.update(legendgroup=kind, showlegend=kind not in self._known, legendrank=rank)
        self._known.add(kind)
        self.figure.add_trace(trace, row=row, col=1)


def stacked(heights: Sequence[float], *, shared_x: bool, gap: float = 42.0) -> tuple[go.Figure, list[float]]:
    """Return a figure of panels of these heights in pixels, and where their tops are (0 to 1)."""
    inner = sum(heights) + gap * (len(heights) - 1)
    figure = make_subplots(
        rows=len(heights),
        shared_xaxes=shared_x,
        row_heights=list(heights),
        vertical_spacing=gap / inner if len(heights) > 1 else 0,
    )
    top, bottom = 64, 52
    figure.update_layout(
        template="none",
        height=inner + top + bottom,
        margin={"l": 64, "r": 16, "t": top, "b": bottom},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13},
        # Above the first title; where it takes several lines it pushes the panels down.
        legend={"orientation": "h", "x": 0, "y": 1 + 26 / inner, "yanchor": "bottom"},
        hoverlabel={"align": "left", "font": {"size": 13}},
        dragmode="zoom",
    )
    ticks = {"ticks": "outside", "ticklen": 4, "title": {"standoff": 8, "font": {"size": 12}}}
    figure.update_xaxes(showgrid=False, zeroline=False, showline=True, **ticks)
    small = {"standoff": 4, "font": {"size": 12}}
    figure.update_yaxes(showgrid=True, zeroline=False, nticks=6, title=small)
    return figure, [axis.domain[1] for axis in figure.select_yaxes()]


def put_title(figure: go.Figure, top: float, text: str) -> None:
    figure.add_annotation(
        text=f"<b>{text}</b>",
        x=0,
        y=top,
        xref="paper",
        yref="paper",
        xanchor="left",
        yanchor="bottom",
        yshift=5,
        showarrow=False,
    )


def named(one: Checkpoint) -> str:
    marks = f"{' · best' * one.best}{' · newest' * one.newest}"
    step = f"step {one.global_step:,}, " if one.global_step else ""
    return f"<b>{in_chart(one.file)}</b>{marks}<br>epoch {one.epoch + 1}, {step}{FATES[one.fate]}"


def described(one: Checkpoint) -> str:
    metrics = itertools.islice(one.logs.items(), 6)
    lines = [named(one), *(f"{in_chart(name, 32)} {number(value)}" for name, value in metrics)]
    if one.size:
        lines.append(size(one.size))
    if one.lost is not None:
        lines.append(f"training stood still for {duration(one.lost)}")
    if one.to_durable is not None:
        lines.append(f"safe on the disk after {duration(one.to_durable)}")
    if one.reason:
        lines.append(in_chart(one.reason, 80))
    return "<br>".join(lines)

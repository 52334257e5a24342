"""What saves cost, one by one, and when the training stood still and the writer was busy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from trainbus.cli.report.chart import (
    BLUE,
    CROWD,
    GREEN,
    GREY,
    MOST_SEAMS,
    ORANGE,
    PALE_GREY,
    PINK,
    SEAM,
    Legend,
    named,
    put_title,
    stacked,
)
from trainbus.cli.report.run_data import Checkpoint, RunData, Span
from trainbus.cli.report.words import duration, in_chart, scale, size

__all__ = ["cost_figure", "timeline_figure"]

_FEWEST_BARS = 8  # that a chart has room for, so that a few are not too wide
_SPANS = {
    "training": ("training", PALE_GREY),
    "waiting": ("waits for an earlier save", ORANGE),
    "copying": ("copies the state", BLUE),
    "fenced": ("a step waits for the copy", PINK),
    "writing": ("writes, in the background", GREEN),
}


def cost_figure(data: RunData) -> go.Figure | None:
    """Return for each save how long training stood still, the time until it was durable, and its size."""
    saves = data.checkpoints
    recorded = [(i, one) for i, one in enumerate(saves, 1) if one.lost is not None]
    durable = [(i, one) for i, one in enumerate(saves, 1) if one.to_durable is not None]
    sized = [(i, one) for i, one in enumerate(saves, 1) if one.size]
    rows = [bool(recorded), bool(durable), bool(sized)]
    if not any(rows):
        return None
    heights = [150.0, 150.0, 90.0]
    figure, tops = stacked([h for h, there in zip(heights, rows, strict=True) if there], shared_x=True)
    legend, row = Legend(figure), 0
    if recorded:
        row += 1
        unit, name = scale((one.lost or 0.0 for _, one in recorded), "seconds")
        for kind in ("waiting", "copying", "fenced"):
            values = [(getattr(one, kind) or 0.0) / unit for _, one in recorded]
            if kind == "copying" or any(values):
                texts = [
                    f"{_SPANS[kind][0]}: <b>{duration(getattr(one, kind) or 0.0)}</b>" for _, one in recorded
                ]
                legend.add(row, kind, _bars(recorded, values, texts, *_SPANS[kind]))
        _axis(figure, row, tops[row - 1], "Training stood still", name)
    if durable:
        row += 1
        unit, name = scale((one.to_durable or 0.0 for _, one in durable), "seconds")
        values = [(one.to_durable or 0.0) / unit for _, one in durable]
        texts = [f"on the disk after <b>{duration(one.to_durable or 0.0)}</b>" for _, one in durable]
        legend.add(row, "durable", _bars(durable, values, texts, "from the request to the disk", GREEN))
        _axis(figure, row, tops[row - 1], "Until it was safe on the disk", name)
    if sized:
        row += 1
        unit, name = scale((one.size for _, one in sized), "bytes")
        texts = [f"<b>{size(one.size)}</b>" for _, one in sized]
        legend.add(row, "size", _bars(sized, [one.size / unit for _, one in sized], texts, "size", GREY))
        _axis(figure, row, tops[row - 1], "Size of the file", name)
    figure.update_layout(barmode="stack", bargap=0.25)
    figure.update_xaxes(row=row, col=1, title_text="saves, in the order of their requests", tickformat=",d")
    figure.update_xaxes(range=[0.4, max(len(saves), _FEWEST_BARS) + 0.6])
    if len(saves) <= 2 * _FEWEST_BARS:
        figure.update_xaxes(dtick=1)
    return figure


def _bars(
    numbered: Sequence[tuple[int, Checkpoint]],
    values: Sequence[float],
    texts: Sequence[str],
    name: str,
    color: str,
) -> go.Bar:
    return go.Bar(
        x=[i for i, _ in numbered],
        y=list(values),
        name=name,
        marker={"color": color, "line": {"width": 0}},
        hovertext=[f"{named(one)}<br>{text}" for (_, one), text in zip(numbered, texts, strict=True)],
        hoverinfo="text",
    )


def _axis(figure: go.Figure, row: int, top: float, title: str, unit: str) -> None:
    put_title(figure, top, title)
    figure.update_yaxes(row=row, col=1, title_text=unit, rangemode="tozero", automargin=True)


def timeline_figure(data: RunData) -> go.Figure | None:
    """Return what the training and the writer did when: over the whole run, and around its longest save."""
    if not data.spans:
        return None
    close = _longest_save(data.spans)
    figure, tops = stacked([92.0] * (1 + bool(close)), shared_x=False, gap=88.0)
    legend = Legend(figure)
    unit = scale((span.end for span in data.spans), "seconds")
    _add_timeline(legend, 1, data.spans, 0.0, unit)
    for part in data.parts[1:MOST_SEAMS]:
        figure.add_vline(part.start / unit[0], row=1, col=1, line=SEAM)
    put_title(figure, tops[0], "The whole run")
    if close:
        start = min(span.start for span in close)
        end = max(span.end for span in close)
        margin = 0.15 * (end - start)
        near = [
            Span(
                kind=span.kind,
                start=max(span.start, start - margin),
                end=min(span.end, end + margin),
                file=span.file,
                global_step=span.global_step,
            )
            for span in data.spans
            if span.end > start - margin and span.start < end + margin
        ]
        _add_timeline(legend, 2, near, start, scale([end - start], "seconds"))
        put_title(figure, tops[1], f"Close up: the save that took longest, {in_chart(close[0].file)}")
    figure.update_layout(barmode="overlay", bargap=0.25)
    return figure


def _longest_save(spans: Sequence[Span]) -> list[Span]:
    """Return the writing that took longest, and what the training did for that save."""
    written = [span for span in spans if span.kind == "writing"]
    if not written:
        return []
    longest = max(written, key=lambda span: span.end - span.start)
    of_save = [s for s in spans if (s.file, s.global_step) == (longest.file, longest.global_step)]
    # One file of one step may be there twice: a run that was killed after it does that step again.
    copied = [s for s in of_save if s.kind == "copying" and s.start <= longest.start]
    if not copied:
        return [longest]
    copying = copied[-1]
    waited = [s for s in of_save if s.kind == "waiting" and math.isclose(s.end, copying.start, abs_tol=1e-6)]
    fenced = [s for s in of_save if s.kind == "fenced" and copying.start <= s.start <= longest.end]
    return [longest, copying, *waited, *fenced]


def _add_timeline(
    legend: Legend, row: int, spans: Sequence[Span], origin: float, unit: tuple[float, str]
) -> None:
    length, name = unit
    for kind, (label, color) in _SPANS.items():
        chosen = [span for span in spans if span.kind == kind]
        if not chosen:
            continue
        widened = int(kind != "training" and len(chosen) <= CROWD)
        legend.add(
            row,
            kind,
            go.Bar(
                orientation="h",
                base=[(span.start - origin) / length for span in chosen],
                x=[(span.end - span.start) / length for span in chosen],
                y=["writer" if kind == "writing" else "training"] * len(chosen),
                name=label,
                # A line, so that what takes a thousandth of the width is still seen.
                marker={"color": color, "line": {"color": color, "width": widened}},
                hovertext=[
                    f"{label}: <b>{duration(span.end - span.start)}</b>"
                    + (f"<br>{in_chart(span.file)}, step {span.global_step:,}" if span.file else "")
                    for span in chosen
                ],
                hoverinfo="text",
            ),
        )
    figure = legend.figure
    figure.update_yaxes(
        row=row, col=1, categoryorder="array", categoryarray=["writer", "training"], range=[-0.6, 1.6]
    )
    title = f"{name} of running time" if row == 1 else f"{name} since training turned to it"
    figure.update_xaxes(row=row, col=1, title_text=title)

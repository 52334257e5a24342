"""The page of a report: everything in one file, which a browser shows without asking anybody else."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
from dataclasses import dataclass
from importlib import resources
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trainbus import __version__
from trainbus.cli.report.metrics_figure import MOST_PANELS, metrics_figure
from trainbus.cli.report.run_data import Checkpoint, Part, RunData
from trainbus.cli.report.save_figures import cost_figure, timeline_figure
from trainbus.cli.report.words import FATES, counted, date, duration, number, shortened, size
from trainbus.cli.text import printable

__all__ = ["render"]

_MOST_COLUMNS = 4  # of metrics in the table
_MOST_PARTS_TOLD = 4
_DRAWING = """"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const options = {responsive: true, displayModeBar: false};
for (const [id, figure] of Object.entries(figures)) {
  Plotly.newPlot(id, figure.data, figure.layout, options);
}
"""


@dataclass(frozen=True)
class _Tile:
    name: str
    value: str
    more: str
    best: bool = False


@dataclass(frozen=True)
class _Chart:
    id: str
    heading: str
    caption: str
    label: str


def render(data: RunData) -> str:
    """
    Return the page as HTML.

    What a run has named itself (metrics, files, reasons) is text wherever it stands. The page's own
    policy lets no browser fetch anything for it, nor run a script that is not one of these two.
    """
    figures = {
        name: figure
        for name, make in (("metrics", metrics_figure), ("costs", cost_figure), ("timeline", timeline_figure))
        if (figure := make(data)) is not None
    }
    library = get_plotlyjs()
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    columns = _columns(data)
    return template.render(
        title=printable(os.path.basename(data.folder) or data.folder),
        facts=_facts(data),
        tiles=_tiles(data),
        summary=_summary(data),
        notes=[printable(note) for note in data.notes],
        charts=[_chart(name, data) for name in figures],
        columns=[{"full": printable(name), "short": shortened(name, 20)} for name in columns],
        rows=[_row(one, columns) for one in data.checkpoints],
        figures=Markup(_as_json(figures)),
        library=Markup(library),
        drawing=Markup(_DRAWING),
        script_sources=Markup(f"{_source(library)} {_source(_DRAWING)}"),
        made=date(data.made),
        version=__version__,
    )


def _as_json(figures: dict[str, go.Figure]) -> str:
    # Inside of a script element nothing but this could end it.
    plain = {name: json.loads(figure.to_json()) for name, figure in figures.items()}
    return json.dumps(plain, allow_nan=False).replace("<", "\\u003c")


def _source(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


# -- the head of the page


def _facts(data: RunData) -> list[str]:
    lines = [printable(data.folder)]
    if data.run_id:
        lines.append(f"Run {printable(data.run_id)}")
    if data.parts:
        first, last = data.parts[0], data.parts[-1]
        lines[-1] += f" · began {date(first.began)}, last heard of {date(last.began + last.seconds)}"
    elif data.checkpoints:
        first_save, last_save = data.checkpoints[0], data.checkpoints[-1]
        lines[-1] += f" · saved from {date(first_save.created)} to {date(last_save.created)}"
    return lines


def _tiles(data: RunData) -> list[_Tile]:
    if not data.checkpoints and not data.parts:
        return []
    totals, best = data.totals, data.best
    of_all = f" of {data.total_epochs:,}" if data.total_epochs else ""
    tiles = [_Tile("Epoch", f"{data.epoch:,}{of_all}", f"{data.global_step:,} training batches")]
    if best is not None and data.monitor is not None:
        value = best.logs.get(data.monitor, best.score)
        where = f"epoch {best.epoch + 1}, {shortened(best.file, 40)}"
        shown = "" if value is None else number(value)
        tiles.append(_Tile(f"Best {shortened(data.monitor, 40)}", shown, where, best=True))
    written = f"; {counted(totals.saves, 'save')} wrote {size(totals.bytes_written)}"
    more = f"{counted(totals.files, 'file')}{written * (totals.saves > totals.files)}"
    tiles.append(_Tile("On the disk", size(totals.bytes), more))
    if totals.lost is not None and totals.running:
        each = f", {duration(totals.lost / totals.saves)} a save" if totals.saves else ""
        share = f"{totals.lost / totals.running:.2%} of the run{each}"
        tiles.append(_Tile("Training lost to saves", duration(totals.lost), share))
    if totals.running is not None:
        times = len(data.parts) - 1
        more = f"interrupted {'once' if times == 1 else f'{times:,} times'}" if times else "in one go"
        tiles.append(_Tile("Running time", duration(totals.running), more))
    return tiles


def _summary(data: RunData) -> str:
    if not data.checkpoints and not data.parts:
        return "There is no checkpoint of a training in this folder."
    sentences = [_what_saves_cost(data)] if data.parts else []
    sentences += _what_went_wrong(data)
    if len(data.parts) <= _MOST_PARTS_TOLD:
        sentences += [_how_it_went_on(*both) for both in itertools.pairwise(data.parts)]
    if data.parts and not data.parts[-1].ended:
        last = data.parts[-1]
        sentences.append(
            "No end is recorded: it was killed, or still runs. It was last heard of at step "
            f"{last.last_step:,}, {date(last.began + last.seconds)}."
        )
    elif data.parts and data.parts[-1].reason:
        sentences.append(f"It ended before its time: {shortened(data.parts[-1].reason, 200)}.")
    return " ".join(sentences)


def _what_went_wrong(data: RunData) -> list[str]:
    counts = [(data.totals.failed, "failed"), (data.totals.skipped, "skipped")]
    told = " and ".join(f"{counted(many, 'save')} {how}" for many, how in counts if many)
    return [f"Of {told} there is no file; the table says why."] if told else []


def _how_it_went_on(before: Part, after: Part) -> str:
    if before.reason:
        end = f"was stopped at step {before.last_step:,} ({shortened(before.reason, 120)})"
    else:
        end = f"{'ended' if before.ended else 'was cut off after'} step {before.last_step:,}"
    again = f"; at least {before.done_again:,} batches were trained twice" if before.done_again else ""
    return f"The run {end} and went on from step {after.first_step:,}{again}."


def _what_saves_cost(data: RunData) -> str:
    totals = data.totals
    if not totals.saves:
        return "Nothing was saved."
    lost, writing, overlapped = totals.lost or 0.0, totals.writing or 0.0, totals.overlapped or 0.0
    words = f"For {counted(totals.saves, 'save')} the training stood still for {duration(lost)} in all."
    if writing:
        share = f"{overlapped / writing:.0%}"
        words += (
            f" Writing the files took {duration(writing)}, and during {share} of that the training went on."
        )
    return words


# -- the charts


def _chart(name: str, data: RunData) -> _Chart:
    totals, saves = data.totals, counted(len(data.checkpoints), "save")
    if name == "metrics":
        panels = len({curve.name.removeprefix("val_") for curve in data.curves})
        more = f" {panels - MOST_PANELS} more metrics are in --json." if panels > MOST_PANELS else ""
        dotted = " At dotted lines the run was interrupted and continued." if len(data.parts) > 1 else ""
        return _Chart(
            name,
            "Metrics and checkpoints",
            "Each mark is a checkpoint. Point at anything to read it, drag to zoom in, double-click to see "
            f"all again.{dotted}{more}",
            f"Curves of {counted(len(data.curves), 'metric')} over the training batches, with {saves} marked",
        )
    if name == "costs":
        return _Chart(
            name,
            "What each save cost",
            "The training stands still while the state is copied, and before that while the writer is busy. "
            "The file is then written in the background until it is safe on the disk.",
            f"Bars for {saves}: how long the training stood still, how long until the file was on the disk, "
            "and its size",
        )
    return _Chart(
        name,
        "Training beside writing",
        "Above the training, and where it stood still; below the writer. The time between a process and "
        "the one that continued its run is left out.",
        f"A timeline of {duration(totals.running or 0.0)}: the training, beside it the writing of {saves}",
    )


# -- the table


def _columns(data: RunData) -> list[str]:
    """Return the metrics that get a column: the monitored one, then the most frequent."""
    counts: dict[str, int] = {}
    for one in data.checkpoints:
        for name in one.logs:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (name != data.monitor, -counts[name]))
    return names[:_MOST_COLUMNS]


def _row(one: Checkpoint, columns: list[str]) -> dict[str, Any]:
    tags = [("best", "best")] * one.best + [("newest", "newest")] * one.newest
    tags += [("bad", one.fate)] * (one.fate in ("failed", "damaged"))
    tags += [("plain", "interrupted")] * one.interrupted
    tags += [("plain", "weights only")] * (one.contents == "weights")
    tags += [("plain", "before the run went back")] * one.abandoned
    fate = one.reason or ("" if one.fate in ("kept", "failed", "damaged") and tags else FATES[one.fate])
    values = [one.logs.get(name) for name in columns]
    return {
        "file": shortened(one.file, 64),
        "whole": printable(one.file),
        "tags": [{"kind": kind, "text": text} for kind, text in tags],
        "fate": shortened(fate, 300),
        "past": one.fate not in ("kept", "elsewhere"),
        "epoch": f"{one.epoch + 1:,}",
        "step": f"{one.global_step:,}",
        "metrics": ["" if value is None else number(value) for value in values],
        "size": size(one.size) if one.size else "",
        "lost": "" if one.lost is None else duration(one.lost),
        "durable": "" if one.to_durable is None else duration(one.to_durable),
        "asked": date(one.created),
    }

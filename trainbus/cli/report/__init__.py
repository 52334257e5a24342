"""``trainbus report``: a picture of a run, as one page that needs nothing else. Needs no torch."""

from __future__ import annotations

import json
import os
import sys

import typer

from trainbus.cli.report.gather import gather
from trainbus.cli.report.run_data import RunData
from trainbus.cli.report.words import counted
from trainbus.cli.text import printable
from trainbus.cli.whole_file import write_whole
from trainbus.errors import MissingExtraError
from trainbus_callbacks.history_file import RunHistory, read_history

__all__ = ["run"]

HISTORY_NAME = "history.jsonl"
_SIGN = b'<meta name="generator" content="trainbus report">'  # stands in the head of each page
_HEAD_BYTES = 1024


def run(
    folder: str,
    output: str,
    history: str | None,
    monitor: str | None,
    mode: str | None,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """
    Write a page about the newest run in *folder*, or print the data that it is made from.

    Reads the ends of the checkpoints and what `History` has recorded. The page is whole or not there.

    Args:
        folder: Of checkpoints.
        output: The page; an earlier report is replaced. ``"-"``: the standard output.
        history: What `History` wrote; None: ``history.jsonl`` in *folder*, if it is there.
        monitor: The metric by which one is the best; None: the one that the newest was judged by.
        mode: ``"min"`` or ``"max"``; None: as the newest has it.
        force: Replace also what is no report.
        as_json: Print one object, and write nothing.

    Raises:
        typer.BadParameter: *folder* is none, *history* cannot be read, or *output* is something else.
        MissingExtraError: plotly or Jinja2 is not installed.
    """
    place = os.path.expanduser(folder)
    if not os.path.isdir(place):
        raise typer.BadParameter(f"{folder!r} is no folder. `report` takes a folder of checkpoints.")
    recorded, path = _read(history, place)
    near = os.path.dirname(os.path.abspath(path))
    data = gather(place, recorded, history_folder=near, monitor=monitor, mode=mode)
    if as_json:
        print(json.dumps(data.as_json(), allow_nan=False))
        return
    to_stdout = output == "-"
    target = os.path.expanduser(output)
    if not to_stdout:
        _refuse_to_replace(target, output, force)
    try:
        from trainbus.cli.report.page import render
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("plotly", "jinja2", "markupsafe"):
            raise
        raise MissingExtraError(f'report needs {error.name}: pip install "trainbus[report]"') from error
    page = render(data).encode()
    assert _SIGN in page[:_HEAD_BYTES]
    _tell_what_is_missing(data, folder, recorded, path)
    if to_stdout:
        sys.stdout.buffer.write(page)
        sys.stdout.flush()
        return
    try:
        write_whole(target, page)
    except OSError as error:
        sys.exit(f"trainbus: cannot write {output!r}: {error.strerror}. What was there before still is.")
    saves = counted(len(data.checkpoints), "save")
    print(f"{output}: {saves}, {len(page) / 1e6:.1f} MB. Open it in a browser.")


def _read(history: str | None, folder: str) -> tuple[RunHistory | None, str]:
    path = os.path.join(folder, HISTORY_NAME) if history is None else os.path.expanduser(history)
    if history is None and not os.path.exists(path):
        return None, path
    try:
        return read_history(path), path
    except OSError as error:
        raise typer.BadParameter(
            f"the history {path!r} cannot be read: {error.strerror}. Give --history what History writes."
        ) from error


def _tell_what_is_missing(data: RunData, folder: str, history: RunHistory | None, path: str) -> None:
    if not data.checkpoints:
        print(f"No checkpoints of a training in {printable(folder)}.", file=sys.stderr)
    if history is not None and history.unreadable:
        lines = f"{counted(history.unreadable, 'line')} of the history {printable(path)}"
        print(f"{lines} cannot be read as what History writes.", file=sys.stderr)


def _refuse_to_replace(target: str, output: str, force: bool) -> None:
    if force or not os.path.lexists(target):
        return
    try:
        with open(target, "rb") as file:
            known = _SIGN in file.read(_HEAD_BYTES)
    except OSError as error:
        raise typer.BadParameter(f"{output!r} cannot be replaced: {error.strerror}.") from error
    if not known:
        raise typer.BadParameter(
            f"{output!r} is there and no report of trainbus. Give --force to replace it."
        )

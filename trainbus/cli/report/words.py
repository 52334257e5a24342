"""How the report writes numbers, dates and what is not its own."""

from __future__ import annotations

import html
import math
import re
import time
from collections.abc import Iterable

from trainbus.cli.report.run_data import Checkpoint
from trainbus.cli.text import printable

__all__ = [
    "FATES",
    "amount",
    "counted",
    "date",
    "duration",
    "in_chart",
    "lane",
    "number",
    "scale",
    "shortened",
    "size",
]

FATES = {
    "kept": "there",
    "replaced": "replaced by a later one",
    "removed": "removed by retention",
    "gone": "gone, nobody said why",
    "elsewhere": "in another folder",
    "damaged": "damaged",
    "failed": "failed",
    "skipped": "skipped",
}

_SECONDS = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def scale(values: Iterable[float], units: str) -> tuple[float, str]:
    """
    Return what to divide by, and the unit of the quotient, so that the greatest of *values* reads well.

    Args:
        values: Seconds or bytes.
        units: ``"seconds"`` or ``"bytes"``.
    """
    greatest = max(values, default=0.0)
    known = _SECONDS if units == "seconds" else _BYTES
    return next(((length, name) for length, name in known if greatest >= 2 * length), known[-1])


def duration(seconds: float) -> str:
    """Return seconds as people say them: ``"5.4 ms"``, ``"12.1 s"``, ``"2 h 05 min"``."""
    if seconds >= 3600:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours:,} h {minutes:02} min"
    if seconds >= 120:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest:02} s"
    return f"{amount(seconds)} s" if seconds >= 0.1 else f"{amount(1e3 * seconds)} ms"


def size(nbytes: float) -> str:
    """Return bytes in the unit that fits."""
    length, unit = next(((length, name) for length, name in _BYTES if nbytes >= length), _BYTES[-1])
    return f"{amount(nbytes / length)} {unit}"


def amount(value: float) -> str:
    """Return a number that is not negative with two or three places that count."""
    digits = 0 if value >= 100 or value == 0 else 1 if value >= 10 else 2
    return f"{value:,.{digits}f}"


def number(value: float) -> str:
    """Return a metric's value."""
    return f"{value:.5g}" if math.isfinite(value) else str(value)


def counted(many: int, thing: str) -> str:
    """Return ``"1 file"``, ``"2 files"``."""
    return f"{many:,} {thing}" if many == 1 else f"{many:,} {thing}s"


def date(moment: float) -> str:
    """Return seconds since 1970 as local time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if moment else ""


def shortened(text: str, longest: int) -> str:
    """Return *text* without its middle if it is long; ends tell names apart."""
    text = printable(text)
    if len(text) <= longest:
        return text
    head = (longest - 1) // 2
    return f"{text[:head]}…{text[head + 1 - longest :]}"


def in_chart(text: str, longest: int = 48) -> str:
    """Return *text* for a chart, whose library takes some HTML in it for layout."""
    return html.escape(shortened(text, longest), quote=False)


def lane(checkpoints: Iterable[Checkpoint]) -> str:
    """Return a short name for those who asked for these saves: their file, or its template."""
    saves = list(checkpoints)
    files = {one.file for one in saves}
    if len(files) == 1:
        return files.pop()
    stream = saves[0].stream
    template = re.match(r"\w+\((['\"])(?P<name>.*?)\1", stream)
    return template["name"] if template else stream or "saved by hand"

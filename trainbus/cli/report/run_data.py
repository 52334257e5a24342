"""What a report tells of a run: plain data, out of which the page is made and which ``--json`` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trainbus_callbacks.history_file import Metrics

__all__ = ["Checkpoint", "Curve", "Part", "RunData", "Span", "Totals"]


@dataclass(kw_only=True)
class Checkpoint:
    """
    One save of the run, whatever became of it.

    Attributes:
        file: Its path as seen from the folder of the report.
        stream: Who asked for it.
        fate: ``"kept"``; ``"replaced"`` by a later file of its name; ``"removed"`` by retention; ``"gone"``
            without anybody having said so; ``"elsewhere"``, in a folder that is not looked into;
            ``"damaged"``; ``"failed"`` or ``"skipped"``: it was never there.
        epoch, global_step: At the request; the epoch is 0-based.
        logs: Metrics at the request.
        monitor, mode, score: What it was judged by.
        contents: ``"state"`` or ``"weights"``.
        size: Bytes.
        created: Seconds since 1970.
        reason: Why it failed or was skipped.
        interrupted: Whether it was saved amid a batch that an exception ended.
        best, newest: Whether `ls` calls it so.
        abandoned: It stands beyond the point from which a later process went on.
        waiting, copying, fenced: Seconds that the training stood still for it; None: not recorded.
        to_durable: Seconds from the request until the file was durable; None: not recorded.
    """

    file: str
    stream: str
    fate: str
    epoch: int
    global_step: int
    logs: Mapping[str, float]
    monitor: str | None = None
    mode: str | None = None
    score: float | None = None
    contents: str = "state"
    size: int = 0
    created: float = 0.0
    reason: str = ""
    interrupted: bool = False
    best: bool = False
    newest: bool = False
    abandoned: bool = False
    waiting: float | None = None
    copying: float | None = None
    fenced: float | None = None
    to_durable: float | None = None

    @property
    def lost(self) -> float | None:
        """Seconds of the training in all; None: not recorded."""
        if self.waiting is None or self.copying is None or self.fenced is None:
            return None
        return self.waiting + self.copying + self.fenced


@dataclass(kw_only=True)
class Curve:
    """
    A metric over the run.

    Attributes:
        name: As it was logged.
        scope: ``"epoch"``, ``"batch"``, or ``"checkpoint"``: as the files have it.
        steps, epochs, values: Of each point, by rising step; epochs are 0-based.
    """

    name: str
    scope: str
    steps: list[int]
    epochs: list[int]
    values: list[float]


@dataclass(kw_only=True)
class Part:
    """
    What one process did of the run.

    Attributes:
        began: Seconds since 1970.
        start: Running seconds of the parts before it.
        seconds: From its begin until it was last heard of.
        first_step, last_step: Training batches completed at its begin, and when last heard of.
        ended: Whether it said so; if not it was killed, or still runs.
        reason: Why it ended before its time, if it said so.
        done_again: Batches that the next part began before; at least so many were trained twice.
    """

    began: float
    start: float
    seconds: float
    first_step: int
    last_step: int
    ended: bool
    reason: str | None
    done_again: int = 0


@dataclass(kw_only=True)
class Span:
    """
    Something that took its time.

    Attributes:
        kind: ``"training"``, ``"waiting"``, ``"copying"``, ``"fenced"``: of the training thread; or
            ``"writing"``, in the background.
        start, end: Running seconds, from the begin of the first part; pauses between parts left out.
        file: For which checkpoint; empty for training.
        global_step: Of that checkpoint.
    """

    kind: str
    start: float
    end: float
    file: str = ""
    global_step: int = 0


@dataclass(kw_only=True)
class Totals:
    """
    Sums over the run, in seconds and bytes; None: not recorded.

    Attributes:
        files, bytes: That are there.
        saves, bytes_written: Files that became durable, those replaced and removed since included.
        failed, skipped: Saves of which there was no file.
        running: That processes were at work.
        lost: That the training stood still for saves.
        writing: That the writer was busy with saves.
        overlapped: The part of *writing* in which the training went on.
        done_again: Batches that were trained more than once, at least.
    """

    files: int
    bytes: int
    saves: int
    bytes_written: int
    failed: int
    skipped: int
    running: float | None = None
    lost: float | None = None
    writing: float | None = None
    overlapped: float | None = None
    done_again: int = 0


@dataclass(kw_only=True)
class RunData:
    """
    All of a report.

    Attributes:
        folder: Absolute.
        run_id: The newest one's; a resumed run has several ids.
        total_epochs: Of the run, if that was recorded.
        epoch: Completed epochs or, within one, its number (1-based).
        global_step: Training batches completed.
        monitor, mode: By what one is the best.
        checkpoints: In the order of saving.
        curves: Of each metric and scope, in the order of appearance.
        parts: One for each process.
        spans: The timeline.
        damaged: Reasons by file.
        notes: What is missing here and why, as sentences.
        made: When, in seconds since 1970.
    """

    folder: str
    made: float
    run_id: str = ""
    total_epochs: int | None = None
    epoch: int = 0
    global_step: int = 0
    monitor: str | None = None
    mode: str | None = None
    checkpoints: list[Checkpoint] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def place_of(self, one: Checkpoint | Metrics) -> int:
        """Return where *one* stands on the axis: by its step, or by epochs in a run that counts no steps."""
        return one.global_step if self.global_step else one.epoch + 1

    @property
    def best(self) -> Checkpoint | None:
        """The best checkpoint that is there."""
        return next((one for one in self.checkpoints if one.best), None)

    @property
    def totals(self) -> Totals:
        """The sums."""
        there = [one for one in self.checkpoints if one.fate == "kept"]
        written = [one for one in self.checkpoints if one.fate not in ("failed", "skipped")]
        sums = Totals(
            files=len(there),
            bytes=sum(one.size for one in there),
            saves=len(written),
            bytes_written=sum(one.size for one in written),
            failed=sum(one.fate == "failed" for one in self.checkpoints),
            skipped=sum(one.fate == "skipped" for one in self.checkpoints),
        )
        if self.parts:
            sums.running = sum(part.seconds for part in self.parts)
            sums.lost = sum(one.lost or 0.0 for one in self.checkpoints)
            sums.writing = sum(span.end - span.start for span in self.spans if span.kind == "writing")
            sums.overlapped = sums.writing - _standing_still_while_writing(self.spans)
            sums.done_again = sum(part.done_again for part in self.parts)
        return sums

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON has it: what is not finite as a string."""
        facts: dict[str, Any] = _finite({**asdict(self), "totals": asdict(self.totals)})
        return facts


def _standing_still_while_writing(spans: list[Span]) -> float:
    """Return for how long the training stood still while the writer was busy. Neither overlaps itself."""
    still = sorted((s.start, s.end) for s in spans if s.kind in ("waiting", "copying", "fenced"))
    busy = sorted((s.start, s.end) for s in spans if s.kind == "writing")
    total, i, j = 0.0, 0, 0
    while i < len(still) and j < len(busy):
        total += max(0.0, min(still[i][1], busy[j][1]) - max(still[i][0], busy[j][0]))
        if still[i][1] < busy[j][1]:
            i += 1
        else:
            j += 1
    return total


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

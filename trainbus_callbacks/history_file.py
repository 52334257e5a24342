"""
What `History` writes and `trainbus report` reads: one JSON object a line, appended and never changed.

A line is written in one go, so a kill tears none; what a full disk or a power cut leaves of one is passed
over. Imports neither torch nor NumPy.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any

__all__ = [
    "HISTORY_FORMAT",
    "Begin",
    "End",
    "Metrics",
    "Record",
    "Removal",
    "RunHistory",
    "SaveRecord",
    "Sitting",
    "encode",
    "read_history",
]

HISTORY_FORMAT = 1
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclass(frozen=True, kw_only=True)
class Record:
    """
    One line. All times are seconds since 1970, all durations seconds.

    Attributes:
        time: When it was written.
    """

    time: float


@dataclass(frozen=True, kw_only=True)
class Begin(Record):
    """
    A process begins to train, for the first time or after a resume.

    Attributes:
        run_id: Its run; a resumed one has another than the run it continues.
        parents: The runs it continues, oldest first.
        resumed: Whether there are any.
        epoch, global_step: Where it begins.
        total_epochs: Of the run, if that is known.
        format: Version of these lines.
    """

    run_id: str = ""
    parents: tuple[str, ...] = ()
    resumed: bool = False
    epoch: int = 0
    global_step: int = 0
    total_epochs: int | None = None
    format: int = HISTORY_FORMAT


@dataclass(frozen=True, kw_only=True)
class Metrics(Record):
    """
    The logs of an epoch, or of a training batch.

    Attributes:
        scope: ``"epoch"`` or ``"batch"``.
        epoch: 0-based.
        global_step: Training batches completed.
        logs: By name.
    """

    scope: str
    epoch: int
    global_step: int
    logs: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class SaveRecord(Record):
    """
    What became of a save.

    Attributes:
        outcome: ``"saved"``, ``"failed"`` or ``"skipped"``.
        file: Its path, as seen from the history's folder.
        stream: Who asked for it.
        epoch, global_step: At the request.
        logs: The metrics at the request.
        reason: Why there is no file; else empty.
        run_id, sequence, contents, monitor, mode, score, interrupted, size: As its manifest has them.
        requested, taken, begun, durable, fenced_at: As `SaveTimes` has them; None: not reached.
        waiting, copying, fenced: Seconds that the training thread stood still.
    """

    outcome: str
    file: str
    stream: str = ""
    epoch: int = 0
    global_step: int = 0
    logs: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    run_id: str = ""
    sequence: int = 0
    contents: str = "state"
    monitor: str | None = None
    mode: str | None = None
    score: float | None = None
    interrupted: bool = False
    size: int = 0
    requested: float | None = None
    taken: float | None = None
    begun: float | None = None
    durable: float | None = None
    fenced_at: float | None = None
    waiting: float = 0.0
    copying: float = 0.0
    fenced: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Removal(Record):
    """A file that was no longer kept was removed: its path, as seen from the history's folder."""

    file: str
    stream: str = ""


@dataclass(frozen=True, kw_only=True)
class End(Record):
    """
    The training is over.

    Attributes:
        epoch, global_step: Where it ended.
        reason: Why before its time; None: it went to its end.
    """

    epoch: int = 0
    global_step: int = 0
    reason: str | None = None


@dataclass
class Sitting:
    """
    What one process did, from its begin to its end or to where it was cut off.

    Attributes:
        begin: Its first line. Made up if the process wrote of saves before it trained.
        records: What followed, in order.
        end: Its last line; None: it was killed, or still runs.
    """

    begin: Begin
    records: list[Metrics | SaveRecord | Removal] = field(default_factory=list)
    end: End | None = None

    @property
    def last_time(self) -> float:
        """When it was last heard of, in seconds since 1970."""
        times = [record.time for record in self.records]
        return max([self.begin.time, *times, *([self.end.time] if self.end else [])])

    @property
    def last_step(self) -> int:
        """The training batches that are known to have been completed by then."""
        steps = [record.global_step for record in self.records if not isinstance(record, Removal)]
        return max([self.begin.global_step, *steps, *([self.end.global_step] if self.end else [])])


@dataclass
class RunHistory:
    """
    All that a history file tells.

    Attributes:
        sittings: Oldest first, of all runs that wrote to the file.
        unreadable: Lines that were passed over.
    """

    sittings: list[Sitting] = field(default_factory=list)
    unreadable: int = 0


_KINDS: dict[str, type[Record]] = {
    "begin": Begin,
    "metrics": Metrics,
    "save": SaveRecord,
    "removal": Removal,
    "end": End,
}
_NAMES = {kind: name for name, kind in _KINDS.items()}


def encode(record: Record) -> bytes:
    """Return the record's line, its end included. What is not finite is written as a string."""
    facts = {"record": _NAMES[type(record)], **asdict(record)}
    plain = {name: _finite(value) for name, value in facts.items()}
    return json.dumps(plain, allow_nan=False).encode() + b"\n"


def read_history(path: str | os.PathLike[str]) -> RunHistory:
    """
    Read what `History` wrote. Lines that are damaged, or of no kind that is known, are counted only.

    Raises:
        OSError: The file cannot be read.
    """
    history = RunHistory()
    with open(os.path.expanduser(path), "rb") as file:
        for record in _decoded(file):
            if record is None:
                history.unreadable += 1
            elif isinstance(record, Begin):
                history.sittings.append(Sitting(record))
            else:
                _add(history, record)
    return history


def _add(history: RunHistory, record: Record) -> None:
    sittings = history.sittings
    if isinstance(record, End):
        if sittings and sittings[-1].end is None:
            sittings[-1].end = record
        return
    if not sittings:
        run_id = record.run_id if isinstance(record, SaveRecord) else ""
        sittings.append(Sitting(Begin(time=record.time, run_id=run_id)))
    assert isinstance(record, Metrics | SaveRecord | Removal)
    sittings[-1].records.append(record)


def _decoded(lines: Iterable[bytes]) -> Iterator[Record | None]:
    for line in lines:
        if line.strip():
            try:
                yield _decode(json.loads(line))
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                yield None


def _decode(facts: Any) -> Record:
    kind = _KINDS[facts["record"]]
    given = {}
    for one in fields(kind):
        if one.name in facts:
            decode = _DECODERS.get(one.name) or _DECODERS[str(one.type)]
            given[one.name] = decode(facts[one.name])
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ValueError(f"A line of the history has no {one.name!r}.")
    return kind(**given)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(f"{value!r} is no number.")
    return _NON_FINITE[value] if isinstance(value, str) else float(value)


def _moment(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < 1e11:
        raise ValueError(f"{value!r} is no moment since 1970, and no duration.")
    return number


def _of(kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"{value!r} is no {kind.__name__}.")
        return value

    return check


def _one_of(*words: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}.")
        return str(value)

    return check


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} counts nothing.")
    return value


def _or_none(decode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else decode(value)


def _logs(value: Any) -> dict[str, float]:
    return {name: _number(one) for name, one in _of(dict)(value).items()}


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(_of(str), _of(list)(value)))


# By the fields' names, or else their annotations, which are text here.
_DECODERS: dict[str, Callable[[Any], Any]] = {
    "score": _or_none(_number),
    "scope": _one_of("epoch", "batch"),
    "outcome": _one_of("saved", "failed", "skipped"),
    "float": _moment,
    "float | None": _or_none(_moment),
    "int": _count,
    "int | None": _or_none(_count),
    "str": _of(str),
    "str | None": _or_none(_of(str)),
    "bool": _of(bool),
    "tuple[str, ...]": _texts,
    "Mapping[str, float]": _logs,
}

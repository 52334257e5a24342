"""A folder and the history of its run, put together: what is there, what was, and what each save cost."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence

from trainbus.checkpoint.file_format import read_manifest
from trainbus.checkpoint.folder import CheckpointFile, CheckpointFolder, best_of, latest_of
from trainbus.checkpoint.manifest import Manifest
from trainbus.cli.ls import judged_by
from trainbus.cli.report.run_data import Checkpoint, Curve, Part, RunData, Span
from trainbus.cli.report.words import counted
from trainbus.errors import CheckpointCorruptError
from trainbus_callbacks.history_file import Begin, Metrics, Record, Removal, RunHistory, SaveRecord, Sitting

__all__ = ["gather"]


def gather(
    folder: str,
    history: RunHistory | None = None,
    *,
    history_folder: str = "",
    monitor: str | None = None,
    mode: str | None = None,
) -> RunData:
    """
    Put together what is known of the newest run in *folder* and of those it continues.

    Args:
        folder: Of checkpoints; the ends of its files are read.
        history: What was recorded; None: nothing.
        history_folder: As seen from where the paths in it are; by default *folder*.
        monitor: The metric by which one is the best; None: the one that the newest was judged by.
        mode: ``"min"`` or ``"max"``; None: as the newest has it.

    Raises:
        typer.BadParameter: *monitor* is given, and no file says which *mode* is meant.
    """
    folder = os.path.abspath(os.path.expanduser(folder))
    listing = CheckpointFolder(folder)
    files = [file for file in listing if file.manifest.contents != "object"]
    sittings = _sittings_of_newest_run(history, files)
    root = _root(sittings[-1].begin if sittings else files[-1].manifest if files else None)
    own = [file for file in files if _root(file.manifest) == root]
    data = RunData(folder=folder, made=time.time())
    data.damaged = {os.path.relpath(path, folder): why for path, why in listing.damaged.items()}
    _tell_where_it_stands(data, own, sittings)
    _Records(data, own, history_folder or folder).add(sittings)
    _mark(data, own, monitor, mode)
    _add_curves(data, sittings)
    _add_notes(data, history, strangers=len(files) - len(own), recorded=bool(sittings))
    return data


def _root(one: Manifest | Begin | None) -> str | None:
    """Return the id of the first run of a chain of resumed ones."""
    return None if one is None else next(iter(one.parents), one.run_id)


def _sittings_of_newest_run(history: RunHistory | None, files: Sequence[CheckpointFile]) -> list[Sitting]:
    """Return what was recorded of the newest run, nothing if files of an unrecorded run are newer."""
    if history is None or not history.sittings:
        return []
    last = history.sittings[-1]
    root = _root(last.begin)
    if files and _root(files[-1].manifest) != root and files[-1].manifest.created > last.last_time:
        return []
    return [sitting for sitting in history.sittings if _root(sitting.begin) == root]


def _last_steps_that_count(sittings: Sequence[Sitting]) -> list[float]:
    """
    Return for each sitting up to which step the run as it is now goes back to it; -1: not at all.

    A resumed process begins at a checkpoint of the runs that it names. What they did beyond it, and what
    processes did that it does not name, was done for nothing.
    """
    limits = [-1.0] * len(sittings)
    names = {sittings[-1].begin.run_id, *sittings[-1].begin.parents} if sittings else set()
    limit = math.inf
    for i, sitting in reversed(list(enumerate(sittings))):
        if sitting.begin.run_id in names:
            limits[i] = limit
            limit = min(limit, sitting.begin.global_step)
    return limits


def _tell_where_it_stands(data: RunData, files: Sequence[CheckpointFile], sittings: list[Sitting]) -> None:
    if files:
        newest = files[-1].manifest
        data.run_id, data.epoch, data.global_step = newest.run_id, newest.epoch + 1, newest.global_step
    if sittings:
        last = sittings[-1]
        data.run_id, data.total_epochs = last.begin.run_id, last.begin.total_epochs
        data.global_step = last.last_step
        reached = [record.epoch + 1 for record in last.records if not isinstance(record, Removal)]
        data.epoch = max([last.begin.epoch, *reached])
    start = 0.0
    for i, sitting in enumerate(sittings):
        seconds = max(0.0, sitting.last_time - sitting.begin.time)
        following = sittings[i + 1].begin.global_step if i + 1 < len(sittings) else sitting.last_step
        data.parts.append(
            Part(
                began=sitting.begin.time,
                start=start,
                seconds=seconds,
                first_step=sitting.begin.global_step,
                last_step=sitting.last_step,
                ended=sitting.end is not None,
                reason=sitting.end.reason if sitting.end is not None else None,
                done_again=max(0, sitting.last_step - following),
            )
        )
        start += seconds


class _Records:
    """Saves as they were recorded, each matched with the file that is there, and the files left over."""

    def __init__(self, data: RunData, files: Sequence[CheckpointFile], history_folder: str) -> None:
        self._data = data
        self._history_folder = history_folder
        self._there = {file.path: file.manifest for file in files}
        self._latest: dict[str, Checkpoint] = {}  # by path: the one that is there as far as recorded
        self._claimed: dict[str, Checkpoint] = {}  # by path: whose file is there

    def add(self, sittings: Sequence[Sitting]) -> None:
        """Fill the data's checkpoints and spans."""
        limits = _last_steps_that_count(sittings)
        for part, sitting, limit in zip(self._data.parts, sittings, limits, strict=True):
            self._span("training", part.start, part.seconds, None)
            for record in _without_given_up(sitting.records):
                if isinstance(record, SaveRecord):
                    self._add_save(record, abandoned=record.global_step > limit)
                    self._add_spans(record, part)
                elif isinstance(record, Removal):
                    gone = self._latest.pop(self._path(record.file), None)
                    if gone is not None:
                        gone.fate = "removed"
        for path, one in self._latest.items():
            one.fate = self._fate_of_latest(path, one)
        # What is there counts more than what was recorded: a file may have been put back.
        for one in self._claimed.values():
            one.fate = "kept"
        unrecorded = [path for path in self._there if path not in self._claimed]
        self._data.checkpoints += [self._from_manifest(path, self._there[path]) for path in unrecorded]
        self._data.checkpoints.sort(key=lambda one: one.created)

    def _path(self, file: str) -> str:
        return os.path.normpath(os.path.join(self._history_folder, file))

    def _shown(self, path: str) -> str:
        return os.path.relpath(path, self._data.folder)

    def _add_save(self, record: SaveRecord, *, abandoned: bool) -> None:
        path = self._path(record.file)
        requested, durable = record.requested, record.durable
        one = Checkpoint(
            file=self._shown(path),
            stream=record.stream,
            fate="kept" if record.outcome == "saved" else record.outcome,
            epoch=record.epoch,
            global_step=record.global_step,
            logs=record.logs,
            monitor=record.monitor,
            mode=record.mode,
            score=record.score,
            contents=record.contents,
            size=record.size,
            created=requested or record.time,
            reason=record.reason,
            interrupted=record.interrupted,
            abandoned=abandoned,
            waiting=record.waiting,
            copying=record.copying,
            fenced=record.fenced,
            to_durable=None if requested is None or durable is None else max(0.0, durable - requested),
        )
        self._data.checkpoints.append(one)
        if one.fate == "kept":
            if path in self._latest:
                self._latest[path].fate = "replaced"
            self._latest[path] = one
            manifest = self._there.get(path)
            if manifest and (manifest.run_id, manifest.sequence) == (record.run_id, record.sequence):
                self._claimed[path] = one

    def _fate_of_latest(self, path: str, one: Checkpoint) -> str:
        if path in self._there:
            return "replaced"
        if one.file in self._data.damaged:
            return "damaged"
        if os.path.dirname(path) == self._data.folder:
            return "gone"
        return "kept" if self._is_there_below(path, one) else "elsewhere"

    def _is_there_below(self, path: str, one: Checkpoint) -> bool:
        """Look into folders inside of this one. What a history says of others is not followed."""
        if not path.startswith(self._data.folder + os.sep):
            return False
        try:
            manifest = read_manifest(path)
        except (CheckpointCorruptError, OSError, ValueError):  # the last: no name that a file may have
            return False
        return manifest is not None and manifest.global_step == one.global_step

    def _from_manifest(self, path: str, manifest: Manifest) -> Checkpoint:
        return Checkpoint(
            file=self._shown(path),
            fate="kept",
            **{
                name: getattr(manifest, name)
                for name in (
                    *("stream", "epoch", "global_step", "logs", "monitor", "mode", "score"),
                    *("contents", "size", "created", "interrupted"),
                )
            },
        )

    def _add_spans(self, record: SaveRecord, part: Part) -> None:
        if record.taken is not None:
            start = record.taken - part.began + part.start
            self._span("waiting", start, record.waiting, record)
            self._span("copying", start + record.waiting, record.copying, record)
        if record.fenced_at is not None:
            self._span("fenced", record.fenced_at - part.began + part.start, record.fenced, record)
        if record.begun is not None and record.durable is not None:
            self._span(
                "writing", record.begun - part.began + part.start, record.durable - record.begun, record
            )

    def _span(self, kind: str, start: float, seconds: float, record: SaveRecord | None) -> None:
        if seconds <= 0:
            return
        start = max(0.0, start)
        file, step = ("", 0) if record is None else (self._shown(self._path(record.file)), record.global_step)
        self._data.spans.append(
            Span(kind=kind, start=start, end=start + seconds, file=file, global_step=step)
        )


def _mark(data: RunData, files: Sequence[CheckpointFile], monitor: str | None, mode: str | None) -> None:
    by = judged_by(files, monitor, mode)
    if by is not None:
        data.monitor, data.mode = by
    there = {one.file: one for one in data.checkpoints if one.fate == "kept"}
    best, newest = best_of(files, *by) if by is not None else None, latest_of(files)
    if best is not None:
        there[os.path.relpath(best.path, data.folder)].best = True
    if newest is not None:
        there[os.path.relpath(newest.path, data.folder)].newest = True


def _without_given_up(records: Sequence[Record]) -> list[Record]:
    """Leave out saves that were given up because a disk hung, and came late: their files are there."""
    saves = [(index, one) for index, one in enumerate(records) if isinstance(one, SaveRecord)]
    came_late = {
        index
        for index, one in saves
        if one.outcome == "failed" and any(_came_late(one, later) for at, later in saves if at > index)
    }
    return [record for index, record in enumerate(records) if index not in came_late]


def _came_late(failed: SaveRecord, later: SaveRecord) -> bool:
    if later.outcome != "saved" or failed.requested is None or later.requested is None:
        return False
    # What was written at two times of day by one clock differs a little.
    same_moment = abs(failed.requested - later.requested) < 0.05
    return same_moment and (failed.file, failed.global_step) == (later.file, later.global_step)


def _add_curves(data: RunData, sittings: Sequence[Sitting]) -> None:
    points: dict[tuple[str, str], dict[int, tuple[int, float]]] = {}
    for sitting, limit in zip(sittings, _last_steps_that_count(sittings), strict=True):
        for record in sitting.records:
            if isinstance(record, Metrics) and record.global_step <= limit:
                for name, value in record.logs.items():
                    # A resumed run does the end of an epoch again; the later one counts.
                    of_curve = points.setdefault((name, record.scope), {})
                    of_curve[data.place_of(record)] = (record.epoch, value)
    if not points:
        for one in data.checkpoints:
            for name, value in one.logs.items():
                points.setdefault((name, "checkpoint"), {})[data.place_of(one)] = (one.epoch, value)
    data.curves = [_curve(name, scope, of_curve) for (name, scope), of_curve in points.items()]


def _curve(name: str, scope: str, points: dict[int, tuple[int, float]]) -> Curve:
    steps = sorted(points)
    return Curve(
        name=name,
        scope=scope,
        steps=steps,
        epochs=[points[step][0] for step in steps],
        values=[points[step][1] for step in steps],
    )


def _add_notes(data: RunData, history: RunHistory | None, *, strangers: int, recorded: bool) -> None:
    notes = data.notes
    if not recorded and data.checkpoints:
        notes.append(
            "Nothing was recorded while this run went on, so this page knows only the files that are there: "
            "not what saves cost, nor which files were removed, nor the metrics between checkpoints. Add "
            "trainbus_callbacks.History to the callbacks of the next run."
        )
    elif recorded and (unrecorded := sum(one.lost is None for one in data.checkpoints)):
        notes.append(f"What {counted(unrecorded, 'save')} of this run cost was not recorded.")
    if history is not None and history.unreadable:
        notes.append(f"{counted(history.unreadable, 'line')} of the history cannot be read.")
    if strangers:
        notes.append(f"{counted(strangers, 'checkpoint')} of other runs in this folder are left out.")
    notes.extend(data.damaged.values())

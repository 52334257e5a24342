"""What one process of a training does for assert_resumes_exactly: train, be heard, be killed in time."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from trainbus.bus import EventBus
from trainbus.testing.kill_moments import Moment

__all__ = ["Report", "read_report", "train_and_report"]


class Heard(NamedTuple):
    """One event, and where the run stood; epochs are 0-based."""

    name: str
    epoch: int
    global_step: int


@dataclass
class Report:
    """
    What was heard of one process.

    Attributes:
        trace: Its events, in order.
        metrics: What the logs of each epoch held, by epoch and name.
        resumed: Whether it continued a run; None: it emitted no ``train_begin``.
        warnings: What trainbus warned of.
        error: The traceback that ended it.
        exit_code: Of the process; negative for a signal.
    """

    trace: list[Heard] = field(default_factory=list)
    metrics: dict[int, dict[str, float]] = field(default_factory=dict)
    resumed: bool | None = None
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    exit_code: int | None = None

    @property
    def position(self) -> str:
        """Where its last event was, as text."""
        last = self.trace[-1]
        return f"epoch {last.epoch + 1}, global step {last.global_step}"


def read_report(path: str, exit_code: int | None) -> Report:
    """Return what `train_and_report` left at *path*, which is then removed."""
    report = Report(exit_code=exit_code)
    if os.path.exists(path):
        with open(path) as file:
            fields = json.load(file)
        os.remove(path)
        fields["trace"] = [Heard(*event) for event in fields["trace"]]
        fields["metrics"] = {int(epoch): logs for epoch, logs in fields["metrics"].items()}
        report = Report(**{**fields, "exit_code": exit_code})
    return report


def train_and_report(
    train_fn: Callable[[Path], Any], folder: str, report_path: str, seed: int, kill: Moment | None
) -> None:
    """Run *train_fn* in this process, which is of no other use: every bus made in it is listened to."""
    os.setpgrp()  # so that its DataLoader workers end with it
    torch.set_num_threads(1)  # threads of a forked parent are gone, and torch would wait for them
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    watch = _Watch(folder, report_path, kill)
    logging.getLogger("trainbus").addHandler(watch.log_handler)
    make = EventBus.__init__

    def make_watched(bus: EventBus) -> None:
        make(bus)
        watch.listen(bus)

    setattr(EventBus, "__init__", make_watched)  # noqa: B010  (mypy allows no other spelling)
    try:
        train_fn(Path(folder))
    except BaseException:
        watch.report.error = traceback.format_exc()
        sys.exit(1)
    finally:
        watch.write()


class _Watch:
    """
    Hears every event of the process, after all other receivers.

    Args:
        folder: Of the training.
        path: Where to write the report.
        kill: At which moment to end the process and those it started, as by ``kill -9``.
    """

    def __init__(self, folder: str, path: str, kill: Moment | None) -> None:
        self.report = Report()
        self.log_handler = _Warnings(self.report.warnings)
        self._end = f"{folder}.end.pt"
        self._path = path
        self._kill = kill

    def listen(self, bus: EventBus) -> None:
        """Subscribe to all events of *bus*."""
        for name in bus.events:
            bus.on(name, self._receiver(name), priority=math.inf)

    def write(self) -> None:
        """Write the report."""
        with open(self._path, "w") as file:
            json.dump(vars(self.report), file)

    def _receiver(self, name: str) -> Any:
        def hear(handler: Any, epoch: int, global_step: int, **fields: Any) -> None:
            self._hear(name, handler, Heard(name, epoch, global_step), fields)

        return hear

    def _hear(self, name: str, handler: Any, heard: Heard, fields: dict[str, Any]) -> None:
        if fields.get("path") == self._end:
            return  # our own save, below
        self.report.trace.append(heard)
        if name == "train_begin":
            self.report.resumed = bool(fields.get("resumed")) or bool(self.report.resumed)
        if name == "epoch_end":
            self.report.metrics[heard.epoch] = _numbers(fields["logs"])
        saves = hasattr(handler, "finish_writing")  # a bus may have a handler of one's own
        if saves:
            handler.finish_writing()
        if self._kill == (name, sum(event.name == name for event in self.report.trace)):
            self.write()
            os.killpg(0, signal.SIGKILL)
        if name == "train_end" and saves:
            handler.save(self._end)


class _Warnings(logging.Handler):
    """Collects what is logged as a warning or worse."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._messages = messages

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())


def _numbers(logs: Any) -> dict[str, float]:
    numbers = {}
    for name in logs:
        try:
            numbers[name] = float(logs[name])
        except (TypeError, ValueError):
            continue  # no metric
    return numbers

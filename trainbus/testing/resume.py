"""assert_resumes_exactly: a training is killed and continued, and must end as if nothing had happened."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from trainbus.checkpoint.folder import CheckpointFile
from trainbus.testing.differences import (
    checkpoints_below,
    file_differences,
    state_differences,
    value_differences,
)
from trainbus.testing.kill_moments import Moment, check_comes, check_names, named, telling_moments
from trainbus.testing.watched_run import Report, read_report, train_and_report

__all__ = ["assert_resumes_exactly"]

TrainFn = Callable[[Path], Any]

_FIRST_SEED, _LATER_SEED = 1, 2
_SHOWN = 5
_KNOWN_CAUSES = (
    "Something that the training depends on is in no checkpoint. Give the Handler what it was not given: a "
    "second optimizer, a scheduler, a GradScaler, objects of your own such as a torch.Generator "
    "(extra={...}). Attributes of a module must be buffers to be saved, those of a callback part of its "
    "state_dict(). Random numbers drawn inside DataLoader workers are not saved in the middle of an epoch."
)
# What stands in a difference -> what is known to cause it; the first that fits.
_HINTS = {
    "global_step": "The runs are not equally long: epochs(n) and steps(n, loader) take the run's total.",
    "state['scheduler']['last_epoch']": (
        "scheduler.step() in the loop body before a save is done again, since the body begins anew. "
        "Step it after the save, or in a receiver of epoch_end."
    ),
    "state['module']": _KNOWN_CAUSES,
    "state['callbacks']": (
        "A callback goes on from another state: its state_dict() must return all that its later decisions "
        "depend on, and load_state_dict() take it over."
    ),
}


def assert_resumes_exactly(
    train_fn: TrainFn,
    folder: str | os.PathLike[str] | None = None,
    *,
    kill_at: Sequence[Moment] | None = None,
    ignore: Collection[str] = (),
    start_method: Literal["fork", "spawn"] | None = None,
    timeout: float = 600.0,
) -> None:
    """
    Assert that a training that is killed and started again ends as one that was not, bit for bit.

    .. code-block:: python

        def train(folder):
            model, loader = ...
            with Handler(model, torch.optim.AdamW(model.parameters())) as handler:
                handler.add_callback(ModelCheckpoint(folder / "last.pt", save_freq=3))
                handler.resume(folder)
                handler.fit(loader, epochs=2, loss_fn=mse_loss)

        def test_resumes(tmp_path):
            assert_resumes_exactly(train, tmp_path)

    *train_fn* is run once undisturbed; then, for each moment, until it is killed there (``SIGKILL``), and
    again to its end. Each time it has a process of its own, so that nothing in memory survives, with one
    thread of torch, and the saves asked for are durable before the next event, so that the outcome does
    not hang on the disk. Compared are the metrics of each epoch, every checkpoint that is left, and the
    state at ``train_end``. Blocks until all that is done: make the training a small one.

    Args:
        train_fn: Trains a whole run with a `Handler` in the folder it is given, a `Path` to a folder that
            exists, and continues what is there. Its first process begins with the same random numbers
            each time; one that continues with others, so that what is not restored shows.

        folder: Where to put the files of the runs, for a look afterwards; by default they are removed.

        kill_at: Moments, each an event's name and which of its name it is in that process, from 1 on:
            ``[("train_batch_end", 5), ("checkpoint_saved", 2)]``. By default one of each kind: in the
            middle of an epoch, in a validation, at the end of an epoch, after a save.

        ignore: Names that may differ wherever they stand in a state or among metrics, e.g. ``["seconds"]``.

        start_method: ``"fork"``, for any function, or ``"spawn"``, for one at the top level of a module;
            by default ``"fork"`` on Linux as long as this process does not use CUDA.

        timeout: Seconds that one of the processes may take.

    Raises:
        AssertionError: The runs differ; names the first differences and, where there is one, a known
            cause. Or nothing was resumed, or *train_fn* failed.
        UnknownEventError: *kill_at* names an event that there is not.
        ValueError: *kill_at* names a moment that does not come.
        TimeoutError: A process took longer than *timeout* and was ended.
    """
    check_names(kill_at or ())
    with contextlib.ExitStack() as stack:
        is_temporary = folder is None
        if folder is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="trainbus-"))
        else:
            os.makedirs(folder, exist_ok=True)
            folder = tempfile.mkdtemp(prefix="resume-", dir=folder)
        runs = _Runs(train_fn, folder, start_method or _start_method(), timeout, is_temporary)
        whole = runs.undisturbed("undisturbed")
        names = [event.name for event in whole.report.trace]
        moments = telling_moments(names) if kill_at is None else kill_at
        for moment in moments:
            check_comes(moment, names)
        for moment in moments:
            _compare(runs, whole, moment, ignore)


@dataclass(frozen=True)
class _Run:
    """
    A run that went to its end, in one process or two.

    Attributes:
        folder: Where its files are now.
        report: What was heard of it; of the last process, and the metrics of both.
        position: Where it was killed, as text.
        source: The checkpoint it was continued from.
    """

    folder: str
    report: Report
    position: str = ""
    source: str = ""

    @property
    def end(self) -> str:
        return f"{self.folder}.end.pt"


@dataclass(frozen=True)
class _Runs:
    """Trains in processes of their own. Every training has the same folder; afterwards it is renamed."""

    train_fn: TrainFn
    folder: str
    start_method: str
    timeout: float
    is_temporary: bool

    def undisturbed(self, name: str) -> _Run:
        os.mkdir(self._place)
        report = self._train(_FIRST_SEED)
        _require_end(report, "train_fn failed before anything was killed")
        return self._put_away(_Run(os.path.join(self.folder, name), report))

    def killed(self, name: str, moment: Moment, later_seed: int = _LATER_SEED) -> _Run:
        os.mkdir(self._place)
        first = self._train(_FIRST_SEED, moment)
        if first.exit_code != -signal.SIGKILL:
            _require_end(first, f"train_fn failed before {named(moment)}, where it was to be killed")
            raise AssertionError(
                f"Cannot kill train_fn at {named(moment)}: the run that was not killed came there, and a "
                "second one did not. It must do the same each time: seed what it draws from."
            )
        position = f"{named(moment)} ({first.position})"
        source = _newest(self._place)
        if source is None:
            raise AssertionError(
                f"Nothing was saved before {position}, so there is nothing to resume from. Save earlier, or "
                "name later moments with kill_at=[...]."
            )
        report = self._train(later_seed)
        _require_end(report, f"train_fn failed when it was started again after it was killed at {position}")
        if report.resumed is False:
            raise AssertionError(
                f"train_fn began anew after it was killed at {position}, although its folder held "
                f"{os.path.basename(source.path)!r}. Call handler.resume(folder) before the loop."
            )
        report.metrics = {**first.metrics, **report.metrics}
        source_name = f"{os.path.basename(source.path)} (global step {source.manifest.global_step})"
        return self._put_away(_Run(os.path.join(self.folder, name), report, position, source_name))

    def where(self, *runs: _Run) -> str:
        """Tell where the files of *runs* are."""
        if self.is_temporary:
            return "removed; give assert_resumes_exactly a folder to keep them."
        return ", ".join(run.folder for run in runs)

    @property
    def _place(self) -> str:
        return os.path.join(self.folder, "run")

    def _put_away(self, run: _Run) -> _Run:
        # Where files lie is part of some states, so all runs must have been in the same place.
        shutil.rmtree(run.folder, ignore_errors=True)
        os.rename(self._place, run.folder)
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{self._place}.end.pt", run.end)
        return run

    def _train(self, seed: int, kill: Moment | None = None) -> Report:
        report = os.path.join(self.folder, "report.json")
        context: Any = multiprocessing.get_context(self.start_method)
        arguments = (self.train_fn, self._place, report, seed, kill)
        process = context.Process(target=train_and_report, args=arguments)
        _start(process, self.train_fn)
        try:
            process.join(self.timeout)
            if process.is_alive():
                raise TimeoutError(
                    f"train_fn did not end within timeout={self.timeout!r} seconds and was ended. Make it "
                    "train less, or give it more time."
                )
        finally:
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # its DataLoader workers too
                process.kill()
                process.join()
        return read_report(report, process.exitcode)


def _compare(runs: _Runs, whole: _Run, moment: Moment, ignore: Collection[str]) -> None:
    name = f"killed-at-{moment[0]}-{moment[1]}"
    part = runs.killed(name, moment)
    found = list(_differences(whole, part, ignore))
    if not found:
        return
    lines = [f"  {line}" for line in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  and {len(found) - _SHOWN} more")
    lines += [f"Said while it resumed: {line}" for line in part.report.warnings]
    raise AssertionError(
        f"The run is not resumed exactly: killed at {part.position} and continued from {part.source}, "
        "it does not end as the run that was not killed:\n"
        + "\n".join(lines)
        + f"\nHint: {_hint(runs, whole, moment, found, ignore)}\nFiles: {runs.where(whole, part)}"
    )


def _differences(whole: _Run, part: _Run, ignore: Collection[str]) -> Iterator[str]:
    for epoch, metrics in whole.report.metrics.items():
        other = part.report.metrics.get(epoch, {})
        yield from value_differences(metrics, other, f"epoch {epoch + 1}: logs", ignore)
    yield from file_differences(whole.folder, part.folder, ignore)
    if os.path.exists(whole.end) and os.path.exists(part.end):
        for line in state_differences(whole.end, part.end, ignore):
            yield f"at train_end: {line}"


def _hint(runs: _Runs, whole: _Run, moment: Moment, found: Sequence[str], ignore: Collection[str]) -> str:
    """Find out by more runs whether it is the resuming at all that differs, else name known causes."""
    again = list(_differences(whole, runs.undisturbed("undisturbed-again"), ignore))
    if again:
        return (
            "train_fn does not do the same twice even if nobody kills it: "
            f"{again[0]}. Seed all it draws from, use deterministic algorithms, and name what measures "
            "time with ignore=[...]."
        )
    same_seed = runs.killed("killed-same-seed", moment, later_seed=_FIRST_SEED)
    if not list(_differences(whole, same_seed, ignore)):
        return (
            "With the random numbers that the first process began with it does end the same: something is "
            "drawn before the loop, such as data, a split or a buffer that is not saved. Seed it in "
            "train_fn, e.g. torch.manual_seed(0) in its first line."
        )
    known = (hint for words, hint in _HINTS.items() if any(words in line for line in found))
    return next(known, _KNOWN_CAUSES)


def _require_end(report: Report, what: str) -> None:
    if report.error is not None:
        raise AssertionError(f"{what}:\n{report.error}")
    if report.exit_code != 0:
        raise AssertionError(
            f"{what}: its process ended with exit code {report.exit_code} and no exception. Look at what it "
            "printed."
        )


def _newest(folder: str) -> CheckpointFile | None:
    files = [file for file in checkpoints_below(folder).values() if file.manifest.contents == "state"]
    return files[-1] if files else None


def _start_method() -> str:
    # A forked child cannot use CUDA that its parent has used; on macOS forked children may crash.
    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return "fork" if sys.platform == "linux" and not in_use else "spawn"


def _start(process: Any, train_fn: TrainFn) -> None:
    with warnings.catch_warnings():
        # Python warns of forks beside threads. The child uses none of them: torch has one thread there.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            process.start()
        except (AttributeError, TypeError, ImportError) as error:
            raise TypeError(
                f"Cannot start {train_fn!r} in a new interpreter: {error}. With start_method='spawn' it "
                "must be a function at the top level of a module that can be imported."
            ) from error

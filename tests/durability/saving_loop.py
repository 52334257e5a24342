"""A training that saves all the time, ended at any moment, and what must be true of its folder then.

The training tells over a pipe what it asks for and what it is told in return, each before it does
anything else. So whoever reads the pipe knows what was promised, however the training ends.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from volumes import Volume, die_with_parent, take_own_mounts

import trainbus
from trainbus import CheckpointFolder, Handler
from trainbus.checkpoint.disk import Disk
from trainbus_callbacks import ModelCheckpoint

KEEP = 2
LIMIT = 30.0  # seconds in which a training must say something
MOST_SAVES = 15
MOST_SECONDS = 0.01  # after the last of them: some ten times what a small save takes


class Notes:
    """What a training tells, and the end of the pipe that hears it."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        self._rest = b""

    def tell(self, what: str, *details: Any) -> None:
        """Say it at once, in one piece."""
        os.write(self._write, json.dumps([what, *details]).encode() + b"\n")

    def hear(self) -> Iterator[list[Any]]:
        """Give what is told, until all who could tell anything have ended."""
        os.close(self._write)
        with os.fdopen(self._read, "rb", buffering=0) as pipe:
            while True:
                if not select.select([pipe], [], [], LIMIT)[0]:
                    raise TimeoutError(f"the training has said nothing for {LIMIT} s")
                data = pipe.read(1 << 16)
                if not data:
                    return
                *lines, self._rest = (self._rest + data).split(b"\n")
                yield from map(json.loads, lines)


def train(folder: str, notes: Notes, mebibytes: int) -> None:
    """
    Resume what *folder* holds and go on saving for ever, under names of three kinds.

    Each step fills all tensors with its number. It saves under a new name and waits for that; then has
    the same name overwritten and, with retention, a numbered file written, both in the background.
    """
    torch.set_num_threads(1)
    sizes = (1, 1000, mebibytes << 18)
    model = nn.ParameterList([torch.zeros(size) for size in sizes])
    with Handler(model) as handler, open(f"{folder}/log.txt", "a") as log:
        handler.add_callback(ModelCheckpoint(f"{folder}/last.pt", save_freq=1))
        numbered = None

        def on_saved(path: str, global_step: int) -> None:
            notes.tell("saved", os.path.basename(path), global_step)

        def save_numbered(global_step: int) -> None:
            nonlocal numbered
            name, old = f"step-{global_step}.pt", f"step-{global_step - KEEP}.pt"
            notes.tell("asked", name, global_step, old)
            numbered = handler.save_async(f"{folder}/{name}", removals=[f"{folder}/{old}"])

        handler.on("train_batch_end", save_numbered, priority=200)
        handler.on("checkpoint_saved", on_saved)
        handler.on("checkpoint_removed", lambda path: notes.tell("removed", os.path.basename(path)))
        handler.resume(folder)
        for _ in handler.steps(10**9, DataLoader(range(100))):
            step = handler.global_step + 1
            with torch.no_grad():  # while the file of the step before may still be in writing
                for parameter in model:
                    parameter.fill_(step)
            if step % 2 == 0:
                handler.flush()  # so that what was removed is told of before anything else is synced
            if numbered is not None:
                notes.tell("saved", os.path.basename(numbered.path), numbered.result(LIMIT).global_step)
            notes.tell("asked", f"new-{step}.pt", step, None)
            trainbus.save({"module": model.state_dict()}, f"{folder}/new-{step}.pt")
            notes.tell("saved", f"new-{step}.pt", step)
            if step % 3 == 0:
                # As the logs of real runs do, this has the file system's journal written now and then.
                log.write(f"{step}\n")
                log.flush()
                os.fsync(log.fileno())
            notes.tell("asked", "last.pt", step, None)


@contextmanager
def busy_neighbour(folder: str) -> Iterator[None]:
    """Have another process sync a file of its own all the time, and the journal with it."""
    child = os.fork()
    if child == 0:
        die_with_parent()
        with suppress(OSError), open(f"{folder}/neighbour.txt", "a") as file:
            while True:
                file.write("busy\n")
                file.flush()
                os.fsync(file.fileno())
        os._exit(0)
    try:
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def train_until(
    folder: str, end: Callable[[], None], *, saves: int, mebibytes: int = 0, broken: str | None = None
) -> list[list[Any]]:
    """
    Train in a forked process and call *end* some moment after it was told of so many *saves*.

    Args:
        end: Ends the world as the training knows it. The process is killed afterwards in any case.
        broken: A method of `Disk` that does nothing in there: the mutant.

    Returns:
        All it told.
    """
    notes = Notes()
    child = os.fork()
    if child == 0:
        die_with_parent()
        try:
            if broken is not None:
                assert callable(getattr(Disk, broken))
                setattr(Disk, broken, lambda *_: True)
            train(folder, notes, mebibytes)
        except BaseException:
            notes.tell("failed", traceback.format_exc())
        os._exit(1)
    told = []
    hearing = notes.hear()
    try:
        left = saves
        while left:
            told.append(next(hearing, ["failed", "the training ended without a word"]))
            if told[-1][0] == "failed":
                raise AssertionError(told[-1][1])
            left -= told[-1][0] == "saved"
        time.sleep(random.uniform(0, MOST_SECONDS))
        end()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return told + list(hearing)


class Promises:
    """What a folder must hold after all that was told, over several trainings."""

    def __init__(self) -> None:
        self._saved: dict[str, int] = {}  # the step that a name holds at least
        self._asked: dict[str, int] = {}  # the step that it holds at most
        self._remover: dict[str, str] = {}  # whose save has this one removed
        self._removed: set[str] = set()
        self._newest = 0

    def hear(self, told: list[list[Any]]) -> None:
        """Take in what a training told."""
        for what, name, *details in told:
            if what == "asked":
                self._asked[name], removes = details
                self._removed.discard(name)
                if removes is not None:
                    self._remover[removes] = name
            elif what == "saved":
                self._saved[name] = details[0]
                if not name.startswith("new-"):  # which are no runs to resume
                    self._newest = max(self._newest, details[0])
            elif what == "removed":
                self._removed.add(name)

    def broken_in(self, folder: str) -> list[str]:
        """Return what is not as it was promised, in words."""
        names = {name for name in os.listdir(folder) if name.endswith(".pt") and not name.startswith(".")}
        problems = [self._look_at(folder, name) for name in sorted(names)]
        for name in self._saved.keys() - names:
            if self._was_replaced(name, names):
                del self._saved[name]
            else:
                problems.append(f"{name}: it was reported as saved and is not there")
        problems += [f"{name}: it was reported as removed and is there" for name in self._removed & names]
        problems.append(self._look_at_newest(folder))
        return [problem for problem in problems if problem]

    def forget_leftovers(self, folder: str) -> None:
        """Remove the files that nothing else removes, or they would fill the disk."""
        newest = CheckpointFolder(folder).latest()
        first_removed = newest.manifest.global_step + 1 - KEEP if newest is not None else 0
        for name in os.listdir(folder):
            kind, _, number = name.removesuffix(".pt").partition("-")
            if kind == "new" or (kind == "step" and int(number) < first_removed):
                os.unlink(os.path.join(folder, name))
                self._saved.pop(name, None)

    def _look_at(self, folder: str, name: str) -> str:
        try:
            number, _ = read_number(os.path.join(folder, name))
        except (trainbus.CheckpointError, ValueError) as error:
            return f"{name}: unreadable: {error}"
        least = self._saved.get(name, number)
        if not least <= number <= self._asked[name]:
            return f"{name}: holds {number}, which should be from {least} to {self._asked[name]}"
        return ""

    def _was_replaced(self, name: str, names: set[str]) -> bool:
        # Removed is only what a durable save replaces; that one may have been replaced as well.
        while name in self._remover:
            name = self._remover[name]
            if name in names:
                return True
        return False

    def _look_at_newest(self, folder: str) -> str:
        newest = CheckpointFolder(folder).latest()
        if newest is None:
            return f"no checkpoint to resume from, and step {self._newest} was saved" if self._newest else ""
        if newest.manifest.global_step < self._newest:
            return f"the newest is of step {newest.manifest.global_step}, and {self._newest} was saved"
        if os.path.basename(newest.path) not in self._asked:
            return f"{newest.path} is taken for a checkpoint"
        return ""


def read_number(path: str) -> tuple[int, Mapping[str, Any]]:
    """
    Return the one number that fills all tensors of a checkpoint, and the state.

    Raises:
        CheckpointCorruptError: It is damaged.
        ValueError: There are several: it is torn.
    """
    manifest = trainbus.verify(path)
    state = trainbus.load(path, verify=False)
    numbers = {end for tensor in state["module"].values() if tensor.numel() for end in tensor.aminmax()}
    numbers = {int(number) for number in numbers}
    if manifest.contents == "state":
        numbers.add(manifest.global_step)
    if len(numbers) != 1:
        raise ValueError(f"it holds several steps: {sorted(numbers)}")
    return numbers.pop(), state


def unfinished(folder: str) -> list[str]:
    """Return the hidden files that were in writing; there must be no others."""
    hidden = [name for name in os.listdir(folder) if name.startswith(".")]
    strange = [name for name in hidden if not name.endswith((".tmp", ".lock"))]
    if strange:
        raise AssertionError(f"nobody knows these files: {strange}")
    return [name for name in hidden if name.endswith(".tmp")]


def count_saves(told: list[list[Any]]) -> int:
    """Count the saves that were acknowledged, some of them in two ways."""
    return len({tuple(note) for note in told if note[0] == "saved"})


def killed(folder: str, times: int, mebibytes: int = 0) -> dict[str, Any]:
    """Kill a training so many times, each time going on in the same folder."""
    promises, problems, left, saves = Promises(), [], 0, 0
    most = MOST_SAVES // (1 + mebibytes // 4)
    for number in range(times):
        # Now and then before it has saved anything. Not at random: few saves in all would prove little.
        wanted = number % (most + 1)
        told = train_until(folder, lambda: None, saves=wanted, mebibytes=mebibytes)
        promises.hear(told)
        problems += promises.broken_in(folder) + [text for what, text, *_ in told if what == "failed"]
        before, left = left, len(unfinished(folder))
        # The one that was in writing; those of the run before are removed with the first save.
        swept = any(what == "saved" for what, *_ in told)
        if left > 1 + (0 if swept else before):
            problems.append(f"{left} unfinished files are left")
        promises.forget_leftovers(folder)
        saves += count_saves(told)
    return {"problems": problems, "saves": saves}


def powered_off(
    folder: str, kind: str, times: int, mebibytes: int = 0, broken: str | None = None
) -> dict[str, Any]:
    """
    Cut the power of a training's disk so many times, each time going on with what the disk holds then.

    With a *broken* disk only until that has been noticed.
    """
    take_own_mounts()
    promises, problems, saves, cuts = Promises(), [], 0, 0
    with Volume(folder, kind) as volume:
        while cuts < times and not (broken and problems):
            cuts += 1
            wanted = random.randint(1, MOST_SAVES // (1 + mebibytes // 4))
            # A busy journal has every half-done thing written, an idle one nothing that is not synced.
            with busy_neighbour(volume.path) if cuts % 2 else nullcontext():
                told = train_until(
                    volume.path, volume.cut_power, saves=wanted, mebibytes=mebibytes, broken=broken
                )
            volume.unmount()
            volume.mount()
            promises.hear(told)
            problems += promises.broken_in(volume.path)
            unfinished(volume.path)
            promises.forget_leftovers(volume.path)
            saves += count_saves(told)
    return {"problems": problems, "saves": saves, "cuts": cuts}

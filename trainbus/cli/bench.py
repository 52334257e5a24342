"""``trainbus bench``: what a save costs a training on this disk and this device, in plain words."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

import torch
import typer
from rich.console import Console
from rich.table import Table

from trainbus.cli.text import printable
from trainbus.handler import Handler

__all__ = ["Cost", "Load", "chosen_device", "run", "verdict"]

MIB = 1 << 20
STEPS_BETWEEN = 30  # from one save to the next
STEPS_PAYING = 15  # of them: by then its file is written, and the others tell what a step takes without
SAVES = 3  # a turn; the first, which touches fresh memory, is not counted
STEPS_OF_A_TURN = (1 + SAVES) * STEPS_BETWEEN
FLOAT_BYTES = 4
WORTH_SAYING = 0.05  # of a training's time


@dataclass(frozen=True)
class Load:
    """
    The training that is saved.

    Attributes:
        mebibytes: Size of its parameters, in *tensors* pieces of one size.
        tensors: How many.
        step_seconds: How long the host waits for a step of the model, beside the optimizer's.
        device: Where the parameters are, e.g. ``"cuda"``.
    """

    mebibytes: int
    tensors: int
    step_seconds: float
    device: str


@dataclass
class Cost:
    """
    What saves of one kind cost.

    Attributes:
        name: How one would write it.
        lost: Seconds a save: its call and the steps after it, over what steps take without saves.
        durable: Seconds from each request to its file being on the disk; empty where nothing is synced.
    """

    name: str
    lost: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)


Save = Callable[[Handler, str], object]


def chosen_device(name: str) -> str:
    """
    Return *name*, or for ``"auto"`` the device that a training would use here.

    Raises:
        typer.BadParameter: There is no such device.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise typer.BadParameter(f"no device {name!r} can be used here: {reason}") from error
    return name


def run(folder: str | None, load: Load, rounds: int, every: int, *, as_json: bool) -> None:
    """
    Train and save, print what it cost and what that means.

    Args:
        folder: On the disk to be tried; a folder in it is made and removed. None: the current one.
        load: The training.
        rounds: How often each kind of save is measured, in turn.
        every: Batches between two saves in the training that the verdict speaks of.
        as_json: One JSON object instead of words.

    Raises:
        typer.BadParameter: There are more tensors than numbers to be in them.
    """
    numbers = load.mebibytes * MIB // FLOAT_BYTES
    if load.tensors > numbers:
        raise typer.BadParameter(
            f"--size {load.mebibytes} is {numbers:,} numbers, too few for --tensors {load.tensors}. Models "
            "have some hundreds of tensors, large ones thousands."
        )
    place = os.path.expanduser(folder or os.curdir)
    if not os.path.lexists(place):
        _tell(f"The folder {printable(place)} is not there, and is made.")
    os.makedirs(place, exist_ok=True)
    with _leaving_on_sigterm(), tempfile.TemporaryDirectory(prefix=".trainbus-bench-", dir=place) as scratch:
        costs, step = measure(scratch, load, rounds)
    if as_json:
        print(json.dumps({"load": asdict(load), "step": step, "costs": [asdict(cost) for cost in costs]}))
        return
    console = Console()
    console.print(_table(costs, load, step))
    for sentence in verdict(costs, step, every):
        console.print(sentence, soft_wrap=True, highlight=False)


def measure(folder: str, load: Load, rounds: int) -> tuple[list[Cost], float]:
    """
    Return the costs of each kind of save, and the seconds of a step without any.

    The kinds take turns, so that what else the machine does meets them all. Each turn has a
    handler, memory and baseline of its own.
    """
    kinds: list[tuple[Cost, str, Save]] = [
        (Cost("torch.save"), "auto", _save_plainly),
        (Cost('trainbus, snapshot="auto"'), "auto", Handler.save_async),
        (Cost('trainbus, snapshot="overlap"'), "overlap", Handler.save_async),
    ]
    steps: list[float] = []
    turns = rounds * len(kinds)
    seconds = turns * STEPS_OF_A_TURN * load.step_seconds
    _tell(f"{turns} turns of {STEPS_OF_A_TURN} steps: this takes more than {seconds:.0f} s.")
    for _ in range(rounds):
        for cost, snapshot, save in kinds:
            with _removed_afterwards(folder):
                _tell(f"turn {len(steps) + 1} of {turns}: {cost.name}")
                steps.append(_measure_turn(folder, load, snapshot, save, cost))
    return [cost for cost, _, _ in kinds], statistics.median(steps)


def _measure_turn(folder: str, load: Load, snapshot: str, save: Save, cost: Cost) -> float:
    """Add the costs of all saves but the first; return the seconds of a step without any."""
    total = STEPS_OF_A_TURN
    module = torch.nn.ParameterList(
        [torch.zeros(load.mebibytes * MIB // FLOAT_BYTES // load.tensors) for _ in range(load.tensors)]
    ).to(load.device)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    with Handler(module, optimizer, snapshot=snapshot) as handler:
        handler.prepare_saves()

        def save_now(global_step: int) -> None:
            if STEPS_BETWEEN <= global_step < total:
                save(handler, os.path.join(folder, f"{global_step}.pt"))

        handler.on("train_batch_end", save_now, every=STEPS_BETWEEN)
        handler.on("checkpoint_saved", lambda seconds: cost.durable.append(seconds))
        begins = [time.perf_counter()]
        for _ in handler.steps(total, range(total)):
            time.sleep(load.step_seconds)
            optimizer.step()
            _wait_for(load.device)
            begins.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(begins)]
    # A save after step n is made when step n + 1 is asked for, so it is in that one's time.
    for start in range(2 * STEPS_BETWEEN, total, STEPS_BETWEEN):
        paying = seconds[start : start + STEPS_PAYING]
        usual = statistics.median(seconds[start + STEPS_PAYING : start + STEPS_BETWEEN])
        cost.lost.append(sum(paying) - usual * len(paying))
    return statistics.median(seconds)


def _save_plainly(handler: Handler, path: str) -> None:
    state = {"module": handler.module.state_dict(), "optimizer": handler.optimizer.state_dict()}
    torch.save(state, path)


def _wait_for(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def _tell(line: str) -> None:
    """Say how far it is, also where nobody has a terminal; the results alone go to stdout."""
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _leaving_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end what is inside as Ctrl-C does, so that its files are removed."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _removed_afterwards(folder: str) -> Iterator[None]:
    try:
        yield
    finally:
        for entry in os.scandir(folder):
            os.unlink(entry.path)


def _table(costs: list[Cost], load: Load, step: float) -> Table:
    table = Table(
        title=f"{load.mebibytes} MiB in {load.tensors} tensors on {load.device}, a step {1e3 * step:.0f} ms",
        title_justify="left",
    )
    for heading in ("", "lost a save", "on the disk after"):
        table.add_column(heading, justify="left" if not heading else "right")
    for cost in costs:
        lost = statistics.median(cost.lost)
        spread = f"{1e3 * min(cost.lost):,.0f} to {1e3 * max(cost.lost):,.0f}"
        durable = f"{statistics.median(cost.durable):.2f} s" if cost.durable else "not synced"
        table.add_row(cost.name, f"{1e3 * lost:,.0f} ms ({spread})", durable)
    return table


def verdict(costs: list[Cost], step: float, every: int) -> list[str]:
    """
    Say in sentences what the *costs* (torch.save's, then auto's and overlap's) mean.

    Args:
        costs: As `measure` returns them.
        step: Seconds of a step without saves.
        every: Batches between two saves.
    """
    plain, auto, overlap = (max(0.0, statistics.median(cost.lost)) for cost in costs)
    share = auto / (auto + every * step)
    words = [
        f"With a save every {every} batches, training spends {share:.2%} of its time on them, "
        f"with torch.save {plain / (plain + every * step):.2%}."
    ]
    if share > WORTH_SAYING:
        enough = round(auto * (1 - WORTH_SAYING) / (WORTH_SAYING * step))
        words.append(f"That is much. Every {enough} batches it would be {WORTH_SAYING:.0%}.")
    noise = max(costs[1].lost) - min(costs[1].lost)
    if auto - overlap > noise:
        words.append(
            f'snapshot="overlap" saves another {1e3 * (auto - overlap):,.0f} ms a save, if your weights '
            "change in optimizer steps only."
        )
    else:
        words.append('snapshot="overlap" makes no difference here that could be told from noise.')
    return words

"""The list of subcommands. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@app.callback()
def trainbus() -> None:
    """Checkpoints that do not stop the GPU, and an event bus for PyTorch training loops."""


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where its checkpoints go.")] = Path("trainbus-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="The run's total of epochs.")] = 3,
    batches: Annotated[int, typer.Option(min=1, help="Training batches in an epoch.")] = 120,
    save_every: Annotated[int, typer.Option(min=1, help="Training batches between two checkpoints.")] = 40,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object at the end.")] = False,
) -> None:
    """Train a small GPT on the source of Python's library; run it again and it continues."""
    from trainbus.cli.demo import run

    run(str(folder), epochs, batches, save_every, as_json=as_json)


@app.command()
def verify(
    paths: Annotated[list[str], typer.Argument(help="Checkpoints, or folders of them.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Read checkpoints through and compare them with their digests; exit code 1 if any is damaged."""
    from trainbus.cli.verify import run

    raise typer.Exit(run(paths, as_json=as_json))


@app.command()
def ls(
    folder: Annotated[str, typer.Argument(help="The folder.")] = ".",
    monitor: Annotated[str | None, typer.Option(help="The metric by which one is the best.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Whether less or more of it is better: min or max.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """List the checkpoints of a folder: epoch, step, metrics, size, age, which is best and which newest."""
    from trainbus.cli.ls import run

    run(folder, monitor, mode, as_json=as_json)


@app.command()
def show(
    file: Annotated[str, typer.Argument(help="A checkpoint, or any file of torch.save.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show what a file says of itself and the names, shapes, dtypes and sizes in it; loads no tensor."""
    from trainbus.cli.show import run

    run(file, as_json=as_json)


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="A checkpoint, or any file of torch.save.", show_default=False)],
    b: Annotated[str, typer.Argument(help="Another.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Say where two files differ: names, shapes, values and by how much; exit code 1 if they do."""
    from trainbus.cli.diff import run

    raise typer.Exit(run(a, b, as_json=as_json))


@app.command()
def prune(
    folder: Annotated[str, typer.Argument(help="The folder.")] = ".",
    keep_last: Annotated[int | None, typer.Option(min=1, help="Keep so many of the newest.")] = None,
    keep_best: Annotated[
        list[str] | None,
        typer.Option(help="Keep so many of the best by a metric, e.g. val_loss:2 or acc:2:max."),
    ] = None,
    keep_every: Annotated[int | None, typer.Option(min=1, help="Keep those of each so many epochs.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Remove nothing, say what would go.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Remove the checkpoints of a folder that no --keep-... keeps; the newest and the best always stay."""
    from trainbus.cli.prune import run

    run(folder, keep_last, keep_best or [], keep_every, dry_run=dry_run, as_json=as_json)


@app.command()
def export(
    file: Annotated[str, typer.Argument(help="A checkpoint, or any file of weights.", show_default=False)],
    target: Annotated[str, typer.Argument(help="Ends in .safetensors.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write the weights of a checkpoint as safetensors. Needs the extra "export"."""
    from trainbus.cli.export import run

    run(file, target, force=force, as_json=as_json)


@app.command()
def consolidate(
    folder: Annotated[str, typer.Argument(help="A sharded checkpoint.", show_default=False)],
    target: Annotated[str, typer.Argument(help="The file to write.", show_default=False)],
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Write a sharded checkpoint as one plain file, in this process alone."""
    from trainbus.cli.consolidate import run

    run(folder, target, force=force, as_json=as_json)


@app.command()
def bench(
    folder: Annotated[str | None, typer.Argument(help="On the disk to try. Default: here.")] = None,
    size: Annotated[int, typer.Option(min=1, help="MiB of parameters.")] = 256,
    tensors: Annotated[int, typer.Option(min=1, help="In how many tensors.")] = 64,
    step_ms: Annotated[int, typer.Option(min=0, help="Milliseconds of a step beside the optimizer's.")] = 100,
    device: Annotated[str, typer.Option(help="Where the parameters are: cpu, cuda, ...")] = "auto",
    every: Annotated[int, typer.Option(min=1, help="Batches between two saves, for the verdict.")] = 500,
    rounds: Annotated[int, typer.Option(min=1, help="How often each kind of save is measured.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure what a save costs a training on this disk and device, beside torch.save."""
    from trainbus.cli.bench import Load, chosen_device, run

    load = Load(size, tensors, step_ms / 1000, chosen_device(device))
    run(folder, load, rounds, every, as_json=as_json)


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="The folder of checkpoints.")] = ".",
    output: Annotated[str, typer.Option("-o", "--output", help="The page; - for stdout.")] = "report.html",
    history: Annotated[
        str | None, typer.Option(help="What History wrote. Default: history.jsonl in the folder.")
    ] = None,
    monitor: Annotated[str | None, typer.Option(help="The metric by which one is the best.")] = None,
    mode: Annotated[
        str | None, typer.Option(help="Whether less or more of it is better: min or max.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is no report.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the page is made from.")] = False,
) -> None:
    """Draw the newest run of a folder: metrics, checkpoints, what they cost. Needs the extra "report"."""
    from trainbus.cli.report import run

    run(folder, output, history, monitor, mode, force=force, as_json=as_json)

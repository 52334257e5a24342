"""``trainbus demo``: a real training on text that every machine has, killed and continued at will."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import sysconfig
from typing import Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from trainbus.checkpoint.folder import CheckpointFolder
from trainbus.errors import StateMismatchError
from trainbus.handler import Handler
from trainbus_callbacks import History, ModelCheckpoint, ProgressBar

__all__ = ["run"]

CONTEXT = 64  # characters that the model sees
BATCH_SIZE = 24
VOCABULARY = 128  # ASCII
VALIDATION_BATCHES = 20


def run(folder: str, epochs: int, batches: int, save_every: int, *, as_json: bool = False) -> None:
    """
    Train for *epochs* in all, continuing what *folder* holds, and say what was saved.

    Args:
        folder: Of the checkpoints and the history of the run.
        epochs: The run's total.
        batches: Training batches in an epoch.
        save_every: Training batches between two checkpoints.
        as_json: Print one object at the end: ``folder``, ``resumed``, ``epoch`` (completed ones),
            ``global_step``, ``cost`` (as `CheckpointStats`) and ``checkpoints``. All else goes to stderr.

    Raises:
        typer.BadParameter: *folder* is a file.
        SystemExit: What *folder* holds is no demo's.
    """
    place = os.path.expanduser(folder)
    if os.path.lexists(place) and not os.path.isdir(place):
        raise typer.BadParameter(f"{folder!r} is a file. The demo takes a folder for its checkpoints.")
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        console = Console()
        handler = _train(console, folder, epochs, batches, save_every)
        if not as_json:
            _report(console, folder)
    if as_json:
        print(json.dumps(_facts(handler, folder)))


def _train(console: Console, folder: str, epochs: int, batches: int, save_every: int) -> Handler:
    torch.manual_seed(0)
    text = library_source(limit=2_000_000)
    cut = len(text) - (VALIDATION_BATCHES * BATCH_SIZE + 1) * CONTEXT
    train = DataLoader(Windows(text[:cut], batches * BATCH_SIZE), BATCH_SIZE, shuffle=True)
    validation = DataLoader(Windows(text[cut:], VALIDATION_BATCHES * BATCH_SIZE), BATCH_SIZE)

    model = CharGPT()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"A GPT of {parameters:,} parameters reads {len(text):,} characters of Python's own library."
    )

    with Handler(model, optimizer, config={"context": CONTEXT}) as handler:
        handler.add_callback(ModelCheckpoint(os.path.join(folder, "last.pt"), save_freq=save_every))
        best = ModelCheckpoint(os.path.join(folder, "best.pt"), monitor="val_loss", save_best_only=True)
        handler.add_callback(best)
        handler.add_callback(History(os.path.join(folder, "history.jsonl"), every=10))
        handler.add_callback(ProgressBar(disable=None))  # no bar where the output is no terminal
        if _resumes(handler, folder):
            console.print(_where_it_continues(handler, epochs), soft_wrap=True)
        try:
            handler.fit(train, validation, epochs=epochs, train_step=loss_of)
        except KeyboardInterrupt:
            sys.exit("\nInterrupted. Run the same command again, and it continues where it was.")
    return handler


def _resumes(handler: Handler, folder: str) -> bool:
    try:
        return handler.resume(folder) is not None
    except StateMismatchError:
        sys.exit(
            f"trainbus: {folder!r} holds checkpoints of another run, which the demo cannot continue. Give "
            "the demo a folder of its own."
        )


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of predicting each next character of *batch* (batch, CONTEXT + 1)."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def library_source(limit: int) -> str:
    """Return up to *limit* characters of the standard library's modules, in order of their names."""
    folder = sysconfig.get_paths()["stdlib"]
    parts: list[str] = []
    size = 0
    for name in sorted(os.listdir(folder)):
        if name.endswith(".py") and size < limit:
            with open(os.path.join(folder, name), encoding="utf-8") as file:
                parts.append(file.read().encode("ascii", "ignore").decode())
            size += len(parts[-1])
    return "".join(parts)[:limit]


class Windows(Dataset[torch.Tensor]):
    """*count* overlapping pieces of a text, evenly spread, as CONTEXT + 1 character codes (int64)."""

    def __init__(self, text: str, count: int) -> None:
        self.codes = torch.tensor(bytearray(text, "ascii"), dtype=torch.uint8)
        self.count = count
        self.stride = (len(self.codes) - CONTEXT - 1) / count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        start = int(index * self.stride)
        return self.codes[start : start + CONTEXT + 1].long()


class CharGPT(nn.Module):
    """A decoder-only transformer over characters; shares the embedding with the output layer."""

    def __init__(self, width: int = 96, heads: int = 4, layers: int = 3) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.place = nn.Embedding(CONTEXT, width)
        block = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        nn.init.normal_(self.token.weight, std=0.02)
        self.head.weight = self.token.weight
        self.mask: torch.Tensor
        self.register_buffer(
            "mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False
        )

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """Return logits (batch, length, VOCABULARY) for *codes* (batch, length), length <= CONTEXT."""
        length = codes.shape[1]
        x = self.token(codes) + self.place(torch.arange(length, device=codes.device))
        x = self.blocks(x, mask=self.mask[:length, :length], is_causal=True)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _where_it_continues(handler: Handler, epochs: int) -> str:
    if handler.epoch >= epochs:
        return f"This run of {handler.epoch} epochs is complete."
    return (
        f"Continuing in epoch {handler.epoch + 1} after {handler.global_step} batches: "
        "the result will be the same as without the interruption."
    )


def _facts(handler: Handler, folder: str) -> dict[str, Any]:
    checkpoints = [
        {
            "path": file.path,
            "epoch": file.manifest.epoch,
            "global_step": file.manifest.global_step,
            "logs": file.manifest.logs,
            "size": file.manifest.size,
        }
        for file in CheckpointFolder(folder)
    ]
    return {
        "folder": folder,
        "resumed": handler.resumed,
        "epoch": handler.epoch,
        "global_step": handler.global_step,
        "cost": dataclasses.asdict(handler.checkpoint_stats()),
        "checkpoints": checkpoints,
    }


def _report(console: Console, folder: str) -> None:
    table = Table("file", "epoch", "step", "val_loss", "size")
    for file in CheckpointFolder(folder):
        manifest = file.manifest
        loss = manifest.logs.get("val_loss")
        table.add_row(
            os.path.basename(file.path),
            str(manifest.epoch + 1),
            str(manifest.global_step),
            "" if loss is None else f"{loss:.4f}",
            f"{manifest.size / 1e6:.1f} MB",
        )
    console.print(table)
    console.print(
        "\nNext: kill it in the middle and run it again, "
        f"train on with [bold]trainbus demo {folder} --epochs 6[/],\n"
        f"look at the run with [bold]trainbus report {folder} -o report.html[/],\n"
        f'or open a file without trainbus: [bold]python -c "import torch; '
        f"print(torch.load('{os.path.join(folder, 'best.pt')}', weights_only=True).keys())\"[/]",
        highlight=False,
        soft_wrap=True,
    )

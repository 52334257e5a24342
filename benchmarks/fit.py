"""What `Handler.fit` costs over the same loop by hand: ``python -m benchmarks.fit [--json]``.

Epochs of both are interleaved, so that what else the machine does falls on both alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from trainbus import Handler

BATCHES = 100


def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    """Return a model of three layers, AdamW, and a loader of 100 batches of 64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    data = TensorDataset(torch.randn(BATCHES * 64, width), torch.randint(10, (BATCHES * 64,)))
    return model, torch.optim.AdamW(model.parameters()), DataLoader(data, 64, shuffle=True)


def by_hand(width: int) -> Callable[[], None]:
    """Return a function that trains one epoch and keeps the mean loss, as people write it."""
    model, optimizer, loader = make(width)

    def epoch() -> None:
        model.train()
        total = torch.zeros(())
        for x, y in loader:
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.detach() * len(x)
        (total / len(loader.dataset)).item()

    return epoch


def with_fit(width: int) -> Callable[[], None]:
    """Return a function that trains one epoch more with fit."""
    model, optimizer, loader = make(width)
    handler = Handler(model, optimizer)
    handler.on("epoch_end", lambda logs: logs["loss"])

    def epoch() -> None:
        handler.fit(loader, epochs=handler.epoch + 1, loss_fn=cross_entropy)

    return epoch


def measure(width: int, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a batch by hand and with fit, and the ratio."""
    loops = {"hand": by_hand(width), "fit": with_fit(width)}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for round_ in range(rounds + 1):
        for name, epoch in loops.items():
            begun = time.perf_counter()
            epoch()
            if round_:  # the first warms up
                times[name].append((time.perf_counter() - begun) * 1000 / BATCHES)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [fit / hand for fit, hand in zip(times["fit"], times["hand"], strict=True)]
    return {**medians, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = {width: measure(width, options.rounds) for width in (64, 512, 1024)}
    if options.json:
        print(json.dumps(results))
        return
    print(f"{'width':>6} {'by hand, ms/batch':>18} {'fit, ms/batch':>14} {'ratio':>7}")
    for width, row in results.items():
        print(f"{width:>6} {row['hand']:>18.3f} {row['fit']:>14.3f} {row['ratio']:>7.3f}")


if __name__ == "__main__":
    main()

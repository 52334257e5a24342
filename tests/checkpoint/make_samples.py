"""
Writes ``samples/format-1.pt``, which every later version must be able to read.

Run once for a format's first release, and never again: ``python tests/checkpoint/make_samples.py``.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from pathlib import Path

import torch

from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.manifest import Manifest


def main() -> None:
    weight = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    state = {
        "module": OrderedDict(embedding=weight, head=weight, scale=torch.tensor(0.5)),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "params": [0]}],
        },
        "progress": {"epoch": 2, "names": ("a", "b"), "done": False, "nothing": None},
    }
    manifest = Manifest(
        contents="state",
        run_id="sample-run",
        parents=("older-run",),
        stream="best",
        sequence=4,
        epoch=2,
        global_step=30,
        logs={"val_loss": 0.25, "diverged": math.nan, "norm": math.inf},
        monitor="val_loss",
        mode="min",
        score=0.25,
        created=1_780_000_000.25,
        config={"lr": 0.1, "layers": [2, 3]},
        versions={"trainbus": "0.1.0", "torch": "2.13.0"},
    )
    path = Path(__file__).parent / "samples" / "format-1.pt"
    commit(path, manifest, lambda stream: torch.save(state, stream))


if __name__ == "__main__":
    main()

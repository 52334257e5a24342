"""Two real processes: rank 0 decides and writes, metrics are averaged over both."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import trainbus

SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from torch import nn
from trainbus import Handler
from trainbus_callbacks import ModelCheckpoint

store, folder = sys.argv[1:]
before = Handler(nn.Linear(1, 1)).save_async(f"{folder}/before.pt").path  # the launcher's RANK counts
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
seen = []
with Handler(model, optimizer) as handler:
    best = handler.add_callback(ModelCheckpoint(f"{folder}/best.pt", monitor="val_loss", save_best_only=True))
    handler.on("epoch_end", lambda logs: seen.append(dict(logs)))
    for epoch in handler.epochs(2):
        for batch in handler.batches([torch.ones(1, 2), torch.ones(3, 2)]):
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            handler.log(loss=float(rank))
        if rank == 1:
            handler.log(only_there=5.0)
        handler.log(val_loss=1.0 - epoch + rank)
    pending = handler.save_async(f"{folder}/last.pt")
    assert (pending.path is None) == (rank == 1)
print(json.dumps({"logs": seen, "best": best.best_score, "before": before}))
dist.destroy_process_group()
"""


@pytest.mark.full
class TestTwoRanks:
    def test_one_decision_one_writer(self, tmp_path):
        """Logs are the same on both ranks, a name that one rank logs does not hang, only rank 0 writes."""
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", SCRIPT, tmp_path / "store", tmp_path / "run"],
                env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in (0, 1)
        ]
        first, second = (json.loads(process.communicate(timeout=120)[0]) for process in processes)

        assert first["logs"] == second["logs"]
        assert first["logs"][0] == {"loss": 0.5, "val_loss": 1.5, "only_there": 5.0}
        assert (first["best"], second["best"]) == (0.5, 0.5)
        assert (first["before"] is None, second["before"]) == (False, None)
        state = trainbus.load(tmp_path / "run" / "last.pt")
        assert set(state["module"]) == {"weight", "bias"}
        assert trainbus.read_manifest(tmp_path / "run" / "best.pt").score == 0.5

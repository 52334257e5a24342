"""Real ranks under torchrun: saved at one number of them, loaded at others; what one meets, all hear of."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trainbus

SCRIPT = Path(__file__).parent / "sharded_ranks.py"
LIMIT = 240.0


def torchrun(ranks, scenario, folder):
    """Run a scenario on so many ranks; return what each returned."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, SCRIPT, scenario, folder],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULTS ")]
    return json.loads(line.removeprefix("RESULTS "))


def damage(path):
    """Flip a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


KINDS = ["save", "save_hsdp"]


@pytest.fixture(name="saved", scope="module", params=KINDS)
def _saved(request, tmp_path_factory):
    """Save at 4 ranks, in one shard group or in two replicas of one."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "run").mkdir()
    return request.param, folder, torchrun(4, request.param, folder)


@pytest.mark.full
class TestSharded:
    def test_is_of_the_moment_of_the_save(self, saved):
        """Everything changed right after the save returned, and the checkpoint holds what was before."""
        _, folder, results = saved

        state, oracle = trainbus.load(folder / "run" / "a"), torch.load(folder / "oracle.pt")
        assert state["progress"] == {"step": 2, 3: (1, "a")} and state["empty"] == {}
        for name, tensor in oracle["module"].items():
            assert torch.equal(state["module"][name], tensor), name
        for name, moments in oracle["optimizer"]["state"].items():
            assert all(torch.equal(state["optimizer"]["state"][name][key], moments[key]) for key in moments)
        assert {result["manifest"] for result in results} == {trainbus.verify(folder / "run" / "a").digest}

    def test_tensors_that_one_rank_has(self, saved):
        """A tensor that only one rank has, as a stage of a pipeline, is saved too."""
        _, folder, _ = saved

        stages = trainbus.load(folder / "run" / "a")["stages"]
        assert {name: stage.tolist() for name, stage in stages.items()} == {str(n): [n, n] for n in range(4)}

    @pytest.mark.parametrize(
        ("saved", "ranks"), [("save", 4), ("save", 2), ("save", 1), ("save_hsdp", 2)], indirect=["saved"]
    )
    def test_loads_at(self, saved, ranks):
        """At any number of ranks a fresh model and optimizer become the saved ones bit for bit."""
        _, folder, _ = saved

        for result in torchrun(ranks, "load", folder):
            assert result["same"] and result["keys"] == ["module"]
            assert "it has no module.new, which this run has" in result["refused"]

    def test_one_replica_writes(self, saved):
        """Each piece is written once: with two replicas of two ranks, by the two of the first replica."""
        scenario, folder, _ = saved
        path = folder / "run" / "a"
        metadata = pickle.loads((path / ".metadata").read_bytes())
        pieces = [
            (index.fqn, tuple(index.offset or ()), place) for index, place in metadata.storage_data.items()
        ]
        divided = {name for name, offset, _ in pieces if sum(offset)}
        writers = {place.relative_path for name, _, place in pieces if name in divided}

        assert len(divided) > 10
        assert writers == {f"__{rank}_0.distcp" for rank in range({"save": 4, "save_hsdp": 2}[scenario])}
        # All that is in the files is in these pieces, and they do not overlap.
        size = sum(file.stat().st_size for file in path.glob("*.distcp"))
        assert sum(place.length for _, _, place in pieces) == size

    def test_damage_is_found_by_all(self, saved):
        """A flipped bit in one shard is found before any tensor has changed, on every rank."""
        _, folder, _ = saved
        damage(folder / "run" / "a" / "__1_0.distcp")
        try:
            results = torchrun(2, "damaged", folder)
        finally:
            damage(folder / "run" / "a" / "__1_0.distcp")

        assert (
            results
            == [{"reason": "__1_0.distcp does not have the digest it was written with", "unchanged": True}]
            * 2
        )


@pytest.mark.full
class TestFailing:
    def test_one_rank_fails_all(self, tmp_path):
        """
        What fails on one rank fails on all with its reason; the old checkpoint stays whole, nothing
        temporary is left, and the next save succeeds.
        """
        results = torchrun(4, "failing", tmp_path)

        full = "[Errno 28] No space left on device (injected into write)"
        for result in results:
            assert result["again"]
            told = result["told"]
            assert told[:2] == [[f"it failed on rank {rank}: {full}", rank, 28] for rank in (0, 3)]
            assert [(rank, number) for _, rank, number in told[2:4]] == [(0, 30)] * 2
            assert told[4][0] == "it failed on rank 0: ValueError: no manifest"
            assert told[5][0].startswith("it failed on rank 3: TypeError: Cannot copy a defaultdict")

    def test_rank_that_does_not_come(self, tmp_path):
        """Where one rank does not save, the others fail within their group's time-out, and leave nothing."""
        first, second = torchrun(2, "absent", tmp_path)

        assert first["told"].startswith("the ranks did not do it together: RuntimeError")
        assert first["left"] == second["left"] == []

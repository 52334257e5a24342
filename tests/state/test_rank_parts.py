"""What differs from rank to rank: given to the one file, and taken from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainbus.state import rank_parts


def part(rank, **progress):
    counters = {"epoch": 2, "batches": 3, "epoch_begun": True, "in_body": True, "in_validation": False}
    return {
        "progress": {
            **counters,
            "metrics": {"means": {"loss": (float(rank), 1)}},
            "global_step": 23,
            **progress,
        },
        "rng": {"torch": torch.tensor([rank]), "numpy": np.array([rank])},
        "data": {"train 0": rank},
    }


def state_of(size, **progress):
    given = [rank_parts.give(part(rank, **progress)) for rank in range(size)]
    return {"module": {}, **part(0, **progress), rank_parts.KEY: rank_parts.together(given, size)}


class TestOwnState:
    @pytest.mark.parametrize("rank", [0, 1, 2])
    def test_same_number(self, rank):
        """Each rank finds its own, NumPy values too."""
        state, lacking, told = rank_parts.own_state(state_of(3), rank, 3)

        assert (lacking, told) == (set(), None)
        assert state["progress"]["metrics"]["means"]["loss"] == (float(rank), 1)
        assert state["rng"]["torch"].tolist() == state["rng"]["numpy"].tolist() == [rank]
        assert isinstance(state["rng"]["numpy"], np.ndarray)
        assert state["data"] == {"train 0": rank} and state["module"] == {}

    def test_one_process(self):
        """A file of one process is taken by one as it is."""
        state = {"module": {}, **part(0)}

        assert rank_parts.own_state(state, 0, 1) == (state, set(), None)

    @pytest.mark.parametrize(("before", "now"), [(4, 2), (2, 1), (1, 2)])
    def test_another_number(self, before, now):
        """Counters stay, the epoch under way begins again, and it is said what is not exact."""
        saved = state_of(before) if before > 1 else {"module": {}, **part(0)}
        state, lacking, told = rank_parts.own_state(saved, 0, now)

        assert lacking == {"rng", "data"}
        assert state["progress"]["global_step"] == 23 and state["progress"]["epoch"] == 2
        assert (state["progress"]["batches"], state["progress"]["epoch_begun"]) == (0, False)
        assert state["progress"]["metrics"] == {} and not state["progress"]["in_body"]
        assert saved["progress"]["batches"] == 3, "the state of the file was changed"
        assert f"saved by {'1 process' if before == 1 else f'{before} ranks'} and is loaded by" in told
        assert "epoch 3 is done again from its first batch, of which 3 batches were done" in told

    def test_another_number_between_epochs(self):
        """Between two epochs only random numbers and order differ."""
        state, lacking, told = rank_parts.own_state(state_of(2, epoch_begun=False, batches=0), 1, 4)

        assert lacking == {"rng", "data"} and state["progress"]["epoch"] == 2
        assert "random numbers and the order of data" in told and "again" not in told

    def test_saved_by_rank_0_alone(self):
        """A save amid an exception has no parts: the others keep their random state and take the position."""
        state = {"module": {}, **part(0), rank_parts.KEY: rank_parts.together(None, 2)}

        assert rank_parts.own_state(state, 0, 2)[:2] == (state, set())
        found, lacking, told = rank_parts.own_state(state, 1, 2)
        assert (found["data"], lacking) == ({"train 0": 0}, {"rng"}) and "Rank 0 saved it alone" in told

    def test_rank_that_cannot_give(self):
        """What one rank cannot save fails the save, and says whose it is."""
        given = [rank_parts.give(part(0)), rank_parts.give({"data": object()})]

        with pytest.raises(
            RuntimeError, match=r"(?s)state of rank 1 cannot be saved: UnsavableStateError: .*'data'"
        ):
            rank_parts.together(given, 2)

"""No two callbacks that save have one name for their files."""

from __future__ import annotations

import itertools
import os

import pytest

from trainbus.testing import FakeHandler
from trainbus_callbacks import ModelCheckpoint, OnException, Preemption, SaveOnRequest

KINDS = [ModelCheckpoint, OnException, Preemption, SaveOnRequest]


class TestNames:
    @pytest.mark.parametrize(("first", "second"), list(itertools.product(KINDS, repeat=2)))
    def test_one_name(self, first, second):
        """Whatever the two are, they are refused before anything is saved, and both are named."""
        handler = FakeHandler()
        one = handler.add_callback(first("run/last.pt"))
        two = handler.add_callback(second(os.path.abspath("run/last.pt")))

        with pytest.raises(ValueError, match="they would overwrite each other's") as caught:
            handler.bus.emit("train_begin")
        assert one.state_key in str(caught.value) and two.state_key in str(caught.value)

    def test_names_of_their_own(self):
        """Other names, or the same one in another folder, are fine."""
        handler = FakeHandler()
        for number, kind in enumerate(KINDS):
            handler.add_callback(kind(f"run/{number}.pt"))
            handler.add_callback(kind(f"run/{number}/last.pt"))

        handler.bus.emit("train_begin")
        handler.bus.emit("train_end")

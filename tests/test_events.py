"""Tests of the catalogue of events."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys

import pytest

from trainbus import events
from trainbus.events import COMMON_FIELDS, EVENTS, Event


class TestCatalogue:
    def test_names(self):
        """
        The catalogue holds these events and no others.
        """
        assert list(EVENTS) == [
            "train_begin",
            "train_end",
            "epoch_begin",
            "epoch_end",
            "train_batch_begin",
            "train_batch_end",
            "val_begin",
            "val_end",
            "val_batch_begin",
            "val_batch_end",
            "exception",
            "checkpoint_saved",
            "checkpoint_failed",
            "checkpoint_skipped",
            "checkpoint_removed",
        ]

    def test_closed(self):
        """
        Nobody can add to the catalogue that all buses share.
        """
        with pytest.raises(TypeError):
            EVENTS["mine"] = Event("mine", ())  # type: ignore[index]

    @pytest.mark.parametrize("event", EVENTS.values(), ids=str)
    def test_each(self, event):
        """
        Each event has the common fields first, a sentence, and a place in the pseudocode.
        """
        assert event.fields[: len(COMMON_FIELDS)] == COMMON_FIELDS
        assert event.doc.endswith(".")
        assert re.search(rf"^ +{event.name}\b", events.__doc__, re.MULTILINE)

    @pytest.mark.parametrize(
        ("name", "own"),
        [
            ("train_begin", ("total_epochs", "resumed")),
            ("train_end", ("reason",)),
            ("epoch_end", ()),
            ("exception", ("error",)),
            ("checkpoint_saved", ("save", "path", "manifest", "size", "seconds", "stream")),
            ("checkpoint_failed", ("save", "path", "error", "stream")),
            ("checkpoint_skipped", ("save", "path", "reason", "stream")),
            ("checkpoint_removed", ("path", "stream")),
        ],
    )
    def test_fields(self, name, own):
        """
        Beside the common fields an event has its own, each explained in the module's docstring.
        """
        assert EVENTS[name].fields[len(COMMON_FIELDS) :] == own
        assert all(f"``{field}``" in events.__doc__ for field in EVENTS[name].fields)

    @pytest.mark.parametrize(
        ("name", "number"),
        [
            ("epoch_begin", 5),
            ("epoch_end", 5),
            ("val_begin", 5),
            ("val_end", 5),
            ("train_batch_begin", 101),
            ("train_batch_end", 100),
            ("val_batch_begin", 8),
            ("val_batch_end", 8),
        ],
    )
    def test_number(self, name, number):
        """
        An event's number is that of its epoch or batch, counted from 1.
        """
        assert EVENTS[name].number({"epoch": 4, "batch": 7, "global_step": 100}) == number

    @pytest.mark.parametrize("name", ["train_begin", "train_end", "exception", "checkpoint_saved"])
    def test_no_number(self, name):
        """
        Events that do not belong to an epoch or a batch have no number.
        """
        assert EVENTS[name].number is None


class TestEvent:
    def test_frozen(self):
        """
        An event does not change.
        """
        with pytest.raises(dataclasses.FrozenInstanceError):
            EVENTS["epoch_end"].name = "other"

    @pytest.mark.parametrize("name", ["epoch end", "", "class", 3])
    def test_name_no_identifier(self, name):
        """
        A name that no method could have is refused.
        """
        with pytest.raises(ValueError, match=r"Cannot declare event .* Python identifiers"):
            Event(name, ())

    def test_field_no_identifier(self):
        """
        A field that no parameter could have is refused.
        """
        with pytest.raises(ValueError, match="'val/loss' is no name"):
            Event("mine", ("val/loss",))

    def test_field_sender(self):
        """
        A field called sender is refused, since emit could not pass it on.
        """
        with pytest.raises(ValueError, match="Give the field another name"):
            Event("mine", ("sender",))


class TestImport:
    def test_neither_torch_nor_numpy(self):
        """
        Bus and callbacks import neither torch nor NumPy, the catalogue not even blinker.
        """
        code = (
            "import sys, trainbus.events\n"
            "assert 'blinker' not in sys.modules\n"
            "import trainbus.callback\n"
            "assert 'trainbus.bus' in sys.modules\n"
            "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

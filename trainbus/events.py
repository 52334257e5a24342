"""
The catalogue of events: when each one fires, and which fields it brings.

.. code-block:: text

    train_begin                           total_epochs, resumed
    for epoch in epochs:
        epoch_begin                       not again for an epoch that a resumed run continues
        for batch in train_loader:
            train_batch_begin
            forward, backward, optimizer.step()
            train_batch_end               global_step already counts this batch
        val_begin
        for batch in val_loader:
            val_batch_begin
            forward
            val_batch_end
        val_end
        epoch_end                         after validation: logs hold this epoch's val_*
    exception                             error; only if one ended the run
    train_end                             reason

    after a save was asked for, before the next event of the training thread:
        checkpoint_saved                  save, path, manifest, size, seconds, stream
        checkpoint_failed                 save, path, error, stream
        checkpoint_skipped                save, path, reason, stream
        checkpoint_removed                path, stream

Every event has the common fields:

- ``handler``: the bus's handler, or None.
- ``epoch``: 0-based.
- ``batch``: 0-based index within the epoch (within the validation for ``val_batch_*``).
- ``global_step``: training batches completed over the run. At ``train_batch_end`` it counts
  the batch that ends, at ``train_batch_begin`` not yet the one that begins.
- ``logs``: metrics by name; empty if the emitter gave none.

For ``checkpoint_*``, ``epoch``, ``global_step`` and ``logs`` are those of the save, not of the
moment at which the event arrives. The other fields:

- ``total_epochs``: int, or None if the run has no fixed length.
- ``resumed``: True if the run continues from a checkpoint.
- ``error``: the exception.
- ``reason``: a sentence; in ``train_end`` what `stop` was told, or None if nobody stopped the run.
- ``save``: the `PendingSave`; ``save.times`` tells what it cost, and when what happened to it.
- ``path``: the file. ``manifest``: its `Manifest`.
- ``size``: bytes. ``seconds``: from the request until the file was durable.
- ``stream``: the key of the callback that asked for the save, or an empty string.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

__all__ = ["COMMON_FIELDS", "EVENTS", "Event"]

COMMON_FIELDS = ("handler", "epoch", "batch", "global_step", "logs")


@dataclass(frozen=True, slots=True)
class Event:
    """
    What the bus knows of one kind of event.

    Attributes:
        name: An identifier, e.g. ``"epoch_end"``; a `Callback` receives it in ``on_<name>``.
        fields: All fields it may be emitted with, the common ones first.
        number:
            Tells from a payload the event's own number, which filters such as
            ``every=`` go by. The first is 1. None: filters count calls.
        doc: When it fires, in one sentence.

    Raises:
        ValueError: If a name is no identifier, or a field is called ``sender``.
    """

    name: str
    fields: tuple[str, ...]
    number: Callable[[Mapping[str, Any]], int] | None = None
    doc: str = ""

    def __post_init__(self) -> None:
        for name in (self.name, *self.fields):
            if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
                raise ValueError(
                    f"Cannot declare event {self.name!r}: {name!r} is no name for an event or a field. "
                    "Both must be Python identifiers, since receivers name them in their signatures."
                )
        if "sender" in self.fields:
            raise ValueError(
                f"Cannot declare event {self.name!r} with a field 'sender': "
                "that is an argument of `emit` itself. Give the field another name."
            )


def _epoch_number(payload: Mapping[str, Any]) -> int:
    return int(payload["epoch"]) + 1


def _batch_number(payload: Mapping[str, Any]) -> int:
    return int(payload["batch"]) + 1


def _steps_completed(payload: Mapping[str, Any]) -> int:
    return int(payload["global_step"])


def _step_begun(payload: Mapping[str, Any]) -> int:
    # One more than what is completed, so that begin and end of one batch have the same number.
    return int(payload["global_step"]) + 1


def _catalogue(*events: Event) -> Mapping[str, Event]:
    return MappingProxyType(
        {e.name: Event(e.name, (*COMMON_FIELDS, *e.fields), e.number, e.doc) for e in events}
    )


EVENTS: Mapping[str, Event] = _catalogue(
    Event("train_begin", ("total_epochs", "resumed"), doc="The run begins, or begins again after a resume."),
    Event("train_end", ("reason",), doc="The run is over and everything asked for is saved."),
    Event("epoch_begin", (), _epoch_number, "An epoch begins."),
    Event("epoch_end", (), _epoch_number, "An epoch is over, its validation included."),
    Event("train_batch_begin", (), _step_begun, "A training batch was loaded and is handed to the loop."),
    Event("train_batch_end", (), _steps_completed, "The loop is done with a training batch."),
    Event("val_begin", (), _epoch_number, "A validation begins."),
    Event("val_end", (), _epoch_number, "A validation is over."),
    Event("val_batch_begin", (), _batch_number, "A validation batch was loaded and is handed to the loop."),
    Event("val_batch_end", (), _batch_number, "The loop is done with a validation batch."),
    Event("exception", ("error",), doc="An exception ends the run; train_end follows."),
    Event(
        "checkpoint_saved",
        ("save", "path", "manifest", "size", "seconds", "stream"),
        doc="A checkpoint is durable.",
    ),
    Event(
        "checkpoint_failed",
        ("save", "path", "error", "stream"),
        doc="A checkpoint could not be written. The error says what stands under its name.",
    ),
    Event(
        "checkpoint_skipped",
        ("save", "path", "reason", "stream"),
        doc="A save was not carried out: the writer was busy, a newer one took its place, or what it "
        "waited for did not come.",
    ),
    Event("checkpoint_removed", ("path", "stream"), doc="A checkpoint that is no longer kept was removed."),
)

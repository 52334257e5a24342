"""How far a run has come: the counters, and what is going on between two of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Progress"]


_ALLOWED = 8  # batches without a step, beyond twice the most that a step came behind


@dataclass
class Progress:
    """
    The counters of a run. Changed by the loop alone, on the training thread.

    Attributes:
        epoch: The epoch under way, or the next one; 0-based.
        batches: Training batches completed in this epoch.
        batch: Index of the training batch at hand, or of the last one; 0-based.
        global_step: Training batches completed over the whole run.
        total_epochs: What `epochs` was asked for; None when unknown.
        epoch_begun: ``epoch_begin`` of `epoch` has been emitted, in this process or in the
            one that wrote the checkpoint.
        in_body: The loop body of `epoch` was entered; it runs from its top again after a resume.
        batch_open: A batch was handed to the loop body and is not completed.
        in_batch: A batch is open, or its ``train_batch_end`` is being emitted.
        stepped: An optimizer stepped since that batch was handed out.
        stepping: How many optimizers are inside of ``step``, or were left there by an exception since
            that batch was handed out.
        last_stepped: The same of the batch completed last.
        ever_stepped: An optimizer has stepped in this run.
        stepless: Batches completed since the one in which an optimizer stepped last.
        most_stepless: The most of these before a step so far; None before the first step.
        epoch_complete: Everything of `epoch` is done; only its ``epoch_end`` is under way.
    """

    epoch: int = 0
    batches: int = 0
    batch: int = 0
    global_step: int = 0
    total_epochs: int | None = None
    epoch_begun: bool = False
    in_body: bool = False
    batch_open: bool = False
    in_batch: bool = False
    stepped: bool = False
    stepping: int = 0
    last_stepped: bool = False
    ever_stepped: bool = False
    stepless: int = 0
    most_stepless: int | None = None
    epoch_complete: bool = False

    @property
    def batch_in_body_counts(self) -> bool:
        """True when the open batch has already changed the weights, so that it must not be repeated."""
        return self.batch_open and self.stepped

    @property
    def batch_in_body_repeats(self) -> bool:
        """True when the open batch has not changed the weights: who loads a checkpoint is handed it again."""
        return self.batch_open and not self.stepped

    def is_stepping(self) -> bool:
        """Tell whether an optimizer is inside of ``step``. Any thread may ask."""
        return self.stepping > 0

    def begin_epoch(self) -> None:
        self.batches = self.batch = 0
        self.epoch_begun = True

    def end_epoch(self) -> None:
        self.epoch += 1
        self.batches = self.batch = 0
        self.epoch_begun = self.in_body = self.epoch_complete = False

    def open_batch(self) -> None:
        self.batch = self.batches
        self.batch_open = self.in_batch = True
        self.stepped = False
        self.stepping = 0

    def complete_batch(self) -> None:
        self.batches += 1
        self.global_step += 1
        self.batch_open = False
        if not self.stepped:
            self.stepless += 1

    def leave_batch(self) -> None:
        self.batch_open = self.in_batch = False
        self.last_stepped, self.stepped = self.stepped, False

    def note_step_begun(self) -> None:
        self.stepping += 1

    def note_step_done(self) -> None:
        self.stepping -= 1
        self.note_stepped()

    def note_stepped(self) -> None:
        self.stepped = self.ever_stepped = True
        self.most_stepless = max(self.most_stepless or 0, self.stepless)
        self.stepless = 0

    @property
    def steps_stay_away(self) -> bool:
        """
        True when so many batches went without a step that their gradients cannot be meant for one.

        A `torch.amp.GradScaler` leaves the steps out, or the body does. More batches than before are
        allowed for: the number that gradients are accumulated over may grow.
        """
        return self.most_stepless is not None and self.stepless > 2 * self.most_stepless + _ALLOWED

    def state_dict(self) -> dict[str, Any]:
        """Return the counters as a run that loads them must find them."""
        if self.epoch_complete:
            epoch, batches, begun, in_body = self.epoch + 1, 0, False, False
        else:
            epoch, batches, begun, in_body = self.epoch, self.batches, self.epoch_begun, self.in_body
        ahead = 1 if self.batch_in_body_counts else 0
        return {
            "epoch": epoch,
            "batches": batches + ahead,
            "epoch_begun": begun,
            "in_body": in_body,
            "global_step": self.global_step + ahead,
            "total_epochs": self.total_epochs,
            "ever_stepped": self.ever_stepped,
            "most_stepless": self.most_stepless,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where a checkpoint stood, between two batches."""
        self.epoch = state["epoch"]
        self.batches = state["batches"]
        self.batch = max(0, self.batches - 1)
        self.epoch_begun = state["epoch_begun"]
        self.in_body = state["in_body"]
        self.global_step = state["global_step"]
        self.total_epochs = state["total_epochs"]
        self.ever_stepped = state["ever_stepped"]
        self.most_stepless = state.get("most_stepless")  # older files do not say
        self.stepless = 0
        self.batch_open = self.in_batch = self.stepped = self.epoch_complete = False
        self.stepping = 0

"""What checkpoints cost a run, and each save by itself."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CheckpointStats", "LostTime", "SaveTimes"]


@dataclass
class SaveTimes:
    """
    What one save cost, and when. Complete with its event, when the training thread reads it.

    Moments are ``time.monotonic()`` in seconds, None: not reached; durations are seconds.

    Attributes:
        requested: When it was asked for.
        taken: When the training thread turned to it: later than *requested* if the save was put off
            until an optimizer step. It stood still from here on for *waiting*, then *copying*.
        waiting: For earlier saves to be written.
        copying: Collecting the state and copying it.
        fenced: In an optimizer step that had to wait for the copy in the background, from
            *fenced_at* on.
        fenced_at: When that wait began.
        begun: When the writer thread took it up.
        durable: When its file was durable.
    """

    requested: float
    taken: float | None = None
    waiting: float = 0.0
    copying: float = 0.0
    fenced: float = 0.0
    fenced_at: float | None = None
    begun: float | None = None
    durable: float | None = None

    @property
    def lost(self) -> float:
        """Seconds of the training thread in all."""
        return self.waiting + self.copying + self.fenced


@dataclass
class LostTime:
    """
    Seconds of the training thread that went into checkpoints.

    Attributes:
        waiting: For an earlier save to be written, because ``max_pending`` were unfinished.
        copying: Collecting the state and copying it.
        fenced: In optimizer steps that had to wait for a copy in the background.
        overlappable: The part of *copying* that was spent on host memory, in saves for which
            ``snapshot="overlap"`` could have done that in the background.
    """

    waiting: float = 0.0
    copying: float = 0.0
    fenced: float = 0.0
    overlappable: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.waiting + self.copying + self.fenced


@dataclass
class CheckpointStats:
    """
    Sums over a run's saves so far.

    Attributes:
        saves: Files that became durable.
        bytes: Their sizes together.
        seconds_lost: Time the training thread spent on saves: waiting for room, collecting the
            state, copying it, and in optimizer steps that waited for a copy.
        seconds_waiting: The part of it spent waiting for room.
        seconds_copying: The part of it spent collecting and copying the state.
        seconds_fenced: The part of it spent in optimizer steps.
        seconds_to_durable: From each request to its file being durable, summed; training went
            on meanwhile.
        skipped: Saves that were not carried out.
        failed: Saves that could not be written.
    """

    saves: int = 0
    bytes: int = 0
    seconds_lost: float = 0.0
    seconds_waiting: float = 0.0
    seconds_copying: float = 0.0
    seconds_fenced: float = 0.0
    seconds_to_durable: float = 0.0
    skipped: int = 0
    failed: int = 0

    def summary(self) -> str:
        """Return the sums as one line for people."""
        if not self.saves + self.skipped + self.failed:
            return "no checkpoints"
        each = 1000 * self.seconds_lost / max(1, self.saves)
        line = (
            f"{self.saves} checkpoints, {self.bytes / 1e6:.1f} MB: training lost {self.seconds_lost:.2f} s "
            f"({each:.1f} ms each), {self.seconds_to_durable:.2f} s of writing went on in the background"
        )
        if self.skipped:
            line += f", {self.skipped} skipped"
        if self.failed:
            line += f", {self.failed} failed"
        return line

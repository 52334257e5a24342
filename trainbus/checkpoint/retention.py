"""Which checkpoints stay. Pure functions over what the files say of themselves; needs no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainbus.checkpoint.folder import CheckpointFile
from trainbus.checkpoint.manifest import Manifest

__all__ = ["KeepBest", "KeepEvery", "KeepLast", "KeepNamed", "Retention", "is_abandoned", "superfluous"]


class Retention:
    """
    Says which of a run's files stay. Combine some with ``|``: a file stays if any says so.

    Attributes:
        needs_scores: Whether it judges files by the monitored metric.
    """

    needs_scores: bool = False

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Return those of *files* (in order of ``sequence``) that stay."""
        raise NotImplementedError

    def __or__(self, other: Retention) -> Retention:
        return _AnyOf((self, other))


@dataclass(frozen=True)
class KeepLast(Retention):
    """
    Keep the newest files.

    Args:
        number: How many, at least 1.
    """

    number: int

    def __post_init__(self) -> None:
        _check_positive("KeepLast", self.number)

    def __repr__(self) -> str:
        return f"KeepLast({self.number})"

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Return the newest of *files*."""
        return list(files[-self.number :])


@dataclass(frozen=True)
class KeepBest(Retention):
    """
    Keep the files with the best scores, by the metric they were judged by; the older of equals.

    Files whose score is not finite, or that were judged by another metric than the newest, are not
    among the best.

    Args:
        number: How many, at least 1.
    """

    needs_scores = True

    number: int

    def __post_init__(self) -> None:
        _check_positive("KeepBest", self.number)

    def __repr__(self) -> str:
        return f"KeepBest({self.number})"

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Return the best of *files*."""
        if not files:
            return []
        judged_by = (files[-1].manifest.monitor, files[-1].manifest.mode)
        scored = [
            (-score if judged_by[1] == "max" else score, file)
            for file in files
            if (file.manifest.monitor, file.manifest.mode) == judged_by
            and (score := file.manifest.score) is not None
            and math.isfinite(score)
        ]
        return [file for _, file in sorted(scored, key=lambda one: one[0])[: self.number]]


@dataclass(frozen=True)
class KeepEvery(Retention):
    """
    Keep each so many epochs' or steps' file for ever; one of them is given.

    Args:
        epochs: Counted from the run's first, from 1 on.
        steps: Training batches, counted over the run.
    """

    epochs: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.epochs, self.steps) if value is not None]
        if len(given) != 1:
            raise TypeError(
                f"KeepEvery takes either epochs or steps, got {self.epochs!r} and {self.steps!r}. "
                "Combine two with |."
            )
        _check_positive("KeepEvery", given[0])

    def __repr__(self) -> str:
        return f"KeepEvery(epochs={self.epochs})" if self.steps is None else f"KeepEvery(steps={self.steps})"

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Return those of *files* whose epoch or step is a multiple."""
        if self.epochs is not None:
            return [file for file in files if (file.manifest.epoch + 1) % self.epochs == 0]
        assert self.steps is not None
        return [file for file in files if file.manifest.global_step % self.steps == 0]


@dataclass(frozen=True)
class KeepNamed(Retention):
    """
    Keep one file whatever it says of itself, for who knows better which is the best.

    Args:
        name: Of the file, without its folder.
    """

    name: str

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        """Return the one of *files* with this name, if there is one."""
        return [file for file in files if os.path.basename(file.path) == self.name]


@dataclass(frozen=True)
class _AnyOf(Retention):
    parts: tuple[Retention, ...]

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        return any(part.needs_scores for part in self.parts)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.parts))

    def kept(self, files: Sequence[CheckpointFile]) -> list[CheckpointFile]:
        return [file for part in self.parts for file in part.kept(files)]


def superfluous(
    files: Sequence[CheckpointFile], keep: Retention, left_at: Mapping[str, tuple[int, int]] | None = None
) -> list[str]:
    """
    Return the paths of those of *files* that need not stay, oldest first.

    The best one always stays, and the newest: a run can be continued from it, and a rule under which no
    file stays, such as the best where none has a score, would remove each once it is written. Links and
    copies stay and do not count: the file itself would go if one of them were kept in its place.

    Files that lie behind the point at which their run was left for another one are in nobody's way: they
    may stay as if the run had not been left, beside those that stay without them.

    Args:
        files: Of one stream and one run with those it continues, in order of ``sequence``.
        keep: What stays.
        left_at: Where runs were left, see `Manifest.left_at`, by ``run_id``.
    """
    rule = keep | KeepBest(1) | KeepLast(1)
    originals = [file for file in files if file.is_original]
    on_the_way = [file for file in originals if not is_abandoned(file.manifest, left_at or {})]
    staying = {file.path for file in rule.kept(on_the_way)}
    staying |= {file.path for file in rule.kept(originals) if file not in on_the_way}
    return [file.path for file in originals if file.path not in staying]


def is_abandoned(manifest: Manifest, left_at: Mapping[str, tuple[int, int]]) -> bool:
    """Tell whether a file lies behind the point at which its run was left for another one."""
    end = left_at.get(manifest.run_id)
    return end is not None and manifest.position > end


def _check_positive(name: str, number: object) -> None:
    if type(number) is not int or number < 1:
        raise ValueError(f"{name} takes a positive int, got {number!r}.")

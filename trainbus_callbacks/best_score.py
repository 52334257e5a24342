"""What counts as better, and the ledger of scores: pending, durable, rolled back. Pure.

A score is durable when the file it stands for is. Until then it is pending: later
decisions compare with it, so that two saves in flight cannot end in the wrong order,
and a save that fails takes its score with it.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from trainbus.errors import did_you_mean
from trainbus_callbacks.scalars import as_float

__all__ = [
    "KNOWN_METRICS",
    "Mode",
    "Proposal",
    "ScoreLedger",
    "Standing",
    "check_monitor",
    "is_comparable",
    "resolve_mode",
]

Mode = Literal["min", "max"]

_LESS_IS_BETTER = (
    "bce ber bits_per_byte bits_per_char bpb bpc brier cer cross_entropy crossentropy ece energy error "
    "error_rate fid hinge huber kl kl_divergence kld lpips loss mae mape mean_absolute_error "
    "mean_squared_error mse msle nll perplexity ppl rmse rmsle smape ter top1_error top5_error wer"
)
_MORE_IS_BETTER = (
    "acc accuracy ap auc auprc auroc average_precision balanced_acc balanced_accuracy binary_accuracy "
    "bleu categorical_accuracy cider cosine_similarity dice exact_match f1 f1_score fmeasure iou "
    "jaccard kappa map map50 mcc meteor miou mrr ndcg pearson pr_auc precision psnr r2 r2_score recall "
    "return reward roc_auc rouge rouge1 rouge2 rougel sensitivity sparse_categorical_accuracy spearman "
    "specificity ssim success_rate top1 top1_acc top1_accuracy top5 top5_acc top5_accuracy"
)

KNOWN_METRICS: dict[str, Mode] = {
    **dict.fromkeys(_LESS_IS_BETTER.split(), "min"),
    **dict.fromkeys(_MORE_IS_BETTER.split(), "max"),
}
"""Which direction is better, by a metric's name without ``train_``, ``val_`` or ``test_``.

Used only to warn where ``mode="auto"`` guesses: its rule is fixed and looks at the name alone.
"""


def check_monitor(monitor: str | None, save_best_only: bool, threshold: float | None) -> None:
    """
    Refuse what could never be judged.

    Raises:
        TypeError: If *monitor* is no name.
        ValueError: If there is no monitor and something depends on it, or *threshold* is no number.
    """
    if monitor is not None and (not isinstance(monitor, str) or not monitor):
        raise TypeError(f"monitor must be the name of a metric or None, got {monitor!r}.")
    if monitor is None and save_best_only:
        raise ValueError(
            "save_best_only=True needs to know what is best. Name a metric, e.g. monitor='val_loss'."
        )
    if threshold is None:
        return
    if monitor is None:
        raise ValueError(
            f"initial_value_threshold={threshold!r} needs a metric to compare with. "
            "Name it, e.g. monitor='val_loss'."
        )
    number = as_float(threshold)
    if number is None or math.isnan(number) or isinstance(threshold, bool):
        raise ValueError(f"initial_value_threshold must be a number, got {threshold!r}.")


def resolve_mode(monitor: str | None, mode: str) -> Mode:
    """
    Return the direction in which *monitor* is better; without one it does not matter.

    ``"auto"`` is ``"max"`` if the name contains ``acc`` or starts with ``fmeasure``, else ``"min"``.

    Warns:
        RuntimeWarning: If *mode* is unknown (``"auto"`` is taken), or if ``"auto"`` takes for
            *monitor* what `KNOWN_METRICS` does not confirm.
    """
    if mode in ("min", "max"):
        return cast(Mode, mode)
    if mode != "auto":
        _warn(f"Unknown mode {mode!r}; 'auto' is used. Pass mode='min', 'max' or 'auto'.")
    if monitor is None:
        return "min"
    guess: Mode = "max" if "acc" in monitor or monitor.startswith("fmeasure") else "min"
    name = _bare_name(monitor)
    if name not in KNOWN_METRICS:
        _warn(
            f"mode='auto' takes {guess!r} for {monitor!r}, a metric it does not know."
            f"{did_you_mean(name, KNOWN_METRICS)} Pass mode='min' or mode='max'."
        )
    elif KNOWN_METRICS[name] != guess:
        _warn(
            f"mode='auto' takes {guess!r} for {monitor!r} (only names with 'acc' and those starting with "
            f"'fmeasure' are maximised), but {name!r} is better at its {KNOWN_METRICS[name]}. "
            "Pass mode='min' or mode='max'."
        )
    return guess


def is_comparable(
    state: Mapping[str, Any], monitor: str | None, mode: str | None, *, owner: str, what: str
) -> bool:
    """
    Tell whether a saved state was judged by this metric in this direction; what it lacks counts as the same.

    Args:
        state: Of a callback, with keys ``monitor`` and ``mode``.
        monitor: The callback's metric now.
        mode: Its direction now.
        owner: The callback, for the warning.
        what: The part of the state that the warning says is not taken over.

    Warns:
        RuntimeWarning: If it was not.
    """
    for key, mine in (("monitor", monitor), ("mode", mode)):
        if state.get(key, mine) != mine:
            warnings.warn(
                f"{owner} has {key} {mine!r}, the checkpoint's has {state[key]!r}: {what} is not comparable "
                "and not taken over. Use the same arguments to continue it.",
                RuntimeWarning,
                stacklevel=3,
            )
            return False
    return True


@dataclass(frozen=True)
class Standing:
    """
    What a sequence of saves has led to.

    Attributes:
        best_score: The best score saved; None before the first finite one.
        best_path: The file that holds it; None also when a later save replaced that file.
        last_epoch_saved: Epoch of the newest save, 0-based as in events.
        last_step_saved: Training batches completed at the newest save.
    """

    best_score: float | None = None
    best_path: str | None = None
    last_epoch_saved: int | None = None
    last_step_saved: int | None = None


@dataclass(eq=False)
class Proposal:
    """
    A save that was asked for and is not known to be durable.

    Attributes:
        path: Its file.
        score: The monitored metric, if there is one.
        epoch: 0-based.
        global_step: Training batches completed.
        number: Counts the proposals of its ledger.
        save: What identifies it in `ScoreLedger.settle`; given once the save was accepted.
    """

    path: str
    score: float | None
    epoch: int
    global_step: int
    number: int
    save: Any = None


class ScoreLedger:
    """
    The scores of one callback's saves.

    Args:
        mode: ``"min"`` or ``"max"``.
        threshold: Until a score has once been strictly better than it, `gate` stays shut.

    Attributes:
        threshold: As given.
        durable: The standing by the files known to be durable.
        threshold_passed: Whether the gate is open; always, without a threshold.
        best_held_back: The best finite score that did not open it.
    """

    def __init__(self, mode: Mode, threshold: float | None = None) -> None:
        self.mode = mode
        self.threshold = threshold
        self.durable = Standing()
        self.threshold_passed = threshold is None
        self.best_held_back: float | None = None
        self._count = 0  # of proposals
        self._newest_durable = 0  # its number
        self._pending: list[Proposal] = []
        self._failed: list[Proposal] = []  # since the last durable one; a write that hung may come after all

    @property
    def expected(self) -> Standing:
        """The standing once every pending save is durable."""
        return functools.reduce(self._after, self._pending, self.durable)

    def gate(self, score: float | None) -> bool:
        """Take note of a score and tell whether saves are let through, by it or since an earlier one."""
        if not self.threshold_passed and score is not None:
            self.threshold_passed = self._is_better(score, self.threshold)
            if not self.threshold_passed and self._is_better(score, self.best_held_back):
                self.best_held_back = score
        return self.threshold_passed

    def improves(self, score: float) -> bool:
        """Tell whether *score* is finite and strictly better than the newest best, pending or durable."""
        return self._is_better(score, self.expected.best_score)

    def propose(self, path: str, score: float | None, *, epoch: int, global_step: int) -> Proposal:
        """
        Hold a save as pending.

        Whether it is the best shows when it is durable: a better one that is pending now may fail.
        """
        self._count += 1
        proposal = Proposal(path, score, epoch, global_step, self._count)
        self._pending.append(proposal)
        return proposal

    def withdraw(self, proposal: Proposal) -> None:
        """Roll back a save that was not accepted."""
        self._pending.remove(proposal)

    def settle(self, save: Any, *, durable: bool) -> None:
        """
        Make the pending save that *save* identifies durable, or roll it back; others are ignored.

        One that was rolled back may become durable later.
        """
        proposal = next((one for one in (*self._pending, *self._failed) if one.save is save), None)
        if proposal is None:
            return
        if proposal in self._pending:
            self._pending.remove(proposal)
        if durable:
            self.durable = self._after(self.durable, proposal)
            self._newest_durable = max(self._newest_durable, proposal.number)
            self._failed.clear()
        elif proposal not in self._failed:
            self._failed.append(proposal)

    def overtake(self, standing: Standing, *, threshold_passed: bool) -> bool:
        """
        Continue from *standing* if its best is the better one, and tell whether it is.

        Args:
            standing: What may be better.
            threshold_passed: Whether its files were let through by this threshold; else its best is judged.
        """
        score = standing.best_score
        if score is None or not self._is_better(score, self.durable.best_score):
            return False
        self.restore(standing, threshold_passed=threshold_passed or self.gate(score))
        return True

    def restore(self, standing: Standing, *, threshold_passed: bool) -> None:
        """Continue from *standing*. Saves still pending belong to what is left behind."""
        self._pending.clear()
        self._failed.clear()
        self.durable = standing
        self.threshold_passed = threshold_passed or self.threshold is None

    def _is_better(self, score: float, reference: float | None) -> bool:
        if not math.isfinite(score):
            return False
        if reference is None:
            return True
        return score < reference if self.mode == "min" else score > reference

    def _after(self, standing: Standing, proposal: Proposal) -> Standing:
        saved = replace(standing, last_epoch_saved=proposal.epoch, last_step_saved=proposal.global_step)
        if proposal.score is not None and self._is_better(proposal.score, standing.best_score):
            return replace(saved, best_score=proposal.score, best_path=proposal.path)
        # Reports may come in another order, and an older file lies below the one that stands here.
        if proposal.path == standing.best_path and proposal.number > self._newest_durable:
            return replace(saved, best_path=None)
        return saved


def _bare_name(monitor: str) -> str:
    for part in ("train", "val", "test"):
        if monitor.startswith((f"{part}_", f"{part}/")):
            return monitor[len(part) + 1 :]
    return monitor


def _warn(message: str) -> None:
    # The frames above: resolve_mode, the callback's constructor, the user.
    warnings.warn(message, RuntimeWarning, stacklevel=4)

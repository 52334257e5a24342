"""Sees the steps of a run's optimizers, by their public hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainbus.loop.progress import Progress

__all__ = ["OptimizerSteps"]


class OptimizerSteps:
    """
    Tells *progress* of each step; other optimizers than torch's go unseen.

    Attributes:
        optimizers: Those of torch among them.

    Args:
        optimizers: One, a dict of them by name, or None.
    """

    def __init__(self, optimizers: Any, progress: Progress) -> None:
        each = optimizers.values() if isinstance(optimizers, Mapping) else [optimizers]
        self.optimizers = [one for one in each if isinstance(one, torch.optim.Optimizer)]
        self._hooks = [
            hook
            for one in self.optimizers
            for hook in (
                one.register_step_pre_hook(lambda *_: progress.note_step_begun()),
                one.register_step_post_hook(lambda *_: progress.note_step_done()),
            )
        ]

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def has_gradients(self) -> bool:
        """Return whether backward has left gradients that a step would use."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return any(parameter.grad is not None for group in groups for parameter in group["params"])

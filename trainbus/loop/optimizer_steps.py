"""Sees the steps of a run's optimizers, by their public hooks."""

from __future__ import annotations

import weakref
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
        self._captured = captured = weakref.WeakSet[torch.optim.Optimizer]()

        # Optimizers keep their hooks, so these must not lead back to them: a dropped one is freed at once.
        def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if _is_capturing():
                captured.add(optimizer)
            else:
                progress.note_step_begun()

        def after(*_: Any) -> None:
            if not _is_capturing():
                progress.note_step_done()

        self._hooks = [
            hook
            for one in self.optimizers
            for hook in (one.register_step_pre_hook(before), one.register_step_post_hook(after))
        ]

    @property
    def are_replayed(self) -> bool:
        """
        True once one was stepped while a CUDA graph was captured.

        Replays call no hook, so from then on nobody can tell in which batches it steps.
        """
        return len(self._captured) > 0

    def stop(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def has_gradients(self) -> bool:
        """Return whether backward has left gradients that a step would use."""
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        return any(parameter.grad is not None for group in groups for parameter in group["params"])


def _is_capturing() -> bool:
    # torch.compile traces hooks, and may not know how to trace the question.
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()

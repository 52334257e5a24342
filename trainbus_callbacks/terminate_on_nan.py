"""TerminateOnNaN: stop a run whose loss is no number any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from trainbus.callback import Callback
from trainbus_callbacks.arguments import require_count
from trainbus_callbacks.scalars import as_float

__all__ = ["TerminateOnNaN"]


class TerminateOnNaN(Callback):
    """
    Stop the run when a metric of a training batch is NaN or infinite, naming metric, value and step.

    In a run of several processes each looks at its own metrics, and all stop in the same batch if one has to.
    It saves nothing; a `ModelCheckpoint` that is due in the same event would still save the weights that
    made the NaN, unless it has ``save_best_only=True`` and monitors that metric: NaN is never the best.
    Otherwise give its files ``{global_step}`` in their names, with ``keep=KeepLast(2)``, and load the one
    before.

    Args:
        *monitors: Names of metrics; those that a batch does not have are passed over.
        every: Look after so many training batches. Looking waits for the device that computes the
            metric, which costs the overlap of host and device.

    Raises:
        ValueError: If no metric is named or *every* is no count.
    """

    priority = 10  # before those that would write the value down

    def __init__(self, *monitors: str, every: int = 1) -> None:
        if not all(isinstance(name, str) and name for name in monitors):
            raise ValueError(f"TerminateOnNaN takes names of metrics, e.g. 'loss', got {monitors!r}.")
        require_count("every", every, "training batches", least=1)
        self.monitors = monitors or ("loss",)
        self.every = every

    def on_train_batch_end(self, handler: Any, global_step: int, logs: Mapping[str, Any]) -> None:
        """Look at the batch's metrics."""
        found = None if global_step % self.every else self._find(logs, global_step)
        if found is not None:
            handler.stop(found)

    def _find(self, logs: Mapping[str, Any], global_step: int) -> str | None:
        for name in self.monitors:
            value = as_float(logs[name]) if name in logs else None
            if value is not None and not math.isfinite(value):
                return f"{name} is {value} at step {global_step}."
        return None

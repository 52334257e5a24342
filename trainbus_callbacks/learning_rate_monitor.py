"""LearningRateMonitor: put the learning rates into the logs, where loggers and manifests find them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainbus.callback import Callback

__all__ = ["LearningRateMonitor"]


class LearningRateMonitor(Callback):
    """
    Log the learning rate of each parameter group at ``epoch_end``, before all who read the logs then.

    One group is called ``lr``; several are ``lr/0``, ``lr/1`` or ``lr/<its "name">``; those of a dict of
    optimizers ``lr/<key>`` and ``lr/<key>/<group>``. A rate is that at the end of the epoch: if the loop
    steps its scheduler before, the next epoch's.

    Args:
        momentum: Log ``momentum`` (of Adam and its like: the first beta) in the same way.
        weight_decay: Log ``weight_decay`` in the same way.
    """

    priority = -50  # what it logs is for the others

    def __init__(self, *, momentum: bool = False, weight_decay: bool = False) -> None:
        self._wanted = ["lr", *["momentum"] * momentum, *["weight_decay"] * weight_decay]

    def on_epoch_end(self, handler: Any) -> None:
        """Log. Does nothing without an optimizer. Waits for the device where a rate is a tensor there."""
        found = {
            f"{wanted}{suffix}": float(value)
            for suffix, group in _groups(handler.optimizer)
            for wanted in self._wanted
            if (value := _value(group, wanted)) is not None
        }
        if found:
            handler.log(**found)


def _groups(optimizers: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give each parameter group with what its metrics' names end in."""
    if optimizers is None:
        return
    if not isinstance(optimizers, dict):
        yield from _groups_of_one("", optimizers)
        return
    for key, optimizer in optimizers.items():
        yield from _groups_of_one(f"/{key}", optimizer)


def _groups_of_one(prefix: str, optimizer: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        yield prefix if len(groups) == 1 else f"{prefix}/{group.get('name', index)}", group


def _value(group: dict[str, Any], wanted: str) -> Any:
    if wanted == "momentum" and "betas" in group:
        return group["betas"][0]
    return group.get(wanted)

"""Which epoch a distributed sampler shuffles for: untold, it gives each epoch the order of the first."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from trainbus.state.wrapped_loaders import loaders_in, samplers_of

__all__ = ["SamplerEpochs"]


class SamplerEpochs:
    """Tells the samplers of training loaders the epoch, unless the script does. Training thread."""

    def __init__(self) -> None:
        # Samplers may be unhashable, and hold the data.
        self._told: list[tuple[Callable[[], Any], int]] = []

    def tell(self, loader: Any, epoch: int) -> None:
        """
        Call ``set_epoch`` of the samplers of *loader* that have one, as `DistributedSampler` does.

        One whose ``epoch`` is not what it was told here, at first 0, is left alone: the script counts by
        itself.

        Args:
            loader: Whatever batches come from; wrappers such as ``tqdm(loader)`` are seen through.
            epoch: 0-based; the same on all ranks, and after a resume that of the run that was killed.
        """
        for sampler in _samplers(loader):
            told = next((number for refer, number in self._told if refer() is sampler), 0)
            if getattr(sampler, "epoch", told) == told:
                sampler.set_epoch(epoch)
                others = [(refer, number) for refer, number in self._told if _is_another(refer(), sampler)]
                self._told = [*others, (_reference(sampler), epoch)]


def _reference(sampler: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(sampler)
    except TypeError:  # of a class with slots
        return lambda: sampler


def _is_another(one: Any, sampler: Any) -> bool:
    return one is not None and one is not sampler


def _samplers(loader: Any) -> list[Any]:
    found: list[Any] = []
    for owner in (sampler for one in loaders_in(loader) for sampler in samplers_of(one)):
        if callable(getattr(owner, "set_epoch", None)) and not any(owner is one for one in found):
            found.append(owner)
    return found

"""The loaders inside of a loader: progress bars and prefetchers hide what the order is drawn from."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader, Dataset

__all__ = ["loaders_in", "samplers_of"]

_NAMES = ("iterable", "loader", "_loader", "dataloader", "_dataloader", "data_loader", "dataset")


def loaders_in(loader: Any) -> list[Any]:
    """
    Return *loader* and what it wraps, the outermost first: ``tqdm(loader)``, ``Prefetcher(loader)``.

    Looks at plain attributes of the usual names, and runs no code of theirs. What a generator, a `zip` or
    another name holds is not found.
    """
    found = [loader]
    for one in found:  # which grows meanwhile
        if isinstance(one, DataLoader | Dataset):  # a dataset has no order
            continue
        held = getattr(one, "__dict__", {})
        inner = (held[name] for name in _NAMES if name in held)
        found += [part for part in inner if not isinstance(part, Dataset) and not _is_in(part, found)]
    return found


def samplers_of(loader: Any) -> tuple[Any, Any, Any]:
    """Return the sampler, the batch sampler and its sampler of *loader*; None for each that is not there."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None)


def _is_in(one: Any, several: list[Any]) -> bool:
    return any(one is other for other in several)

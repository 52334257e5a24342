"""The iterators of `DataPositions`: a pass over a loader from its start, or from the middle of one."""

from __future__ import annotations

import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from trainbus.errors import StateMismatchError
from trainbus.state import rng
from trainbus.state.wrapped_loaders import loaders_in, samplers_of

__all__ = [
    "begin",
    "describe_pass",
    "generators_of",
    "has_own_state",
    "has_workers_alive",
    "resume",
    "set_generators",
]

logger = logging.getLogger("trainbus")

_END = object()


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the distinct generators that the order of *loader*, or of one that it wraps, is drawn from."""
    # One with its own state takes care of what it wraps.
    loaders = [loader] if has_own_state(loader) else loaders_in(loader)
    owners = [owner for one in loaders for owner in (one, *samplers_of(one))]
    found = (getattr(owner, "generator", None) for owner in owners)
    return list(dict.fromkeys(one for one in found if isinstance(one, torch.Generator)))


def set_generators(generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]) -> None:
    """Give each generator its state; a loader with more or fewer of them keeps what has none."""
    for generator, state in zip(generators, states, strict=False):
        generator.set_state(state.cpu())


def has_own_state(loader: Any) -> bool:
    """Return True for a loader that saves and loads its position itself."""
    return all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))


def has_workers_alive(loader: Any) -> bool:
    """Return True if the next pass over *loader* is for the workers of the last one."""
    return _keeps_workers(loader) and loader._iterator is not None


def _nothing() -> None:
    """Do nothing."""


def describe_pass(loader: Any) -> dict[str, Any]:
    """
    Return what a pass over *loader*, begun now, depends on.

    Takes the random states; draws nothing and reads nothing.
    """
    return {
        "rng": rng.capture(devices=False),
        "generators": [generator.get_state() for generator in generators_of(loader)],
        "workers_alive": has_workers_alive(loader),
        "shape": _shape(loader),
    }


def begin(loader: Any, start: Mapping[str, Any], own: Any = None) -> Iterator[Any]:
    """
    Begin a pass as the run that *start* comes from would have.

    Args:
        loader: Anything to iterate over.
        start: Of `describe_pass`; its random states are those of this moment.
        own: The state that *loader* itself returned at the end of the pass before, if it has one.
    """
    if has_own_state(loader):
        return _begin_from_own_state(loader, start, own)
    if start["workers_alive"] and not has_workers_alive(loader) and _keeps_workers(loader):
        return _iterate_from(loader, 0, 0, start, _nothing, "train")
    iterator: Iterator[Any] = iter(loader)
    return iterator


def resume(
    loader: Any,
    role: str,
    start: Mapping[str, Any],
    own: Any,
    consumed: int,
    in_hand: int,
    arrive: Callable[[], None],
    return_in_hand: Callable[[], None] = _nothing,
) -> Iterator[Any]:
    """
    Continue a pass that *start* describes after *consumed* batches.

    Args:
        loader: The loader of that pass, made again.
        role: Names the loader in messages.
        start: Of `describe_pass`, when the pass was begun.
        own: The state that *loader* itself returned there, or None.
        consumed: Batches not to come again.
        in_hand: Batches that come again: 1 if one had been handed out that did not count, else 0.
        arrive: Called once, when *loader* stands there, to set the random states of the checkpoint.
        return_in_hand: Called before that, and before anything is drawn for what comes again.

    Raises:
        StateMismatchError: If there are fewer than *consumed* batches.
    """
    iterator: Iterator[Any]
    _warn_of_changes(loader, role, start["shape"])
    _rewind(loader, start)
    if own is not None and has_own_state(loader):
        _warn_of_workers(loader, role, consumed)
        loader.load_state_dict(own)
        iterator = iter(loader)
    elif isinstance(loader, DataLoader) and not _is_streaming(loader):
        _warn_of_workers(loader, role, consumed)
        return _iterate_from(loader, consumed, in_hand, start, arrive, role, return_in_hand)
    else:
        iterator = _read_up_to(loader, consumed, role)
        if in_hand and start["generators"]:
            return_in_hand()
            # As in _Rest: what comes again was drawn from the generators before the checkpoint was taken.
            again = list(itertools.islice(iterator, in_hand))
            arrive()
            return itertools.chain(again, iterator)
    return_in_hand()
    arrive()
    return iterator


class _Rest:
    """
    A sampler whose first pass leaves out what the interrupted run has consumed.

    The loader draws its base seed after it asked for the sampler's iterator and before it takes
    the first item, so the items are dropped no earlier than at the first one.
    """

    def __init__(self, sampler: Any, skip: int, in_hand: int, rewind: Callable[[], None], role: str) -> None:
        self.sampler = sampler
        self.live: Iterator[Any] | None = None
        self.arrive: Callable[[], None] = _nothing
        self.return_in_hand: Callable[[], None] = _nothing
        self._skip = skip
        self._in_hand = in_hand
        self._is_there = False
        self._again: list[Any] = []
        self._rewind = rewind
        self._role = role

    def __iter__(self) -> Iterator[Any]:
        self._rewind()
        self.live = live = iter(self.sampler)
        return self._items(live)

    def _items(self, live: Iterator[Any]) -> Iterator[Any]:
        self.advance(live)
        again, self._again = self._again, []  # workers that are kept begin each later pass here too
        yield from again
        yield from live

    def advance(self, live: Iterator[Any]) -> None:
        """Go to the first item to hand out; do nothing if it is there."""
        if self._is_there:
            return
        self._is_there, self._rewind = True, _nothing
        _drop(live, self._skip, self._role)
        self.return_in_hand()
        # What comes again was drawn before the checkpoint was taken, so it is drawn before we arrive.
        self._again = list(itertools.islice(live, self._in_hand))
        arrive, self.arrive = self.arrive, _nothing
        arrive()

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


def _iterate_from(
    loader: DataLoader[Any],
    skip: int,
    in_hand: int,
    start: Mapping[str, Any],
    arrive: Callable[[], None],
    role: str,
    return_in_hand: Callable[[], None] = _nothing,
) -> Iterator[Any]:
    # Workers that were kept began this pass without a new base seed, and new ones draw it first.
    rewind = (lambda: _rewind(loader, start)) if start["workers_alive"] else _nothing
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    rest = _Rest(getattr(loader, name), skip, in_hand, rewind, role)
    rest.return_in_hand = return_in_hand
    twin = copy.copy(loader)
    # DataLoader.__setattr__ refuses to replace samplers.
    vars(twin).update({name: rest, "_iterator": None})
    iterator = iter(twin)
    if rest.live is None:  # __iter__ of a subclass is a generator, it comes here with the first batch
        rest.arrive = arrive
        return iterator
    rest.advance(rest.live)
    arrive()
    if vars(twin)["_iterator"] is not None:  # the next pass is for the same workers
        vars(loader)["_iterator"] = vars(twin)["_iterator"]
    return iterator


def _begin_from_own_state(loader: Any, start: Mapping[str, Any], own: Any) -> Iterator[Any]:
    iterator: Iterator[Any]
    # A StatefulDataLoader that was left by break would go on there, and a new pass is what was begun.
    left = isinstance(own, Mapping) and not own.get("_iterator_finished", True)
    if own is not None and not left:
        loader.load_state_dict(own)
    if own is None or not isinstance(loader, DataLoader):
        iterator = iter(loader)
        return iterator
    make = loader._get_iterator

    def make_from_start() -> Any:
        _rewind(loader, start)
        return make()

    # It makes two iterators, one to load and one to begin; without this the second would draw later.
    vars(loader)["_get_iterator"] = make_from_start
    try:
        return iter(loader)
    finally:
        del vars(loader)["_get_iterator"]


def _read_up_to(loader: Any, count: int, role: str) -> Iterator[Any]:
    began = time.perf_counter()
    iterator: Iterator[Any] = iter(loader)
    _drop(iterator, count, role)
    if count:
        level = logging.INFO if isinstance(loader, (list, tuple)) else logging.WARNING
        logger.log(
            level,
            "The %s loader is where it was: its first %d batches were read again and discarded, which took "
            "%.1f s. Only the position is restored, not random numbers drawn while reading. A DataLoader "
            "over a map-style dataset, or a StatefulDataLoader, continues at once.",
            role,
            count,
            time.perf_counter() - began,
        )
    return iterator


def _drop(iterator: Iterator[Any], count: int, role: str) -> None:
    for taken in range(count):
        if next(iterator, _END) is _END:
            raise StateMismatchError(
                f"Cannot continue the {role} pass after batch {count}: the loader now ends after {taken}. "
                "Did the dataset, the batch size or the number of ranks change? Continue with what the "
                "checkpoint was made with, or load it without its data position."
            )


def _rewind(loader: Any, start: Mapping[str, Any]) -> None:
    set_generators(generators_of(loader), start["generators"])
    rng.restore(start["rng"])


def _warn_of_changes(loader: Any, role: str, then: Mapping[str, Any]) -> None:
    now = _shape(loader)
    changes = [f"{name} {then[name]} then, {now[name]} now" for name in now if then.get(name) != now[name]]
    if changes:
        logger.warning(
            "The %s loader is not the one of the checkpoint (%s). Its position is counted in batches, "
            "so samples may come twice or not at all in this epoch.",
            role,
            "; ".join(changes),
        )


def _warn_of_workers(loader: Any, role: str, consumed: int) -> None:
    if not consumed or not getattr(loader, "num_workers", 0):
        return
    until = "in this run, because they are kept" if _keeps_workers(loader) else "until the next epoch"
    logger.warning(
        "The %s loader continues with the right batches, but random augmentation inside its workers is not "
        "that of the uninterrupted run %s. Use num_workers=0 if it must be.",
        role,
        until,
    )
    if not getattr(loader, "in_order", True):
        logger.warning(
            "The %s loader has in_order=False: batches that overtook others may come twice, others not at "
            "all. Use in_order=True to continue exactly.",
            role,
        )


def _shape(loader: Any) -> dict[str, Any]:
    # The length of a stream is a guess, and asking for it makes torch check it.
    sized = not _is_streaming(loader)
    return {
        "batches": _length(loader) if sized else None,
        "batch size": getattr(loader, "batch_size", None),
        "samples": _length(getattr(loader, "dataset", None)) if sized else None,
        "generators": len(generators_of(loader)),
    }


def _is_streaming(loader: Any) -> bool:
    return isinstance(getattr(loader, "dataset", None), IterableDataset)


def _keeps_workers(loader: Any) -> bool:
    return isinstance(loader, DataLoader) and loader.persistent_workers and loader.num_workers > 0


def _length(sized: Any) -> int | None:
    try:
        return len(sized)
    except (TypeError, NotImplementedError):
        return None

"""The state of a run as one nested dict, and back.

Top-level keys: ``module, optimizer, scheduler, scaler, extra, callbacks, progress, rng, data``.
A part the run does not have is None.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch.optim.lr_scheduler import LRScheduler

from trainbus.errors import StateMismatchError, did_you_mean
from trainbus.state.named_optimizer import NamedOptimizer, is_by_name
from trainbus.state.optimizer_types import ExactOptimizer, types_saved
from trainbus.state.other_kinds import refuse_other_scheduler
from trainbus.state.scaler import scaler_numbers, scaler_state
from trainbus.state.split_state import refuse_split_state

__all__ = [
    "KEYS",
    "Parts",
    "Stateful",
    "check_parts",
    "check_restorable",
    "collect",
    "collect_weights",
    "each_of",
    "restore",
]

KEYS = ("module", "optimizer", "scheduler", "scaler", "extra", "callbacks", "progress", "rng", "data")

_KINDS: dict[str, type] = {
    "module": torch.nn.Module,
    "optimizer": torch.optim.Optimizer,
    "scheduler": LRScheduler,
    "scaler": torch.amp.GradScaler,
}

logger = logging.getLogger("trainbus")


class Stateful(Protocol):
    """Anything with a state: modules, optimizers, schedulers, scalers, callbacks, the user's own."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass
class Parts:
    """
    The objects of a run whose state is saved.

    Attributes:
        module, optimizer, scheduler: One object, or a dict of them by name.
        scaler: A GradScaler, or None.
        extra: The user's own objects, by name.
        callbacks: By state key.
    """

    module: Any
    optimizer: Any = None
    scheduler: Any = None
    scaler: Any = None
    extra: Mapping[str, Stateful] = field(default_factory=dict)
    callbacks: Mapping[str, Stateful] = field(default_factory=dict)


def collect(parts: Parts, progress: Any, rng: Any, data: Any) -> dict[str, Any]:
    """Return the full state; its tensors are the live ones, still to be copied."""
    state = {key: _state_of(getattr(parts, key)) for key in KEYS[:6]}
    return {**state, "progress": progress, "rng": rng, "data": data}


def collect_weights(parts: Parts) -> Any:
    """Return the module's ``state_dict()`` alone (a dict of them for several modules)."""
    return _state_of(parts.module)


def restore(parts: Parts, state: Mapping[str, Any], only: Collection[str], strict: bool) -> None:
    """
    Load the objects' parts of *state* that *only* names.

    A part that one side has and the other has not is refused before anything is changed.

    Raises:
        StateMismatchError: With *strict*, if the run and the file have different parts.
    """
    if "optimizer" in only:
        parts = replace(parts, optimizer=_exact_optimizer(parts, state))
    for load in _loads(parts, state, only, strict):
        load()


def check_restorable(parts: Parts, state: Mapping[str, Any], only: Collection[str]) -> None:
    """Raise what `restore` would because of different parts. Of *state* the keys suffice."""
    _loads(parts, state, only, strict=True)


def each_of(part: Any, change: Callable[[Any], Any]) -> Any:
    """Return what *change* makes of a part, or of each of several by name."""
    if isinstance(part, Mapping):
        return {name: change(one) for name, one in part.items()}
    return change(part)


def check_parts(parts: Parts) -> None:
    """
    Raise TypeError for a part that has no state to save and load, or not on this rank alone, naming it;
    and for one in the place of another, such as a scheduler for an optimizer.

    An optimizer or scheduler may be None, and each part but the scaler a dict of several.
    """
    for key in KEYS[:5]:
        part = getattr(parts, key)
        named = (
            {f"{key}[{name!r}]": one for name, one in part.items()}
            if isinstance(part, Mapping)
            else {key: part}
        )
        for place, one in named.items():
            if one is None and place == key != "module":
                continue
            if isinstance(one, type):
                raise TypeError(
                    f"Cannot save {place}={one.__qualname__}: it is a class. Give an instance of it."
                )
            if not all(callable(getattr(one, method, None)) for method in ("state_dict", "load_state_dict")):
                raise TypeError(
                    f"Cannot save {place}={one!r}: it has no state_dict() and load_state_dict(). "
                    "Give an object that has both, or a dict of such objects by name."
                )
            _refuse_swapped(place, key, one)
    refuse_split_state(parts.module, parts.optimizer)


def _refuse_swapped(place: str, key: str, one: Any) -> None:
    kind = next((other for other, known in _KINDS.items() if isinstance(one, known)), None)
    if key == "extra" or kind == key:
        return
    # What trains need not be of a class of torch; a module may be an optimizer, too.
    lacks_step = key in ("optimizer", "scheduler") and not callable(getattr(one, "step", None))
    if lacks_step or kind not in (None, "module"):
        article = "an" if kind == "optimizer" else "a"
        reason = f"it is {article} {kind}" if kind is not None else "it has no step()"
        raise TypeError(
            f"Cannot take {place}={type(one).__name__}(...): {reason}. Write Handler(module, optimizer, "
            "scheduler=..., scaler=...), and what is none of these by name into extra."
        )


def _exact_optimizer(parts: Parts, state: Mapping[str, Any]) -> Any:
    """Return the optimizers such that they keep types, and take names, as sharded checkpoints have them."""
    types, saved = types_saved(parts.module, state.get("module")), state.get("optimizer")
    several = (
        saved.values() if isinstance(parts.optimizer, Mapping) and isinstance(saved, Mapping) else [saved]
    )
    by_name = any(map(is_by_name, several))

    def exact(one: Any) -> Any:
        if not isinstance(one, torch.optim.Optimizer):
            return one
        return NamedOptimizer(one, parts.module, types) if by_name else ExactOptimizer(one, types)

    return each_of(parts.optimizer, exact)


def _loads(
    parts: Parts, state: Mapping[str, Any], only: Collection[str], strict: bool
) -> list[Callable[[], Any]]:
    loads: list[Callable[[], Any]] = []
    for key in KEYS[:6]:
        if key in only:
            loads += _loads_of(key, getattr(parts, key), state.get(key), strict)
    return loads


def _state_of(thing: Any) -> Any:
    if thing is None:
        return None
    if isinstance(thing, Mapping):
        return {name: _state_of(one) for name, one in thing.items()}
    if isinstance(thing, torch.amp.GradScaler):
        return scaler_state(thing)
    return thing.state_dict()


def _loads_of(key: str, mine: Any, saved: Any, strict: bool) -> list[Callable[[], Any]]:
    if isinstance(mine, Mapping):
        return _loads_of_each(key, mine, saved if isinstance(saved, Mapping) else {}, strict)
    if mine is None or saved is None:
        if mine is not saved and _is_refused(key, strict):
            raise StateMismatchError(_one_sided(key, "file" if mine is None else "run"))
        return []
    if key.startswith("module") and not strict:  # also one of several
        return [lambda: _load(key, mine, saved, strict=False)]
    return [lambda: _load(key, mine, saved)]


def _load(key: str, mine: Any, saved: Any, **options: Any) -> None:
    kind = getattr(mine, "kind", type(mine).__name__)  # of what it stands for
    if isinstance(mine, torch.amp.GradScaler):
        saved = scaler_numbers(saved)
    try:
        refuse_other_scheduler(mine, saved)
        left_out = mine.load_state_dict(saved, **options)
    except (MemoryError, torch.OutOfMemoryError, OSError, Warning):  # which say nothing of the state
        raise
    except Exception as error:
        reason = str(error) if isinstance(error, (RuntimeError, ValueError)) else _named(error)
        raise StateMismatchError(
            f"Cannot load {key} into {kind}: {reason.removesuffix('.')}. What comes before it in the file "
            "is loaded. Make the object as it was when the file was written, or load less with "
            "handler.load(path, only=(...))."
        ) from error
    for side, names in (("file", "missing_keys"), ("run", "unexpected_keys")):
        # Of a torch.nn.Module alone, and empty unless strict=False.
        if lacking := getattr(left_out, names, None):
            more = f" and {len(lacking) - 5} more" if lacking[5:] else ""
            named = ", ".join(lacking[:5]) + more
            logger.warning("Not loaded into %s: %s, which the %s has not.", key, named, side)


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _loads_of_each(
    key: str, mine: Mapping[str, Any], saved: Mapping[str, Any], strict: bool
) -> list[Callable[[], Any]]:
    loads = []
    for name in sorted({*mine, *saved}):
        if name in mine and name in saved:
            loads += _loads_of(f"{key}[{name!r}]", mine[name], saved[name], strict)
        elif key != "callbacks" and _is_refused(key, strict):
            where = "run" if name in mine else "file"
            raise StateMismatchError(
                _one_sided(f"{key}[{name!r}]", where) + did_you_mean(name, {*mine, *saved} - {name})
            )
    return loads


def _is_refused(key: str, strict: bool) -> bool:
    if not strict:
        logger.warning("Not loaded: %s is not on both sides, in the checkpoint and in this run.", key)
    return strict


def _one_sided(key: str, where: str) -> str:
    other = "file" if where == "run" else "run"
    return (
        f"Cannot load {key}: the {where} has it and the {other} has not. Make them agree, or load the file "
        "with handler.load(path, only=(...)) or handler.load(path, strict=False)."
    )

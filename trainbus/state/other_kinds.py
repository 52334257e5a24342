"""A state of another kind of optimizer or scheduler, which torch takes and which fails, or not, much later.

Refused is only what cannot be right: where each side has what the other has not. One side alone may have
more because another version of torch wrote the file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

__all__ = ["refuse_other_options", "refuse_other_scheduler"]

# What schedulers and scripts add to an optimizer's options.
_ADDED = {
    "params",
    "param_names",
    "initial_lr",
    "swa_lr",
    "max_lr",
    "min_lr",
    "base_momentum",
    "max_momentum",
}
_PARTS = "_schedulers"


def refuse_other_options(saved: Collection[str], known: Collection[str], lacking: Collection[str]) -> None:
    """
    Refuse the options of another kind of optimizer, for one group of parameters.

    Args:
        saved: The names in the file.
        known: Those that the optimizer had by itself.
        lacking: Those of its own that it has no more after loading; what older versions of torch did not
            write is filled in then.

    Raises:
        ValueError: There are some that it does not know, and some that it needs are not there.
    """
    _refuse(set(saved) - set(known) - _ADDED, lacking)


def refuse_other_scheduler(scheduler: Any, saved: Any) -> None:
    """
    Refuse the state of another kind of scheduler, or of another number of them, for those of torch.

    Raises:
        ValueError: *saved* is such a state.
    """
    if not (_is_of_torch(scheduler) and isinstance(saved, Mapping)):
        return
    own, known = scheduler.state_dict(), _telling(saved)
    _refuse(known - own.keys(), _telling(own) - saved.keys())
    parts, theirs = getattr(scheduler, _PARTS, None), saved.get(_PARTS)
    if parts is None or theirs is None:
        return
    if len(parts) != len(theirs):
        raise ValueError(f"it has {len(parts)} schedulers, and the state is of {len(theirs)}")
    for number, (part, one) in enumerate(zip(parts, theirs, strict=True)):
        try:
            refuse_other_scheduler(part, one)
        except ValueError as error:
            raise ValueError(f"its scheduler {number} is a {type(part).__name__}, and {error}") from None


def _is_of_torch(scheduler: Any) -> bool:
    # Classes of others may take states of older versions of themselves.
    return isinstance(scheduler, LRScheduler) and type(scheduler).__module__.startswith("torch.")


def _telling(state: Mapping[str, Any]) -> set[str]:
    """Return the names that tell of the kind: torch changes private ones, and has dropped ``verbose``."""
    return {name for name in state if name == _PARTS or not name.startswith("_")} - {"verbose"}


def _refuse(unknown: Collection[str], lacking: Collection[str]) -> None:
    if unknown and lacking:
        raise ValueError(
            f"the state is of another kind, it has {', '.join(sorted(unknown))} and not "
            f"{', '.join(sorted(lacking))}"
        )

"""Where each loader of a run stands, so that the next process continues with the next batch.

What makes it exact: the random state from just before a pass was begun gives the same order again,
and the random state of the checkpoint, set once the loader is where it was, gives the same future.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from trainbus.state import rng
from trainbus.state.loader_rebuild import (
    begin,
    describe_pass,
    generators_of,
    has_own_state,
    has_workers_alive,
    resume,
    set_generators,
)

__all__ = ["DataPositions"]

logger = logging.getLogger("trainbus")

T = TypeVar("T")
Role = Literal["train", "val"]

_NESTED = "val in train"  # numbered apart: a continued run does not come to these passes again
_SAME_LOADERS = {"val": _NESTED, _NESTED: "val"}


@dataclass
class _Slot:
    """
    The place of one loader in the epoch.

    Attributes:
        loader: What was opened here last, in this process.
        generators: What its order is drawn from, besides the global random states.
        seeds: The generators' seeds when the last pass was begun.
        reseeded: They are seeded anew for each pass, so they do not go on; None until a second pass tells.
        finished: Passes ended in this epoch.
        behind: Those of them that ended before the load and have not been opened again since.
        saved: What the loaded state says of this slot, until a pass is begun or continued.
    """

    loader: Any = None
    generators: list[torch.Generator] = field(default_factory=list)
    seeds: list[int] | None = None
    reseeded: bool | None = None
    finished: int = 0
    behind: int = 0
    saved: dict[str, Any] | None = None


@dataclass
class _Pass:
    """
    A pass under way.

    Attributes:
        slot: Whose pass it is.
        start: Random states from just before it was begun.
        consumed: Batches completed.
        nested: It is a validation inside of a training pass, which a continued run does not come to again.
    """

    slot: _Slot
    start: dict[str, Any]
    consumed: int = 0
    nested: bool = False


def _nothing() -> None:
    """Restore nothing."""


class DataPositions:
    """
    The positions of all loaders of a run. Everything runs on the training thread.

    A slot is a role and how many distinct loaders of that role appeared in this epoch before it;
    the same loader again is the slot's next pass. Loaders that were opened are kept alive until
    another one takes their slot.
    """

    def __init__(self) -> None:
        self._slots: dict[str, _Slot] = {}
        self._seen: dict[str, list[Any]] = {}  # loaders of this epoch, in order
        self._open: dict[str, _Pass] = {}  # by role
        self._restored: list[torch.Generator] = []  # they have their saved state; a second time is too late
        self._arrived = False  # a loader was opened since the load

    def open(
        self, loader: Iterable[T], role: Role, *, restore_rng: Callable[[], None] = _nothing
    ) -> Iterator[T]:
        """
        Begin a pass over *loader*, or continue the one that a loaded state was in.

        A pass that was finished gives an iterator without batches. Continuing loads no data of the
        batches left out if *loader* is a DataLoader over a map-style dataset; any other iterable is
        read up to there, which blocks.

        Args:
            loader: A DataLoader, a loader with ``state_dict`` and ``load_state_dict``, or any iterable.
            role: ``"train"`` or ``"val"``. An open pass of the same role ends.

            restore_rng:
                Sets the global random states to those of the checkpoint, or does nothing if there
                is none. Called for each pass that the loaded state knows as finished or under way,
                once its loader stands where it stood, and for the first pass of all.

        Raises:
            StateMismatchError: If *loader* ends before the position.
        """
        self.closed(role)
        nested = role == "val" and "train" in self._open
        slot = self._slot(loader, _NESTED if nested else role)
        first, self._arrived = not self._arrived, True
        if slot.behind:
            slot.behind -= 1
            self._restore_generators(slot)
            restore_rng()
            return iter(())
        if slot.saved is not None and slot.saved["pass"] is not None:
            opened, iterator = self._continue(slot, slot.saved, role, restore_rng)
        else:
            opened, iterator = self._begin(slot, restore_rng if first else _nothing)
        opened.nested = nested
        slot.saved = None
        self._open[role] = opened
        return iterator

    def advanced(self, role: Role) -> None:
        """Count one completed batch of the open pass of *role*; without one, do nothing."""
        if role in self._open:
            self._open[role].consumed += 1

    def closed(self, role: Role) -> None:
        """End the open pass of *role*, exhausted or left; without one, do nothing."""
        ended = self._open.pop(role, None)
        if ended is not None and not ended.nested:
            ended.slot.finished += 1

    def consumed(self, role: Role) -> int:
        """Return how many batches of the open pass of *role* are completed; 0 without one."""
        return self._open[role].consumed if role in self._open else 0

    def finished(self, role: Role) -> bool:
        """Return True if no pass of *role* is open."""
        return role not in self._open

    def new_epoch(self) -> None:
        """Count all passes from zero. Generators go on where they are."""
        self._open.clear()
        self._seen.clear()
        for slot in self._slots.values():
            slot.finished = slot.behind = 0
            if slot.saved is not None:
                slot.saved = {**slot.saved, "pass": None, "rng": None}

    def state_dict(
        self, *, completed: int = 0, in_hand: int = 0, rng_is_before: bool = False
    ) -> dict[str, Any]:
        """
        Return the position now: plain values, and tensors that nobody changes afterwards.

        A validation under way, unless it is inside of a training pass, is begun anew by whoever
        loads this.

        Args:
            completed: Batches of the open training pass that count although `advanced` was not called yet.
            in_hand: 1 if a batch of it was handed out that does not count and is to come again, else 0.
            rng_is_before: The checkpoint's random state is the one from before that batch was drawn.
        """
        val = self._open.get("val")
        again = val if "train" not in self._open else None
        # What shares a generator with that validation goes back to its start as well.
        states = dict(zip(again.slot.generators, again.start["generators"], strict=True)) if again else {}
        trained = self._open.get("train")
        under_way = None
        if trained is not None:
            consumed = trained.consumed + completed
            under_way = {
                "start": trained.start,
                "consumed": consumed,
                "in_hand": in_hand,
                "rng_is_before": rng_is_before,
            }
        return {name: self._slot_state(slot, again, states, under_way) for name, slot in self._slots.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over *state*, which `open` will apply, loader by loader. Passes under way are forgotten."""
        self._slots = {
            name: _Slot(
                saved=dict(saved),
                finished=saved["finished"],
                behind=saved["finished"],
                reseeded=saved["reseeded"],
            )
            for name, saved in state.items()
        }
        self._seen, self._open, self._restored, self._arrived = {}, {}, [], False

    def _slot(self, loader: Any, where: str) -> _Slot:
        seen = self._seen.setdefault(where, [])
        index = next((i for i, other in enumerate(seen) if other is loader), len(seen))
        if index == len(seen):
            seen.append(loader)
        slot = self._slots.setdefault(f"{where} {index}", _Slot())
        if slot.loader is None and slot.saved is None:
            self._share(slot, self._slots.get(f"{_SAME_LOADERS.get(where)} {index}"))
        slot.loader, slot.generators = loader, generators_of(loader)
        return slot

    @staticmethod
    def _share(slot: _Slot, other: _Slot | None) -> None:
        """One loader may validate both inside of training passes and after them: its generators go on."""
        if other is not None and other.saved is not None:
            slot.saved = {**other.saved, "finished": 0, "pass": None, "rng": None}
            slot.reseeded = other.reseeded

    def _begin(self, slot: _Slot, restore_rng: Callable[[], None]) -> tuple[_Pass, Iterator[Any]]:
        saved = slot.saved or {}
        self._restore_generators(slot)
        restore_rng()
        if saved.get("rng") is not None:
            rng.restore(saved["rng"])
        start = describe_pass(slot.loader)
        start["workers_alive"] = start["workers_alive"] or saved.get("workers_alive", False)
        self._note_seeds(slot)
        return _Pass(slot, start), begin(slot.loader, start, saved.get("loader"))

    def _continue(
        self, slot: _Slot, saved: Mapping[str, Any], role: Role, restore_rng: Callable[[], None]
    ) -> tuple[_Pass, Iterator[Any]]:
        start, consumed, in_hand = (saved["pass"][key] for key in ("start", "consumed", "in_hand"))

        rng_is_before = saved["pass"].get("rng_is_before", False)  # older files do not say

        def arrive() -> None:
            set_generators(slot.generators, saved["generators"])
            if not rng_is_before:
                restore_rng()

        before = restore_rng if rng_is_before else _nothing
        iterator = resume(slot.loader, role, start, saved["loader"], consumed, in_hand, arrive, before)
        self._restored += slot.generators
        self._note_seeds(slot)
        return _Pass(slot, start, consumed), iterator

    def _restore_generators(self, slot: _Slot) -> None:
        """Let the generators go on from the load, unless they do already or are seeded for each pass."""
        if slot.saved is None or slot.reseeded:
            return
        for generator, state in zip(slot.generators, slot.saved["generators"], strict=False):
            if generator in self._restored:
                continue
            seed = generator.initial_seed()
            set_generators([generator], [state])
            self._restored.append(generator)
            if slot.reseeded is None and seed != generator.initial_seed():
                logger.warning(
                    "A loader's generator was seeded with %d here and with %d in the checkpoint. It goes on "
                    "from the checkpoint; if you seed it for each epoch, this one has another order than in "
                    "the uninterrupted run.",
                    seed,
                    generator.initial_seed(),
                )

    def _note_seeds(self, slot: _Slot) -> None:
        seeds = [generator.initial_seed() for generator in slot.generators]
        if slot.seeds is not None:
            slot.reseeded = slot.reseeded or slot.seeds != seeds
        slot.seeds = seeds

    def _slot_state(
        self,
        slot: _Slot,
        again: _Pass | None,
        states: Mapping[torch.Generator, torch.Tensor],
        under_way: dict[str, Any] | None,
    ) -> dict[str, Any]:
        generators = [states.get(one, one.get_state()) for one in slot.generators]
        if slot.saved is not None:  # no pass since the load
            if slot.loader is None:
                generators = slot.saved["generators"]
            return {**slot.saved, "finished": slot.finished, "generators": generators}
        running = next((one for one in self._open.values() if one.slot is slot), None)
        trained = running if running is self._open.get("train") else None
        anew = running if running is again else None
        own = has_own_state(slot.loader) and (running is None or running is trained)
        return {
            "finished": slot.finished,
            "reseeded": slot.reseeded,
            "generators": generators,
            "loader": slot.loader.state_dict() if own else None,
            "workers_alive": anew.start["workers_alive"] if anew else has_workers_alive(slot.loader),
            "rng": anew.start["rng"] if anew else None,
            "pass": under_way if trained else None,
        }

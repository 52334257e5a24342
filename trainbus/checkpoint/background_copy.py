"""The part of a snapshot that is copied after the request."""

from __future__ import annotations

import contextlib
import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from operator import attrgetter
from typing import Protocol

import torch

from trainbus.checkpoint.host_copy import Places, copy_all, uses_one_thread
from trainbus.errors import SnapshotChangedError

__all__ = ["BackgroundCopy", "HostMove", "Move", "SharedMoves", "Watched"]

_WORTH_SHARING = 16 << 20  # bytes
_PARTS = 16  # few: each is a turn at the interpreter's lock


class Move(Protocol):
    """One batch of bytes on its way into the staging memory."""

    def begin(self) -> None:
        """Copy, or have a device begin to copy."""

    def hold_back(self) -> None:
        """Let what the calling thread gives the device from now on wait until the bytes are copied."""

    def finish(self) -> None:
        """Return when the bytes have arrived; at once, if none were begun to be copied."""


@dataclass(frozen=True, slots=True)
class HostMove:
    """
    From host memory: over as soon as it was begun.

    Attributes:
        places: Where these tensors lie, if that is known; it must not change then.
    """

    targets: list[torch.Tensor]
    sources: list[torch.Tensor]
    places: Places | None = None

    def begin(self) -> None:
        copy_all(self.targets, self.sources, self.places)

    def parts(self) -> list[HostMove]:
        """Return it in parts of which two threads can take turns; one part where that is not worth it."""
        places, targets = self.places, self.targets
        size = sum(map(attrgetter("nbytes"), targets)) if places is None else places.sizes.sum()
        if size < _WORTH_SHARING:
            return [self]
        count = -(-len(self.targets) // _PARTS)
        return [self._part(start, start + count) for start in range(0, len(self.targets), count)]

    def _part(self, start: int, stop: int) -> HostMove:
        places = self.places and self.places.part(start, stop)
        return HostMove(self.targets[start:stop], self.sources[start:stop], places)

    def is_serial(self) -> bool:
        """Tell whether `begin` copies most of it on one thread, however many it may use."""
        return uses_one_thread(self.targets)

    def hold_back(self) -> None:
        pass

    def finish(self) -> None:
        pass


class SharedMoves:
    """Copies within the host that two threads make, each taking the next one that neither has taken."""

    def __init__(self, moves: Iterable[HostMove]) -> None:
        self._moves = list(moves)
        self._left = deque(self._moves)
        self._made: set[int] = set()
        self._helping = threading.Lock()

    def carry_out(self) -> None:
        """Make them, with what help there is. Returns when all are made, or raises what went wrong."""
        try:
            self._make()
        finally:
            self._left.clear()
            # Held while the other thread is amid a copy; if it has not come yet, nothing is left for it.
            with self._helping:
                pass
        for move in self._moves:
            if id(move) not in self._made:  # the other thread was interrupted
                move.begin()

    def help_out(self) -> None:
        """Make those that are left, on another thread. What goes wrong here, `carry_out` tries again."""
        with self._helping, torch.inference_mode(False), torch.no_grad(), contextlib.suppress(Exception):
            self._make()

    def _make(self) -> None:
        while True:
            try:
                move = self._left.popleft()
            except IndexError:  # the other thread may have taken the last one just now
                return
            move.begin()
            self._made.add(id(move))


class Watched:
    """
    Tensors that nothing but an optimizer's step is to change until they are copied.

    Their version counters and the places of their memory are a tripwire, no proof: fused optimizers,
    batch normalization and ``.data`` change memory and leave both as they are.

    Args:
        owners: Those that the optimizer holds.
        copies: The place of each on the snapshot.
        checked: Keep the values of this moment, to compare with later: the proof, for a second
            copy's time and memory.
    """

    def __init__(
        self,
        owners: Sequence[torch.Tensor] = (),
        copies: Sequence[torch.Tensor] = (),
        *,
        checked: bool = False,
    ) -> None:
        self.copies = copies
        self._owners = owners
        # Where somebody gives a tensor other memory by hand, what is still read must not be freed.
        self._storages = list(map(torch.Tensor.untyped_storage, owners))
        # Attribute by attribute, not tensor by tensor: so the loops run in C.
        self._marks = self._look()
        self._values = [owner.detach().to("cpu", copy=True) for owner in owners] if checked else None

    def __len__(self) -> int:
        return len(self._owners)

    def changed(self) -> list[torch.Tensor]:
        """Return the copies of those that somebody wrote to since."""
        marks = self._look()
        if marks == self._marks and self._values is None:
            return []
        changed = list(map(operator.ne, zip(*marks, strict=True), zip(*self._marks, strict=True)))
        for index, value in enumerate(self._values or ()):
            changed[index] = changed[index] or not _same_bytes(self._owners[index].detach().cpu(), value)
        return list(compress(self.copies, changed))

    def torn(self) -> list[torch.Tensor]:
        """Return the copies, now complete, that differ from the values of the request."""
        if self._values is None:
            return []
        pairs = zip(self.copies, self._values, strict=True)
        return [copy for copy, value in pairs if not _same_bytes(copy.detach(), value)]

    def _look(self) -> tuple[list[int], list[int]]:
        return list(map(attrgetter("_version"), self._owners)), list(map(torch.Tensor.data_ptr, self._owners))


class BackgroundCopy:
    """
    What is left to copy of one snapshot.

    The copying thread runs it; whoever is about to change the tensors calls `let_change` first;
    whoever needs the bytes calls `wait`.

    Args:
        moves: Those that only wait for devices first, that this thread's work does not delay them.
        watched: Tensors that must not change meanwhile.
        place_of: Names a tensor of the snapshot for an error.
        checked: Hold the tensors until `let_change`, also when the copy is complete by then.
    """

    def __init__(
        self,
        moves: Sequence[Move],
        watched: Watched | None = None,
        place_of: Callable[[torch.Tensor], str] = repr,
        *,
        checked: bool = False,
    ) -> None:
        self.thread: threading.Thread | None = None
        self._moves: Sequence[Move] = [move for move in moves if not isinstance(move, HostMove)]
        self._host = SharedMoves(
            part for move in moves if isinstance(move, HostMove) for part in move.parts()
        )
        self._watched = watched or Watched()
        self._place_of = place_of
        self._checked = checked
        self._passed = False  # `let_change` has compared the live tensors
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self._arrived = threading.Event()
        self._claimed = threading.Lock()  # never given back: `run` or `withdraw` has it
        self._judging = threading.Lock()
        self._judged = False

    def run(self) -> None:
        """Copy, unless it was withdrawn. On the copying thread; what goes wrong is kept for `wait`."""
        if not self._claimed.acquire(blocking=False):
            return
        try:
            # Inference tensors could not be written to by the next save.
            with torch.inference_mode(False), torch.no_grad():
                for move in self._moves:
                    move.begin()
                self._host.carry_out()
                self._begun.set()
                for move in self._moves:
                    move.finish()
                self._judge()
                self._find_torn()
        except BaseException as error:
            self._error = self._error or error
            self._let_devices_finish()
        finally:
            self._end()

    def let_change(self) -> None:
        """
        Return when the tensors may be changed by this thread or what it gives to devices.

        Blocks for copies of host memory, and makes those that the copying thread has not come to; a
        device's work is made to wait on the device.

        Raises:
            SnapshotChangedError: Only where the copy is checked: a tensor was changed before.
        """
        if self._is_being_made():
            self._host.help_out()
        self._wait_for(self._begun)
        for move in self._moves:
            move.hold_back()
        # Before the change that the caller is about to make; afterwards it would look like one by hand.
        self._judge()
        if self._checked and not self._passed:
            changed = self._find_changed()
            self._passed = True
            if self._arrived.is_set():
                self._forget_watched()
            if changed:
                self._error = self._error or SnapshotChangedError(changed)
                raise SnapshotChangedError(changed)

    @property
    def is_over(self) -> bool:
        """True when nobody has to wait for it any more. Never blocks."""
        return self._arrived.is_set() and (self._passed or not self._checked)

    @property
    def was_changed(self) -> bool:
        """True when it failed because a tensor was changed by hand."""
        return isinstance(self._error, SnapshotChangedError)

    def wait_until_begun(self) -> None:
        """Block until no device will begin to copy any more: all have, or none ever will."""
        self._wait_for(self._begun)

    def wait_until_arrived(self) -> None:
        """Block until the memory it copies from and to is not used any more, however it ended."""
        self._wait_for(self._arrived)

    def wait(self) -> None:
        """
        Block until all bytes have arrived.

        Raises:
            SnapshotChangedError: A tensor was changed before it was copied.
            Exception: What went wrong on the copying thread.
        """
        self._wait_for(self._arrived)
        if self._error is not None:
            raise self._error

    def withdraw(self, error: BaseException) -> None:
        """Let nobody wait for it, and never copy, unless it is being copied already. For any thread."""
        if self._claimed.acquire(blocking=False):
            try:
                self._let_devices_finish()
            finally:  # also after Ctrl-C: nobody else would end it
                self._give_up(error)

    def _let_devices_finish(self) -> None:
        # What was begun writes into memory that others get next; of the others nothing is waited for.
        for move in self._moves:
            with contextlib.suppress(Exception):
                move.finish()

    def _give_up(self, error: BaseException) -> None:
        self._error = self._error or error
        self._end()

    def _end(self) -> None:
        # The live tensors may be freed from now on.
        self._moves, self._host = (), SharedMoves(())
        if self._passed or not self._checked or self._error is not None:
            self._forget_watched()
        self._begun.set()
        self._arrived.set()

    def _forget_watched(self) -> None:
        # What names them holds the snapshot, whose memory is to go where a larger one takes its place.
        self._watched, self._place_of = Watched(), repr

    def _is_being_made(self) -> bool:
        # In a forked child it is not, and the memory to copy into is not there.
        return self.thread is None or self.thread.is_alive()

    def _wait_for(self, event: threading.Event) -> None:
        while not event.wait(1.0):
            if not self._is_being_made() and not event.is_set():
                self._give_up(RuntimeError("the thread that copies snapshots has died"))

    def _judge(self) -> None:
        """Look once whether a tensor was changed: before it may be, or when it is copied."""
        with self._judging:
            if not self._judged:
                self._judged = True
                changed = self._find_changed()
                if changed:
                    self._error = self._error or SnapshotChangedError(changed)

    def _find_changed(self) -> list[str]:
        return list(map(self._place_of, self._watched.changed()))

    def _find_torn(self) -> None:
        torn = list(map(self._place_of, self._watched.torn()))
        if torn:
            self._error = self._error or SnapshotChangedError(torn)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    # As bytes, for a NaN is not equal to itself.
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)

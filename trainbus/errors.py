"""Everything trainbus raises on purpose. Imports nothing but the standard library.

Each class also inherits from the builtin that callers would expect, so both
``except TrainbusError`` and ``except ValueError`` work.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from typing import Any

__all__ = [
    "CheckpointCorruptError",
    "CheckpointError",
    "CheckpointLockedError",
    "CheckpointSkipped",
    "CheckpointWriteError",
    "HandlerClosedError",
    "MissingExtraError",
    "PayloadError",
    "RankError",
    "RankFailedError",
    "SnapshotChangedError",
    "StateMismatchError",
    "SubscriptionError",
    "TrainbusError",
    "UnknownEventError",
    "UnsavableStateError",
    "UnsyncedNameError",
    "UntrustedPickleError",
    "WrongThreadError",
    "did_you_mean",
]


class TrainbusError(Exception):
    """Base of all errors of trainbus."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Rank 0 tells the others of an error; the constructors take other things than the message.
        number = {"errno": self.errno} if isinstance(self, OSError) else {}
        return _rebuilt, (type(self), self.args, {**vars(self), **number})


class UnknownEventError(TrainbusError, ValueError):
    """An event name that is not in the bus's catalogue."""


class PayloadError(TrainbusError, TypeError):
    """An event was emitted with fields it does not have, or without one that a receiver names."""


class SubscriptionError(TrainbusError, TypeError):
    """A receiver that cannot be called with the fields of the event it subscribes to."""


class WrongThreadError(TrainbusError, RuntimeError):
    """`emit` was called on a thread that does not own the bus; `post` is for those."""


class HandlerClosedError(TrainbusError, RuntimeError):
    """A handler or writer was used after `close`."""


class StateMismatchError(TrainbusError, ValueError):
    """A checkpoint's content does not fit the handler it is loaded into."""


class RankError(TrainbusError, RuntimeError):
    """
    The ranks of a distributed run did not meet: one did not come, has died, or came to something else.

    Attributes:
        missing: The ranks that did not come; empty if they came to something else.
    """

    def __init__(self, message: str, missing: Iterable[int]) -> None:
        self.missing = list(missing)
        super().__init__(message)


class MissingExtraError(TrainbusError, ImportError):
    """A command needs a package that is not installed; the message says which extra brings it."""


class UnsavableStateError(TrainbusError, TypeError):
    """
    A value that ``torch.save`` accepts and ``torch.load(weights_only=True)`` refuses.

    Attributes:
        problems: One ``(path, remedy)`` pair for each such value, where the path
            is written as Python code, e.g. ``state['extra']['when']``.
    """

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {path}: {remedy}" for path, remedy in self.problems)
        super().__init__(
            "Cannot save this state: what follows would be written and could not be loaded again "
            f"(only tensors and plain Python values can).\n{lines}"
        )


class CheckpointError(TrainbusError):
    """
    Base of the errors about one checkpoint.

    Attributes:
        seen: True once somebody was given this error, by `PendingSave.result` or by
            the bus. What has been seen is not raised a second time.
    """

    seen: bool = False


class UnsyncedNameError(TrainbusError, OSError):
    """A file is written and in its place, and the folder could not be synced: a power cut may undo that."""


class RankFailedError(TrainbusError, RuntimeError):
    """
    What several ranks did together failed on one of them; the same error is raised on all.

    Attributes:
        rank: The lowest one it failed on, or None where the ranks lost touch with each other.
        errno: The operating system's number, or None.
        is_unsynced: Only the last sync of a save failed, as of `UnsyncedNameError`.
    """

    def __init__(
        self, rank: int | None, reason: str, errno: int | None = None, *, is_unsynced: bool = False
    ) -> None:
        self.rank = rank
        self.errno = errno
        self.is_unsynced = is_unsynced
        where = "the ranks did not do it together" if rank is None else f"it failed on rank {rank}"
        super().__init__(f"{where}: {reason}")


class CheckpointLockedError(CheckpointError, BlockingIOError):
    """
    Another process writes files of the same name template.

    Attributes:
        path: The lock file.
    """

    def __init__(self, path: str, template: str, holder: str) -> None:
        self.path = path
        super().__init__(
            f"Cannot save under {template!r}: {holder} does. Two runs would overwrite each other's files; "
            "stop it, use another folder or name, or shared=True if that is meant."
        )


class CheckpointWriteError(CheckpointError, OSError):
    """
    A checkpoint could not be written, or not durably: the message says what stands under its name.

    Attributes:
        path: The file that was to be written.
        global_step: Training batches completed when the save was asked for.
        errno: The operating system's number, or None if it was no `OSError`.
        is_unsynced: The new file is in its place, whole; only a power cut may bring the previous one back.
    """

    def __init__(
        self,
        path: str,
        global_step: int,
        cause: BaseException,
        *,
        tries: int = 1,
        is_unsynced: bool = False,
    ) -> None:
        self.path = path
        self.global_step = global_step
        reason, number = f"{type(cause).__name__}: {cause}", None
        if isinstance(cause, OSError) and cause.errno:
            number = cause.errno
            reason = f"[Errno {number}] {cause.strerror or os.strerror(number)}"
        elif isinstance(cause, RankFailedError):
            number, reason = cause.errno, str(cause)
        reason = reason.removesuffix(".") + (f" (tried {tries} times)" if tries > 1 else "")
        there = "the previous file, if any, is untouched"
        self.is_unsynced = (
            is_unsynced or isinstance(cause, UnsyncedNameError) or getattr(cause, "is_unsynced", False)
        )
        if self.is_unsynced:
            there = "the new file is there, but a power cut may bring the previous one back"
        super().__init__(
            f"Cannot write checkpoint {path!r} of global step {global_step}: {reason}. "
            f"Training state is unharmed and {there}."
        )
        # OSError.__init__ with one argument leaves errno None; set it afterwards.
        self.errno = number


class CheckpointCorruptError(CheckpointError, ValueError):
    """
    A file is not the checkpoint it claims to be, or none at all. Raised before any tensor of it is used.

    Attributes:
        path: The file.
        reason: What is wrong with it, in one clause.
        instead: What to do where something else than a checkpoint was given; None: it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, *, instead: str | None = None) -> None:
        self.path = os.fspath(path)
        self.reason = reason
        self.instead = instead
        if instead is None:
            super().__init__(f"Checkpoint {self.path!r} is damaged: {reason}. Load an older one instead.")
        else:
            super().__init__(f"Cannot read {self.path!r}: {reason}. {instead}")


class SnapshotChangedError(TrainbusError, RuntimeError):
    """
    What ``snapshot="overlap"`` copies in the background was changed outside of an optimizer's step.

    Attributes:
        places: Where in the state, written as Python code, e.g. ``state['module']['weight']``.
    """

    def __init__(self, places: Iterable[str]) -> None:
        self.places = list(places)
        named = ", ".join(self.places[:5]) + (f" and {len(self.places) - 5} more" if self.places[5:] else "")
        super().__init__(
            f"{named} changed between the save and the next optimizer step, where snapshot='overlap' "
            "still copies: something else than Optimizer.step() wrote there. Move that to before the save, "
            "or use snapshot='auto'"
        )


class UntrustedPickleError(CheckpointError, ValueError):
    """
    A file without a manifest that holds more than tensors and plain values.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        self.path = os.fspath(path)
        super().__init__(
            f"Cannot load {self.path!r} safely: it was not written by trainbus and "
            f"torch.load(weights_only=True) refuses it ({reason}). If you trust whoever made it, "
            "trainbus.load(path, trust_pickle=True) loads it, which lets the file run any code; give what is "
            "in it to load_state_dict() then."
        )


class CheckpointSkipped(CheckpointError):
    """
    A save that was not carried out.

    The writer was busy (`on_busy`), a newer one took its place, or what it waited for did not come.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        super().__init__(f"Checkpoint {path!r} was not saved: {reason}.")


def _rebuilt(kind: type[TrainbusError], args: tuple[Any, ...], attributes: dict[str, Any]) -> TrainbusError:
    error = kind.__new__(kind, *args)
    error.args = args
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the nearest of *known*, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

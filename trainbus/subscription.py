"""
One receiver's place in the order of an event's calls, and what it is called for.
"""

from __future__ import annotations

import operator
import sys
import threading
import weakref
from types import BuiltinMethodType, MethodType, TracebackType
from typing import Any, Literal, NoReturn, Self, TypedDict

from trainbus.errors import PayloadError, did_you_mean
from trainbus.events import Event
from trainbus.receiver import Payload, Receiver, describe, plan_call, refusal

__all__ = ["Channel", "Filter", "Options", "Subscription", "emitter"]


class Options(TypedDict, total=False):
    """The keyword arguments of `EventBus.on`."""

    priority: float
    every: int
    after: int
    before: int | None
    once: bool
    on_error: Literal["raise", "log"]


class Filter:
    """
    Which occurrences of an event a receiver wants, by the event's own number, which begins at 1.

    Args:
        every: Only numbers that it divides; at least 1.
        after: Only greater numbers.
        before: Only smaller numbers; None: no limit.

    Raises:
        ValueError: If one is no int (a bool is none either), or if no number could pass.
    """

    __slots__ = ("after", "before", "every")

    def __init__(self, every: int, after: int, before: int | None) -> None:
        for name, value in (("every", every), ("after", after), ("before", before)):
            if type(value) is not int and not (name == "before" and value is None):
                raise ValueError(f"{name} must be an int, got {value!r}. Events are numbered from 1.")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every!r}. Pass every=1 for each occurrence.")
        if before is not None and before <= after + 1:
            raise ValueError(
                f"No number is greater than after={after!r} and smaller than before={before!r}, "
                "so the receiver would never be called. Both limits are exclusive."
            )
        self.every = every
        self.after = after
        self.before = before

    def passes(self, number: int) -> bool:
        """Return whether the occurrence with this number is wanted."""
        return (
            number > self.after and (self.before is None or number < self.before) and number % self.every == 0
        )

    def __repr__(self) -> str:
        return f"every={self.every} after={self.after} before={self.before}"


class Subscription:
    """
    A receiver of an event. Made by `EventBus.on`; as a context manager it ends with its block.

    The bus keeps it, and with it the receiver, until it is cancelled.

    Attributes:
        name: The event's name.
        priority: Receivers of lower priority are called first.
    """

    __slots__ = (
        "_calls",
        "_channel",
        "_filter",
        "_once",
        "_required",
        "call",
        "label",
        "logs_errors",
        "name",
        "plain",
        "priority",
        "receiver",
        "senders",
        "takes_sender",
    )

    def __init__(
        self,
        channel: Channel,
        receiver: Receiver,
        *,
        priority: float = 0,
        every: int = 1,
        after: int = 0,
        before: int | None = None,
        once: bool = False,
        on_error: Literal["raise", "log"] = "raise",
        takes_sender: bool = False,
    ) -> None:
        if type(priority) not in (int, float) or priority != priority:
            raise ValueError(f"priority must be a number, got {priority!r}. Lower ones are called first.")
        if on_error not in ("raise", "log"):
            raise ValueError(f"on_error must be 'raise' or 'log', got {on_error!r}.")
        only = Filter(every, after, before)
        self.name = channel.event.name
        self.label = describe(receiver)
        self.call, self._required = plan_call(receiver, channel.event, takes_sender)
        # The receiver, a weak reference to it, or None: cancelled.
        self.receiver: Any = receiver
        self.priority = priority
        self.logs_errors = on_error == "log"
        self.takes_sender = takes_sender
        # Called for events of these senders alone; None: of any.
        self.senders: list[Any] | None = None
        self._channel = channel
        self._filter = None if (every, after, before) == (1, 0, None) else only
        self._once = once
        # Whether it may be called without asking `admit`.
        self.plain = not (self._filter or once or takes_sender or self._required)
        self._calls = 0

    @property
    def active(self) -> bool:
        """False once it was cancelled, or its receiver was held weakly and is gone."""
        return self.alive() is not None

    def cancel(self) -> None:
        """End it, on any thread; a running dispatch does not call it any more. Again: does nothing."""
        self.receiver = None
        self._channel.prune()

    def hold(self, receiver: Receiver, weak: bool) -> None:
        """Keep the receiver alive, or stop doing so."""
        if not weak:
            self.receiver = receiver
            return
        reference = weakref.WeakMethod if isinstance(receiver, MethodType) else weakref.ref
        try:
            self.receiver = reference(receiver)
        except TypeError:
            why = "it cannot be held weakly. Connect it with weak=False."
            raise refusal(receiver, self._channel.event, why) from None

    def alive(self) -> Receiver | None:
        """Return the receiver, or None if there is none any more."""
        receiver = self.receiver
        return receiver() if isinstance(receiver, weakref.ref) else receiver

    def wants(self, sender: Any) -> bool:
        """Return whether it is called for events of this sender."""
        return self.senders is None or any(same_sender(sender, wanted) for wanted in self.senders)

    def admit(self, sender: Any, payload: Payload, posted_by: str | None) -> Receiver | None:
        """
        Return the receiver if it is to be called for this event, else None.

        Raises:
            PayloadError: If the receiver names a field that was not given, or its filter needs the event's
                number and there is none.
        """
        receiver = self.alive()
        if receiver is None:
            self._channel.prune()
            return None
        if not self.wants(sender) or not self._passes(payload, posted_by):
            return None
        for field in self._required:
            if field not in payload:
                raise self._missing(field, posted_by)
        if self._once:
            # Before the call: the receiver may emit the same event again.
            self.cancel()
        return receiver

    def _passes(self, payload: Payload, posted_by: str | None) -> bool:
        if self._filter is None:
            return True
        number = self._channel.event.number
        if number is None:
            self._calls += 1
            return self._filter.passes(self._calls)
        try:
            return self._filter.passes(number(payload))
        except KeyError as error:
            raise self._missing(error.args[0], posted_by) from None
        except (TypeError, ValueError, OverflowError) as error:
            given = ", ".join(f"{name}={payload.get(name)!r}" for name in ("epoch", "batch", "global_step"))
            raise PayloadError(
                f"Cannot deliver event {self.name!r}, emitted by {posted_by or emitter()}, to {self.label}: "
                f"its filter goes by the event's number, which cannot be told from {given}: {error}. "
                "Emit it with ints for these."
            ) from error

    def _missing(self, field: str, posted_by: str | None) -> PayloadError:
        return PayloadError(
            f"Cannot deliver event {self.name!r}, emitted by {posted_by or emitter()}, to {self.label}: "
            f"it needs the field {field!r}, which was not given. "
            f"Emit it with {field}=..., or give the receiver's parameter a default."
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __repr__(self) -> str:
        only = f" {self._filter}" if self._filter else ""
        once = " once" if self._once else ""
        state = "" if self.active else " (cancelled)"
        return f"<Subscription {self.name!r} -> {self.label} priority={self.priority}{only}{once}{state}>"


class Channel:
    """
    The subscriptions to one event, in the order of their calls: by priority, then as subscribed.

    Attributes:
        event: What the subscriptions are to.
        fields: The event's fields.
        subscriptions:
            A tuple that is replaced whole, so that a dispatch walks over those that
            there were when it began. May hold some that have ended.
    """

    __slots__ = ("_lock", "event", "fields", "subscriptions")

    def __init__(self, event: Event) -> None:
        self.event = event
        self.fields = frozenset(event.fields)
        self.subscriptions: tuple[Subscription, ...] = ()
        # Reentrant: what is garbage collected while it is held may cancel a subscription.
        self._lock = threading.RLock()

    def check(self, payload: Payload) -> None:
        """Raise PayloadError if the event has not all these fields, or the logs are no mapping."""
        if not self.fields.issuperset(payload):
            self._refuse_field(payload)
        logs = payload.get("logs")
        # Not isinstance(…, Mapping), which takes four times as long for what is no dict.
        if logs is not None and not hasattr(logs, "keys"):
            raise PayloadError(
                f"Cannot emit {self.event.name!r} with logs={logs!r}: logs are metrics by name. "
                "Pass a mapping, e.g. logs={'loss': 0.5}."
            )

    def _refuse_field(self, payload: Payload) -> NoReturn:
        unknown = next(field for field in payload if field not in self.fields)
        raise PayloadError(
            f"Cannot emit {self.event.name!r} with {unknown!r}: the event has no such field."
            f"{did_you_mean(unknown, self.event.fields)} Fields: {', '.join(self.event.fields)}. "
            "Put metrics into logs, or declare an event of your own with bus.declare."
        )

    def add(self, subscription: Subscription) -> None:
        """Put it behind all others of its priority."""
        with self._lock:
            # The sort is stable and the new one comes last.
            everyone = sorted((*self.subscriptions, subscription), key=operator.attrgetter("priority"))
            self.subscriptions = tuple(s for s in everyone if s.active)

    def prune(self) -> None:
        """Forget those that have ended."""
        with self._lock:
            self.subscriptions = tuple(s for s in self.subscriptions if s.active)

    def of(self, receiver: Receiver) -> list[Subscription]:
        """Return the receiver's subscriptions; methods of one object are the same receiver each time."""
        return [s for s in self.subscriptions if _same_receiver(s.alive(), receiver)]


def same_sender(one: Any, other: Any) -> bool:
    """Compare as blinker does: objects by identity, text and numbers by value."""
    return one is other or (isinstance(one, str | int) and type(one) is type(other) and one == other)


def emitter() -> str:
    """Return the function and line that called into the bus."""
    frame = sys._getframe(1)
    inside = (__name__, "trainbus.bus", "trainbus.signals")
    while frame.f_back and frame.f_globals.get("__name__") in inside:
        frame = frame.f_back
    return f"{frame.f_code.co_qualname} ({frame.f_code.co_filename}:{frame.f_lineno})"


def _same_receiver(one: Receiver | None, other: Receiver) -> bool:
    # Methods are made anew at each access. Other callables may define == as they like.
    return one is other or (isinstance(one, MethodType | BuiltinMethodType) and one == other)

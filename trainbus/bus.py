"""
The event bus: who is told of what, in which order, on which thread.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from threading import get_ident
from types import MappingProxyType
from typing import Any, Literal, NoReturn, TypeVar, Unpack, overload

from trainbus.errors import (
    SubscriptionError,
    UnknownEventError,
    WrongThreadError,
    did_you_mean,
)
from trainbus.events import COMMON_FIELDS, EVENTS, Event
from trainbus.receiver import Receiver, describe
from trainbus.signals import BusSignal
from trainbus.subscription import Channel, Options, Subscription, emitter

__all__ = ["EventBus", "Subscription"]

R = TypeVar("R", bound=Callable[..., Any])
Results = list[tuple[Receiver, Any]]

_log = logging.getLogger("trainbus")


class EventBus:
    """
    Delivers events to receivers: lower priority first, then in the order of subscription.

    It knows the events of `trainbus.events` and those it was told of by `declare`; any
    other name is an error. It belongs to one thread, the one that made it and from
    ``train_begin`` on the one that emitted that: receivers run there and need no lock.
    Other threads `post`. It keeps receivers alive until they are cancelled.

    A receiver may subscribe, cancel and emit while it is called. What was cancelled is
    not called any more, what was added is first called at the next emit.

    Attributes:
        handler:
            Where ``handler``, ``epoch``, ``batch`` and ``global_step`` come from when an
            emitter leaves them out; any object with the latter three, or None.
    """

    def __init__(self) -> None:
        self.handler: Any = None
        self._channels = {name: Channel(event) for name, event in EVENTS.items()}
        self._signals: dict[str, BusSignal] = {}
        self._posted: deque[tuple[Channel, dict[str, Any], str]] = deque()
        self._held_back: deque[Exception] = deque()
        self._dispatching = False
        self._own()

    @property
    def events(self) -> Mapping[str, Event]:
        """All events of this bus by name, the declared ones included."""
        return MappingProxyType({name: channel.event for name, channel in self._channels.items()})

    def declare(
        self,
        name: str,
        fields: Iterable[str] = (),
        number: Callable[[Mapping[str, Any]], int] | None = None,
    ) -> None:
        """
        Add an event of your own. Declaring the same again does nothing.

        Args:
            name: An identifier that no event has yet.
            fields: What it brings beside the common fields.
            number:
                Tells from a payload the event's own number, beginning at 1, for the
                filters of `on`. None: they count calls.

        Raises:
            ValueError: If there is another event of this name, or a name is no identifier.
            TypeError: If fields is one string.
        """
        if isinstance(fields, str):
            raise TypeError(f"fields must be a list of names, got {fields!r}. Pass fields=[{fields!r}].")
        extra = dict.fromkeys(field for field in fields if field not in COMMON_FIELDS)
        event = Event(name, (*COMMON_FIELDS, *extra), number, "Declared by bus.declare.")
        known = self._channels.setdefault(name, Channel(event)).event
        if known != event:
            raise ValueError(
                f"Cannot declare event {name!r} with fields {list(extra)}: there is one of that name, "
                f"which differs in its number or its fields ({', '.join(known.fields)}). Choose another name."
            )

    @overload
    def on(self, name: str, fn: Receiver, **options: Unpack[Options]) -> Subscription: ...

    @overload
    def on(self, name: str, fn: None = None, **options: Unpack[Options]) -> Callable[[R], R]: ...

    def on(
        self,
        name: str,
        fn: Receiver | None = None,
        *,
        priority: float = 0,
        every: int = 1,
        after: int = 0,
        before: int | None = None,
        once: bool = False,
        on_error: Literal["raise", "log"] = "raise",
    ) -> Subscription | Callable[[R], R]:
        """
        Call a function at each event of this name, on the thread that emits it.

        The function names the fields it wants: ``def report(epoch, logs)``, or
        ``def report(**payload)`` for all. A parameter with a default gets the field if it
        was given. Its result is of interest to `signal` alone.

        The filters go by the event's own number, so that they agree after a resume:
        epoch + 1 for ``epoch_*``, ``val_begin`` and ``val_end``; the steps completed for
        ``train_batch_end`` (``train_batch_begin`` has the number of its end); batch + 1 for
        ``val_batch_*``. Events without a number count the calls of this subscription.

        Args:
            name: The event.
            fn: The receiver, kept alive by the bus. Left out: `on` is a decorator.
            priority: Lower ones are called first; `ModelCheckpoint` is at 100.
            every: Only numbers that it divides.
            after: Only greater numbers.
            before: Only smaller numbers.
            once: Cancel it before its first call.
            on_error:
                ``"raise"``: its exception ends the dispatch and reaches the emitter.
                ``"log"``: it is logged and the others are called.

        Returns:
            The subscription, or as a decorator the function unchanged.

        Raises:
            UnknownEventError: If there is no event of this name.
            SubscriptionError: If the function could not be called with the event's fields.
            ValueError: If an option is out of range.
        """
        channel = self._channel(name)

        def subscribe(receiver: Receiver) -> Subscription:
            subscription = Subscription(
                channel,
                receiver,
                priority=priority,
                every=every,
                after=after,
                before=before,
                once=once,
                on_error=on_error,
            )
            channel.add(subscription)
            return subscription

        def decorate(receiver: R) -> R:
            subscribe(receiver)
            return receiver

        return decorate if fn is None else subscribe(fn)

    def off(self, name: str, fn: Receiver) -> None:
        """
        Cancel all subscriptions of this function to the event.

        Raises:
            UnknownEventError: If there is no event of this name.
            SubscriptionError: If it has none.
        """
        subscriptions = self._channel(name).of(fn)
        if not subscriptions:
            raise SubscriptionError(
                f"Cannot cancel {describe(fn)} at {name!r}: it is not subscribed to it. A lambda or partial "
                "written twice is two functions: keep the Subscription that bus.on returns, and cancel that."
            )
        for subscription in subscriptions:
            subscription.cancel()

    def emit(self, name: str, /, sender: Any = None, **payload: Any) -> None:
        """
        Deliver what was posted, then this event; return when all its receivers have returned.

        Of the common fields those left out are filled: from the handler, else with None, 0,
        0 and 0; ``logs`` with an empty dict. A receiver's exception ends this event's dispatch
        and is raised, with a note naming the receiver. One raised by a receiver of a posted
        event is held back until everything is delivered.

        Args:
            name: The event.
            sender: Who emits, for those who connected to `signal`. None: the handler.
            payload: The event's fields, handed on as they are, not copied.

        Raises:
            UnknownEventError: If there is no event of this name.
            PayloadError: If it does not have a field, a receiver needs one left out, logs are no mapping, or
                a filter goes by a number that is none.
            WrongThreadError: If called on a thread that does not own the bus.
        """
        self._emit(name, sender, payload, None)

    def post(self, name: str, /, **payload: Any) -> None:
        """
        Have an event delivered before the next one emitted, or by `drain`. For any thread; never blocks.

        Raises:
            UnknownEventError: If there is no event of this name.
            PayloadError: If it does not have a field, or logs are no mapping.
        """
        channel = self._channel(name)
        channel.check(payload)
        self._posted.append((channel, payload, emitter()))

    def drain(self) -> None:
        """
        Deliver what was posted, also what is posted meanwhile; then raise the first error held back.

        Does nothing while an event is being delivered: posted events never come inside another.

        Raises:
            WrongThreadError: If called on a thread that does not own the bus.
        """
        if get_ident() != self._owner:
            self._refuse_thread("drain it", "It delivers what was posted before its next event.")
        if not self._dispatching:
            self._deliver_posted()
            if self._held_back:
                raise self._held_back.popleft()

    def take_held_back(self) -> list[Exception]:
        """Return the errors that the next emits and drains would raise, and forget them."""
        taken = list(self._held_back)
        self._held_back.clear()
        return taken

    def signal(self, name: str) -> BusSignal:
        """
        Return the event as a blinker signal: the same one each time, with the same receivers.

        Raises:
            UnknownEventError: If there is no event of this name.
        """
        channel = self._channel(name)
        return self._signals.setdefault(name, BusSignal(channel, self._send))

    def _send(self, name: str, sender: Any, payload: dict[str, Any]) -> Results:
        results: Results = []
        self._emit(name, sender, payload, results)
        return results

    def _emit(self, name: str, sender: Any, payload: dict[str, Any], results: Results | None) -> None:
        channel = self._channel(name)
        channel.check(payload)
        if get_ident() != self._owner:
            self._change_owner(name)
        if self._dispatching:
            self._dispatch(channel, sender, payload, results, None)
            return
        if self._posted:
            self._deliver_posted()
        self._dispatch(channel, sender, payload, results, None)
        if self._held_back:
            raise self._held_back.popleft()

    def _dispatch(
        self,
        channel: Channel,
        sender: Any,
        payload: dict[str, Any],
        results: Results | None,
        posted_by: str | None,
    ) -> None:
        subscriptions = channel.subscriptions
        if not subscriptions:
            return
        full = self._filled(payload)
        if sender is None:
            sender = self.handler
        outside = self._dispatching
        try:
            # Saved and restored instead of counted: an interrupt anywhere leaves it right.
            self._dispatching = True
            for subscription in subscriptions:
                try:
                    if subscription.plain:
                        receiver = subscription.receiver
                    else:
                        receiver = subscription.admit(sender, full, posted_by)
                    if receiver is None:
                        continue
                    result = subscription.call(receiver, sender, full)
                except Exception as error:
                    if not self._keep(error, subscription, posted_by):
                        raise
                    continue
                if results is not None:
                    results.append((receiver, result))
        finally:
            self._dispatching = outside

    def _filled(self, payload: dict[str, Any]) -> dict[str, Any]:
        handler = self.handler
        if handler is None:
            return {"handler": None, "epoch": 0, "batch": 0, "global_step": 0, "logs": {}, **payload}
        return {
            "handler": handler,
            "epoch": handler.epoch,
            "batch": handler.batch,
            "global_step": handler.global_step,
            "logs": {},
            **payload,
        }

    def _keep(self, error: Exception, subscription: Subscription, posted_by: str | None) -> bool:
        """Log the error or hold it back; return False if it is to be raised at once."""
        note = f"Raised by {subscription.label}, receiver of event {subscription.name!r}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        if subscription.logs_errors:
            _log.error(
                "Receiver %s of event %r failed.", subscription.label, subscription.name, exc_info=error
            )
            return True
        if posted_by is None:
            return False
        self._held_back.append(error)
        return True

    def _deliver_posted(self) -> None:
        # One at a time: if an interrupt ends this, the others are still there.
        while self._posted:
            channel, payload, posted_by = self._posted.popleft()
            self._dispatch(channel, None, payload, None, posted_by)

    def _channel(self, name: str) -> Channel:
        try:
            return self._channels[name]
        except KeyError:
            near = did_you_mean(name, self._channels) if isinstance(name, str) else ""
            raise UnknownEventError(
                f"Unknown event {name!r}.{near} Known events: {', '.join(self._channels)}. "
                "Add one of your own with bus.declare."
            ) from None

    def _own(self) -> None:
        self._owner = get_ident()
        self._owner_name = threading.current_thread().name

    def _change_owner(self, name: str) -> None:
        if name != "train_begin" or self._dispatching:
            self._refuse_thread(f"emit {name!r}", "Use bus.post, which works on every thread.")
        self._own()

    def _refuse_thread(self, what: str, advice: str) -> NoReturn:
        raise WrongThreadError(
            f"Cannot {what} on thread {threading.current_thread().name!r}: this bus belongs to thread "
            f"{self._owner_name!r}, where its receivers run. {advice}"
        )

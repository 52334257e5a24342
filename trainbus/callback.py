"""
Callbacks: subscribers with one method for each event they want, and a state that is saved with the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainbus.bus import EventBus, Subscription
from trainbus.errors import StateMismatchError, SubscriptionError, UnknownEventError, did_you_mean

__all__ = ["Callback", "add_to"]


class Callback:
    """
    Base of subscribers with ``on_<event>`` methods, which name the fields they want.

    .. code-block:: python

        class Report(Callback):
            def on_epoch_end(self, epoch, logs):
                print(epoch, dict(logs))

    `Handler.add_callback` attaches it and keeps its state in the checkpoints. Subclasses
    need not call ``super().__init__()``. Everything runs on the thread that owns the bus.

    Attributes:
        priority: Of all its subscriptions; lower ones are called first.
    """

    priority: float = 0

    _attached: tuple[tuple[EventBus, tuple[Subscription, ...]], ...] = ()

    def attach(self, bus: EventBus) -> None:
        """
        Subscribe all ``on_<event>`` methods, or none if one is refused. The bus keeps the callback alive.

        Raises:
            UnknownEventError: If there is no event of a method's name.
            SubscriptionError: If a method names what the event lacks, or it is attached to this bus.
        """
        if any(known is bus for known, _ in self._attached):
            raise SubscriptionError(
                f"Cannot attach {type(self).__name__}: it is attached to this bus, and each event would "
                "reach it twice. Call detach() first, or attach another instance."
            )
        receivers = self._receivers(bus)
        subscriptions: list[Subscription] = []
        try:
            for event, method in receivers.items():
                subscriptions.append(bus.on(event, method, priority=self.priority))
        except Exception:
            for subscription in subscriptions:
                subscription.cancel()
            raise
        self._attached = (*self._attached, (bus, tuple(subscriptions)))

    def detach(self) -> None:
        """Cancel the subscriptions to all buses. Does nothing if there are none."""
        self._stay_attached(())

    def leave(self, bus: EventBus) -> None:
        """Cancel the subscriptions to *bus*, whose handler is closed; those to others stay."""
        others = tuple(pair for pair in self._attached if pair[0] is not bus)
        if others:
            self._stay_attached(others)
        else:
            self.detach()

    @property
    def state_key(self) -> str:
        """Under which name a checkpoint keeps the state; a number is added for a second of the same name."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs: plain values and tensors. Called at each full save."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """
        Take over a state that `state_dict` returned, perhaps that of an older version.

        Raises:
            StateMismatchError: If there is a state and the class does not define this method.
        """
        if state:
            raise StateMismatchError(
                f"Cannot load the state of {type(self).__name__} with keys {sorted(state)}: "
                "the class defines no load_state_dict. Define it next to state_dict."
            )

    def _stay_attached(self, pairs: tuple[tuple[EventBus, tuple[Subscription, ...]], ...]) -> None:
        attached, self._attached = self._attached, pairs
        for _, subscriptions in (pair for pair in attached if pair not in pairs):
            for subscription in subscriptions:
                subscription.cancel()

    def _receivers(self, bus: EventBus) -> dict[str, Any]:
        """Return the methods by event; refuse those that no event would ever call."""
        receivers = {}
        for name in dir(self):
            if name.startswith("on_") and callable(method := getattr(self, name)):
                receivers[name.removeprefix("on_")] = method
        misspelt = next((f"on_{event}" for event in receivers if event not in bus.events), None)
        if misspelt is not None:
            near = did_you_mean(misspelt, [f"on_{event}" for event in bus.events])
            raise UnknownEventError(
                f"Cannot attach {type(self).__name__}: there is no event for its method {misspelt!r}.{near} "
                f"Events: {', '.join(bus.events)}. Rename the method, or declare the event with "
                "bus.declare before attaching."
            )
        return receivers


def add_to(callbacks: dict[str, Callback], callback: Callback, bus: EventBus) -> str:
    """
    Attach *callback* to *bus* and enter it in *callbacks*.

    Returns:
        Under which key: its `Callback.state_key`, with ``#2``, ``#3``, ... for more of one name.

    Raises:
        TypeError: It is no instance of `Callback`.
    """
    _require_callback(callback)
    callback.attach(bus)
    key, count = callback.state_key, 1
    while key in callbacks:
        count += 1
        key = f"{callback.state_key}#{count}"
    callbacks[key] = callback
    return key


def _require_callback(thing: object) -> None:
    if isinstance(thing, Callback):
        return
    if isinstance(thing, type) and issubclass(thing, Callback):
        name = thing.__name__
        raise TypeError(f"Cannot add {name}: it is a class. Add an instance, add_callback({name}(...)).")
    raise TypeError(
        f"Cannot add {thing!r}: it is no trainbus.Callback. Subscribe a function with "
        "handler.on('epoch_end', function), or derive its class from Callback."
    )

"""
The bus's events as blinker signals: one list of receivers and one order. The only importer of blinker.

For code that speaks blinker. What it does differently from blinker's own is what blinker
leaves open or lets go wrong silently: receivers run in a defined order, are checked when
they connect, and nothing can mute the whole signal.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, NoReturn, TypeVar

from blinker import ANY, NamedSignal

from trainbus.errors import TrainbusError
from trainbus.subscription import Channel, Subscription, same_sender

__all__ = ["BusSignal"]

Receiver = Callable[..., Any]
R = TypeVar("R", bound=Callable[..., Any])
Results = list[tuple[Receiver, Any]]
Send = Callable[[str, Any, dict[str, Any]], Results]


class BusSignal(NamedSignal):
    """
    One event of a bus as a blinker signal. Made by `EventBus.signal`.

    `connect_via` and `connected_to` are blinker's own, on top of `connect` and `disconnect`.

    Attributes:
        name: The event's name.
    """

    def __init__(self, channel: Channel, send: Send) -> None:
        # blinker's own bookkeeping is not set up: the channel is the only list of receivers.
        self.name = channel.event.name
        self.__doc__ = channel.event.doc
        self._channel = channel
        self._send = send

    def connect(self, receiver: R, sender: Any = ANY, weak: bool = True) -> R:
        """
        Subscribe a receiver that is called ``f(sender, **payload)``, at priority 0; return it.

        Connecting it again adds a sender; it is still called once for each event.

        Args:
            receiver: It may also name the fields it wants: ``f(sender, epoch, logs)``.
            sender: Only for events of this sender, which is kept alive; ANY: for all.
            weak:
                Forget the receiver when nothing else refers to it, as blinker does.
                A lambda is then gone at once; pass False to keep it, or use `EventBus.on`.

        Raises:
            SubscriptionError: If the receiver cannot be called like this.
        """
        place = next((s for s in self._channel.of(receiver) if s.takes_sender), None)
        if place is None:
            place = Subscription(self._channel, receiver, takes_sender=True)
            place.hold(receiver, weak)
            place.senders = None if sender is ANY else [sender]
            self._channel.add(place)
        else:
            place.hold(receiver, weak)
            place.senders = None if sender is ANY or place.senders is None else [*place.senders, sender]
        if "receiver_connected" in self.__dict__:
            self.receiver_connected.send(self, receiver=receiver, sender=sender, weak=weak)
        return receiver

    def disconnect(self, receiver: Receiver, sender: Any = ANY) -> None:
        """
        End all subscriptions of the receiver to this event, also those made by `EventBus.on`.

        With a sender, only stop calling it for that sender. As in blinker, disconnecting
        what is not connected does nothing.
        """
        for place in self._channel.of(receiver):
            if sender is not ANY:
                place.senders = place.senders and [s for s in place.senders if not same_sender(s, sender)]
            if sender is ANY or place.senders == []:
                place.cancel()
        if "receiver_disconnected" in self.__dict__:
            self.receiver_disconnected.send(self, receiver=receiver, sender=sender)

    def send(self, sender: Any | None = None, /, **payload: Any) -> Results:
        """
        Emit the event, as `EventBus.emit` does and with its errors, on the bus's own thread.

        Returns:
            ``(receiver, result)`` for each receiver called, in order, those of `EventBus.on` included.
        """
        return self._send(self.name, sender, payload)

    def receivers_for(self, sender: Any) -> Generator[Receiver, None, None]:
        """Yield, in order, the receivers that an event of this sender would reach, filters aside."""
        for subscription in self._channel.subscriptions:
            receiver = subscription.alive()
            if receiver is not None and subscription.wants(sender):
                yield receiver

    def has_receivers_for(self, sender: Any) -> bool:
        """Return whether an event of this sender would reach anybody."""
        return any(True for _ in self.receivers_for(sender))

    @property
    def receivers(self) -> dict[Any, Any]:  # type: ignore[override]
        """A snapshot of all receivers by id; its truth value says whether there are any."""
        alive = (s.alive() for s in self._channel.subscriptions)
        return {id(receiver): receiver for receiver in alive if receiver is not None}

    @property
    def is_muted(self) -> bool:  # type: ignore[override]
        """Always False: see `muted`."""
        return False

    def muted(self) -> NoReturn:
        """Refused: an inner ``muted`` block would unmute the outer one."""
        raise TrainbusError(
            f"Cannot mute {self.name!r}: saving and other receivers would silently miss the event. "
            "Cancel single subscriptions instead, with Subscription.cancel() or bus.off()."
        )

    def send_async(self, *args: Any, **payload: Any) -> NoReturn:
        """Refused: receivers run on the training thread, one after the other."""
        raise TrainbusError(
            f"Cannot send {self.name!r} asynchronously: receivers of a bus are plain functions. "
            "Use send(), or bus.post() from another thread."
        )

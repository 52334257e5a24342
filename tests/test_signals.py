"""Tests of the bus's events as blinker signals."""

from __future__ import annotations

import asyncio
import gc

import blinker
import pytest

from trainbus.bus import EventBus
from trainbus.errors import PayloadError, SubscriptionError, TrainbusError


class Handler:
    """What a bus reads of its handler."""

    epoch, batch, global_step = 4, 7, 107


@pytest.fixture
def bus():
    return EventBus()


@pytest.fixture
def signal(bus):
    return bus.signal("epoch_end")


def recorder(calls, name="receiver"):
    def receiver(sender, **payload):
        calls.append((name, sender))
        return name

    return receiver


class TestSignal:
    def test_is_blinkers(self, bus, signal):
        """
        It is a named blinker signal, the same one each time, and unknown to other buses.
        """
        assert isinstance(signal, blinker.NamedSignal)
        assert signal.name == "epoch_end"
        assert "'epoch_end'" in repr(signal)
        assert bus.signal("epoch_end") is signal
        assert EventBus().signal("epoch_end") is not signal
        assert blinker.signal("epoch_end") is not signal

    def test_declared(self, bus):
        """
        Events added by declare have one, too.
        """
        bus.declare("mine", ["score"])
        calls = []
        receiver = bus.signal("mine").connect(lambda sender, score: calls.append(score), weak=False)
        bus.emit("mine", score=3)
        assert calls == [3]
        assert callable(receiver)


class TestConnect:
    def test_called_as_by_blinker(self, bus, signal):
        """
        A receiver gets the sender first and the payload by name, the filled fields included.
        """
        calls = []

        @signal.connect
        def receiver(sender, **payload):
            calls.append((sender, payload))

        bus.emit("epoch_end", "me", epoch=3)

        payload = {"handler": None, "epoch": 3, "batch": 0, "global_step": 0, "logs": {}}
        assert calls == [("me", payload)]

    def test_named_fields(self, bus, signal):
        """
        A receiver may name the fields it wants, behind the sender.
        """
        calls = []
        receiver = signal.connect(lambda who, epoch, logs=None: calls.append((who, epoch, logs)), weak=False)
        bus.emit("epoch_end", "me", epoch=3)
        assert calls == [("me", 3, {})]
        assert callable(receiver)

    def test_other_shapes(self, bus, signal):
        """
        Positional-only senders, *args and methods of builtins are called as blinker would.
        """
        calls = []

        def handler_first(handler, /, epoch, **payload):
            calls.append((handler, epoch, payload["handler"]))

        def starred(*args, **payload):
            calls.append((args, payload["epoch"]))

        def keyword_only(sender, *args, epoch):
            calls.append((sender, args, epoch))

        for receiver in (handler_first, starred, keyword_only, calls.append):
            signal.connect(receiver, weak=False)
        bus.emit("epoch_end", "me", epoch=3)

        assert calls == [("me", 3, None), (("me",), 3), ("me", (), 3), "me"]

    def test_sender_left_out(self, bus, signal):
        """
        The sender of an event emitted or posted without one is the bus's handler.
        """
        calls = []
        receiver = recorder(calls)
        bus.handler = Handler()
        signal.connect(receiver, sender=bus.handler)

        bus.emit("epoch_end")
        bus.post("epoch_end")
        bus.drain()
        bus.emit("epoch_end", "somebody else")

        assert calls == [("receiver", bus.handler)] * 2

    def test_sender(self, bus, signal):
        """
        With a sender given, a receiver is called for that one alone: objects by identity, text by value.
        """
        calls, one, other = [], [], []
        by_object, by_text = recorder(calls, "object"), recorder(calls, "text")
        signal.connect(by_object, sender=one)
        signal.connect(by_text, sender="run-1")

        for sender in (one, other, "".join(["run", "-1"]), "run-2", None):
            bus.emit("epoch_end", sender)

        assert calls == [("object", one), ("text", "run-1")]
        assert calls[0][1] is one

    def test_again(self, bus, signal):
        """
        Connecting again adds senders; the receiver is still called once and keeps its place.
        """
        calls = []
        first, second = recorder(calls, "first"), recorder(calls, "second")
        signal.connect(first, sender="a")
        signal.connect(second)
        signal.connect(first, sender="b")
        bus.emit("epoch_end", "a")
        bus.emit("epoch_end", "b")
        bus.emit("epoch_end", "c")
        assert [name for name, _ in calls] == ["first", "second", "first", "second", "second"]
        calls.clear()

        signal.connect(first)
        signal.connect(first, sender="a")
        bus.emit("epoch_end", "c")
        assert [name for name, _ in calls] == ["first", "second"]

    def test_weak(self, bus, signal):
        """
        As with blinker, a receiver that nothing else refers to is gone, a lambda at once.
        """
        calls = []
        signal.connect(lambda sender: calls.append("lambda"))
        receiver = recorder(calls)
        signal.connect(receiver)
        bus.emit("epoch_end")
        assert calls == [("receiver", None)]

        del receiver
        gc.collect()
        bus.emit("epoch_end")

        assert calls == [("receiver", None)]
        assert not signal.receivers
        assert "cancelled" not in repr(signal)

    def test_weak_method(self, bus, signal):
        """
        A method is held by its object, not by the passing object that accessing it makes.
        """

        class Receiver:
            def receive(self, sender):
                calls.append(1)

        calls = []
        receiver = Receiver()
        signal.connect(receiver.receive)
        bus.emit("epoch_end")
        del receiver
        gc.collect()
        bus.emit("epoch_end")
        assert calls == [1]

    def test_strong(self, bus, signal):
        """
        With weak=False a receiver stays, also one first connected weakly.
        """
        calls = []
        signal.connect(lambda sender: calls.append("lambda"), weak=False)
        receiver = recorder(calls)
        signal.connect(receiver)
        signal.connect(receiver, weak=False)
        del receiver
        gc.collect()
        bus.emit("epoch_end")
        assert calls == ["lambda", ("receiver", None)]

    def test_weak_impossible(self, signal):
        """
        What cannot be held weakly is refused with advice.
        """

        class Receiver:
            __slots__ = ()

            def __call__(self, sender):
                pass

        with pytest.raises(SubscriptionError, match=r"cannot be held weakly\. Connect it with weak=False"):
            signal.connect(Receiver())
        assert not signal.receivers

    @pytest.mark.parametrize(
        ("receiver", "match"),
        [
            (lambda: None, "takes no positional argument. Add a first parameter for the sender"),
            (lambda **payload: None, "takes no positional argument"),
            (lambda *, sender: None, "takes no positional argument"),
            (lambda handler, **payload: None, "first parameter 'handler' is a field"),
            (lambda sender, loss: None, "its parameter 'loss' is no field"),
        ],
    )
    def test_refused(self, signal, receiver, match):
        """
        A receiver that would fail when called is refused when it connects.
        """
        with pytest.raises(SubscriptionError, match=match):
            signal.connect(receiver)
        assert not signal.receivers

    def test_refused_async(self, signal):
        """
        An async receiver is refused.
        """

        async def receiver(sender, **payload):
            pass

        with pytest.raises(SubscriptionError, match="it is async"):
            signal.connect(receiver)

    def test_priority(self, bus, signal):
        """
        Connected receivers have priority 0, in one order with those of on.
        """
        calls = []
        first, second = recorder(calls, "first"), recorder(calls, "second")
        bus.on("epoch_end", lambda: calls.append("late"), priority=1)
        signal.connect(first, sender="me")
        bus.on("epoch_end", lambda: calls.append("between"))
        signal.connect(second)
        bus.on("epoch_end", lambda: calls.append("early"), priority=-1)

        bus.emit("epoch_end", "me")

        assert calls == ["early", ("first", "me"), "between", ("second", "me"), "late"]

    def test_via(self, bus, signal):
        """
        connect_via is a decorator for one sender.
        """
        calls = []

        @signal.connect_via("me")
        def receiver(sender, **payload):
            calls.append(sender)

        bus.emit("epoch_end", "me")
        bus.emit("epoch_end", "you")
        assert calls == ["me"]
        assert callable(receiver)

    def test_connected_to(self, bus, signal):
        """
        connected_to connects for a block.
        """
        calls = []
        with signal.connected_to(recorder(calls)):
            bus.emit("epoch_end", "me")
        bus.emit("epoch_end", "me")
        assert calls == [("receiver", "me")]


class TestDisconnect:
    def test_all(self, bus, signal):
        """
        It ends all the receiver's subscriptions to the event, those of on included.
        """
        calls = []

        def receiver(sender=None, **payload):
            calls.append(1)

        bus.on("epoch_end", receiver)
        bus.on("epoch_begin", receiver)
        signal.connect(receiver)
        bus.emit("epoch_end")
        assert len(calls) == 2

        signal.disconnect(receiver)
        bus.emit("epoch_end")
        assert len(calls) == 2
        bus.emit("epoch_begin")
        assert len(calls) == 3

    def test_sender(self, bus, signal):
        """
        With a sender it ends that connection alone; the last one ends the subscription.
        """
        calls = []
        receiver = recorder(calls)
        signal.connect(receiver, sender="a")
        signal.connect(receiver, sender="b")

        signal.disconnect(receiver, sender="a")
        bus.emit("epoch_end", "a")
        bus.emit("epoch_end", "b")
        assert calls == [("receiver", "b")]
        signal.disconnect(receiver, sender="b")
        assert not signal.receivers

    def test_one_sender_of_any(self, bus, signal):
        """
        One sender cannot be taken out of any, as in blinker, and receivers of on have no senders.
        """
        calls = []

        def other(sender=None):
            calls.append("on")

        receiver = recorder(calls)
        signal.connect(receiver)
        bus.on("epoch_end", other)
        signal.disconnect(receiver, sender="a")
        signal.disconnect(other, sender="a")
        bus.emit("epoch_end", "a")
        assert calls == [("receiver", "a"), "on"]

    def test_not_connected(self, signal):
        """
        Disconnecting what is not connected does nothing, as in blinker.
        """
        signal.disconnect(print)

    def test_off(self, bus, signal):
        """
        off also ends what connect made.
        """
        calls = []
        receiver = recorder(calls)
        signal.connect(receiver)
        bus.off("epoch_end", receiver)
        bus.emit("epoch_end")
        assert calls == []


class TestSend:
    def test_is_emit(self, bus, signal):
        """
        Sending is emitting: it returns all receivers called with their results, in order.
        """
        calls = []
        connected = recorder(calls, "connected")

        def subscribed(epoch):
            return epoch

        bus.on("epoch_end", subscribed)
        signal.connect(connected)
        bus.on("epoch_end", lambda: "filtered out", every=2)
        ignored = recorder(calls, "ignored")
        signal.connect(ignored, sender="you")

        assert signal.send("me", epoch=4) == [(subscribed, 4), (connected, "connected")]
        assert calls == [("connected", "me")]

    def test_delivers_posted(self, bus, signal):
        """
        What was posted comes first and is not among the results.
        """
        calls = []
        bus.on("epoch_begin", lambda: calls.append("posted"))
        bus.post("epoch_begin")
        assert signal.send() == []
        assert calls == ["posted"]

    def test_logged(self, bus, signal, caplog):
        """
        A receiver whose error was logged has no result.
        """
        bus.on("epoch_end", lambda logs: logs["loss"], on_error="log")
        assert signal.send() == []
        assert len(caplog.records) == 1

    def test_unknown_field(self, signal):
        """
        The payload is checked as by emit.
        """
        with pytest.raises(PayloadError, match="Did you mean 'logs'"):
            signal.send("me", log={})


class TestLooking:
    def test_receivers(self, bus, signal):
        """
        `receivers` is true as long as somebody listens, in whatever way.
        """
        assert not signal.receivers
        subscription = bus.on("epoch_end", lambda: None)
        assert signal.receivers
        subscription.cancel()
        assert not signal.receivers

    def test_receivers_gone(self, signal):
        """
        A receiver that is gone is not among them, even before the next event.
        """
        receiver = signal.connect(recorder([]))
        assert list(signal.receivers.values()) == [receiver]
        del receiver
        gc.collect()
        assert not signal.receivers
        assert not signal.has_receivers_for("me")

    def test_receivers_for(self, bus, signal):
        """
        It yields in order those whom an event of the sender would reach.
        """

        def subscribed():
            pass

        first, second = recorder([]), recorder([])
        signal.connect(first, sender="me")
        bus.on("epoch_end", subscribed, priority=-1)
        signal.connect(second)

        assert list(signal.receivers_for("me")) == [subscribed, first, second]
        assert list(signal.receivers_for("you")) == [subscribed, second]
        assert list(signal.receivers_for(blinker.ANY)) == [subscribed, second]

    def test_has_receivers_for(self, signal):
        """
        It tells whether an event of the sender would reach anybody.
        """
        receiver = recorder([])
        signal.connect(receiver, sender="me")
        assert signal.has_receivers_for("me")
        assert not signal.has_receivers_for("you")

    def test_notifications(self, signal):
        """
        blinker's signals about connecting and disconnecting are sent.
        """
        calls = []
        for name in ("receiver_connected", "receiver_disconnected"):
            notify = getattr(signal, name)
            notify.connect(lambda by, name=name, **info: calls.append((name, by, info)), weak=False)
        receiver = recorder([])

        signal.connect(receiver, sender="me")
        signal.disconnect(receiver)

        assert calls == [
            ("receiver_connected", signal, {"receiver": receiver, "sender": "me", "weak": True}),
            ("receiver_disconnected", signal, {"receiver": receiver, "sender": blinker.ANY}),
        ]


class TestRefused:
    def test_muted(self, signal):
        """
        Muting is refused with what to do instead.
        """
        with pytest.raises(TrainbusError, match=r"Cannot mute 'epoch_end'.*Subscription\.cancel\(\)"):
            signal.muted()

    def test_is_muted(self, signal):
        """
        It is never muted, and setting the attribute does not pretend so.
        """
        assert signal.is_muted is False
        with pytest.raises(AttributeError):
            signal.is_muted = True

    def test_send_async(self, signal):
        """
        Sending asynchronously is refused with what to do instead.
        """

        async def main():
            await signal.send_async("me", epoch=3)

        with pytest.raises(TrainbusError, match=r"Use send\(\), or bus\.post\(\)"):
            asyncio.run(main())

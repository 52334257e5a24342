"""Tests of the order of calls, of filters and of ending a subscription."""

from __future__ import annotations

import gc
import math
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainbus.bus import EventBus
from trainbus.errors import PayloadError
from trainbus.events import EVENTS
from trainbus.subscription import Channel, Subscription


def numbers_passed(numbers, event="epoch_end", field="epoch", **filters):
    """Return which of the *numbers* of a field reach a receiver with these filters."""
    bus = EventBus()
    passed = []
    bus.on(event, lambda **payload: passed.append(payload[field]), **filters)
    for number in numbers:
        bus.emit(event, **{field: number})
    return passed


class TestOrder:
    def test_subscription(self):
        """
        Receivers of one priority run in the order in which they subscribed, bound methods too.
        """

        class Receiver:
            def __init__(self, number):
                self.number = number

            def receive(self):
                calls.append(self.number)

        calls = []
        bus = EventBus()
        receivers = [Receiver(number) for number in range(8)]
        for receiver in receivers:
            bus.on("epoch_end", receiver.receive)

        bus.emit("epoch_end")

        assert calls == list(range(8))

    def test_priority(self):
        """
        Lower priorities run first, whenever they subscribed.
        """
        calls = []
        bus = EventBus()
        for priority in (100, 0, -5, 0.5):
            bus.on("epoch_end", lambda p=priority: calls.append(p), priority=priority)

        bus.emit("epoch_end")

        assert calls == [-5, 0, 0.5, 100]

    @settings(max_examples=150, deadline=None)
    @given(st.data())
    def test_any_mix(self, data):
        """
        Whatever the mix of on, connect, off, cancel and disconnect: priority, then subscription.
        """
        bus, calls, expected, known = EventBus(), [], [], []
        signal = bus.signal("epoch_end")
        for number in range(data.draw(st.integers(1, 25))):
            action = data.draw(st.sampled_from(("on", "on", "connect", "off", "cancel", "disconnect")))
            if action in ("on", "connect"):
                receiver = (lambda n: lambda sender=None, **payload: calls.append(n))(number)
                priority = data.draw(st.integers(-2, 2)) if action == "on" else 0
                if action == "on":
                    subscription = bus.on("epoch_end", receiver, priority=priority)
                else:
                    subscription = None
                    signal.connect(receiver)
                known.append((receiver, subscription, (priority, number)))
                expected.append((priority, number))
            elif known:
                place = data.draw(st.integers(0, len(known) - 1))
                receiver, subscription, key = known.pop(place)
                expected.remove(key)
                if action == "cancel" and subscription:
                    subscription.cancel()
                elif action == "disconnect":
                    signal.disconnect(receiver)
                else:
                    bus.off("epoch_end", receiver)
            calls.clear()
            bus.emit("epoch_end")
            assert calls == [number for _, number in sorted(expected)]

    def test_added_during_dispatch(self):
        """
        A receiver added while an event is delivered is first called at the next one.
        """
        calls = []
        bus = EventBus()

        def first():
            calls.append("first")
            bus.on("epoch_end", lambda: calls.append("added"), once=True)

        bus.on("epoch_end", first, once=True)

        bus.emit("epoch_end")
        assert calls == ["first"]
        bus.emit("epoch_end")
        assert calls == ["first", "added"]

    def test_cancelled_during_dispatch(self):
        """
        A receiver cancelled while an event is delivered is not called any more; the others are.
        """
        calls = []
        bus = EventBus()
        bus.on("epoch_end", lambda: second.cancel())
        second = bus.on("epoch_end", lambda: calls.append("second"))
        bus.on("epoch_end", lambda: calls.append("third"))

        bus.emit("epoch_end")

        assert calls == ["third"]

    def test_filtered_cancelled_during_dispatch(self):
        """
        The same holds for a receiver with filters.
        """
        calls = []
        bus = EventBus()
        bus.on("epoch_end", lambda: second.cancel())
        second = bus.on("epoch_end", lambda: calls.append("second"), once=True)

        bus.emit("epoch_end")

        assert calls == []

    def test_cancels_itself(self):
        """
        A receiver that cancels itself while it runs does not make the next one miss its turn.
        """
        calls = []
        bus = EventBus()
        first = bus.on("epoch_end", lambda: first.cancel())
        bus.on("epoch_end", lambda: calls.append("second"))

        bus.emit("epoch_end")
        bus.emit("epoch_end")

        assert calls == ["second", "second"]

    def test_subscribing_on_many_threads(self):
        """
        Subscribing and cancelling on several threads at once loses nobody.
        """
        calls = []
        bus = EventBus()
        start = threading.Barrier(4)

        def work():
            start.wait(30)
            for _ in range(100):
                bus.on("epoch_end", lambda: None).cancel()
                bus.on("epoch_end", lambda: calls.append(1))

        threads = [threading.Thread(target=work) for _ in range(4)]
        interval = sys.getswitchinterval()
        try:
            sys.setswitchinterval(1e-6)
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(60)
        finally:
            sys.setswitchinterval(interval)
        bus.emit("epoch_end")

        assert len(calls) == 400


class TestFilter:
    @pytest.mark.parametrize(
        ("filters", "epochs"),
        [
            ({}, [0, 1, 2, 3, 4, 5, 6]),
            ({"every": 3}, [2, 5]),
            ({"after": 4}, [4, 5, 6]),
            ({"before": 3}, [0, 1]),
            ({"every": 2, "after": 2, "before": 7}, [3, 5]),
            ({"every": 1, "after": -1}, [0, 1, 2, 3, 4, 5, 6]),
        ],
    )
    def test_epochs(self, filters, epochs):
        """
        Filters go by epoch + 1, both limits excluded.
        """
        assert numbers_passed(range(7), **filters) == epochs

    def test_begins_late(self):
        """
        Filters go by the event's own number, not by calls, so they agree after a resume.
        """
        assert numbers_passed([4, 5, 6, 7], every=3) == [5]

    def test_batches(self):
        """
        For training batches the number is that of the steps completed at their end.
        """
        end = numbers_passed(range(1, 8), "train_batch_end", "global_step", every=3)
        begin = numbers_passed(range(7), "train_batch_begin", "global_step", every=3)
        assert end == [3, 6]
        assert begin == [2, 5]

    def test_calls(self):
        """
        For events without a number a subscription counts the calls since it began.
        """
        assert numbers_passed(range(7), "exception", "error", every=2) == [1, 3, 5]

    def test_handler(self):
        """
        A number that the emitter left to the handler counts as well.
        """

        class Handler:
            epoch, batch, global_step = 5, 0, 0

        bus, calls = EventBus(), []
        bus.handler = Handler()
        bus.on("epoch_end", lambda: calls.append(1), every=6)

        bus.emit("epoch_end")

        assert calls == [1]

    def test_declared_number(self):
        """
        A declared event's number is what its function tells.
        """
        bus, calls = EventBus(), []
        bus.declare("game_over", ["score"], number=lambda payload: payload["score"])
        bus.on("game_over", lambda score: calls.append(score), every=5)

        for score in (4, 5, 10):
            bus.emit("game_over", score=score)

        assert calls == [5, 10]

    def test_declared_number_missing(self):
        """
        A field that the event's number needs and nobody gave is an error that names it.
        """
        bus = EventBus()
        bus.declare("game_over", ["score"], number=lambda payload: payload["score"])
        bus.on("game_over", lambda: None, every=5)

        with pytest.raises(PayloadError, match="needs the field 'score'"):
            bus.emit("game_over")

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"every": 0}, "every must be at least 1, got 0"),
            ({"every": -2}, "every must be at least 1, got -2"),
            ({"every": True}, "every must be an int, got True"),
            ({"every": 2.0}, r"every must be an int, got 2\.0"),
            ({"every": None}, "every must be an int, got None"),
            ({"after": None}, "after must be an int, got None"),
            ({"after": False}, "after must be an int, got False"),
            ({"before": "3"}, "before must be an int, got '3'"),
            ({"after": 4, "before": 5}, "No number is greater than after=4 and smaller than before=5"),
            ({"priority": "high"}, "priority must be a number, got 'high'"),
            ({"priority": True}, "priority must be a number, got True"),
            ({"priority": float("nan")}, "priority must be a number, got nan"),
            ({"on_error": "ignore"}, "on_error must be 'raise' or 'log', got 'ignore'"),
        ],
    )
    def test_refused(self, options, match):
        """
        An option out of range is an error that names it, its value and the rule; nothing is subscribed.
        """
        bus = EventBus()
        with pytest.raises(ValueError, match=match):
            bus.on("epoch_end", lambda: None, **options)
        assert not bus.signal("epoch_end").receivers


class TestNumbers:
    @pytest.mark.parametrize("one", [np.int64(1), np.array(1), torch.tensor(1), 1.0])
    def test_of_other_libraries(self, one):
        """
        Integers of NumPy and torch are numbers of events as well, and floats that are whole.
        """
        assert numbers_passed([0, one, 2], every=2) == [one]

    @pytest.mark.parametrize("epoch", ["one", None, [1], math.nan, math.inf, np.ones(2)])
    def test_that_are_none(self, epoch):
        """
        What is no number is told to be so where a filter goes by it, with the one who emitted it.
        """
        bus, called = EventBus(), []
        bus.on("epoch_end", lambda: called.append(1), every=2)

        with pytest.raises(
            PayloadError, match=r"emitted by .*test_that_are_none .* cannot be told from epoch="
        ):
            bus.emit("epoch_end", epoch=epoch)
        assert called == []

    def test_without_a_filter(self):
        """
        Where nothing goes by the number it may be anything.
        """
        bus, seen = EventBus(), []
        bus.on("epoch_end", lambda epoch: seen.append(epoch))
        bus.emit("epoch_end", epoch="one")

        assert seen == ["one"]


class TestOnce:
    def test_once(self):
        """
        A receiver with once is called once and then forgotten.
        """
        bus, calls = EventBus(), []
        subscription = bus.on("epoch_end", lambda: calls.append(1), once=True)

        bus.emit("epoch_end")
        bus.emit("epoch_end")

        assert calls == [1]
        assert not subscription.active

    def test_with_filter(self):
        """
        Occurrences that a filter keeps out do not use it up.
        """
        assert numbers_passed(range(7), every=3, once=True) == [2]

    def test_emits_the_same(self):
        """
        One that emits the same event while it runs is not called again.
        """
        bus, calls = EventBus(), []

        def receiver():
            calls.append(1)
            bus.emit("epoch_end")

        bus.on("epoch_end", receiver, once=True)
        bus.emit("epoch_end")

        assert calls == [1]

    def test_missing_field(self):
        """
        An event that lacks a field the receiver needs does not use it up.
        """
        bus, calls = EventBus(), []
        bus.on("train_end", lambda reason: calls.append(reason), once=True)

        with pytest.raises(PayloadError):
            bus.emit("train_end")
        bus.emit("train_end", reason="done")

        assert calls == ["done"]


class TestSubscription:
    def test_cancel(self):
        """
        Cancelling ends the calls, and again it does nothing.
        """
        bus, calls = EventBus(), []
        subscription = bus.on("epoch_end", lambda: calls.append(1))
        assert subscription.active

        subscription.cancel()
        subscription.cancel()
        bus.emit("epoch_end")

        assert calls == []
        assert not subscription.active

    def test_context_manager(self):
        """
        As a context manager it ends with the block, also by an exception.
        """
        bus, calls = EventBus(), []
        with pytest.raises(RuntimeError), bus.on("epoch_end", lambda: calls.append(1)) as subscription:
            bus.emit("epoch_end")
            raise RuntimeError

        bus.emit("epoch_end")

        assert calls == [1]
        assert not subscription.active

    def test_kept_alive(self):
        """
        The bus keeps a receiver that nobody else refers to, until it is cancelled.
        """

        class Receiver:
            def receive(self):
                calls.append(1)

        bus, calls = EventBus(), []
        receiver = Receiver()
        gone = weakref.ref(receiver)
        subscription = bus.on("epoch_end", receiver.receive)
        del receiver
        gc.collect()

        bus.emit("epoch_end")
        assert calls == [1]
        subscription.cancel()
        gc.collect()
        assert gone() is None

    def test_repr(self):
        """
        The repr tells event, receiver, options and whether it has ended.
        """
        subscription = EventBus().on("epoch_end", object, priority=3, every=2, once=True)
        assert repr(subscription) == (
            "<Subscription 'epoch_end' -> object priority=3 every=2 after=0 before=None once>"
        )
        assert subscription.name == "epoch_end"
        subscription.cancel()
        assert repr(subscription).endswith(" (cancelled)>")


class TestChannel:
    def make(self, receiver):
        channel = Channel(EVENTS["epoch_end"])
        subscription = Subscription(channel, receiver)
        channel.add(subscription)
        return channel, subscription

    def test_cancelled(self):
        """
        What was cancelled is forgotten, so a long run does not collect it.
        """
        channel, subscription = self.make(lambda: None)
        assert channel.subscriptions == (subscription,)
        subscription.cancel()
        assert channel.subscriptions == ()

    def test_gone(self):
        """
        A weakly held receiver that is gone is forgotten at the next event.
        """

        def receiver():
            pass

        channel, subscription = self.make(receiver)
        subscription.hold(receiver, weak=True)
        del receiver
        gc.collect()
        assert not subscription.active
        assert subscription.admit(None, {}, None) is None
        assert channel.subscriptions == ()

"""Tests of callbacks: how their methods are found and subscribed, and their state."""

from __future__ import annotations

import dataclasses
import gc

import pytest

from trainbus.bus import EventBus
from trainbus.callback import Callback
from trainbus.errors import StateMismatchError, SubscriptionError, UnknownEventError


class Recorder(Callback):
    """Notes some events, without calling the base's __init__."""

    def __init__(self, trace=None, name="recorder"):
        self.trace = [] if trace is None else trace
        self.name = name

    def on_epoch_begin(self):
        self.trace.append(self.name)

    def on_epoch_end(self, epoch, logs):
        self.trace.append((self.name, epoch, logs))


@pytest.fixture
def bus():
    return EventBus()


class TestAttach:
    def test_methods(self, bus):
        """
        Each on_<event> method receives its event with the fields it names.
        """
        callback = Recorder()
        callback.attach(bus)

        bus.emit("epoch_begin")
        bus.emit("epoch_end", epoch=3)
        bus.emit("train_end")

        assert callback.trace == ["recorder", ("recorder", 3, {})]

    def test_inherited_and_instance(self, bus):
        """
        Inherited methods count, and callables that only the instance has.
        """

        class Child(Recorder):
            def on_train_end(self):
                self.trace.append("child")

        callback = Child()
        callback.on_val_end = lambda: callback.trace.append("instance")
        callback.attach(bus)
        for event in ("epoch_begin", "val_end", "train_end"):
            bus.emit(event)

        assert callback.trace == ["recorder", "instance", "child"]

    def test_static_and_class_methods(self, bus):
        """
        Static methods and class methods are receivers like others.
        """
        calls = []

        class Mixed(Callback):
            @staticmethod
            def on_epoch_begin(epoch):
                calls.append(epoch)

            @classmethod
            def on_epoch_end(cls, epoch):
                calls.append(cls)

        Mixed().attach(bus)
        bus.emit("epoch_begin")
        bus.emit("epoch_end")
        assert calls == [0, Mixed]

    def test_not_callable(self, bus):
        """
        An attribute that merely begins with on_ is none of the bus's business.
        """

        class Setting(Recorder):
            on_error = "log"

        Setting().attach(bus)

    def test_dataclass(self, bus):
        """
        A dataclass, which is not hashable, may be a callback.
        """

        @dataclasses.dataclass
        class Counter(Callback):
            count: int = 0

            def on_epoch_end(self):
                self.count += 1

        counter = Counter()
        counter.attach(bus)
        Counter().attach(bus)
        bus.emit("epoch_end")
        assert counter.count == 1

    def test_declared(self, bus):
        """
        Events added by declare are received, too.
        """

        class Game(Recorder):
            def on_game_over(self, score):
                self.trace.append(score)

        bus.declare("game_over", ["score"])
        callback = Game()
        callback.attach(bus)
        bus.emit("game_over", score=12)
        assert callback.trace == [12]

    def test_misspelt(self, bus):
        """
        A method that no event would ever call is an error, and nothing is subscribed.
        """

        class Misspelt(Recorder):
            def on_epch_end(self):
                pass

        callback = Misspelt()
        match = (
            r"Cannot attach Misspelt: there is no event for its method 'on_epch_end'. "
            r"Did you mean 'on_epoch_end'\? Events: train_begin, .*Rename the method"
        )
        with pytest.raises(UnknownEventError, match=match):
            callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == []

    def test_all_or_nothing(self, bus):
        """
        If one method is refused, none is subscribed, and it may be attached once it is mended.
        """

        class Wrong(Recorder):
            def on_train_end(self, epoch, los):
                pass

        callback = Wrong()
        with pytest.raises(SubscriptionError, match=r"Wrong\.on_train_end .* its parameter 'los'"):
            callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == []
        assert not bus.signal("epoch_begin").receivers

        callback.on_train_end = lambda: None
        callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == ["recorder"]

    def test_bad_priority(self, bus):
        """
        A priority that is no number is refused before anything is subscribed.
        """
        callback = Recorder()
        callback.priority = "high"
        with pytest.raises(ValueError, match="priority must be a number, got 'high'"):
            callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == []

    def test_twice(self, bus):
        """
        Attaching twice to one bus is an error with the next step, and does no harm.
        """
        callback = Recorder()
        callback.attach(bus)
        with pytest.raises(SubscriptionError, match=r"Cannot attach Recorder: .* Call detach\(\) first"):
            callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == ["recorder"]

    def test_two_buses(self, bus):
        """
        A callback may be attached to several buses.
        """
        callback, other = Recorder(), EventBus()
        callback.attach(bus)
        callback.attach(other)
        bus.emit("epoch_begin")
        other.emit("epoch_begin")
        assert callback.trace == ["recorder", "recorder"]

    def test_priority(self, bus):
        """
        The callback's priority is that of all its methods.
        """
        trace = []
        late, early = Recorder(trace, "late"), Recorder(trace, "early")
        late.priority = 100
        late.attach(bus)
        early.attach(bus)
        bus.emit("epoch_begin")
        bus.emit("epoch_end")
        assert trace == ["early", "late", ("early", 0, {}), ("late", 0, {})]

    def test_kept_alive(self, bus):
        """
        The bus keeps a callback that nobody else refers to.
        """
        trace = []
        Recorder(trace).attach(bus)
        gc.collect()
        bus.emit("epoch_begin")
        assert trace == ["recorder"]


class TestDetach:
    def test_all(self, bus):
        """
        Detaching ends all subscriptions on all buses; then it may be attached again.
        """
        callback, other = Recorder(), EventBus()
        callback.attach(bus)
        callback.attach(other)

        callback.detach()
        callback.detach()
        bus.emit("epoch_begin")
        other.emit("epoch_end")
        assert callback.trace == []

        callback.attach(bus)
        bus.emit("epoch_begin")
        assert callback.trace == ["recorder"]

    def test_others_stay(self, bus):
        """
        Another instance of the class stays attached.
        """
        one, two = Recorder(), Recorder()
        one.attach(bus)
        two.attach(bus)
        one.detach()
        bus.emit("epoch_begin")
        assert (one.trace, two.trace) == ([], ["recorder"])


class TestState:
    def test_default(self):
        """
        A callback has no state unless it says so, and its key is the name of its class.
        """
        callback = Recorder()
        assert callback.state_dict() == {}
        assert callback.state_key == "Recorder"
        callback.load_state_dict({})

    def test_nowhere_to_go(self):
        """
        A state for a class that cannot take it over is an error, not a silent loss.
        """
        with pytest.raises(StateMismatchError, match=r"keys \['best'\]: .* defines no load_state_dict"):
            Recorder().load_state_dict({"best": 3})

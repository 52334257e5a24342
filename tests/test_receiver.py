"""Tests of what signatures a receiver may have and how it is then called."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from trainbus.bus import EventBus
from trainbus.errors import PayloadError, SubscriptionError
from trainbus.events import EVENTS
from trainbus.receiver import describe

COMMON = {"handler": None, "epoch": 3, "batch": 0, "global_step": 0, "logs": {"loss": 0.5}}


def received(make, /, event="epoch_end", **payload):
    """Return what the receiver that *make* returns is called with, by emitting an event to it."""
    calls = []
    bus = EventBus()
    bus.on(event, make(calls.append))
    bus.emit(event, **payload)
    (call,) = calls
    return call


class TestArguments:
    def test_named(self):
        """
        A receiver gets the fields that it names, in whatever order.
        """
        call = received(lambda note: lambda logs, epoch: note((logs, epoch)), epoch=3, logs={"loss": 0.5})
        assert call == ({"loss": 0.5}, 3)

    def test_one(self):
        """
        A receiver may name a single field.
        """
        assert received(lambda note: lambda epoch: note(epoch), epoch=3) == 3

    def test_none(self):
        """
        A receiver may want nothing.
        """
        assert received(lambda note: lambda: note("called"), epoch=3) == "called"

    def test_everything(self):
        """
        A receiver with **payload gets all fields, the filled ones included.
        """
        call = received(lambda note: lambda **payload: note(payload), epoch=3, logs={"loss": 0.5})
        assert call == COMMON

    def test_named_and_everything(self):
        """
        What a receiver names is not in its **payload.
        """
        call = received(
            lambda note: lambda epoch, **payload: note((epoch, payload)), epoch=3, logs={"loss": 0.5}
        )
        assert call == (3, {name: value for name, value in COMMON.items() if name != "epoch"})

    def test_keyword_only(self):
        """
        Keyword-only parameters are filled like others.
        """
        assert received(lambda note: lambda *, epoch, batch: note((epoch, batch)), epoch=3) == (3, 0)

    def test_positional_only(self):
        """
        Positional-only parameters are fine if they are fields.
        """

        def make(note):
            def receiver(epoch, logs, /, **payload):
                note((epoch, logs, sorted(payload)))

            return receiver

        assert received(make, epoch=3) == (3, {}, ["batch", "global_step", "handler"])

    def test_positional_only_with_default(self):
        """
        One positional-only field that was not given does not shift the next.
        """

        def make(note):
            def receiver(error=None, verbose=True, epoch=-1, /):
                note((error, verbose, epoch))

            return receiver

        assert received(make, "exception", epoch=3) == (None, True, 3)

    def test_default_that_is_a_field(self):
        """
        A parameter with a default gets the field when it was given, else keeps its default.
        """

        def make(note):
            def receiver(epoch, reason="none"):
                note((epoch, reason))

            return receiver

        assert received(make, "train_end", epoch=3, reason="stopped") == (3, "stopped")
        assert received(make, "train_end", epoch=3) == (3, "none")

    def test_default_that_is_no_field(self):
        """
        A parameter with a default that is no field keeps it, and those behind it are filled.
        """

        def make(note):
            def receiver(epoch, verbose=True, logs=None):
                note((epoch, verbose, logs))

            return receiver

        assert received(make, epoch=3) == (3, True, {})

    def test_common_with_default(self):
        """
        Common fields are always there, so their defaults are never used.
        """
        assert received(lambda note: lambda logs=None, epoch=9: note((logs, epoch))) == ({}, 0)

    def test_partial(self):
        """
        What a partial has bound stays as bound, also if it is a field.
        """

        def make(note):
            def receiver(prefix, epoch, logs, batch):
                note((prefix, epoch, logs, batch))

            return functools.partial(receiver, "run", logs="mine")

        assert received(make, epoch=3) == ("run", 3, "mine", 0)

    def test_partial_of_everything(self):
        """
        A partial's bound field is not overwritten by **payload.
        """
        call = received(lambda note: functools.partial(lambda **payload: note(payload), epoch="mine"))
        assert call["epoch"] == "mine"
        assert call["batch"] == 0

    def test_callable_object_and_class(self):
        """
        Callable objects, classes and methods of builtins are receivers, too.
        """

        class Receiver:
            def __call__(self, epoch):
                calls.append(("object", epoch))

        class Made:
            def __init__(self, epoch):
                calls.append(("class", epoch))

        calls = []
        bus = EventBus()
        bus.on("epoch_end", Receiver())
        bus.on("epoch_end", Made)

        bus.emit("epoch_end", epoch=3)

        assert calls == [("object", 3), ("class", 3)]

    def test_dataclass(self):
        """
        An object that is not hashable may be a receiver.
        """

        @dataclasses.dataclass
        class Receiver:
            calls: list

            def __call__(self, epoch):
                self.calls.append(epoch)

        receiver, bus = Receiver([]), EventBus()
        bus.on("epoch_end", receiver)

        bus.emit("epoch_end", epoch=3)

        assert receiver.calls == [3]

    def test_decorated(self):
        """
        A decorator that keeps the signature may have *args itself.
        """

        def make(note):
            def receiver(epoch):
                note(epoch)

            @functools.wraps(receiver)
            def wrapper(*args, **kwargs):
                return receiver(*args, **kwargs)

            return wrapper

        assert received(make, epoch=3) == 3


class TestRefused:
    def refuse(self, receiver, match, event="epoch_end"):
        bus = EventBus()
        with pytest.raises(SubscriptionError, match=match):
            bus.on(event, receiver)
        bus.emit(event)

    def test_unknown_parameter(self):
        """
        The error names receiver, parameter, event, fields and the nearest field.
        """
        match = (
            r"Cannot subscribe .*<lambda> \(.*test_receiver.py:\d+\) to 'epoch_end': its parameter 'log' "
            r"is no field of the event. Did you mean 'logs'\? "
            r"Fields: handler, epoch, batch, global_step, logs\. Rename it"
        )
        self.refuse(lambda epoch, log: None, match)

    def test_field_of_another_event(self):
        """
        A field that only other events have is refused.
        """
        self.refuse(lambda path: None, "its parameter 'path' is no field")

    def test_star_args(self):
        """
        *args is refused with advice, since fields have names.
        """
        self.refuse(lambda *args: None, r"\*args would stay empty.*Name those you want.*functools\.wraps")
        self.refuse(lambda *args, **payload: None, r"\*args would stay empty")

    def test_positional_only_that_is_no_field(self):
        """
        A positional-only parameter that is no field cannot be filled.
        """
        self.refuse([].append, "its parameter 'object' is no field")

    def test_no_signature(self):
        """
        A builtin without a signature is refused with advice.
        """
        self.refuse(iter, "Python knows no signature of it.*lambda logs")

    @pytest.mark.parametrize("receiver", [3, "print", []])
    def test_not_callable(self, receiver):
        """
        What cannot be called is refused.
        """
        self.refuse(receiver, "is not callable. Pass a function")

    def test_async(self):
        """
        Async functions are refused in every disguise, since nobody would await them.
        """

        async def function(epoch):
            pass

        async def generator(epoch):
            yield

        class Receiver:
            async def __call__(self, epoch):
                pass

            async def method(self, epoch):
                pass

        for receiver in (
            function,
            generator,
            Receiver(),
            Receiver().method,
            functools.partial(function),
            functools.partial(functools.partial(Receiver()), 3),
        ):
            self.refuse(receiver, "it is async, and nobody would await it. Make it a plain function")

    def test_generator(self):
        """
        A generator function is refused, since calling it runs nothing.
        """

        def generator(epoch):
            yield

        self.refuse(generator, "whose body would never run. Remove the yield")


class TestMissing:
    def test_error(self):
        """
        A field that a receiver needs and nobody gave is an error that names emitter and receiver.
        """
        bus = EventBus()
        bus.on("train_end", lambda reason: None)

        match = (
            r"Cannot deliver event 'train_end', emitted by .*test_error \(.*test_receiver.py:\d+\), "
            r"to .*<lambda> \(.*test_receiver.py:\d+\): it needs the field 'reason'.*reason=\.\.\."
        )
        with pytest.raises(PayloadError, match=match):
            bus.emit("train_end")
        with pytest.raises(PayloadError, match=match):
            bus.signal("train_end").send()

    def test_posted(self):
        """
        For a posted event the error names who posted it.
        """

        def poster():
            bus.post("train_end")

        bus = EventBus()
        bus.on("train_end", lambda reason: None)
        poster()

        with pytest.raises(PayloadError, match=r"emitted by .*test_posted\.<locals>\.poster \("):
            bus.drain()

    def test_key_error_of_receiver(self):
        """
        A KeyError inside a receiver is not taken for a missing field.
        """
        bus = EventBus()
        bus.on("epoch_end", lambda logs: logs["val_loss"])

        with pytest.raises(KeyError, match="val_loss"):
            bus.emit("epoch_end")


class TestDescribe:
    def test_function(self):
        """
        A function is described by its qualified name and its place, through partials.
        """

        def function():
            pass

        place = rf"TestDescribe.test_function.<locals>.function ({__file__}:"
        assert describe(function).startswith(place)
        assert describe(functools.partial(function)).startswith(place)

    def test_object(self):
        """
        What has no source is described by its name, an object by that of its class.
        """

        class Receiver:
            def __call__(self):
                pass

        assert describe(Receiver()).endswith("<locals>.Receiver")
        assert describe(print) == "print"


def test_common_fields_of_all_events():
    """
    A receiver of the common fields fits every event.
    """
    bus = EventBus()
    for name in EVENTS:
        bus.on(name, lambda handler, epoch, batch, global_step, logs: None)

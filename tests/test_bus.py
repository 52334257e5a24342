"""Tests of the event bus: what is emitted, on which thread, and where errors go."""

from __future__ import annotations

import logging
import threading
from types import MappingProxyType

import pytest

from trainbus.bus import EventBus
from trainbus.errors import PayloadError, SubscriptionError, UnknownEventError, WrongThreadError


class Handler:
    """What a bus reads of its handler."""

    epoch, batch, global_step = 4, 7, 107


class Traced:
    """A bus of which some events leave a trace, and may raise."""

    def __init__(self, *names):
        self.bus = EventBus()
        self.trace = []
        for name in names:
            self.bus.on(name, lambda name=name: self.trace.append(name))

    def fail(self, name, error, **options):
        """Subscribe a receiver that leaves a trace and raises."""

        def receiver():
            self.trace.append(f"{name} raises")
            raise error

        return self.bus.on(name, receiver, **options)


def on_thread(function, name="other"):
    """Call *function* on a new thread and raise here what it raises."""
    errors = []

    def work():
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name=name)
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def notes(error):
    return " ".join(error.__notes__)


class TestOn:
    def test_call(self):
        """
        Called with a function it returns the subscription.
        """
        traced = Traced()
        subscription = traced.bus.on("epoch_end", lambda: traced.trace.append("called"))

        traced.bus.emit("epoch_end")

        assert subscription.active
        assert traced.trace == ["called"]

    def test_decorator(self):
        """
        As a decorator it subscribes with its options and returns the function unchanged.
        """
        bus, calls = EventBus(), []

        def function(epoch):
            calls.append(epoch)

        assert bus.on("epoch_end", every=2)(function) is function
        for epoch in range(4):
            bus.emit("epoch_end", epoch=epoch)

        assert calls == [1, 3]

    def test_unknown_event(self):
        """
        A misspelt name is an error with the nearest and all known ones, before anything is decorated.
        """
        match = r"Unknown event 'epoch_edn'. Did you mean 'epoch_end'\? Known events: train_begin, .*declare"
        for misuse in (
            lambda bus: bus.on("epoch_edn", print),
            lambda bus: bus.on("epoch_edn"),
            lambda bus: bus.off("epoch_edn", print),
            lambda bus: bus.emit("epoch_edn"),
            lambda bus: bus.post("epoch_edn"),
            lambda bus: bus.signal("epoch_edn"),
        ):
            with pytest.raises(UnknownEventError, match=match):
                misuse(EventBus())

    def test_decorator_without_name(self):
        """
        The decorator without its parentheses is an error.
        """
        with pytest.raises(UnknownEventError, match="Unknown event <function"):
            EventBus().on(lambda: None)

    def test_two_buses(self):
        """
        Two buses share nothing but the names.
        """
        one, two = Traced("epoch_end"), Traced("epoch_end")
        one.bus.declare("mine")

        one.bus.emit("epoch_end")

        assert (one.trace, two.trace) == (["epoch_end"], [])
        assert "mine" not in two.bus.events


class TestOff:
    def test_all(self):
        """
        All subscriptions of a function to the event end, those to other events stay.
        """
        calls = []

        def function():
            calls.append(1)

        bus = EventBus()
        for name in ("epoch_end", "epoch_end", "epoch_begin"):
            bus.on(name, function)

        bus.off("epoch_end", function)
        bus.emit("epoch_end")
        assert calls == []
        bus.emit("epoch_begin")
        assert calls == [1]

    def test_methods(self):
        """
        A method of the same object is the same receiver, that of an equal one is not.
        """

        class Receiver:
            def __eq__(self, other):
                return True

            __hash__ = None

            def receive(self):
                calls.append(self)

        bus, calls = EventBus(), []
        one, two = Receiver(), Receiver()
        bus.on("epoch_end", one.receive)
        bus.on("epoch_end", two.receive)

        bus.off("epoch_end", one.receive)
        bus.emit("epoch_end")

        assert len(calls) == 1
        assert calls[0] is two

    def test_equal_objects(self):
        """
        Callable objects are told apart by identity, however they define equality.
        """

        class Receiver:
            def __eq__(self, other):
                return True

            __hash__ = None

            def __call__(self):
                pass

        bus = EventBus()
        bus.on("epoch_end", Receiver())
        with pytest.raises(SubscriptionError):
            bus.off("epoch_end", Receiver())

    def test_not_subscribed(self):
        """
        A function that is not subscribed is an error with the next step.
        """
        with pytest.raises(SubscriptionError, match=r"not subscribed to it.*keep the Subscription that"):
            EventBus().off("epoch_end", print)


class TestEmit:
    def test_filled_without_handler(self):
        """
        Without a handler, common fields left out are None, 0 and an empty dict of its own.
        """
        bus, calls = EventBus(), []
        bus.on("epoch_end", lambda **payload: calls.append(payload))

        bus.emit("epoch_end")
        bus.emit("epoch_end")

        assert calls[0] == {"handler": None, "epoch": 0, "batch": 0, "global_step": 0, "logs": {}}
        assert calls[0]["logs"] is not calls[1]["logs"]

    def test_filled_from_handler(self):
        """
        With a handler they come from it; what was given has precedence.
        """
        bus, calls = EventBus(), []
        bus.handler = Handler()
        bus.on("epoch_end", lambda **payload: calls.append(payload))

        bus.emit("epoch_end", epoch=9)

        assert calls == [{"handler": bus.handler, "epoch": 9, "batch": 7, "global_step": 107, "logs": {}}]

    def test_handed_on(self):
        """
        Values reach the receivers as they are, without copies.
        """
        bus, calls = EventBus(), []
        bus.on("epoch_end", lambda logs: calls.append(logs))
        logs = {"loss": 0.5}

        bus.emit("epoch_end", logs=logs)

        assert calls[0] is logs

    @pytest.mark.parametrize("listening", [True, False])
    def test_unknown_field(self, listening):
        """
        A field that the event does not have is an error, with or without receivers.
        """
        traced = Traced(*["epoch_end"] * listening)
        match = r"Cannot emit 'epoch_end' with 'log': .* Did you mean 'logs'\? Fields: handler, .*declare"
        with pytest.raises(PayloadError, match=match):
            traced.bus.emit("epoch_end", log={})
        assert traced.trace == []

    @pytest.mark.parametrize("logs", [[0.5], 0.5, "loss", {"loss"}, lambda: {}])
    @pytest.mark.parametrize("send", ["emit", "post"])
    def test_logs_without_names(self, send, logs):
        """
        Logs that are no mapping are refused where they are sent, not where a receiver reads them.
        """
        traced = Traced("epoch_end")
        with pytest.raises(
            PayloadError, match=r"Cannot emit 'epoch_end' with logs=.*: logs are metrics by name"
        ):
            getattr(traced.bus, send)("epoch_end", logs=logs)
        traced.bus.drain()
        assert traced.trace == []

    def test_no_logs(self):
        """
        None stands for no logs, and any mapping will do.
        """
        traced = Traced("epoch_end")
        for logs in (None, {}, MappingProxyType({"loss": 0.5})):
            traced.bus.emit("epoch_end", logs=logs)

        assert traced.trace == ["epoch_end"] * 3

    def test_nested(self):
        """
        An event emitted by a receiver is delivered at once, and the outer one goes on.
        """
        traced = Traced("epoch_begin")
        traced.bus.on("epoch_begin", lambda: traced.bus.emit("epoch_end"))
        traced.bus.on("epoch_begin", lambda: traced.trace.append("goes on"))
        traced.bus.on("epoch_end", lambda: traced.trace.append("nested"))

        traced.bus.emit("epoch_begin")

        assert traced.trace == ["epoch_begin", "nested", "goes on"]

    def test_error(self):
        """
        An exception ends the dispatch and reaches the emitter as it is, with a note of its origin.
        """
        traced = Traced()
        traced.fail("epoch_end", error := ValueError("broken"))
        traced.bus.on("epoch_end", lambda: traced.trace.append("too late"))

        with pytest.raises(ValueError, match="broken") as info:
            traced.bus.emit("epoch_end")

        assert info.value is error
        assert traced.trace == ["epoch_end raises"]
        assert "Traced.fail.<locals>.receiver" in notes(error)
        assert "test_bus.py" in notes(error)
        assert "'epoch_end'" in notes(error)

    def test_error_raised_again(self):
        """
        An exception object that is raised again and again does not collect notes.
        """
        traced = Traced()
        traced.fail("epoch_end", error := ValueError("broken"))
        for _ in range(3):
            with pytest.raises(ValueError):
                traced.bus.emit("epoch_end")
        assert len(error.__notes__) == 1

    def test_after_error(self):
        """
        After an exception the bus works as before, posted events included.
        """
        traced = Traced("epoch_begin", "train_end")
        traced.fail("epoch_end", ValueError())
        with pytest.raises(ValueError):
            traced.bus.emit("epoch_end")
        traced.trace.clear()

        traced.bus.post("epoch_begin")
        traced.bus.emit("train_end")

        assert traced.trace == ["epoch_begin", "train_end"]

    def test_on_error_log(self, caplog):
        """
        With on_error="log" the exception is logged with its traceback and the others are called.
        """
        traced = Traced()
        traced.fail("epoch_end", ValueError("broken"), on_error="log")
        traced.bus.on("epoch_end", lambda: traced.trace.append("goes on"))

        with caplog.at_level(logging.ERROR, logger="trainbus"):
            traced.bus.emit("epoch_end")

        assert traced.trace == ["epoch_end raises", "goes on"]
        (record,) = caplog.records
        assert (record.name, record.levelname) == ("trainbus", "ERROR")
        assert "receiver" in record.getMessage()
        assert "'epoch_end'" in record.getMessage()
        assert record.exc_info[0] is ValueError

    @pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
    @pytest.mark.parametrize("on_error", ["raise", "log"])
    def test_interrupt(self, kind, on_error):
        """
        KeyboardInterrupt and SystemExit are raised at once, also with on_error="log".
        """
        traced = Traced()
        traced.fail("epoch_end", kind(), on_error=on_error)
        traced.bus.on("epoch_end", lambda: traced.trace.append("too late"))

        with pytest.raises(kind):
            traced.bus.emit("epoch_end")

        assert traced.trace == ["epoch_end raises"]


class TestThreads:
    def test_foreign_emit(self):
        """
        Emitting on a thread that does not own the bus is an error that names post.
        """
        traced = Traced("epoch_end")
        match = r"Cannot emit 'epoch_end' on thread 'other': .* 'MainThread'.* Use bus\.post"
        with pytest.raises(WrongThreadError, match=match):
            on_thread(lambda: traced.bus.emit("epoch_end"))
        assert traced.trace == []

    def test_foreign_send(self):
        """
        Sending the blinker way on a thread that does not own the bus is the same error.
        """
        signal = EventBus().signal("epoch_end")
        with pytest.raises(WrongThreadError, match=r"Use bus\.post"):
            on_thread(signal.send)

    def test_train_begin(self):
        """
        Who emits train_begin owns the bus from then on.
        """
        traced = Traced("train_begin", "epoch_end")

        def train():
            traced.bus.emit("train_begin")
            traced.bus.emit("epoch_end")
            traced.bus.drain()

        on_thread(train, "trainer")

        assert traced.trace == ["train_begin", "epoch_end"]
        with pytest.raises(WrongThreadError, match="belongs to thread 'trainer'"):
            traced.bus.emit("epoch_end")

    def test_train_begin_during_dispatch(self):
        """
        While an event is delivered, no other thread can take the bus over.
        """
        bus = EventBus()
        bus.on("epoch_end", lambda: on_thread(lambda: bus.emit("train_begin")))
        with pytest.raises(WrongThreadError):
            bus.emit("epoch_end")
        bus.emit("epoch_begin")

    def test_refused_train_begin(self):
        """
        A train_begin that is refused does not change the owner.
        """
        bus = EventBus()
        with pytest.raises(PayloadError):
            on_thread(lambda: bus.emit("train_begin", nonsense=1))
        bus.emit("epoch_end")

    def test_foreign_drain(self):
        """
        Draining on a thread that does not own the bus is an error, and what was posted stays.
        """
        traced = Traced("epoch_end")
        traced.bus.post("epoch_end")
        with pytest.raises(WrongThreadError, match="Cannot drain it on thread 'other'"):
            on_thread(traced.bus.drain)
        traced.bus.drain()
        assert traced.trace == ["epoch_end"]


class TestPost:
    def test_delivered_before_the_next(self):
        """
        What another thread posts is delivered on the bus's thread, in order, before the next event.
        """
        traced = Traced("epoch_end")
        threads = []
        for name in ("checkpoint_saved", "checkpoint_removed"):
            traced.bus.on(name, lambda path: threads.append((path, threading.current_thread())))

        def work():
            traced.bus.post("checkpoint_saved", path="b.pt")
            traced.bus.post("checkpoint_removed", path="a.pt")

        on_thread(work)
        assert threads == []
        traced.bus.on("epoch_end", lambda: traced.trace.append(list(threads)))
        traced.bus.emit("epoch_end")

        main = threading.main_thread()
        assert traced.trace == ["epoch_end", [("b.pt", main), ("a.pt", main)]]

    def test_delivered_once(self):
        """
        A posted event is delivered once.
        """
        traced = Traced("epoch_end", "epoch_begin")
        traced.bus.post("epoch_end")
        traced.bus.emit("epoch_begin")
        traced.bus.emit("epoch_begin")
        traced.bus.drain()
        assert traced.trace == ["epoch_end", "epoch_begin", "epoch_begin"]

    def test_without_receivers_of_the_next(self):
        """
        An event that nobody receives delivers what was posted, too.
        """
        traced = Traced("epoch_end")
        traced.bus.post("epoch_end")
        traced.bus.emit("epoch_begin")
        assert traced.trace == ["epoch_end"]

    def test_validated_at_once(self):
        """
        A wrong field is an error where it is posted, on the thread that posts.
        """
        traced = Traced("epoch_end")
        with pytest.raises(PayloadError, match="Did you mean 'path'"):
            on_thread(lambda: traced.bus.post("checkpoint_saved", paht="b.pt"))
        traced.bus.drain()
        assert traced.trace == []

    def test_given_and_filled(self):
        """
        What was posted stays as given; the handler fills the rest at delivery.
        """
        bus, calls = EventBus(), []
        bus.on("checkpoint_saved", lambda **payload: calls.append(payload))
        bus.post("checkpoint_saved", epoch=1, global_step=20, path="b.pt")
        bus.handler = Handler()

        bus.drain()

        assert calls == [
            {"handler": bus.handler, "epoch": 1, "batch": 7, "global_step": 20, "logs": {}, "path": "b.pt"}
        ]

    def test_not_inside_a_dispatch(self):
        """
        Posted events are not delivered inside another: neither by an emit nor by a drain there.
        """
        traced = Traced("epoch_end")

        def receiver():
            traced.bus.post("epoch_end")
            traced.bus.emit("val_begin")
            traced.bus.drain()
            traced.trace.append("epoch_begin over")

        traced.bus.on("epoch_begin", receiver)
        traced.bus.on("val_begin", lambda: traced.trace.append("val_begin"))

        traced.bus.emit("epoch_begin")
        assert traced.trace == ["val_begin", "epoch_begin over"]
        traced.bus.emit("train_end")
        assert traced.trace[2:] == ["epoch_end"]

    def test_refused_emit(self):
        """
        An emit that is refused delivers nothing and loses nothing.
        """
        traced = Traced("epoch_end")
        traced.bus.post("epoch_end")
        with pytest.raises(PayloadError):
            traced.bus.emit("epoch_begin", nonsense=1)
        assert traced.trace == []
        traced.bus.drain()
        assert traced.trace == ["epoch_end"]


class TestDrain:
    def test_posted_meanwhile(self):
        """
        Draining also delivers what the receivers of posted events post.
        """
        traced = Traced("epoch_end", "train_end")
        traced.bus.on("epoch_end", lambda: traced.bus.post("train_end"))
        traced.bus.post("epoch_end")
        traced.bus.drain()
        assert traced.trace == ["epoch_end", "train_end"]

    def test_nothing(self):
        """
        Draining when nothing was posted does nothing.
        """
        EventBus().drain()

    def test_error(self):
        """
        Draining delivers everything and then raises.
        """
        traced = Traced("train_end")
        traced.fail("epoch_end", ValueError("broken"))
        traced.bus.post("epoch_end")
        traced.bus.post("train_end")
        with pytest.raises(ValueError, match="broken"):
            traced.bus.drain()
        assert traced.trace == ["epoch_end raises", "train_end"]
        traced.bus.drain()


class TestHeldBack:
    def make(self, *failing):
        traced = Traced("val_begin", "val_end")
        for name in failing:
            traced.fail(name, RuntimeError(name))
            traced.bus.on(name, lambda name=name: traced.trace.append(f"{name} goes on"))
        return traced

    def test_raised_at_the_end(self):
        """
        An exception about a posted event is raised when everything, the new event too, is delivered.
        """
        traced = self.make("epoch_begin")
        traced.bus.post("epoch_begin")
        traced.bus.post("val_begin")

        with pytest.raises(RuntimeError, match="epoch_begin") as info:
            traced.bus.emit("val_end")

        assert traced.trace == ["epoch_begin raises", "epoch_begin goes on", "val_begin", "val_end"]
        assert "'epoch_begin'" in notes(info.value)
        traced.bus.emit("val_end")

    def test_without_receivers(self):
        """
        It is raised also if nobody receives the new event.
        """
        traced = self.make("epoch_begin")
        traced.bus.post("epoch_begin")
        with pytest.raises(RuntimeError, match="epoch_begin"):
            traced.bus.emit("train_end")

    def test_several(self):
        """
        Of several one is raised by each emit or drain, the first one first; none is lost.
        """
        traced = self.make("epoch_begin", "epoch_end", "train_end")
        for name in ("epoch_begin", "epoch_end", "train_end"):
            traced.bus.post(name)

        with pytest.raises(RuntimeError, match="epoch_begin"):
            traced.bus.emit("val_end")
        with pytest.raises(RuntimeError, match="epoch_end"):
            traced.bus.drain()
        with pytest.raises(RuntimeError, match="train_end"):
            traced.bus.emit("val_end")
        traced.bus.emit("val_end")

    def test_own_error_first(self):
        """
        An exception about the event itself has precedence; the one held back is raised next time.
        """
        traced = self.make("epoch_begin", "epoch_end")
        traced.bus.post("epoch_begin")

        with pytest.raises(RuntimeError, match="epoch_end"):
            traced.bus.emit("epoch_end")
        with pytest.raises(RuntimeError, match="epoch_begin"):
            traced.bus.emit("val_end")

    def test_not_raised_inside(self):
        """
        A nested emit does not raise what is held back: its emitter has no part in it.
        """
        traced = self.make("epoch_begin")
        traced.bus.on("val_end", lambda: traced.bus.emit("val_begin"))
        traced.bus.on("val_end", lambda: traced.trace.append("not disturbed"))
        traced.bus.post("epoch_begin")

        with pytest.raises(RuntimeError, match="epoch_begin"):
            traced.bus.emit("val_end")

        assert traced.trace[-1] == "not disturbed"

    def test_nested_in_posted(self):
        """
        An exception of an event that a posted event's receiver emits is that receiver's.
        """
        traced = self.make("epoch_begin")
        traced.bus.on("train_end", lambda: traced.bus.emit("epoch_begin"))
        traced.bus.post("train_end")

        with pytest.raises(RuntimeError, match="epoch_begin") as info:
            traced.bus.emit("val_end")

        assert traced.trace == ["epoch_begin raises", "val_end"]
        assert len(info.value.__notes__) == 2

    def test_taken(self):
        """
        Who takes what is held back has it alone.
        """
        traced = self.make("epoch_begin", "epoch_end")
        traced.fail("val_end", ValueError("own"))
        traced.bus.post("epoch_begin")
        traced.bus.post("epoch_end")
        with pytest.raises(ValueError, match="own"):
            traced.bus.emit("val_end")

        assert [str(error) for error in traced.bus.take_held_back()] == ["epoch_begin", "epoch_end"]
        assert traced.bus.take_held_back() == []
        traced.bus.drain()

    def test_logged(self, caplog):
        """
        An exception that is to be logged is not held back.
        """
        traced = Traced()
        traced.fail("epoch_end", ValueError("broken"), on_error="log")
        traced.bus.post("epoch_end")
        traced.bus.drain()
        assert len(caplog.records) == 1

    def test_interrupt(self):
        """
        An interrupt is raised at once, and what is not yet delivered stays posted.
        """
        traced = self.make("epoch_begin")
        subscription = traced.fail("epoch_end", KeyboardInterrupt())
        for name in ("epoch_begin", "epoch_end", "val_begin"):
            traced.bus.post(name)

        with pytest.raises(KeyboardInterrupt):
            traced.bus.emit("val_end")
        assert traced.trace == ["epoch_begin raises", "epoch_begin goes on", "epoch_end raises"]
        traced.trace.clear()
        subscription.cancel()

        with pytest.raises(RuntimeError, match="epoch_begin"):
            traced.bus.emit("val_end")
        assert traced.trace == ["val_begin", "val_end"]


class TestDeclare:
    def test_new(self):
        """
        A declared event has the common fields and its own.
        """
        bus, calls = EventBus(), []
        bus.declare("game_over", ["score", "logs"])
        bus.on("game_over", lambda epoch, score: calls.append((epoch, score)))

        bus.emit("game_over", score=12)

        assert calls == [(0, 12)]
        assert bus.events["game_over"].fields == (
            "handler",
            "epoch",
            "batch",
            "global_step",
            "logs",
            "score",
        )

    def test_again(self):
        """
        Declaring the same again does nothing: receivers stay.
        """
        traced = Traced()
        traced.bus.declare("game_over", ["score"])
        traced.bus.on("game_over", lambda score: traced.trace.append(score))
        traced.bus.declare("game_over", ["score"])
        traced.bus.emit("game_over", score=12)
        assert traced.trace == [12]

    @pytest.mark.parametrize("name", ["game_over", "epoch_end"])
    def test_taken(self, name):
        """
        A name that another event has is refused.
        """
        bus = EventBus()
        bus.declare("game_over")
        with pytest.raises(ValueError, match=rf"Cannot declare event '{name}' .* Choose another name"):
            bus.declare(name, ["score"])

    def test_one_string(self):
        """
        Fields given as one string are refused, since each letter would be one.
        """
        with pytest.raises(TypeError, match=r"got 'score'\. Pass fields=\['score'\]"):
            EventBus().declare("game_over", "score")

    def test_bad_name(self):
        """
        A name that is no identifier is refused.
        """
        with pytest.raises(ValueError, match="'game over' is no name"):
            EventBus().declare("game over")

    def test_not_changed_from_outside(self):
        """
        The mapping of events is for reading.
        """
        with pytest.raises(TypeError):
            EventBus().events["mine"] = None

"""What users write by mistake, and what they are told: what is wrong, where, the rule, the next step."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import warnings
from pathlib import Path
from textwrap import dedent

import pytest
import torch

import trainbus
import trainbus_callbacks
from trainbus.errors import (
    CheckpointWriteError,
    HandlerClosedError,
    PayloadError,
    StateMismatchError,
    SubscriptionError,
    UnknownEventError,
    UnsavableStateError,
    WrongThreadError,
)
from trainbus.testing import FakeHandler, FaultyDisk, assert_resumes_exactly, emit_run


def told(*words):
    """Return a pattern that finds all of these words, in any order."""
    return "".join(rf"(?=[\s\S]*{re.escape(word)})" for word in words)


def handler(*arguments, **options):
    return trainbus.Handler(torch.nn.Linear(1, 1), *arguments, **options)


def end_epoch(callback, **logs):
    """Tell a callback of the end of an epoch."""
    fake = FakeHandler()
    fake.add_callback(callback)
    fake.bus.emit("epoch_end", logs=logs)


def end_run(callback):
    """Tell a callback of a run of two epochs with three batches each."""
    fake = FakeHandler()
    fake.add_callback(callback)
    emit_run(fake.bus)


def in_thread(function):
    """Call a function on another thread; raise what it raises."""
    raised = []

    def call():
        try:
            function()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join(60)
    raise raised[0]


NAMES = {
    **{name: getattr(trainbus, name) for name in trainbus.__all__},
    **{name: getattr(trainbus_callbacks, name) for name in trainbus_callbacks.__all__},
    "FakeHandler": FakeHandler,
    "FaultyDisk": FaultyDisk,
    "Path": Path,
    "assert_resumes_exactly": assert_resumes_exactly,
    "emit_run": emit_run,
    "end_epoch": end_epoch,
    "end_run": end_run,
    "handler": handler,
    "in_thread": in_thread,
    "math": math,
    "torch": torch,
    "trainbus": trainbus,
}

WHEN = [
    ("ModelCheckpoint('m.pt', save_freq='epochs')", "got 'epochs'"),
    ("ModelCheckpoint('m.pt', save_freq=0)", "got 0"),
    ("ModelCheckpoint('m.pt', save_freq=-1)", "got -1"),
    ("ModelCheckpoint('m.pt', save_freq=2.0)", "got 2.0"),
    ("ModelCheckpoint('m.pt', save_freq=None)", "got None"),
    ("ModelCheckpoint('m.pt', save_freq=True)", "got True"),
    ("ModelCheckpoint('m.pt', save_freq=Every)", "got <class"),
]
# What the user writes; the error or warning; what is wrong, where, the rule, the next step.
MISTAKES = [
    *[
        (written, ValueError, "save_freq", value, "'epoch' or a positive int", "Every(steps=")
        for written, value in WHEN
    ],
    ("Every()", TypeError, "Every", "got none", "takes one of epochs, steps and minutes", "with |"),
    ("Every(epochs=1, steps=2)", TypeError, "Every", "got epochs, steps", "takes one of", "with |"),
    ("Every(steps=1.5)", TypeError, "steps", "got 1.5", "must be", "an int"),
    ("Every(minutes='10')", TypeError, "minutes", "got '10'", "must be", "a number"),
    ("Every(epochs=0)", ValueError, "epochs", "got 0", "must be", "positive"),
    # which is best
    (
        "ModelCheckpoint('m.pt', save_best_only=True)",
        ValueError,
        "save_best_only=True",
        "needs to know what is best",
        "Name a metric",
        "monitor='val_loss'",
    ),
    (
        "ModelCheckpoint('m.pt', initial_value_threshold=0.5)",
        ValueError,
        "initial_value_threshold=0.5",
        "needs a metric to compare with",
        "Name it",
        "monitor='val_loss'",
    ),
    (
        "ModelCheckpoint('m.pt', 'val_loss', initial_value_threshold='low')",
        ValueError,
        "initial_value_threshold",
        "got 'low'",
        "must be",
        "a number",
    ),
    ("ModelCheckpoint('m.pt', 3)", TypeError, "monitor", "got 3", "must be", "name of a metric or None"),
    (
        "ModelCheckpoint('m.pt', 'val_loss', mode='maximum')",
        RuntimeWarning,
        "Unknown mode",
        "'maximum'",
        "'auto' is used",
        "Pass mode='min', 'max' or 'auto'",
    ),
    (
        "ModelCheckpoint('m.pt', 'val_f1')",
        RuntimeWarning,
        "mode='auto' takes 'min' for 'val_f1'",
        "'f1' is better at its max",
        "only names with 'acc'",
        "Pass mode='min' or mode='max'",
    ),
    (
        "ModelCheckpoint('m.pt', 'vaccine_score')",
        RuntimeWarning,
        "mode='auto' takes 'max'",
        "'vaccine_score'",
        "a metric it does not know",
        "Pass mode='min' or mode='max'",
    ),
    (
        "end_epoch(ModelCheckpoint('m.pt', 'val_los', True, mode='min'), val_loss=1.0)",
        RuntimeWarning,
        "cannot judge by 'val_los'",
        "ModelCheckpoint('m.pt', monitor='val_los'",
        "It saves nothing until the metric is there",
        "Did you mean 'val_loss'? Available: val_loss",
    ),
    (
        "end_epoch(ModelCheckpoint('m.pt', 'val_los', mode='min'), val_loss=1.0)",
        RuntimeWarning,
        "cannot judge by 'val_los'",
        "ModelCheckpoint('m.pt', monitor='val_los'",
        "It saves all the same",
        "Did you mean 'val_loss'? Available: val_loss",
    ),
    (
        "end_epoch(ModelCheckpoint('m.pt', 'val_loss', True), val_loss=torch.ones(3))",
        RuntimeWarning,
        "cannot judge by 'val_loss'",
        "its value is tensor([1., 1., 1.])",
        "which is not one real number",
        "It saves nothing until the metric is there",
    ),
    (
        """
        fake = FakeHandler()
        fake.add_callback(ModelCheckpoint("m.pt", "val_loss", save_best_only=True, save_freq=2))
        fake.bus.emit("train_batch_end", global_step=1)
        fake.bus.emit("epoch_end", logs={"val_loss": 0.5})
        """,
        ValueError,
        "can never save",
        "ModelCheckpoint('m.pt', monitor='val_loss'",
        "decides at the end of batches, and 'val_loss' is among the logs of epochs only",
        'Use save_freq="epoch", or log it in each batch',
    ),
    (
        """
        earlier = ModelCheckpoint("m.pt", "val_loss", mode="min").state_dict()
        ModelCheckpoint("m.pt", "val_loss", mode="max").load_state_dict(earlier)
        """,
        RuntimeWarning,
        "its best is not comparable and not taken over",
        "ModelCheckpoint('m.pt', monitor='val_loss', mode='max')",
        "has mode 'max', the checkpoint's has 'min'",
        "Use the same arguments to continue it",
    ),
    (
        "CheckpointFolder('.').best('val_loss', 'lowest')",
        ValueError,
        "mode",
        "got 'lowest'",
        "must be",
        "'min' or 'max'",
    ),
    # which stay
    ("ModelCheckpoint('m.pt', keep=3)", TypeError, "keep", "got 3", "must be", "KeepLast(3), KeepBest(2)"),
    ("KeepLast(0)", ValueError, "KeepLast", "got 0", "takes", "a positive int"),
    ("KeepEvery()", TypeError, "KeepEvery", "got None and None", "either epochs or steps", "Combine two"),
    # names
    (
        "ModelCheckpoint('runs/')",
        ValueError,
        "Cannot use",
        "'runs/'",
        "it names no file",
        "Add a name, e.g. 'best.pt'",
    ),
    (
        "ModelCheckpoint('runs/.best.pt')",
        ValueError,
        "Cannot use",
        "'runs/.best.pt'",
        "a hidden file is never found by resume",
        "Take away the dot",
    ),
    (
        "ModelCheckpoint('{epoch}/best.pt')",
        ValueError,
        "Cannot use",
        "'{epoch}/best.pt'",
        "All files of one template lie in one folder",
        "move the fields into the file's name",
    ),
    *[
        (
            f"ModelCheckpoint({template!r})",
            ValueError,
            "Cannot read the template",
            f"{template!r} at position 1",
            "a field is {name} or {name:spec}",
            "a brace itself is written twice",
        )
        for template in ("m{epoch.pt", "m}.pt", "m{}.pt", "m{logs[val_loss]}.pt", "m{val_loss!r}.pt")
    ],
    (
        "ModelCheckpoint('m{val_loss:.4q}.pt')",
        ValueError,
        "Cannot use the format '.4q'",
        "of {val_loss} in the template 'm{val_loss:.4q}.pt'",
        "Allowed: [[fill]align]",
        "[d|e|f|g]",
    ),
    (
        "ModelCheckpoint('x' * 300 + '.pt')",
        ValueError,
        "Cannot use",
        "'xxx",
        "may exceed 200 bytes",
        "Shorten it by 103 bytes",
    ),
    (
        "end_epoch(ModelCheckpoint('m{val_los:.2f}.pt'), val_loss=1.0)",
        RuntimeWarning,
        "cannot hold 'val_los'",
        "The file name 'm{val_los:.2f}.pt'",
        "It goes without: 'm_epoch1.pt'",
        "Did you mean 'val_loss'? Available: val_loss",
    ),
    (
        "end_epoch(ModelCheckpoint('m{epoch.__class__}.pt'))",
        RuntimeWarning,
        "cannot hold 'epoch.__class__'",
        "The file name 'm{epoch.__class__}.pt'",
        "it is not among the logs",
        "It goes without: 'm_epoch1.pt'",
    ),
    # where
    (
        """
        Path("notes.txt").touch()
        run = handler()
        run.add_callback(ModelCheckpoint("notes.txt/best.pt"))
        run.emit("train_begin")
        """,
        CheckpointWriteError,
        "Cannot write checkpoint",
        "'notes.txt/best.pt'",
        "Not a directory",
        "Training state is unharmed",
    ),
    (
        """
        trainbus.save({"x": 1}, "best.pt")
        handler().save("best.pt")
        with FaultyDisk(28, calls=["write"]):
            handler().save("best.pt")
        """,
        CheckpointWriteError,
        "Cannot write checkpoint",
        "'best.pt' of global step 0",
        "No space left on device",
        "the previous file, if any, is untouched",
    ),
    (
        """
        first = handler()
        first.add_callback(ModelCheckpoint("best.pt"))
        first.emit("epoch_end")
        first.close()
        second = handler()
        second.add_callback(ModelCheckpoint("best.pt"))
        second.emit("train_begin")
        """,
        RuntimeWarning,
        "This run did not resume",
        "holds 1 checkpoint of another run under its name 'best.pt'",
        "They may be overwritten",
        "call handler.resume('.') before training",
    ),
    # events
    (
        "EventBus().on('epoch_edn', print)",
        UnknownEventError,
        "Unknown event",
        "'epoch_edn'",
        "Known events: train_begin",
        "Did you mean 'epoch_end'?",
    ),
    (
        "EventBus().on('epoch_end', lambda log: None)",
        SubscriptionError,
        "Cannot subscribe <lambda>",
        "to 'epoch_end': its parameter 'log' is no field",
        "Fields: handler, epoch, batch, global_step, logs",
        "Did you mean 'logs'?",
    ),
    (
        "EventBus().on('epoch_end', print('saved'))('x')",
        SubscriptionError,
        "Cannot subscribe",
        "to 'epoch_end'",
        "'x' is not callable",
        "Pass a function",
    ),
    (
        "EventBus().on('epoch_end', lambda *args: None)",
        SubscriptionError,
        "Cannot subscribe <lambda>",
        "*args would stay empty",
        "fields are passed by name",
        "Name those you want",
    ),
    (
        """
        async def report(epoch): ...
        EventBus().on("epoch_end", report)
        """,
        SubscriptionError,
        "Cannot subscribe report",
        "to 'epoch_end'",
        "it is async, and nobody would await it",
        "Make it a plain function",
    ),
    (
        "EventBus().on('epoch_end', print, every=0)",
        ValueError,
        "every",
        "got 0",
        "at least 1",
        "Pass every=1",
    ),
    (
        "EventBus().on('epoch_end', lambda: None, after=3, before=4)",
        ValueError,
        "would never be called",
        "after=3 and smaller than before=4",
        "No number is greater",
        "Both limits are exclusive",
    ),
    (
        "EventBus().on('epoch_end', lambda: None, on_error='ignore')",
        ValueError,
        "on_error",
        "got 'ignore'",
        "must be",
        "'raise' or 'log'",
    ),
    (
        "EventBus().emit('epoch_end', val_loss=0.5)",
        PayloadError,
        "Cannot emit 'epoch_end'",
        "with 'val_loss'",
        "the event has no such field",
        "Put metrics into logs",
    ),
    (
        "EventBus().off('epoch_end', lambda: None)",
        SubscriptionError,
        "Cannot cancel <lambda>",
        "at 'epoch_end'",
        "A lambda or partial written twice is two functions",
        "keep the Subscription that bus.on returns",
    ),
    (
        "EventBus().declare('epoch_end', ['loss'])",
        ValueError,
        "Cannot declare event 'epoch_end'",
        "with fields ['loss']",
        "there is one of that name",
        "Choose another name",
    ),
    (
        "bus = EventBus(); in_thread(lambda: bus.emit('epoch_end'))",
        WrongThreadError,
        "Cannot emit 'epoch_end'",
        "on thread",
        "this bus belongs to thread",
        "Use bus.post",
    ),
    # callbacks
    (
        """
        class Report(Callback):
            def on_epoch_ned(self): ...
        FakeHandler().add_callback(Report())
        """,
        UnknownEventError,
        "Cannot attach Report",
        "'on_epoch_ned'",
        "there is no event for its method",
        "Did you mean 'on_epoch_end'?",
    ),
    (
        "fake = FakeHandler(); fake.add_callback(fake.add_callback(ModelCheckpoint('m.pt')))",
        SubscriptionError,
        "Cannot attach ModelCheckpoint",
        "it is attached to this bus",
        "each event would reach it twice",
        "Call detach() first",
    ),
    (
        """
        class Count(Callback):
            def state_dict(self):
                return {"count": 1}
        Count().load_state_dict(Count().state_dict())
        """,
        StateMismatchError,
        "Cannot load the state of Count",
        "with keys ['count']",
        "the class defines no load_state_dict",
        "Define it next to state_dict",
    ),
    (
        "bus = EventBus(); ModelCheckpoint('m.pt').attach(bus); bus.emit('epoch_end')",
        PayloadError,
        "ModelCheckpoint needs events that carry a handler",
        "this one has none",
        "Set bus.handler",
        "trainbus.testing.FakeHandler",
    ),
    (
        "EarlyStopping(patience=-1)",
        ValueError,
        "patience",
        "got -1",
        "counts epochs",
        "an int of at least 0",
    ),
    (
        "end_epoch(EarlyStopping('val_los', mode='min'), val_loss=1.0)",
        RuntimeWarning,
        "cannot judge this epoch by 'val_los'",
        "there is no such number in the logs",
        "It waits for it",
        "Did you mean 'val_loss'? Available: 'val_loss'",
    ),
    # runs
    (
        "handler(extra={'settings': {'lr': 0.1}['lr']})",
        TypeError,
        "Cannot save",
        "extra['settings']=0.1",
        "it has no state_dict() and load_state_dict()",
        "Give an object that has both",
    ),
    ("handler(on_busy='drop')", ValueError, "on_busy", "got 'drop'", "one of", "'wait', 'skip', 'replace'"),
    (
        "handler(on_busy='replace')",
        ValueError,
        "on_busy='replace'",
        "got 1",
        "needs max_pending",
        "at least 2",
    ),
    ("handler(snapshot='fast')", ValueError, "snapshot", "got 'fast'", "must be", "'auto' or 'overlap'"),
    (
        "handler(on_write_error='no')",
        ValueError,
        "on_write_error",
        "got 'no'",
        "must be",
        "'raise' or 'warn'",
    ),
    ("handler(write_timeout=0)", ValueError, "write_timeout", "got 0", "must be", "more than 0 seconds"),
    (
        "next(handler().batches([1]))",
        trainbus.TrainbusError,
        "batches()",
        "was called outside of an epoch",
        "Put it into the body of",
        "for epoch in handler.epochs(n):",
    ),
    (
        "next(handler().epochs(2.5))",
        ValueError,
        "epochs(n)",
        "got 2.5",
        "the run's total",
        "an int of at least 0",
    ),
    (
        "handler().log(loss=torch.ones(3))",
        TypeError,
        "Cannot log loss=",
        "tensor([1., 1., 1.])",
        "a metric is a number or a tensor with one element",
        "Reduce it first, e.g. with .mean()",
    ),
    (
        "run = handler(); run.on('epoch_end', lambda logs: logs.__setitem__('f1', 1)); run.emit('epoch_end')",
        TypeError,
        "Cannot set logs['f1']",
        "those of all receivers",
        "read-only",
        "handler.log(name=value)",
    ),
    (
        "run = handler(); run.close(); run.save('a.pt')",
        HandlerClosedError,
        "Cannot save",
        "'a.pt'",
        "this handler is closed",
        "Save inside of `with handler:`",
    ),
    (
        "run = handler(); run.save('a.pt'); run.load('a.pt', only='module')",
        ValueError,
        "only",
        "got 'module'",
        "must be a tuple of names",
        "module, optimizer",
    ),
    (
        """
        handler().save("a.pt")
        handler(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])).load("a.pt")
        """,
        StateMismatchError,
        "Cannot load optimizer",
        "the run has it and the file has not",
        "Make them agree",
        "handler.load(path, strict=False)",
    ),
    (
        """
        handler().save("a.pt")
        Handler(torch.nn.Linear(2, 2)).load("a.pt")
        """,
        StateMismatchError,
        "Cannot load module into Linear",
        "size mismatch for weight",
        "Make the object as it was when the file was written",
        "only=(...)",
    ),
    (
        "trainbus.save({'best': {'transform': lambda x: x}}, 'a.pt')",
        UnsavableStateError,
        "Cannot save this state",
        "state['best']['transform']: function",
        "only tensors and plain Python values can",
        "store its name",
    ),
    (
        "trainbus.save(torch.nn.Linear(1, 1), 'a.pt')",
        UnsavableStateError,
        "Cannot save this state",
        "state: torch.nn.modules.linear.Linear",
        "could not be loaded again",
        "store value.state_dict()",
    ),
    (
        "emit_run(EventBus(), epochs=3, logs={'val_loss': [0.5]})",
        ValueError,
        "logs['val_loss']",
        "has 1 values, and number 2 is needed",
        "one for each epoch",
        "a constant or a function",
    ),
    (
        "assert_resumes_exactly(None, kill_at=[('epoch_edn', 1)])",
        UnknownEventError,
        "Cannot kill at unknown event",
        "'epoch_edn'",
        "Known events: train_begin",
        "Did you mean 'epoch_end'?",
    ),
    # the wrong kind of thing, and what can never come to pass
    (
        "ModelCheckpoint(None)",
        TypeError,
        "filepath",
        "None",
        "a str or a path",
        "e.g. 'best.pt'",
    ),
    (
        "handler(max_pending=0)",
        ValueError,
        "max_pending",
        "got 0",
        "must be",
        "at least 1",
    ),
    (
        "handler(torch.optim.SGD)",
        TypeError,
        "optimizer",
        "SGD",
        "a class",
        "instance",
    ),
    (
        "handler().add_callback(ModelCheckpoint)",
        TypeError,
        "Cannot add",
        "ModelCheckpoint",
        "a class",
        "instance",
    ),
    (
        "handler().add_callback(print)",
        TypeError,
        "Cannot add",
        "print",
        "Callback",
        "handler.on",
    ),
    (
        "run = handler(); run.save('a.pt'); run.resume('a.pt')",
        NotADirectoryError,
        "Cannot resume",
        "'a.pt'",
        "a folder",
        "handler.load",
    ),
    (
        "Path('notes.txt').touch(); handler().save('notes.txt/a.pt')",
        CheckpointWriteError,
        "Cannot write checkpoint",
        "notes.txt/a.pt",
        "Not a directory",
        "Training state is unharmed",
    ),
    (
        "Path('notes.txt').write_text('nothing ' * 100); trainbus.load('notes.txt')",
        ValueError,
        "'notes.txt'",
        "is no checkpoint",
        "torch.save",
        "trainbus.save",
    ),
    (
        """
        fake = FakeHandler()
        fake.add_callback(ModelCheckpoint("best.pt"))
        fake.add_callback(ModelCheckpoint("best.pt", monitor="val_loss", save_best_only=True))
        fake.bus.emit("train_begin")
        """,
        ValueError,
        "'best.pt'",
        "two",
        "overwrite",
        "another name",
    ),
    (
        "ModelCheckpoint('{epoch}.pt', keep=KeepBest(2))",
        ValueError,
        "keep",
        "KeepBest(2)",
        "needs a metric",
        "monitor='val_loss'",
    ),
    (
        "ModelCheckpoint('last.pt', keep=KeepLast(3))",
        RuntimeWarning,
        "keep",
        "KeepLast(3)",
        "'last.pt'",
        "{epoch}",
    ),
    (
        "end_run(ModelCheckpoint('{epoch}.pt', save_freq=1000))",
        RuntimeWarning,
        "ModelCheckpoint('{epoch}.pt', save_freq=1000)",
        "saved nothing",
        "6",
        "save_freq",
    ),
]


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(written):
    """Run what a user has written; close what it opened."""
    names = dict(NAMES)
    try:
        exec(compile(dedent(written), "script.py", "exec"), names)
    finally:
        for run in list(names.values()):
            if isinstance(run, trainbus.Handler):
                with contextlib.suppress(trainbus.TrainbusError):
                    run.close()


@pytest.mark.parametrize(
    ("written", "kind", "what", "where", "rule", "step"),
    MISTAKES,
    ids=[" ".join(row[0].split()) for row in MISTAKES],
)
def test_is_told(written, kind, what, where, rule, step):
    """The message says what is wrong, where, what the rule is, and what to do next."""
    expected = pytest.warns if issubclass(kind, Warning) else pytest.raises
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what else it is told on the way
        with expected(kind, match=told(what, where, rule, step)):
            write(written)


class TestSaidInTheLog:
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_metric_that_is_not_finite(self, caplog, value):
        """A metric that can never be best is named with its value, once."""
        fake = FakeHandler()
        fake.add_callback(trainbus_callbacks.ModelCheckpoint("m.pt", "val_loss", save_best_only=True))
        emit_run(fake.bus, epochs=3, logs={"val_loss": value})

        assert [record.getMessage() for record in caplog.records] == [
            f"val_loss is {value}, which never counts as best."
        ]

    def test_a_folder_with_weights_only(self, caplog):
        """A run that cannot resume because the files hold no more than weights is told so."""
        with handler() as run:
            run.save("run/best.pt", weights_only=True)
        with handler() as run:
            assert run.resume("run") is None

        (message,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert message.startswith("Not resumed: 'run' holds files of weights only, and the run begins anew.")
        assert "handler.load('run/best.pt')" in message and "save_weights_only=False" in message

    def test_a_callback_that_is_not_there_any_more(self, caplog):
        """The state of a callback that the resumed run has not is named."""
        with handler() as run:
            run.add_callback(trainbus_callbacks.ModelCheckpoint("m.pt", name="mine"))
            run.save("m.pt")
        with handler() as run:
            run.resume(".")
            run.emit("train_begin")

        assert "the checkpoint's state of callback 'mine', which this run has not" in caplog.text

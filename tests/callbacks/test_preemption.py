"""Preemption: a signal ends the run at its next event, with a checkpoint of that moment."""

from __future__ import annotations

import errno
import logging
import math
import os
import signal
import threading

import pytest
import torch
from torch.nn.functional import mse_loss

from trainbus import CheckpointWriteError, Handler, ranks, read_manifest
from trainbus.testing import FakeHandler, emit_run
from trainbus.testing.faults import FaultyDisk
from trainbus_callbacks import Preemption, SaveOnRequest, signal_flag
from trainbus_callbacks.signal_flag import SignalFlag


def signal_at(handler, event, step, signum=signal.SIGTERM):
    """Send this process a signal at the first such event of a step."""

    def send(global_step):
        if global_step == step:
            signal.raise_signal(signum)

    handler.bus.on(event, send)


def fake(**options):
    handler = FakeHandler()
    callback = handler.add_callback(Preemption("{epoch}_{batch}_{global_step}.pt", **options))
    return handler, callback


class TestFakeEvents:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
    def test_saves_and_stops(self, signum):
        """The batch in which the signal comes is finished and saved, and the run stops and says why."""
        handler, callback = fake()
        signal_at(handler, "train_batch_begin", 4, signum)
        emit_run(handler.bus, epochs=2, batches=3)

        assert [save.path for save in handler.saves] == ["2_2_5.pt"]
        assert handler.stopped and handler.stop_reason == f"{signum.name} came."
        assert callback.received is signum

    def test_nothing_came(self):
        """Without a signal nothing is saved, and it stays with whom it belonged."""
        before = signal.getsignal(signal.SIGTERM)
        handler, callback = fake()
        emit_run(handler.bus)

        assert handler.saves == [] and not handler.stopped and callback.received is None
        assert signal.getsignal(signal.SIGTERM) == before

    def test_in_validation(self):
        """A validation is not waited for."""
        handler, _ = fake()
        handler.bus.emit("train_begin")
        signal.raise_signal(signal.SIGTERM)
        handler.bus.emit("val_batch_end")

        assert len(handler.saves) == 1 and handler.stopped
        handler.bus.emit("train_end")

    def test_comes_again(self):
        """A second signal neither kills nor saves again."""
        handler, _ = fake()
        handler.bus.emit("train_begin")
        for event in ("train_batch_end", "train_batch_end", "epoch_end"):
            signal.raise_signal(signal.SIGTERM)
            handler.bus.emit(event)
        handler.bus.emit("train_end")

        assert len(handler.saves) == 1

    def test_too_late(self, caplog):
        """A signal after the last event is told of."""
        handler, _ = fake()
        handler.bus.on("train_end", lambda: signal.raise_signal(signal.SIGTERM))
        emit_run(handler.bus, epochs=1)

        assert handler.saves == [] and "SIGTERM came too late" in caplog.text

    def test_other_ranks_hear_of_it(self, caplog):
        """A rank that got no signal stops and saves with the one that did; rank 0 says so."""
        handler = FakeHandler(rank=1)
        callback = handler.add_callback(Preemption("a.pt"))
        handler.bus.emit("train_begin")
        handler.tell(callback.state_key, int(signal.SIGTERM))  # as rank 0 did
        with caplog.at_level(logging.INFO, "trainbus"):
            handler.bus.emit("train_batch_end")

        assert handler.stop_reason == "SIGTERM came." and "Saving" not in caplog.text
        assert callback.received is signal.SIGTERM
        handler.bus.emit("train_end")
        assert "too late" not in caplog.text

    def test_several_ranks_amid_validation(self, monkeypatch):
        """Where ranks may validate different numbers of batches, none waits for another there."""
        monkeypatch.setattr(ranks, "together", lambda: True)
        handler, _ = fake()
        handler.bus.emit("train_begin")
        signal.raise_signal(signal.SIGTERM)
        handler.bus.emit("val_batch_end")
        assert not handler.stopped

        handler.bus.emit("epoch_end")
        assert handler.stopped
        handler.bus.emit("train_end")

    def test_not_heard_any_more(self, monkeypatch, caplog):
        """A signal that the other ranks would have heard of behind the last batch is told of."""
        handler, _ = fake()
        handler.bus.emit("train_begin")
        signal.raise_signal(signal.SIGTERM)
        monkeypatch.setattr(handler, "heard", lambda key: [])
        handler.bus.emit("epoch_end")
        handler.bus.emit("train_end")

        assert handler.saves == [] and "SIGTERM came too late" in caplog.text

    def test_slow_disk(self, caplog):
        """Where the file is not there in time, the log says so and the loop ends all the same."""
        handler = FakeHandler(auto_complete=False)
        handler.add_callback(Preemption("a.pt", grace_seconds=0.01))
        signal_at(handler, "train_batch_begin", 1)
        emit_run(handler.bus, epochs=1)

        assert handler.stopped and "not on the disk within grace_seconds=0.01" in caplog.text
        assert "'a.pt'" in caplog.text or "a.pt" in caplog.text

    @pytest.mark.parametrize("seconds", [0, -1, float("nan")])
    def test_no_time(self, seconds):
        """There must be some time to save in."""
        with pytest.raises(ValueError, match=f"grace_seconds must be a positive number, got {seconds}"):
            Preemption("a.pt", grace_seconds=seconds)

    def test_metric_in_the_name(self):
        """A name that depends on metrics is refused at once."""
        with pytest.raises(ValueError, match=r"the field 'loss'.* moment of the signal"):
            Preemption("{loss}.pt")


class Run:
    """A small real training that sends itself SIGTERM."""

    def __init__(self, folder, **options):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.1)
        self.data = [(torch.randn(4, 4), torch.randn(4, 1)) for _ in range(6)]
        self.handler = Handler(self.model, self.optimizer, **options)
        self.preemption = self.handler.add_callback(Preemption(folder / "preempted.pt"))
        self.validated = 0

    def train(self, *, accumulate=1, signal_at=None, signal_in_validation=False):
        with self.handler as handler:
            for _ in handler.epochs(2):
                for index, (x, y) in enumerate(handler.batches(self.data)):
                    if handler.global_step == signal_at:
                        os.kill(os.getpid(), signal.SIGTERM)
                    mse_loss(self.model(x), y).backward()
                    if (index + 1) % accumulate == 0:
                        self.optimizer.step()
                        self.optimizer.zero_grad()
                for _ in handler.val_batches(self.data):
                    self.validated += 1
                    if signal_in_validation and self.validated == 2:
                        os.kill(os.getpid(), signal.SIGTERM)
        return self.model.state_dict()


class TestRun:
    @pytest.mark.parametrize("options", [{}, {"on_busy": "skip"}, {"snapshot": "overlap"}])
    def test_resume(self, tmp_path, options):
        """The file is there when the loop ends, and the next run ends as if nothing had come."""
        expected = Run(tmp_path / "whole").train()
        run = Run(tmp_path, **options)
        run.train(signal_at=3)
        assert run.handler.stopped and read_manifest(tmp_path / "preempted.pt").global_step == 4

        run = Run(tmp_path)
        run.handler.resume(tmp_path)
        found = run.train()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_in_validation(self, tmp_path):
        """Stopped in a validation, the next run does that validation as a whole and goes on."""
        expected = Run(tmp_path / "whole").train()
        run = Run(tmp_path)
        run.train(signal_in_validation=True)
        assert run.validated == 2 and read_manifest(tmp_path / "preempted.pt").global_step == 6

        run = Run(tmp_path)
        run.handler.resume(tmp_path)
        found = run.train()
        assert run.validated == 12
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_while_accumulating(self, tmp_path):
        """Gradients are used before the run is saved and stops."""
        Run(tmp_path).train(accumulate=3, signal_at=3)

        assert read_manifest(tmp_path / "preempted.pt").global_step == 6

    def test_no_space(self, tmp_path):
        """A disk that refuses is an error, as for any save."""
        with (
            FaultyDisk(errno.ENOSPC, calls=["fsync"], times=math.inf),
            pytest.raises(CheckpointWriteError, match=r"preempted\.pt"),
        ):
            Run(tmp_path).train(signal_at=1)

    def test_waits_for_the_save_under_way(self, tmp_path, caplog):
        """A writer that skips when it is busy does not skip this save."""
        run = Run(tmp_path, on_busy="skip")
        run.handler.on(
            "train_batch_end",
            lambda handler, global_step: global_step == 2 and handler.save_async(tmp_path / "other.pt"),
        )
        with FaultyDisk(seconds=0.1, calls=["fsync"]), caplog.at_level(logging.INFO, "trainbus"):
            run.train(signal_at=1)

        assert read_manifest(tmp_path / "other.pt").global_step == 2
        assert read_manifest(tmp_path / "preempted.pt").global_step == 2


class TestSignalFlag:
    @pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
    def test_cannot_be_caught(self, signum):
        """A signal that no process hears is refused."""
        with pytest.raises(ValueError, match=f"{signum.name} ends or stops a process unheard"):
            SignalFlag([signum])

    def test_no_signal(self):
        """A number that is no signal is refused."""
        with pytest.raises(ValueError, match=r"12345 is no signal .* signal\.SIGTERM"):
            SignalFlag([12345])

    def test_earlier_handlers(self):
        """Who listened before hears it too and has it back, Ctrl-C's own handler is not called."""
        heard = []
        mine = {signal.SIGUSR1: lambda *_: heard.append("mine"), signal.SIGINT: signal.default_int_handler}
        before = {signum: signal.signal(signum, handler) for signum, handler in mine.items()}
        try:
            flag = SignalFlag(tuple(mine))
            flag.listen("a test")
            flag.listen("a test")
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGINT)
            taken = flag.take(), flag.take()
            flag.leave()
            after = {signum: signal.getsignal(signum) for signum in mine}
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

        assert heard == ["mine"] and taken == (signal.SIGINT, None) and after == mine

    @pytest.mark.parametrize("order", [1, -1])
    def test_two_of_one_signal(self, order):
        """Both hear it, and when both have left, in whatever order, it is whose it was."""
        before = signal.getsignal(signal.SIGUSR1)
        flags = [SignalFlag([signal.SIGUSR1]) for _ in range(2)]
        for flag in flags:
            flag.listen("a test")
        signal.raise_signal(signal.SIGUSR1)
        first, second = flags[::order]
        first.leave()
        signal.raise_signal(signal.SIGUSR1)
        taken = second.take()
        second.leave()

        assert first.take() is taken is signal.SIGUSR1
        assert signal.getsignal(signal.SIGUSR1) == before

    def test_listens_twice(self):
        """A flag that listened and left listens again."""
        before = signal.getsignal(signal.SIGUSR1)
        flag = SignalFlag([signal.SIGUSR1])
        for _ in range(2):
            flag.listen("a test")
            signal.raise_signal(signal.SIGUSR1)
            assert flag.take() is signal.SIGUSR1
            flag.leave()
            flag.leave()

        assert signal.getsignal(signal.SIGUSR1) == before

    def test_other_thread(self, caplog):
        """On another thread than the main one the log says what cannot be received, and who wanted it."""
        before = signal.getsignal(signal.SIGTERM)
        flag = SignalFlag([signal.SIGTERM])
        thread = threading.Thread(target=flag.listen, args=("Preemption",))
        thread.start()
        thread.join(timeout=30)

        assert "Cannot receive SIGTERM" in caplog.text and "Preemption" in caplog.text
        assert signal.getsignal(signal.SIGTERM) == before


def fork(run=lambda: None):
    """Return the number of a forked child that calls *run*, says so and waits for signals for a while."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(10)
            run()
            os.write(write, b".")
            while True:
                signal.pause()
        finally:
            os._exit(3)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return child


def end_of(child, signum=signal.SIGTERM):
    """Return what became of a child that is sent a signal: its exit code, or minus the signal."""
    os.kill(child, signum)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class TestForkedChildren:
    @pytest.mark.parametrize("callbacks", [[Preemption], [SaveOnRequest], [Preemption, SaveOnRequest]])
    def test_die_of_the_signal(self, callbacks):
        """A process forked while a callback listens dies of the signal, and its parent listens on."""
        handler = FakeHandler()
        for n, callback in enumerate(callbacks):
            signals = {"signals": [signal.SIGTERM]} if callback is Preemption else {"signum": signal.SIGTERM}
            handler.add_callback(callback(f"{n}.pt", **signals))
        handler.bus.emit("train_begin")
        code = end_of(fork())
        signal.raise_signal(signal.SIGTERM)
        handler.bus.emit("train_batch_end")
        handler.bus.emit("train_end")

        assert code == -signal.SIGTERM and len(handler.saves) == len(callbacks)

    def test_from_another_thread(self):
        """A child of another thread than the main one dies of it too."""
        flag = SignalFlag([signal.SIGTERM])
        flag.listen("a test")
        children = []
        thread = threading.Thread(target=lambda: children.append(fork()))
        thread.start()
        thread.join()
        flag.leave()

        assert end_of(children[0]) == -signal.SIGTERM

    def test_have_the_earlier_handler(self):
        """What listened before the first of several hears the signal in the child, as in its parent later."""
        before = signal.signal(signal.SIGUSR1, lambda *_: os._exit(7) if os.getpid() != parent else None)
        parent, flags = os.getpid(), [SignalFlag([signal.SIGUSR1]) for _ in range(2)]
        mine = signal.getsignal(signal.SIGUSR1)
        try:
            for flag in flags:
                flag.listen("a test")
            child = fork()
            flags[0].leave()
            flags[1].leave()
            assert signal.getsignal(signal.SIGUSR1) is mine
        finally:
            signal.signal(signal.SIGUSR1, before)

        assert end_of(child, signal.SIGUSR1) == 7

    def test_keep_what_was_set_later(self):
        """A handler that was set over ours stays, and reaches through it the one of before."""
        before = signal.signal(signal.SIGUSR1, lambda *_: os._exit(7) if os.getpid() != parent else None)
        parent, flag = os.getpid(), SignalFlag([signal.SIGUSR1])
        try:
            flag.listen("a test")
            ours = signal.getsignal(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, lambda *args: ours(*args))
            child = fork()
            flag.leave()
        finally:
            signal.signal(signal.SIGUSR1, before)

        assert end_of(child, signal.SIGUSR1) == 7

    def test_may_listen_themselves(self):
        """A child that trains hears its own signals, and leaves them as they were before its parent's."""

        def train():
            flag.leave()
            flag.listen("the child")
            signal.raise_signal(signal.SIGTERM)
            if flag.take() is not signal.SIGTERM:
                os._exit(4)
            flag.leave()

        flag = SignalFlag([signal.SIGTERM])
        flag.listen("a test")
        child = fork(train)
        flag.leave()

        assert end_of(child) == -signal.SIGTERM

    def test_signal_that_comes_at_once(self, monkeypatch):
        """One that comes before the child has given the signal back is not lost."""

        def begin():
            flag.listen("the child")
            monkeypatch.setattr(signal_flag, "_process", 0)
            signal.raise_signal(signal.SIGTERM)

        flag = SignalFlag([signal.SIGTERM])
        child = fork(begin)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM

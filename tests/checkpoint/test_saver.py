"""A save from the request to the file: room, what waits for a fence, what becomes of failures."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

from trainbus.checkpoint import archive, fence, saver, staging_copy
from trainbus.checkpoint.background_copy import BackgroundCopy
from trainbus.checkpoint.disk import Disk, use_disk
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.saver import Saver
from trainbus.checkpoint.staging_memory import StagingBuffer
from trainbus.errors import CheckpointError, CheckpointWriteError, SnapshotChangedError

from .forked import holds_in_child

WAIT = 30
"""Seconds after which a test that hangs fails."""
LARGE = 40_000
"""Elements of a tensor that is worth waiting for."""
MANIFEST = Manifest(contents="object")


class Clock:
    """In place of the time module: stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class Training:
    """A saver, one weight with an optimizer, and what the saver reported."""

    def __init__(self, folder: Any, **options: Any) -> None:
        self.folder = folder
        self.reports: list[str] = []
        self.saver = Saver(lambda event, **fields: self.reports.append(event), **options)
        self.weight = nn.Parameter(torch.zeros(LARGE))
        self.optimizer = torch.optim.SGD([self.weight], lr=1.0)
        self.small = torch.zeros(3)
        self.count = 0

    def state(self) -> dict[str, Any]:
        return {"weight": self.weight.detach(), "small": self.small}

    def save(self, collect: Callable[[], Any] | None = None) -> PendingSave:
        """Ask for a save as between two steps."""
        self.count += 1
        pending = self.last = PendingSave(str(self.folder / f"{self.count}.pt"), global_step=self.count)
        self.saver.save(pending, collect or self.state, lambda: MANIFEST, optimizers=[self.optimizer])
        return pending

    def step(self) -> None:
        """Add one to the weight."""
        self.weight.grad = torch.full_like(self.weight, -1.0)
        self.optimizer.step()

    def values(self, pending: PendingSave) -> set[float]:
        """Return the values that the file holds of the weight."""
        pending.result(WAIT)
        state, _ = load_file(pending.path)
        return set(state["weight"].tolist())


@pytest.fixture(name="train")
def _train(tmp_path) -> Iterator[Callable[..., Training]]:
    """Make trainings; their savers are closed at the end."""
    made: list[Training] = []

    def make(**options: Any) -> Training:
        made.append(Training(tmp_path, **options))
        return made[-1]

    yield make
    for training in made:
        training.saver.close(WAIT)


@pytest.fixture(name="clock")
def _clock(monkeypatch) -> Clock:
    clock = Clock()
    for module in (saver, fence, staging_copy):
        monkeypatch.setattr(module, "time", clock)
    return clock


class GatedCopy(BackgroundCopy):
    """Copies nothing until it is told to, or until a fence needs it."""

    gate: threading.Event
    let: int

    def run(self) -> None:
        assert self.gate.wait(WAIT)
        super().run()

    def let_change(self) -> None:
        type(self).let += 1
        self.gate.set()
        super().let_change()


@pytest.fixture(name="gate")
def _gate(monkeypatch) -> Iterator[threading.Event]:
    """Hold copies in the background until the next fence, or until this is set."""
    GatedCopy.gate, GatedCopy.let = threading.Event(), 0
    monkeypatch.setattr(staging_copy, "BackgroundCopy", GatedCopy)
    yield GatedCopy.gate
    GatedCopy.gate.set()


def in_child(work: Callable[[], None]) -> bool:
    """Tell whether *work* came to its end in a forked child; one that hangs is killed."""

    def claim() -> bool:
        # OpenMP's threads do not live in a forked child, and it would wait for them; a DataLoader's
        # workers do the same.
        torch.set_num_threads(1)
        work()
        return True

    return holds_in_child(claim)


def root_of(error: BaseException | None) -> BaseException:
    """Return what a save's failure goes back to."""
    assert error is not None
    return error if error.__cause__ is None else root_of(error.__cause__)


class TestOptions:
    @pytest.mark.parametrize("value", ["sometimes", "", None, True, "Overlap"])
    def test_unknown_snapshot(self, value):
        """
        A value of snapshot that is none is refused, and nothing is left raised.
        """
        hooks = dict(torch_optimizer._global_optimizer_pre_hooks)

        with pytest.raises(ValueError, match=f"'auto' or 'overlap', got {value!r}"):
            Saver(print, snapshot=value)

        assert dict(torch_optimizer._global_optimizer_pre_hooks) == hooks

    @pytest.mark.parametrize("value", ["overlap", None, "yes"])
    def test_unknown_device_snapshot(self, value):
        """
        So is one of device_snapshot.
        """
        with pytest.raises(ValueError, match=f"'auto', True or False, got {value!r}"):
            Saver(print, device_snapshot=value)


class TestFence:
    def test_closed(self, train):
        """
        A saver's hooks go with it, also if it is closed twice.
        """
        before = len(torch_optimizer._global_optimizer_pre_hooks)
        training = train(snapshot="overlap")
        assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1

        training.saver.close(WAIT)
        training.saver.close(WAIT)

        assert len(torch_optimizer._global_optimizer_pre_hooks) == before

    def test_closed_with_a_writer_that_is_not_done(self, train, monkeypatch):
        """
        A close that times out lowers the fence all the same.
        """
        before = len(torch_optimizer._global_optimizer_pre_hooks)
        go_on = threading.Event()
        real = saver.commit
        monkeypatch.setattr(saver, "commit", lambda *a, **kw: go_on.wait(WAIT) and real(*a, **kw))
        training = train(snapshot="overlap")
        training.save()

        with pytest.raises(TimeoutError):
            training.saver.close(0)

        assert len(torch_optimizer._global_optimizer_pre_hooks) == before
        go_on.set()

    def test_auto_raises_none(self, train):
        """
        Who copies at once hooks into no optimizer.
        """
        before = len(torch_optimizer._global_optimizer_pre_hooks)

        train()

        assert len(torch_optimizer._global_optimizer_pre_hooks) == before

    def test_step_waits(self, train, gate):
        """
        A save returns before the weight is copied, and the next step waits until it is.
        """
        training = train(snapshot="overlap")

        pending = training.save()
        assert not gate.is_set()
        training.step()

        assert gate.is_set()
        assert training.values(pending) == {0.0}

    def test_file_is_begun_meanwhile(self, train, gate):
        """
        The writer has begun the file before the weight is copied, and waits for it only then.
        """
        begun = threading.Event()

        class Noted(Disk):
            def create(self, folder: int, name: str) -> int:
                begun.set()
                return super().create(folder, name)

        with use_disk(Noted()):
            training = train(snapshot="overlap")
            pending = training.save()

            assert begun.wait(WAIT / 2)  # longer, and the copy would not wait for the gate any more
            assert not gate.is_set()
            assert not pending.done()
            training.step()
            assert training.values(pending) == {0.0}

    @pytest.mark.parametrize("why", ["auto", "no optimizers", "within a step"])
    def test_copied_at_once(self, train, gate, why):
        """
        Where something else than the next step may follow, all is copied before save returns.
        """
        training = train(snapshot="auto" if why == "auto" else "overlap")
        saves = []

        def closure() -> None:
            saves.append(training.save())

        if why == "within a step":
            training.weight.grad = torch.full_like(training.weight, -1.0)
            training.optimizer.step(closure)
        elif why == "no optimizers":
            pending = PendingSave(str(training.folder / "1.pt"))
            training.saver.save(pending, training.state, lambda: MANIFEST)
            saves.append(pending)
        else:
            closure()
        training.weight.data.fill_(-5)

        assert training.values(saves[0]) == {0.0}
        assert GatedCopy.let == 0

    def test_small_tensors_do_not_wait(self, train, gate):
        """
        What is not the optimizer's may change when save returns, also while the rest waits.
        """
        training = train(snapshot="overlap")

        pending = training.save()
        training.small.fill_(7)
        training.step()

        pending.result(WAIT)
        assert load_file(pending.path)[0]["small"].tolist() == [0, 0, 0]

    def test_steps_on(self, train):
        """
        Each of many saves holds the values of its own moment.
        """
        training = train(snapshot="overlap", max_pending=2)

        saves = []
        for _ in range(20):
            training.step()
            saves.append(training.save())
        training.step()

        assert [training.values(save) for save in saves] == [{float(n)} for n in range(1, 21)]


class TestFailure:
    @pytest.fixture(name="break_down")
    def _break_down(self, monkeypatch) -> threading.Event:
        """While this is set, copies in the background run into an error."""
        broken = threading.Event()

        class Breaking(BackgroundCopy):
            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options)
                self.breaks = broken.is_set()

            def run(self) -> None:
                if self.breaks:
                    self._moves = (*self._moves, Broken())
                super().run()

        class Broken:
            def begin(self) -> None:
                raise MemoryError("no more of it")

            def hold_back(self) -> None: ...

            def finish(self) -> None: ...

        monkeypatch.setattr(staging_copy, "BackgroundCopy", Breaking)
        return broken

    def test_while_copying(self, train, break_down):
        """
        An error in the background fails that save with its reason; training and later saves go on.
        """
        training = train(snapshot="overlap")
        break_down.set()
        failing = training.save()
        break_down.clear()
        training.step()

        with pytest.raises(CheckpointError, match="no more of it") as caught:
            failing.result(WAIT)

        assert isinstance(root_of(caught.value), MemoryError)
        assert not os.path.exists(failing.path)
        assert training.values(training.save()) == {1.0}
        assert training.reports == ["checkpoint_failed", "checkpoint_saved"]

    def test_while_copying_is_no_reason_to_distrust_the_loop(self, train, break_down, caplog):
        """
        After such an error, saves go on being copied in the background, without a word.
        """
        training = train(snapshot="overlap")
        break_down.set()
        failing = training.save()
        break_down.clear()
        with pytest.raises(CheckpointError):
            failing.result(WAIT)

        training.save().result(WAIT)

        assert training.saver._last_copy.is_over
        assert not training.saver._last_copy.was_changed
        assert "at once" not in caplog.text

    def test_while_collecting(self, train):
        """
        A state that cannot be collected fails that save, and the next finds room.
        """
        training = train()

        def collect() -> Any:
            raise LookupError("no state")

        failing = training.save(collect)

        with pytest.raises(CheckpointError, match="global step 1: LookupError: no state") as caught:
            failing.result(0)
        assert isinstance(caught.value.__cause__, LookupError)
        assert training.values(training.save()) == {0.0}

    def test_while_copying_at_once(self, train):
        """
        A container that cannot be copied fails that save, and gives the room back.
        """
        training = train(snapshot="overlap")

        with pytest.raises(CheckpointError, match="Cannot copy a frozenset"):
            training.save(lambda: {"weight": training.weight, "odd": frozenset()}).result(0)

        assert training.values(training.save()) == {0.0}


class TestTripwire:
    def test_changed_by_hand(self, train, gate, caplog):
        """
        A save whose weight was changed by hand fails and names it; later ones copy at once, said once.
        """
        training = train(snapshot="overlap")
        failing = training.save()
        with torch.no_grad():
            training.weight.mul_(0.5)
        training.step()

        with pytest.raises(CheckpointError) as caught:
            failing.result(WAIT)
        cause = root_of(caught.value)
        assert isinstance(cause, SnapshotChangedError)
        assert cause.places == ["state['weight']"]
        gate.clear()
        saves = []
        for value in (1.0, 2.0):
            saves.append(training.save())
            with torch.no_grad():
                training.weight.fill_(value + 1)

        assert [training.values(save) for save in saves] == [{1.0}, {2.0}]
        assert caplog.text.count("Saves copy everything at once from now on") == 1

    def test_names_the_file(self, train, gate):
        """
        The failure says which file of which step could not be written, and why.
        """
        training = train(snapshot="overlap")
        failing = training.save()
        with torch.no_grad():
            training.weight.mul_(0.5)
        training.step()

        with pytest.raises(CheckpointError) as caught:
            failing.result(WAIT)

        assert isinstance(caught.value, CheckpointWriteError)
        assert isinstance(caught.value.__cause__, SnapshotChangedError)
        assert (caught.value.path, caught.value.global_step) == (failing.path, 1)
        assert "state['weight'] changed" in str(caught.value)

    def test_checked(self, train, gate):
        """
        With check_snapshots also what leaves no trace on the tensor is named.
        """
        training = train(snapshot="overlap", check_snapshots=True)
        failing = training.save()
        training.weight.data.fill_(9)

        with contextlib.suppress(SnapshotChangedError):
            training.step()

        with pytest.raises(CheckpointError, match=r"state\['weight'\]"):
            failing.result(WAIT)

    def test_checked_after_the_copy(self, train):
        """
        A change that came too late to harm the file is raised from the step.
        """
        training = train(snapshot="overlap", check_snapshots=True)
        pending = training.save()
        assert training.values(pending) == {0.0}
        training.weight.data.fill_(9)

        with pytest.raises(SnapshotChangedError, match=r"state\['weight'\]"):
            training.step()

        training.step()
        assert training.weight.tolist()[0] == 10


class TestWaitingForRoom:
    @pytest.fixture(name="slow_disk")
    def _slow_disk(self, clock, monkeypatch) -> Callable[[Training], None]:
        """Let each file be written only when the next save asks for room, which then takes five seconds."""

        def slow(training: Training) -> None:
            asked = threading.Semaphore(0)
            wait, commit = training.saver.writer.wait_for_room, saver.commit

            def tell_and_wait(timeout: float | None) -> bool:
                if training.saver.writer.unfinished:
                    asked.release()
                return wait(timeout)

            def commit_late(*args: Any, **options: Any) -> Manifest:
                assert asked.acquire(timeout=WAIT)
                clock.now += 5
                return commit(*args, **options)

            monkeypatch.setattr(training.saver.writer, "wait_for_room", tell_and_wait)
            monkeypatch.setattr(saver, "commit", commit_late)
            slow.last = asked.release

        return slow

    def test_said_once(self, train, slow_disk, caplog):
        """
        That a save waited for another is said once, with the options that would change it.
        """
        training = train()
        slow_disk(training)

        for _ in range(4):
            training.save()
        slow_disk.last()

        waits = [record for record in caplog.records if "waited" in record.getMessage()]
        assert len(waits) == 1
        assert "waited 5.00 s" in waits[0].getMessage()
        assert "max_pending=2" in waits[0].getMessage()
        assert "on_busy='skip'" in waits[0].getMessage()
        assert training.saver.lost.waiting == 15

    def test_no_wait_is_no_news(self, train, clock, caplog):
        """
        A save that finds room says nothing.
        """
        training = train()

        training.save().result(WAIT)

        assert caplog.text == ""
        assert training.saver.lost.waiting == 0

    def test_skipped(self, train, slow_disk):
        """
        A save that is skipped does not collect the state.
        """
        training = train(on_busy="skip")
        slow_disk(training)
        training.save()
        collected = []

        skipped = training.save(lambda: collected.append(1))

        assert skipped.done()
        assert collected == []
        assert training.saver.lost.copying == 0


class TestLostTime:
    @pytest.mark.parametrize("mode", ["auto", "overlap"])
    def test_copying(self, train, clock, mode, monkeypatch):
        """
        Collecting and copying count, and the copying is said to be what overlap would spare auto.
        """
        training = train(snapshot=mode)
        copy = staging_copy.copy_together

        def copy_slowly(*args: Any) -> None:
            if mode == "auto":  # else it is the small ones
                clock.now += 0.5
            copy(*args)

        monkeypatch.setattr(staging_copy, "copy_together", copy_slowly)

        def collect() -> Any:
            clock.now += 2
            return training.state()

        for _ in range(3):
            training.save(collect).result(WAIT)
            training.step()

        lost = training.saver.lost
        assert lost.copying == (7.5 if mode == "auto" else 6)
        assert lost.overlappable == (1.5 if mode == "auto" else 0)
        assert lost.total == lost.waiting + lost.copying + lost.fenced == lost.copying

    def test_copying_what_failed(self, train, clock):
        """
        A save that failed on the training thread took its time as well.
        """
        training = train()

        def collect() -> Any:
            clock.now += 2
            raise LookupError

        with pytest.raises(CheckpointError):
            training.save(collect).result(0)

        assert training.saver.lost.copying == 2

    def test_not_to_be_spared(self, train, clock, monkeypatch):
        """
        What an optimizer of another class trains could not be copied in the background.
        """
        training = train()
        training.optimizer = types.SimpleNamespace()

        copy = staging_copy.copy_together

        def copy_slowly(*args: Any) -> None:
            clock.now += 2
            copy(*args)

        monkeypatch.setattr(staging_copy, "copy_together", copy_slowly)
        training.save()

        assert (training.saver.lost.copying, training.saver.lost.overlappable) == (2, 0)

    def test_fenced(self, train, clock, gate, monkeypatch):
        """
        The time that a step waits for a copy counts, once.
        """
        let_change = GatedCopy.let_change

        def slowly(self: GatedCopy) -> None:
            clock.now += 3
            let_change(self)

        monkeypatch.setattr(GatedCopy, "let_change", slowly)
        training = train(snapshot="overlap")
        training.save()

        training.step()
        training.step()

        assert training.saver.lost.fenced == 3
        assert training.saver.lost.total == 3


class TestInterrupted:
    """Ctrl-C, or what a signal's handler raises, in the middle of a save."""

    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
    def test_while_collecting(self, train, error):
        """
        It goes on to the loop, the save has failed, and the next one finds room.
        """
        training = train()

        def collect() -> Any:
            raise error

        with pytest.raises(error):
            training.save(collect)

        with pytest.raises(CheckpointWriteError, match=error.__name__):
            training.last.result(0)
        assert training.values(training.save()) == {0.0}

    def test_before_it_is_copied(self, train, monkeypatch):
        """
        No step waits for a copy that nobody will make, and the next save finds memory and room.
        """
        training = train(snapshot="overlap")

        def interrupted(snapshot: Any) -> None:
            monkeypatch.undo()
            raise KeyboardInterrupt

        monkeypatch.setattr(training.saver._stager, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            training.save()
        training.step()

        with pytest.raises(CheckpointWriteError, match="KeyboardInterrupt"):
            training.last.result(0)
        assert training.values(training.save()) == {1.0}

    @pytest.mark.parametrize("is_queued", [False, True])
    def test_while_it_is_queued(self, train, monkeypatch, is_queued):
        """
        Before it is in the queue it fails and gives its memory back; once it is there it is written.
        """
        training = train()
        real = training.saver.writer.submit

        def submit(*args: Any, **options: Any) -> None:
            monkeypatch.undo()
            if is_queued:
                real(*args, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(training.saver.writer, "submit", submit)
        with pytest.raises(KeyboardInterrupt):
            training.save()

        if is_queued:
            assert training.last.result(WAIT) is not None
        else:
            with pytest.raises(CheckpointWriteError, match="KeyboardInterrupt"):
                training.last.result(0)
        assert training.values(training.save()) == {0.0}

    def test_removals_that_have_no_place(self, train, tmp_path, monkeypatch):
        """
        Where a relative path means nothing, because the working directory is gone, that save fails alone.
        """
        training = train()
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        pending = PendingSave(str(training.folder / "a.pt"))
        training.saver.save(pending, lambda: {}, lambda: Manifest(contents="object"), removals=["old.pt"])
        with pytest.raises(FileNotFoundError):
            PendingSave("b.pt")
        monkeypatch.undo()

        with pytest.raises(CheckpointWriteError, match="No such file or directory"):
            pending.result(0)
        assert training.values(training.save()) == {0.0}

    def test_while_others_are_told(self, train):
        """
        Of a save that several ranks write, the part of this one that could not be begun holds up no other.
        """
        training = train()
        pending = PendingSave(str(training.folder / "a.pt"))

        def begin() -> Any:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            training.saver.follow(pending, begin, lambda: 0.0)

        with pytest.raises(CheckpointWriteError, match="KeyboardInterrupt"):
            pending.result(0)
        assert training.values(training.save()) == {0.0}


class TestAmidAnother:
    """A save that a signal's handler asks for in the middle of another one."""

    @pytest.fixture(autouse=True)
    def _no_handler_stays(self) -> Iterator[None]:
        before = signal.getsignal(signal.SIGUSR1)
        yield
        signal.signal(signal.SIGUSR1, before)

    @pytest.mark.parametrize("max_pending", [1, 2])
    def test_refused(self, train, max_pending):
        """
        It is refused at once, for either would wait for the other; the save that it came into is made.
        """
        training = train(max_pending=max_pending)
        errors: list[RuntimeError] = []

        def save(*_: Any) -> None:
            with pytest.raises(RuntimeError, match=r"amid the save of .*1\.pt. on the same") as caught:
                training.save()
            errors.append(caught.value)

        def collect() -> dict[str, Any]:
            signal.raise_signal(signal.SIGUSR1)
            return training.state()

        signal.signal(signal.SIGUSR1, save)
        outer = training.save(collect)

        assert training.values(outer) == {0.0}
        assert len(errors) == 1
        assert training.values(training.save()) == {0.0}

    def test_while_the_other_waits_for_room(self, train):
        """
        It is made where the other one only waits for room: both are written.
        """
        training = train()
        about_to_wait, go_on = threading.Event(), threading.Event()
        inner: list[PendingSave] = []

        class Signalling(Disk):
            def create(self, folder: int, name: str) -> int:
                if not go_on.is_set():
                    assert about_to_wait.wait(WAIT)
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
                    assert go_on.wait(WAIT)
                return super().create(folder, name)

        def save(*_: Any) -> None:
            go_on.set()
            inner.append(training.save())

        signal.signal(signal.SIGUSR1, save)
        with use_disk(Signalling()):
            first = training.save()
            about_to_wait.set()
            outer = training.save()
            saves = [first, outer, *inner]
            assert [training.values(save) for save in saves] == [{0.0}] * 3

    def test_another_thread(self, train):
        """
        Another thread may save meanwhile, where there is room.
        """
        training = train(max_pending=2)
        others: list[PendingSave] = []

        def collect() -> dict[str, Any]:
            thread = threading.Thread(target=lambda: others.append(training.save()))
            thread.start()
            thread.join(WAIT)
            return training.state()

        outer = training.save(collect)

        assert [training.values(save) for save in (outer, *others)] == [{0.0}] * 2


class TestCollector:
    def test_rests_while_a_snapshot_is_made(self, train):
        """
        No collection begins while the state is collected and copied, and afterwards all is as it was.
        """
        training = train()
        before, meanwhile = gc.get_threshold(), []

        training.save(lambda: meanwhile.append(gc.get_threshold()[0]) or training.state()).result(WAIT)
        training.saver.writer.flush()

        assert meanwhile == [0]
        assert gc.get_threshold() == before != (0, *before[1:])

    def test_runs_while_the_disk_writes(self, train):
        """
        Garbage is collected while a file is written: on a slow disk it would pile up.
        """
        enabled = []

        class Noted(Disk):
            def write(self, fd: int, data: memoryview, position: int) -> int:
                enabled.append(gc.isenabled() and gc.get_threshold()[0] > 0)
                return super().write(fd, data, position)

        with use_disk(Noted()):
            train().save().result(WAIT)

        assert enabled and all(enabled)


class TestSpans:
    """What ``torch.profiler`` shows of the training thread."""

    def test_in_order(self, train, gate):
        """
        A save is its wait for room and its snapshot, the step behind it a wait for the copy.
        """
        training = train(snapshot="overlap")

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            training.save()
            training.step()

        spans = [span for span in profiler.events() if span.name.startswith("trainbus: ")]
        assert [span.name for span in sorted(spans, key=lambda span: span.time_range.start)] == [
            "trainbus: wait for room",
            "trainbus: snapshot",
            "trainbus: wait for the copy",
        ]
        assert len({span.thread for span in spans}) == 1

    def test_nothing_to_wait_for(self, train):
        """
        A step that no copy is made beside has no span.
        """
        training = train(snapshot="overlap")

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            training.step()

        assert not [span for span in profiler.events() if span.name.startswith("trainbus: ")]


class TestTimes:
    """What a save says of itself; together it is what the saver says of all."""

    def test_of_each(self, train, clock, gate, monkeypatch):
        """
        A save knows what it cost by itself, and when training turned to it and a step waited for it.
        """
        let_change = GatedCopy.let_change

        def slowly(self: GatedCopy) -> None:
            clock.now += 3
            let_change(self)

        def collect() -> Any:
            clock.now += 2
            return training.state()

        monkeypatch.setattr(GatedCopy, "let_change", slowly)
        training = train(snapshot="overlap")
        saves = []
        for _ in range(2):
            clock.now += 10
            saves.append(training.save(collect))
            training.step()
            saves[-1].result(WAIT)

        assert [(one.times.taken, one.times.fenced_at) for one in saves] == [(10, 12), (25, 27)]
        assert [(one.times.waiting, one.times.copying, one.times.fenced) for one in saves] == [(0, 2, 3)] * 2
        assert sum(one.times.lost for one in saves) == training.saver.lost.total == 10

    def test_waiting(self, train, clock):
        """
        A save that had to wait for room knows how long, and since when, also if it was waited for before.
        """
        training = train()
        pending = PendingSave(str(training.folder / "a.pt"))
        clock.now = 10

        def wait_for_room(timeout: float | None = None) -> bool:
            clock.now += 4
            return timeout is None

        training.saver.writer.wait_for_room = wait_for_room
        assert not training.saver.wait_for_room(pending, 3.0)
        training.saver.save(pending, training.state, lambda: MANIFEST)

        assert pending.times.waiting == training.saver.lost.waiting == 8
        assert pending.times.taken == 10

    def test_on_the_writer(self, train):
        """
        The writer adds when it took the save up and when the file was durable.
        """
        save = train().save()
        save.result(WAIT)

        assert save.times.requested <= save.times.begun <= save.times.durable


class TestPrepare:
    @pytest.fixture(name="touching")
    def _touching(self, monkeypatch) -> threading.Event:
        """Making memory lasts until it is stopped; this is set when it has begun."""
        begun = threading.Event()

        def touch(self: StagingBuffer, stop: threading.Event) -> None:
            begun.set()
            assert stop.wait(WAIT)

        monkeypatch.setattr(StagingBuffer, "touch", touch)
        return begun

    def test_made_in_the_background(self, train, monkeypatch):
        """
        Memory for such a state is made on another thread, and the first save is copied into it.
        """
        touched: list[tuple[str, Any]] = []
        done = threading.Event()
        touch = StagingBuffer.touch

        def note(self: StagingBuffer, stop: threading.Event) -> None:
            touch(self, stop)
            touched.append((threading.current_thread().name, self.mapping))
            done.set()

        monkeypatch.setattr(StagingBuffer, "touch", note)
        training = train()

        training.saver.prepare(training.state())
        assert done.wait(WAIT)
        size = training.saver._memory.size
        pending = training.save()

        assert training.values(pending) == {0.0}
        assert touched[0][0] == "trainbus-copy"
        assert len(touched[0][1]) == size == training.saver._memory.size
        assert size >= 4 * LARGE

    def test_no_thread_for_it(self, train, monkeypatch):
        """
        Where the system has no thread for it, the next save does not wait for it.
        """
        training = train()

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="start new thread"):
                training.saver.prepare(training.state())

        assert training.values(training.save()) == {0.0}

    @pytest.mark.parametrize("mode", ["auto", "overlap"])
    def test_save_meanwhile(self, train, touching, mode):
        """
        A save that comes meanwhile stops it and succeeds.
        """
        training = train(snapshot=mode)
        training.saver.prepare(training.state())
        assert touching.wait(WAIT)

        pending = training.save()
        training.step()

        assert training.values(pending) == {0.0}

    def test_again_after_saves(self, train, touching):
        """
        It may be asked for at any time: while a save holds the memory it does nothing.
        """
        training = train()
        training.saver.prepare(training.state())
        for _ in range(3):
            training.save()
            training.saver.prepare(training.state())

        assert training.values(training.save()) == {0.0}

    @pytest.mark.parametrize("max_pending", [1, 2])
    def test_twice(self, train, touching, max_pending):
        """
        Asked for twice, it keeps no save from being taken.
        """
        training = train(max_pending=max_pending)
        training.saver.prepare(training.state())
        training.saver.prepare(training.state())

        assert [training.values(training.save()) for _ in range(3)] == [{0.0}] * 3

    # Python warns of every fork beside threads; torch has some.
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    @pytest.mark.parametrize("mode", ["auto", "overlap"])
    def test_forked_child(self, train, touching, mode):
        """
        A child forked meanwhile does not wait for what only its parent's thread would finish.
        """
        training = train(snapshot=mode)
        training.saver.prepare(training.state())
        assert touching.wait(WAIT)

        def work() -> None:
            for value in (0.0, 1.0):
                pending = training.save()
                training.step()
                assert training.values(pending) == {value}
            training.saver.close(WAIT)

        assert in_child(work)
        assert training.values(training.save()) == {0.0}


class TestForkWhileCopying:
    # Python warns of every fork beside threads; torch has some.
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_child_trains_and_saves(self, train, gate):
        """
        A child forked while its parent copies may step at once, and save.
        """
        training = train(snapshot="overlap")
        in_parent = training.save()

        def work() -> None:
            training.step()
            assert GatedCopy.let == 0
            pending = training.save()
            training.step()
            assert training.values(pending) == {1.0}

        assert in_child(work)
        training.step()
        assert training.values(in_parent) == {0.0}


class TestChecksums:
    def test_options_of_other_code(self, train):
        """
        Files have their sums whatever torch's option is, on the thread that asks or on the one that writes.
        """
        training = train()
        before = torch.serialization.get_crc32_options()

        def no_sums(event: str, **fields: Any) -> None:
            torch.serialization.set_crc32_options(False)

        training.saver.writer._report = no_sums
        try:
            torch.serialization.set_crc32_options(False)
            saves = []
            for _ in range(2):
                saves.append(training.save())
                saves[-1].result(WAIT)
        finally:
            torch.serialization.set_crc32_options(before)

        for save in saves:
            with zipfile.ZipFile(save.path) as file:
                assert file.testzip() is None

    def test_option_is_left_alone(self, train):
        """
        The asking thread's own option stays as it was.
        """
        training = train()
        before = torch.serialization.get_crc32_options()
        try:
            torch.serialization.set_crc32_options(False)
            training.save().result(WAIT)

            assert torch.serialization.get_crc32_options() is False
        finally:
            torch.serialization.set_crc32_options(before)


@pytest.mark.parametrize("works", [True, False])
def test_file_is_equal_either_way(train, monkeypatch, works):
    """
    A save that has to go through ``torch.save`` holds the same, with sums that are right.
    """
    monkeypatch.setattr(archive, "_works", lambda: works)
    training = train()
    save = training.save()

    assert training.values(save) == {0.0}
    with zipfile.ZipFile(save.path) as file:
        assert file.testzip() is None
        assert ("archive/.format_version" in file.namelist()) is not works


def test_copy_is_waited_for_either_way(train, gate, monkeypatch):
    """
    A save that has to go through ``torch.save`` waits for the copy before it.
    """
    asked, saving = threading.Event(), threading.Event()
    save = torch.save
    monkeypatch.setattr(archive, "_works", asked.set)  # which returns None
    monkeypatch.setattr(torch, "save", lambda *args: (saving.set(), save(*args)))
    training = train(snapshot="overlap")

    pending = training.save()
    assert asked.wait(WAIT)
    assert not saving.wait(0.05)
    training.step()

    assert training.values(pending) == {0.0}
    assert saving.is_set()


def test_copying_thread_ends(train):
    """
    A closed saver's copying thread ends.
    """
    training = train(snapshot="overlap")
    training.save()
    training.step()
    thread = training.saver._last_copy.thread
    assert isinstance(thread, threading.Thread)
    assert training.saver._stager.thread.is_alive()

    training.saver.close(WAIT)
    thread.join(WAIT)

    assert not thread.is_alive()

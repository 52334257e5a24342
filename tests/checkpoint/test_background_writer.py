from __future__ import annotations

import errno
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from trainbus.checkpoint import background_writer, interpreter_exit, patience
from trainbus.checkpoint.background_writer import BackgroundWriter, PendingSave
from trainbus.checkpoint.manifest import Manifest
from trainbus.errors import CheckpointSkipped, CheckpointWriteError, HandlerClosedError

MANIFEST = Manifest(contents="object", size=123)
WAIT = 30


class Reports:
    """Keeps what a writer reports, with whether the save was finished by then."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.fields: list[dict[str, Any]] = []
        self.early: list[bool] = []
        self.threads: list[str] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.events.append((event.removeprefix("checkpoint_"), fields["path"]))
        self.fields.append(fields)
        self.threads.append(threading.current_thread().name)
        if "save" in fields:
            self.early.append(not fields["save"].done())


class Gate:
    """A write that says when it begins and ends when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.open = threading.Event()

    def __call__(self) -> Manifest:
        self.begun.set()
        assert self.open.wait(WAIT)
        return MANIFEST


@pytest.fixture(name="gates")
def _gates() -> Iterator[list[Gate]]:
    """Gates that are opened at the end, so that a failed test leaves no thread waiting."""
    gates = [Gate() for _ in range(4)]
    yield gates
    for gate in gates:
        gate.open.set()


@pytest.fixture(name="reports")
def _reports() -> Reports:
    return Reports()


@pytest.fixture(name="make")
def _make(reports: Reports, gates: list[Gate]) -> Iterator[Callable[..., BackgroundWriter]]:
    writers = []

    def make(report: Callable[..., None] = reports, **options: Any) -> BackgroundWriter:
        writers.append(BackgroundWriter(report, **options))
        return writers[-1]

    yield make
    for gate in gates:
        gate.open.set()
    for writer in writers:
        writer.close(WAIT)


@pytest.fixture(autouse=True)
def _no_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in a test is not printed when pytest exits."""
    monkeypatch.setattr(interpreter_exit, "_failures", [])
    monkeypatch.setattr(interpreter_exit, "_exiting", False)


def done() -> Manifest:
    return MANIFEST


def full() -> Manifest:
    raise OSError(errno.ENOSPC, "No space left on device")


def save(
    writer: BackgroundWriter, path: str, write: Callable[[], Manifest] = done, **options: Any
) -> PendingSave:
    pending = PendingSave(path, epoch=1, global_step=7, stream="s", logs={"loss": 0.5})
    if writer.admit(pending):
        writer.submit(pending, write, **options)
    return pending


class TestSaving:
    def test_saved(self, make, reports):
        """
        A save is written on the writer's thread, reported, then finished.
        """
        writer = make()
        threads = []

        def write() -> Manifest:
            threads.append(threading.current_thread().name)
            return MANIFEST

        pending = save(writer, "a.pt", write)

        assert pending.result(WAIT) is MANIFEST
        assert threads == reports.threads == ["trainbus-writer"]
        assert reports.events == [("saved", "a.pt")]
        assert reports.early == [True]
        (fields,) = reports.fields
        assert fields.pop("seconds") >= 0
        assert fields == {
            "save": pending,
            "path": "a.pt",
            "manifest": MANIFEST,
            "size": 123,
            "stream": "s",
            "epoch": 1,
            "global_step": 7,
            "logs": {"loss": 0.5},
        }

    def test_in_order(self, make, reports, gates):
        """
        Saves are written one after the other, in the order they were submitted.
        """
        writer = make(max_pending=3)
        for name in "abc":
            save(writer, name, gates[0])
        gates[0].open.set()

        writer.flush(WAIT)

        assert reports.events == [("saved", "a"), ("saved", "b"), ("saved", "c")]

    def test_failed(self, make, reports):
        """
        A write that fails becomes a CheckpointWriteError, in the report and in the result alike.
        """
        writer = make()
        pending = save(writer, "a.pt", full)

        with pytest.raises(
            CheckpointWriteError, match=r"'a\.pt' of global step 7: \[Errno 28\] No space"
        ) as info:
            pending.result(WAIT)

        assert info.value.errno == errno.ENOSPC
        assert isinstance(info.value.__cause__, OSError)
        assert reports.events == [("failed", "a.pt")]
        assert reports.fields[0]["error"] is info.value
        assert reports.early == [True]

    def test_goes_on_after_a_failure(self, make):
        """
        A failure does not stop the saves after it.
        """
        writer = make()
        save(writer, "a.pt", full)

        assert save(writer, "b.pt").result(WAIT) is MANIFEST

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    def test_anything_raised_is_a_failure(self, make, error):
        """
        Also what is meant to end a thread only fails the save.
        """

        def write() -> Manifest:
            raise error

        writer = make()

        with pytest.raises(CheckpointWriteError, match=type(error).__name__):
            save(writer, "a.pt", write).result(WAIT)
        assert save(writer, "b.pt").result(WAIT) is MANIFEST

    @pytest.mark.parametrize("write", [done, full])
    def test_release_before_room(self, make, write):
        """
        The snapshot's memory is given back before the next save is admitted, also after a failure.
        """
        order = []
        writer = make(lambda event, **fields: order.append(event))
        for _ in range(20):
            pending = PendingSave("a.pt")
            assert writer.admit(pending)
            order.append("admitted")
            writer.submit(pending, write, release=lambda: order.append("released"))
        writer.flush(WAIT)

        kinds = [entry for entry in order if not entry.startswith("checkpoint")]
        assert kinds == ["admitted", "released"] * 20

    @pytest.mark.parametrize("error", [RuntimeError("mine"), SystemExit()])
    def test_report_that_fails(self, make, caplog, error):
        """
        A report that raises is logged, and the save is finished all the same.
        """

        def report(event: str, **fields: Any) -> None:
            raise error

        with caplog.at_level(logging.ERROR, "trainbus"):
            assert save(make(report), "a.pt").result(WAIT) is MANIFEST

        assert "Reporting checkpoint_saved of 'a.pt' failed" in caplog.text

    def test_fail(self, make, reports):
        """
        An admitted save that cannot be submitted fails and makes room.
        """
        writer = make()
        pending = PendingSave("a.pt", global_step=3)
        assert writer.admit(pending)

        writer.fail(pending, ValueError("no snapshot"))

        with pytest.raises(CheckpointWriteError, match="global step 3: ValueError: no snapshot"):
            pending.result(WAIT)
        assert reports.events == [("failed", "a.pt")]
        assert writer.unfinished == []
        assert save(writer, "b.pt").result(WAIT) is MANIFEST

    def test_fail_with_a_checkpoint_error(self, make):
        """
        An error that is a CheckpointWriteError already is not wrapped again.
        """
        writer = make()
        pending = PendingSave("a.pt")
        error = CheckpointWriteError("a.pt", 3, ValueError("no"))
        writer.admit(pending)

        writer.fail(pending, error)

        with pytest.raises(CheckpointWriteError) as info:
            pending.result(WAIT)
        assert info.value is error


class TestRemovals:
    def test_after_the_save(self, make, reports, tmp_path):
        """
        What a save replaces is removed when the new file is durable, and reported with the save's moment.
        """
        old = tmp_path / "old.pt"
        old.touch()
        seen = []

        def write() -> Manifest:
            seen.append(old.exists())
            return MANIFEST

        writer = make()
        save(writer, "a.pt", write, removals=[str(old)])
        writer.flush(WAIT)

        assert seen == [True]
        assert not old.exists()
        assert reports.events == [("saved", "a.pt"), ("removed", str(old))]
        assert reports.fields[1] == {
            "path": str(old),
            "stream": "s",
            "epoch": 1,
            "global_step": 7,
            "logs": {"loss": 0.5},
        }

    def test_not_after_a_failure(self, make, tmp_path):
        """
        A save that failed removes nothing.
        """
        old = tmp_path / "old.pt"
        old.touch()
        writer = make()

        save(writer, "a.pt", full, removals=[str(old)])
        writer.flush(WAIT)

        assert old.exists()

    def test_relative_paths(self, make, reports, tmp_path, monkeypatch):
        """
        Relative paths are those of the moment of asking, and reported as they were given.
        """
        monkeypatch.chdir(tmp_path)
        (tmp_path / "old.pt").touch()
        writer = make()

        save(writer, "a.pt", removals=["old.pt"])
        monkeypatch.chdir("/")
        writer.flush(WAIT)

        assert os.listdir(tmp_path) == []
        assert reports.events == [("saved", "a.pt"), ("removed", "old.pt")]

    def test_before_the_next_save(self, make, reports, gates, tmp_path):
        """
        What a save makes superfluous is gone before the next one is begun.
        """
        old = tmp_path / "old.pt"
        old.touch()
        writer = make(max_pending=2)
        save(writer, "a.pt", removals=[str(old)])
        save(writer, "b.pt", gates[0])

        assert gates[0].begun.wait(WAIT)

        assert reports.events == [("saved", "a.pt"), ("removed", str(old))]

    def test_failure_is_logged(self, make, reports, tmp_path, caplog):
        """
        A removal that fails is logged; the others go on.
        """
        (tmp_path / "folder").mkdir()
        (tmp_path / "b.pt").touch()
        writer = make()

        with caplog.at_level(logging.WARNING, "trainbus"):
            save(writer, "a.pt", removals=[str(tmp_path / "folder"), str(tmp_path / "b.pt")])
            writer.flush(WAIT)

        assert "Cannot remove the old checkpoint" in caplog.text
        assert reports.events == [("saved", "a.pt"), ("removed", str(tmp_path / "b.pt"))]


class TestIdle:
    def test_holds_no_save(self, make):
        """
        When nothing is left to do, what the last save was made of is let go, which holds its snapshot.
        """

        class Write:
            def __call__(self) -> Manifest:
                return MANIFEST

        write, gone = Write(), threading.Event()
        weakref.finalize(write, gone.set)
        writer = make()

        save(writer, "a.pt", write)
        del write

        assert gone.wait(WAIT)


class TestAdmit:
    def test_wait(self, make, gates):
        """
        With "wait" the next save is admitted when the one before is finished, and not sooner.
        """
        writer = make()
        first = save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)
        finished_by_then = []

        def second() -> None:
            writer.admit(PendingSave("b.pt"))
            finished_by_then.append(first.done())

        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()

        gates[0].open.set()
        thread.join(WAIT)
        assert finished_by_then == [True]

    def test_max_pending(self, make, gates):
        """
        As many saves as max_pending are admitted without waiting.
        """
        writer = make(max_pending=3)

        saves = [save(writer, name, gates[0]) for name in "abc"]

        assert writer.unfinished == saves

    def test_wait_for_room(self, make, gates):
        """
        Waiting for room ends with the time given, or at once when there is some.
        """
        writer = make()
        assert writer.wait_for_room(0.0)
        first = save(writer, "a.pt", gates[0])

        assert not writer.wait_for_room(0.0)
        assert not writer.wait_for_room(0.01)
        gates[0].open.set()
        assert writer.wait_for_room(WAIT)
        assert first.done()

    def test_no_room_is_waited_for(self, make, gates):
        """
        A writer that skips saves, or is closed, has nobody wait for room.
        """
        skipping, closed = make(on_busy="skip"), make()
        save(skipping, "a.pt", gates[0])
        save(closed, "b.pt", gates[0])
        with pytest.raises(TimeoutError):
            closed.close(timeout=0.01)

        assert skipping.wait_for_room() and closed.wait_for_room()
        gates[0].open.set()

    def test_skip(self, make, reports, gates):
        """
        With "skip" a save that finds the writer busy is not carried out, and says so.
        """
        writer = make(on_busy="skip")
        save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)

        second = PendingSave("b.pt")
        assert writer.admit(second) is False

        with pytest.raises(CheckpointSkipped, match=r"'b\.pt' was not saved: 1 earlier save"):
            second.result(0)
        assert reports.events == [("skipped", "b.pt")]
        assert reports.early == [True]
        assert "on_busy is 'skip'" in reports.fields[0]["reason"]
        gates[0].open.set()

    def test_result_means_room(self, make):
        """
        Whoever has waited for a save finds room for the next.
        """
        writer = make(on_busy="skip")
        for _ in range(200):
            assert save(writer, "a.pt").result(WAIT) is MANIFEST

    def test_replace(self, make, reports, gates):
        """
        With "replace" the newest takes the place of the one that has not begun, whose memory comes free.
        """
        writer = make(max_pending=2, on_busy="replace")
        released = []
        first = save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)
        second = save(writer, "b.pt", release=lambda: released.append("b"))

        third = PendingSave("c.pt")
        assert writer.admit(third) is True

        assert released == ["b"]
        with pytest.raises(CheckpointSkipped, match="a newer save took its place"):
            second.result(0)
        writer.submit(third, done)
        gates[0].open.set()
        writer.flush(WAIT)
        assert first.result(0) is third.result(0) is MANIFEST
        assert reports.events == [
            ("skipped", "b.pt"),
            ("saved", "a.pt"),
            ("saved", "c.pt"),
        ]

    def test_interrupted_while_it_is_replaced(self, make, gates):
        """
        Ctrl-C while the memory of a replaced save comes free: that save is over all the same.
        """

        def release() -> None:
            raise KeyboardInterrupt

        writer = make(max_pending=2, on_busy="replace")
        save(writer, "a.pt", gates[0])
        replaced = save(writer, "b.pt", release=release)
        with pytest.raises(KeyboardInterrupt):
            save(writer, "c.pt")

        with pytest.raises(CheckpointSkipped, match="a newer save took its place"):
            replaced.result(0)

    def test_replaced_save_removes_nothing(self, make, gates, tmp_path):
        """
        The removals of a save that was replaced are not carried out.
        """
        old = tmp_path / "old.pt"
        old.touch()
        writer = make(max_pending=2, on_busy="replace")
        save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)
        save(writer, "b.pt", removals=[str(old)])
        save(writer, "c.pt")

        gates[0].open.set()
        writer.flush(WAIT)

        assert old.exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_pending": 0}, "max_pending must be at least 1, got 0"),
            ({"on_busy": "drop"}, "on_busy must be one of 'wait', 'skip', 'replace', got 'drop'"),
            ({"on_busy": "replace"}, "needs max_pending of at least 2, got 1"),
            ({"patience": 0}, "write_timeout must be more than 0 seconds, got 0"),
        ],
    )
    def test_wrong_options(self, options, message):
        """
        Options that make no sense are refused at once.
        """
        with pytest.raises(ValueError, match=message):
            BackgroundWriter(lambda *args, **fields: None, **options)


class TestFlushAndClose:
    def test_flush_raises_no_failure(self, make):
        """
        A failure is the result's and the report's business, not flush's.
        """
        writer = make()
        pending = save(writer, "a.pt", full)

        writer.flush(WAIT)

        assert pending.done()

    def test_timeouts_name_the_saves(self, make, gates):
        """
        Flush and close that take too long name what is unfinished.
        """
        writer = make(max_pending=2)
        save(writer, "a.pt", gates[0])
        save(writer, "b.pt", gates[0])

        with pytest.raises(TimeoutError, match=r"unfinished after 0.01 s: 'a\.pt', 'b\.pt'"):
            writer.flush(0.01)
        with pytest.raises(TimeoutError, match=r"'a\.pt', 'b\.pt'"):
            writer.close(0.01)

    def test_close(self, make):
        """
        Close finishes what is queued, ends the thread, and admits nothing any more.
        """
        writer = make(max_pending=3, name="this writer")
        saves = [save(writer, name) for name in "abc"]

        writer.close(WAIT)
        writer.close(WAIT)

        assert all(pending.done() for pending in saves)
        assert not any(thread.name == "this writer" for thread in threading.enumerate())
        with pytest.raises(HandlerClosedError, match=r"Cannot save 'd\.pt': the writer is closed"):
            writer.admit(PendingSave("d.pt"))

    def test_close_while_one_waits_for_room(self, make, gates):
        """
        Whoever waits for room when the writer is closed is refused.
        """
        writer = make()
        save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)
        errors = []

        def wait() -> None:
            try:
                writer.admit(PendingSave("b.pt"))
            except HandlerClosedError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        with pytest.raises(TimeoutError):
            writer.close(0.05)
        gates[0].open.set()
        thread.join(WAIT)

        assert len(errors) == 1

    def test_admitted_before_close(self, make):
        """
        A save that was admitted is written even if the writer was closed before it was submitted.
        """
        writer = make()
        pending = PendingSave("a.pt")
        writer.admit(pending)
        writer.close(WAIT)

        writer.submit(pending, done)

        assert pending.result(WAIT) is MANIFEST

    def test_submitted_while_the_thread_ends(self, make, gates):
        """
        A save submitted when a closed writer's thread is just about to end gets a new one.
        """
        writer = make()
        pending = PendingSave("a.pt")
        writer.admit(pending)
        end = writer._leave_nobody_waiting

        def end_slowly() -> None:
            gates[0]()
            end()

        writer._leave_nobody_waiting = end_slowly
        writer.close(0.01)
        assert gates[0].begun.wait(WAIT)

        writer.submit(pending, done)

        assert pending.result(WAIT) is MANIFEST

    def test_from_the_writers_own_thread(self, make):
        """
        A report that waits for the writer gets an error and no deadlock.
        """
        errors = []

        def report(event: str, **fields: Any) -> None:
            try:
                writer.flush()
            except RuntimeError as error:
                errors.append(str(error))

        writer = make(report)
        save(writer, "a.pt").result(WAIT)

        assert errors == ["Cannot wait for the writer on its own thread: it would wait for itself."]


class TestDeadThread:
    # pytest warns of every thread that ends by an exception, which is what this is about.
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_nobody_waits_for_ever(self, make, gates):
        """
        When the thread dies, every save it had fails, and the next one gets a new thread.
        """
        writer = make(max_pending=2)
        released = []

        def die(job: Any) -> None:
            gates[0]()
            raise SystemExit

        writer._runner.carry_out = die
        saves = [save(writer, name, release=lambda: released.append(1)) for name in "ab"]
        thread = writer._thread
        gates[0].open.set()
        thread.join(WAIT)

        for pending in saves:
            with pytest.raises(CheckpointWriteError, match="the writer thread has died"):
                pending.result(WAIT)
        writer.flush(WAIT)
        assert released == [1, 1]
        del writer._runner.carry_out
        assert save(writer, "c.pt").result(WAIT) is MANIFEST


class TestStuckThread:
    @pytest.fixture(autouse=True)
    def _looks_often(self, monkeypatch):
        monkeypatch.setattr(background_writer, "_LOOKS_EVERY", 0.01)

    def test_fails_what_waits_for_it(self, make, gates, reports):
        """
        A write that makes no progress fails, and so does the save that waits for it; both say for how long.
        """
        writer = make(patience=0.1)
        stuck = save(writer, "a.pt", gates[0])
        waiting = save(writer, "b.pt")

        for pending in (stuck, waiting):
            with pytest.raises(
                CheckpointWriteError, match=r"'a\.pt' has been in writing for .* without"
            ) as info:
                pending.result(WAIT)
            assert info.value.errno == errno.ETIMEDOUT
        assert reports.events == [("failed", "a.pt"), ("failed", "b.pt")]

    def test_keeps_nobody_waiting(self, make, gates):
        """
        Later saves fail at once, and flush and close return.
        """
        writer = make(patience=0.1)
        save(writer, "a.pt", gates[0])
        writer.flush()
        thread = writer._thread

        with pytest.raises(CheckpointWriteError):
            save(writer, "b.pt").result(0)
        writer.close()
        assert thread.is_alive()

    def test_fails_what_is_queued_behind_it(self, make, gates):
        """
        Saves in the queue behind it fail too, and give their memory back.
        """
        writer = make(patience=0.1, max_pending=2)
        released = []
        save(writer, "a.pt", gates[0])
        queued = save(writer, "b.pt", release=lambda: released.append("b"))
        writer.flush()

        with pytest.raises(CheckpointWriteError, match=r"'a\.pt' has been in writing"):
            queued.result(0)
        assert released == ["b"]

    def test_may_come_back(self, make, gates, reports, caplog):
        """
        Once the disk answers after all, saves work again; what was reported as failed is told of, once more.
        """
        writer = make(patience=0.1)
        late = save(writer, "a.pt", gates[0], removals=["old.pt"])
        writer.flush()
        gates[0].open.set()
        while writer._running is not None:
            with writer._changed:
                writer._changed.wait(0.01)

        assert save(writer, "b.pt").result(WAIT) is MANIFEST
        assert reports.events == [("failed", "a.pt"), ("saved", "a.pt"), ("saved", "b.pt")]
        with pytest.raises(CheckpointWriteError):
            late.result(0)
        assert "was written after all" in caplog.text

    def test_is_not_one_that_makes_progress(self, make, gates):
        """
        A long write is waited for as long as the disk takes bytes of it.
        """
        looks, looked = [], threading.Event()

        def now() -> float:
            looks.append(1)
            if len(looks) >= 30:
                looked.set()
            return time.monotonic()

        writer = make(patience=0.05, last_progress=now)
        first = save(writer, "a.pt", gates[0])
        second: list[PendingSave] = []
        thread = threading.Thread(target=lambda: second.append(save(writer, "b.pt")))
        thread.start()
        assert looked.wait(WAIT)
        assert not first.done() and not second
        gates[0].open.set()
        thread.join(WAIT)

        assert first.result(WAIT) is MANIFEST and second[0].result(WAIT) is MANIFEST

    def test_is_warned_of_once(self, make, gates, monkeypatch, caplog):
        """
        Before it counts as stuck, one warning says what has been in writing and for how long.
        """
        monkeypatch.setattr(patience, "_WORTH_A_WORD", 0.02)
        writer = make(patience=0.2)
        save(writer, "a.pt", gates[0])
        writer.flush()

        warnings = [one for one in caplog.records if "has been in writing" in one.getMessage()]
        assert len(warnings) == 1


class TestExit:
    def test_no_thread_is_started(self, make, monkeypatch):
        """
        While the interpreter exits no thread is started: a save that needs one is refused.
        """
        writer = make()
        monkeypatch.setattr(interpreter_exit, "_exiting", True)

        with pytest.raises(HandlerClosedError, match="while the interpreter exits"):
            writer.admit(PendingSave("a.pt"))
        assert writer.unfinished == []

    def test_submitted_too_late(self, make, monkeypatch):
        """
        An admitted save that comes too late for a thread fails instead of being lost.
        """
        writer = make()
        pending = PendingSave("a.pt")
        released = []
        writer.admit(pending)
        writer.close(WAIT)
        monkeypatch.setattr(interpreter_exit, "_exiting", True)

        writer.submit(pending, done, release=lambda: released.append(1))

        with pytest.raises(CheckpointWriteError, match="while the interpreter exits"):
            pending.result(0)
        assert released == [1]


# Python warns of every fork beside threads.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_child_starts_empty(self, make, gates):
        """
        A forked child has a writer that is empty and works, and nobody in it waits for the parent's saves.
        """
        writer = make()
        pending = save(writer, "a.pt", gates[0])
        assert gates[0].begun.wait(WAIT)

        child = os.fork()
        if child == 0:
            status = 1
            try:
                assert writer.unfinished == []
                assert isinstance(pending._error, CheckpointSkipped)
                assert save(writer, "b.pt").result(WAIT) is not None
                writer.close(WAIT)
                status = 0
            finally:
                os._exit(status)

        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert not pending.done()
        gates[0].open.set()
        assert pending.result(WAIT) is MANIFEST

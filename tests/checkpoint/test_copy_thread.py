from __future__ import annotations

import threading
import weakref

import pytest
import torch

from trainbus.checkpoint import background_copy, host_copy
from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove
from trainbus.checkpoint.copy_thread import CopyThread, copy_together

from .forked import holds_in_child

TOO_LONG = 30
A_MOMENT = 0.1  # given to whoever should wait and would not


class Held:
    """A move that begins and is held there."""

    def __init__(self) -> None:
        self.begun, self.may_go_on = threading.Event(), threading.Event()

    def begin(self) -> None:
        self.begun.set()
        assert self.may_go_on.wait(TOO_LONG)

    def hold_back(self) -> None:
        pass

    def finish(self) -> None:
        pass


class TestCopyTogether:
    def many(self, elements: int = 8, count: int = 100) -> HostMove:
        sources = [torch.full((elements,), float(number)) for number in range(count)]
        return HostMove([torch.zeros(elements) for _ in sources], sources)

    @pytest.fixture(autouse=True)
    def _share_everything(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 0)
        # Past the caches, no copy is left to one thread.
        monkeypatch.setattr(host_copy, "copy_past_caches", None)

    @pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
    def test_all_is_copied(self, thread, count):
        """
        Every tensor is copied when the call returns.
        """
        move = self.many(count=count)

        copy_together(move, thread)

        assert all(map(torch.equal, move.targets, move.sources))

    def test_both_copy(self, thread, monkeypatch):
        """
        Each of the two threads takes parts while the other is busy, also of tensors that require grad.
        """
        meet = threading.Barrier(2)

        def begin(self: HostMove) -> None:
            if threading.current_thread() not in threads:
                threads.add(threading.current_thread())
                meet.wait(TOO_LONG)
            original(self)

        threads: set[threading.Thread] = set()
        original = HostMove.begin
        monkeypatch.setattr(HostMove, "begin", begin)

        move = self.many()
        for tensor in move.targets:
            tensor.requires_grad_()
        with torch.no_grad():
            copy_together(move, thread)

        assert len(threads) == 2
        assert all(map(torch.equal, move.targets, move.sources))

    def test_thread_that_is_busy(self, thread):
        """
        A thread that has something else to do is not waited for.
        """
        may_end = threading.Event()
        thread.call(lambda: may_end.wait(TOO_LONG))
        move = self.many()

        copy_together(move, thread)

        assert all(map(torch.equal, move.targets, move.sources))
        may_end.set()

    def test_thread_that_does_not_run(self):
        """
        Without the thread, the calling one copies all, and leaves nothing for a later one.
        """
        move, thread = self.many(), CopyThread()

        copy_together(move, thread)

        assert all(map(torch.equal, move.targets, move.sources))
        assert thread._jobs.empty()

    @pytest.mark.parametrize("times", [1, 2])
    def test_waits_for_the_other(self, thread, monkeypatch, times):
        """
        It returns when the part that the other is amid is copied; what went wrong there it tries again.
        """
        mine = threading.current_thread()
        amid, failed = threading.Event(), list[int]()
        original = HostMove.begin

        def begin(self: HostMove) -> None:
            if threading.current_thread() is mine:
                assert amid.wait(TOO_LONG)
            if threading.current_thread() is not mine or (id(self) in failed and times == 2):
                failed.append(id(self))
                amid.set()
                threading.Event().wait(A_MOMENT)
                raise OSError("no memory")
            original(self)

        monkeypatch.setattr(HostMove, "begin", begin)
        move = self.many()

        if times == 2:
            with pytest.raises(OSError, match="no memory"):
                copy_together(move, thread)
        else:
            copy_together(move, thread)
            assert all(map(torch.equal, move.targets, move.sources))
        assert len(failed) == times

    def test_waits_after_an_error(self, thread, monkeypatch):
        """
        What breaks on the calling thread is raised when the other one touches nothing any more.
        """
        mine = threading.current_thread()
        amid, begun = threading.Event(), []
        original = HostMove.begin

        def begin(self: HostMove) -> None:
            if threading.current_thread() is mine:
                assert amid.wait(TOO_LONG)
                raise OSError("no memory")
            begun.append(self)
            amid.set()
            threading.Event().wait(A_MOMENT)
            original(self)

        monkeypatch.setattr(HostMove, "begin", begin)
        move = self.many()

        with pytest.raises(OSError, match="no memory"):
            copy_together(move, thread)

        copied = [torch.equal(*pair) for pair in zip(move.targets[1:], move.sources[1:], strict=True)]
        assert len(begun) == 1 and any(copied) and not all(copied)

    @pytest.mark.parametrize(("elements", "shared"), [(32_769, False), (32_768, True)])
    def test_large_tensors_are_not_shared(self, thread, monkeypatch, elements, shared):
        """
        What torch copies with all of its threads by itself is left to it in one call.
        """
        begun: list[int] = []
        monkeypatch.setattr(HostMove, "begin", lambda move: begun.append(id(move)))
        move = self.many(elements=elements, count=9)

        copy_together(move, thread)

        assert (begun != [id(move)]) is shared


class Job:
    """Something to call that notes when it is let go of."""

    def __init__(self, freed: threading.Event) -> None:
        weakref.finalize(self, freed.set)

    def __call__(self) -> None:
        pass


class TestCopyThread:
    def test_in_order(self, thread):
        """
        Jobs are done one after the other, in the order they were given, none on the caller's thread.
        """
        done: list[tuple[int, int]] = []
        last = threading.Event()
        for number in range(100):
            thread.call(lambda number=number: done.append((number, threading.get_ident())))
        thread.call(last.set)
        assert last.wait(TOO_LONG)

        assert [number for number, _ in done] == list(range(100))
        idents = {ident for _, ident in done}
        assert len(idents) == 1
        assert threading.get_ident() not in idents

    def test_given_before_the_start(self):
        """
        What is given to a thread that does not run yet is done when it does.
        """
        thread, done = CopyThread(), threading.Event()
        thread.call(done.set)
        assert not thread.is_alive()

        thread.start()

        assert done.wait(TOO_LONG)
        assert thread.is_alive()
        thread.close()

    def test_started_twice(self, thread):
        """
        A thread that runs is not started again.
        """
        before = threading.active_count()

        thread.start()

        assert threading.active_count() == before

    def test_uses_one_core(self):
        """
        The thread lets torch use one core, and those of all others as many as before.
        """
        numbers: list[int] = []
        before = torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            thread, done = CopyThread(), threading.Event()
            thread.start()
            thread.call(lambda: numbers.append(torch.get_num_threads()))
            thread.call(done.set)
            assert done.wait(TOO_LONG)
            other = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
            other.start()
            other.join(TOO_LONG)
            numbers.append(torch.get_num_threads())
            thread.close()
        finally:
            torch.set_num_threads(before)

        assert numbers == [1, 3, 3]

    def test_close(self):
        """
        The thread ends when it has done what it was given; closing does not wait, also twice.
        """
        thread, running, may_go_on = CopyThread(), threading.Event(), threading.Event()
        threads: list[threading.Thread] = []
        done: list[str] = []

        def run() -> None:
            threads.append(threading.current_thread())
            running.set()
            assert may_go_on.wait(TOO_LONG)
            done.append("first")

        thread.start()
        thread.call(run)
        thread.call(lambda: done.append("last"))
        assert running.wait(TOO_LONG)

        thread.close()
        thread.close()

        assert not thread.is_alive()
        assert done == []
        may_go_on.set()
        threads[0].join(TOO_LONG)
        assert not threads[0].is_alive()
        assert done == ["first", "last"]

    def test_used_while_it_ends(self):
        """
        A copy given to a thread that was closed amid its work is made by a new one, at once.
        """
        thread, running, may_go_on = CopyThread(), threading.Event(), threading.Event()

        def run() -> None:
            running.set()
            assert may_go_on.wait(TOO_LONG)

        thread.start()
        thread.call(run)
        assert running.wait(TOO_LONG)
        thread.close()
        copy = BackgroundCopy([])

        thread.carry_out(copy)

        copy.wait()
        assert copy.thread is not None and copy.thread.is_alive()
        thread.close()
        may_go_on.set()

    def test_close_before_the_start(self):
        """
        A thread that never ran is closed without more ado.
        """
        thread = CopyThread()

        thread.close()

        assert not thread.is_alive()

    def test_keeps_no_job(self, thread):
        """
        A job is let go of when it is done, not when the next one comes: it may hold a model's tensors.
        """
        freed = threading.Event()

        thread.call(Job(freed))

        assert freed.wait(TOO_LONG)

    def test_copy_knows_its_thread(self, thread):
        """
        Whoever waits for a copy can tell that the thread it was given to is gone.
        """
        copy = BackgroundCopy([])

        thread.carry_out(copy)

        assert copy.thread is not None
        assert copy.thread.is_alive()
        copy.wait()


# Python warns of every fork beside threads; torch has some.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_child_begins_empty(self, thread):
        """
        A forked child has no thread and none of the parent's jobs, and can start one for its own.
        """
        running, may_go_on = threading.Event(), threading.Event()
        calls: list[str] = []

        def run() -> None:
            running.set()
            assert may_go_on.wait(TOO_LONG)

        thread.call(run)
        assert running.wait(TOO_LONG)
        thread.call(lambda: calls.append("of the parent"))

        def works() -> bool:
            if thread.is_alive():
                return False
            thread.start()
            copy = BackgroundCopy([])
            thread.carry_out(copy)
            copy.wait()
            return thread.is_alive() and calls == []

        assert holds_in_child(works)
        assert thread.is_alive()
        may_go_on.set()

    def test_child_waits_for_no_copy_of_its_parent(self, thread):
        """
        A child that has a copy of its parent's at hand does not wait for it for ever.
        """
        move = Held()
        copy = BackgroundCopy([move])
        thread.carry_out(copy)
        assert move.begun.wait(TOO_LONG)

        def goes_on() -> bool:
            copy.let_change()
            try:
                copy.wait()
            except RuntimeError as error:
                return "has died" in str(error)
            return False

        assert holds_in_child(goes_on)
        move.may_go_on.set()
        copy.wait()

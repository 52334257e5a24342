from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from trainbus.checkpoint import collector
from trainbus.checkpoint.collector import paused

from .forked import holds_in_child


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


class TestPaused:
    def test_off_inside_and_on_afterwards(self):
        """
        The collector is off inside of the context and on after it.
        """
        with paused():
            assert not gc.isenabled()

        assert gc.isenabled()

    def test_nothing_is_collected(self):
        """
        However much is made inside, no collection begins.
        """
        begun = []

        def note(phase: str, info: dict[str, int]) -> None:
            begun.append(phase)

        gc.callbacks.append(note)
        try:
            with paused():
                begun.clear()
                kept = [[] for _ in range(10 * gc.get_threshold()[0])]
                assert begun == []
        finally:
            gc.callbacks.remove(note)
        assert kept

    def test_nested(self):
        """
        Leaving an inner context leaves the collector off; the outermost puts it on again.
        """
        with paused():
            with paused():
                pass
            assert not gc.isenabled()

        assert gc.isenabled()

    def test_again(self):
        """
        Each pause counts for itself: the next one begins and ends as the first did.
        """
        for _ in range(3):
            with paused():
                assert not gc.isenabled()
            assert gc.isenabled()

    def test_over_two_threads(self):
        """
        The collector stays off until the last thread has left its context, whichever that is.
        """
        inside, leave, left = threading.Event(), threading.Event(), threading.Event()

        def pause() -> None:
            with paused():
                inside.set()
                assert leave.wait(30)
            left.set()

        thread = threading.Thread(target=pause)
        with paused():
            thread.start()
            assert inside.wait(30)
        assert not gc.isenabled()
        leave.set()
        assert left.wait(30)
        thread.join(30)

        assert gc.isenabled()

    def test_off_before(self):
        """
        A collector that was off before stays off.
        """
        gc.disable()

        with paused(), paused():
            pass

        assert not gc.isenabled()

    def test_exception(self):
        """
        An exception goes through, and the collector is on again.
        """
        with pytest.raises(KeyError, match="mine"), paused():
            raise KeyError("mine")

        assert gc.isenabled()


# Python warns of every fork beside threads; torch has some.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_child_collects(self):
        """
        A child forked in a pause, whose thread is not in it, has the collector on.
        """
        with paused():
            assert holds_in_child(gc.isenabled)
            assert not gc.isenabled()

    def test_child_of_one_that_was_off(self):
        """
        A child forked in a pause of a collector that was off has it off.
        """
        gc.disable()

        with paused():
            assert holds_in_child(lambda: not gc.isenabled())

    def test_child_pauses(self):
        """
        A child may pause the collector itself, also if its parent was about to at the fork.
        """

        def pauses() -> bool:
            with paused():
                inside = gc.isenabled()
            return not inside and gc.isenabled()

        with paused(), collector._lock:
            assert holds_in_child(pauses)

    def test_child_without_a_pause(self):
        """
        A child of a parent that does not pause has the collector as the parent has it.
        """
        assert holds_in_child(gc.isenabled)
        gc.disable()

        assert holds_in_child(lambda: not gc.isenabled())

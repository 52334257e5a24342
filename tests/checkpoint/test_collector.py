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
    thresholds = gc.get_threshold()
    gc.enable()
    yield
    gc.enable()
    gc.set_threshold(*thresholds)


def _collects() -> bool:
    return gc.isenabled() and gc.get_threshold()[0] > 0


class TestPaused:
    def test_off_inside_and_on_afterwards(self):
        """
        The collector is off inside of the context and on after it.
        """
        with paused():
            assert not _collects()

        assert _collects()

    def test_nothing_is_collected(self):
        """
        However much is made inside, no collection begins.
        """
        begun = []

        def note(phase: str, info: dict[str, int]) -> None:
            begun.append(phase)

        objects = 10 * gc.get_threshold()[0]
        gc.callbacks.append(note)
        try:
            with paused():
                begun.clear()
                kept = [[] for _ in range(objects)]
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
            assert not _collects()

        assert _collects()

    def test_again(self):
        """
        Each pause counts for itself: the next one begins and ends as the first did.
        """
        for _ in range(3):
            with paused():
                assert not _collects()
            assert _collects()

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
        assert not _collects()
        leave.set()
        assert left.wait(30)
        thread.join(30)

        assert _collects()

    def test_off_before(self):
        """
        A collector that was off before stays off.
        """
        gc.disable()

        with paused(), paused():
            pass

        assert not gc.isenabled()

    def test_turned_off_meanwhile(self):
        """
        A collector that another thread turns off meanwhile is off afterwards, with its thresholds.
        """
        thresholds = gc.get_threshold()

        with paused():
            gc.disable()

        assert not gc.isenabled()
        assert gc.get_threshold() == thresholds

    def test_thresholds_set_meanwhile(self):
        """
        Thresholds that another thread sets meanwhile stay.
        """
        with paused():
            gc.set_threshold(12_345, 6, 7)

        assert gc.get_threshold()[0] == 12_345

    def test_exception(self):
        """
        An exception goes through, and the collector is on again.
        """
        with pytest.raises(KeyError, match="mine"), paused():
            raise KeyError("mine")

        assert _collects()


# Python warns of every fork beside threads; torch has some.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def test_child_collects(self):
        """
        A child forked in a pause, whose thread is not in it, has the collector on.
        """
        with paused():
            assert holds_in_child(_collects)
            assert not _collects()

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
                inside = _collects()
            return not inside and _collects()

        with paused(), collector._lock:
            assert holds_in_child(pauses)

    def test_child_without_a_pause(self):
        """
        A child of a parent that does not pause has the collector as the parent has it.
        """
        assert holds_in_child(_collects)
        gc.disable()

        assert holds_in_child(lambda: not gc.isenabled())

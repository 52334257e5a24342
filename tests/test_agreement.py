"""What ranks agree on; here each is a thread, and they meet at a barrier."""

from __future__ import annotations

import threading

import pytest

from trainbus import CheckpointWriteError, ranks
from trainbus.agreement import Agreement
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.pending_save import PendingSave


class Table:
    """Stands in for the group: threads that are ranks."""

    def __init__(self, size):
        self.size = size
        self.here = threading.local()
        self.words = [b""] * size
        self.barrier = threading.Barrier(size, timeout=30)
        self.met = []

    def exchange(self, what, mine, answer):
        rank = self.here.rank
        self.words[rank] = mine
        self.barrier.wait()
        if rank == 0:
            self.met.append(what)
            self.reply = answer(list(self.words))
        self.barrier.wait()
        return self.reply


class Rank:
    """One rank's agreement, and what it brought about there."""

    def __init__(self, number):
        self.number = number
        self.posted, self.reasons = [], []
        self.agreement = Agreement(
            lambda name, **fields: self.posted.append((name, fields)), self.reasons.append
        )
        self.save = PendingSave("a.pt" if number == 0 else None)


@pytest.fixture
def together(monkeypatch):
    """Return a function that lets so many ranks do something, and returns them and where they met."""

    def run(do, size=2):
        table = Table(size)
        monkeypatch.setattr(ranks, "together", lambda: True)
        monkeypatch.setattr(ranks, "rank", lambda: table.here.rank)
        monkeypatch.setattr(ranks, "_table", lambda: table)
        everyone, errors = [Rank(number) for number in range(size)], []

        def live(rank):
            table.here.rank = rank.number
            try:
                do(rank)
            except Exception as error:
                errors.append(error)
                table.barrier.abort()

        threads = [threading.Thread(target=live, args=(rank,)) for rank in everyone]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        if errors:
            raise errors[0]
        return everyone, table.met

    return run


class TestAlone:
    def test_at_once(self):
        """Without other ranks a stop, a word and an event take effect where they are said."""
        rank = Rank(0)
        rank.agreement.stop("enough")
        rank.agreement.tell("key", 5)
        rank.agreement.post("checkpoint_removed", path="a.pt")
        rank.agreement.meet("the test")

        assert rank.reasons == ["enough"]
        assert (rank.agreement.heard("key"), rank.agreement.heard("key")) == ([5], [])
        assert rank.posted == [("checkpoint_removed", {"path": "a.pt"})]


class TestMeet:
    def test_stop(self, together):
        """One rank wants to stop; all do at the meeting, none before, for the reason of the lowest rank."""

        def do(rank):
            if rank.number:
                rank.agreement.stop(f"rank {rank.number} has enough")
            assert rank.reasons == []
            rank.agreement.meet("one")
            rank.agreement.meet("two")

        everyone, met = together(do, size=3)

        assert [rank.reasons for rank in everyone] == [["rank 1 has enough"]] * 3
        assert met == ["one", "two"]

    def test_told(self, together):
        """What was told is heard on all ranks, in their order, once; the last of a rank's words counts."""
        heard = {}

        def do(rank):
            rank.agreement.tell("key", "old")
            rank.agreement.tell("key", rank.number)
            before = rank.agreement.heard("key")
            rank.agreement.meet("one")
            heard[rank.number] = before, rank.agreement.heard("key"), rank.agreement.heard("key")
            rank.agreement.meet("two")
            assert rank.agreement.heard("key") == []

        together(do)

        assert heard == {0: ([], [0, 1], []), 1: ([], [0, 1], [])}

    def test_news(self, together):
        """What becomes of a save is posted on all ranks, with the handle that each of them was given."""
        error = CheckpointWriteError("a.pt", 1, OSError(28, "no space"))

        def do(rank):
            first = PendingSave(None)
            rank.agreement.expect(first)
            rank.agreement.expect(rank.save)
            if rank.number == 0:
                rank.agreement.post("checkpoint_failed", save=rank.save, error=error)
                rank.agreement.post("checkpoint_removed", path="b.pt")
            assert rank.posted == []
            rank.agreement.meet("one")
            rank.agreement.meet("two")

        everyone, _ = together(do)

        for rank in everyone:
            (name, fields), removed = rank.posted
            assert name == "checkpoint_failed" and fields["save"] is rank.save
            assert str(fields["error"]) == str(error) and fields["error"].errno == 28
            assert removed == ("checkpoint_removed", {"path": "b.pt"})
        assert everyone[0].posted[0][1]["error"] is error

    @pytest.mark.parametrize("meets_between", [False, True])
    def test_news_of_a_write_that_came_late(self, together, meets_between):
        """A save that failed, and was written after all, is told of twice, on all ranks in that order."""

        def do(rank):
            older, newer = PendingSave(None), PendingSave(None)
            for save in (older, rank.save, newer):
                rank.agreement.expect(save)
            if rank.number == 0:
                rank.agreement.post("checkpoint_failed", save=rank.save)
            if meets_between:
                rank.agreement.meet("one")
            if rank.number == 0:
                rank.agreement.post("checkpoint_saved", save=rank.save)
                rank.agreement.post("checkpoint_skipped", save=newer)
            rank.agreement.meet("two")
            assert list(rank.agreement._expected.values()) == [rank.save]  # one, however many failed

        everyone, _ = together(do)

        for rank in everyone:
            names = [name for name, _ in rank.posted]
            assert names == ["checkpoint_failed", "checkpoint_saved", "checkpoint_skipped"]
            assert [fields["save"] is rank.save for _, fields in rank.posted] == [True, True, False]

    def test_save_of_one_rank(self, together):
        """A save that rank 0 alone asked for is its own affair."""

        def do(rank):
            if rank.number == 0:
                rank.agreement.post("checkpoint_saved", save=rank.save)
                assert rank.posted == [("checkpoint_saved", {"save": rank.save})]
            rank.agreement.meet("one")

        everyone, _ = together(do)

        assert everyone[1].posted == []

    def test_leave(self, together):
        """A rank that ends with an error meets nobody any more, and loses no news."""

        def do(rank):
            rank.agreement.expect(rank.save)
            if rank.number == 0:
                rank.agreement.post("checkpoint_saved", save=rank.save)
            rank.agreement.leave()
            assert len(rank.posted) == (rank.number == 0)
            rank.agreement.meet("nowhere")
            rank.agreement.finish(lambda timeout: None)

        everyone, met = together(do)

        assert met == []
        assert everyone[0].posted == [("checkpoint_saved", {"save": everyone[0].save})]


class TestGive:
    def test_room(self, together):
        """Rank 0 gets the part of each rank, in their order, and the others nothing; they meet once."""
        given = {}

        def do(rank):
            given[rank.number] = rank.agreement.give(rank.number * 10, lambda seconds: True)

        _, met = together(do, size=3)

        assert given == {0: [0, 10, 20], 1: None, 2: None}
        assert met == ["handler.save or save_async"]

    def test_no_room(self, together, monkeypatch):
        """While rank 0 has no room for a save, the others hear of it, again and again."""
        monkeypatch.setattr(ranks, "_timeout", 8.0)
        waits, given = [], {}

        def do(rank):
            def wait_for_room(seconds):
                assert rank.number == 0
                waits.append(seconds)
                return len(waits) == 4

            given[rank.number] = rank.agreement.give("part", wait_for_room)

        _, met = together(do)

        assert given == {0: ["part"] * 2, 1: None}
        assert waits == [0.0, 2.0, 2.0, 2.0]
        assert met == ["handler.save or save_async"] * 4


class TestWaiting:
    def test_finish(self, together, monkeypatch):
        """The others wait for rank 0's disk, longer than ranks wait for each other, and hear the news."""
        monkeypatch.setattr(ranks, "_timeout", 0.01)
        calls = []

        def do(rank):
            rank.agreement.expect(rank.save)

            def flush(timeout):
                assert rank.number == 0
                calls.append(timeout)
                if len(calls) < 4:
                    raise TimeoutError("still writing")
                rank.agreement.post("checkpoint_saved", save=rank.save)

            rank.agreement.finish(flush)

        everyone, met = together(do)

        assert met == ["waiting for saves"] * 4 + ["the end of saves"]
        assert [rank.posted[0][0] for rank in everyone] == ["checkpoint_saved"] * 2

    def test_finish_in_time(self, together):
        """A time-out is everybody's."""

        def flush(timeout):
            raise TimeoutError(f"unfinished after {timeout}")

        def do(rank):
            rank.agreement.expect(rank.save)
            with pytest.raises(TimeoutError, match="unfinished"):
                rank.agreement.finish(flush, timeout=0.0)

        together(do)

    def test_nothing_to_wait_for(self, together):
        """Ranks that asked for no save do not meet."""
        _, met = together(lambda rank: rank.agreement.finish(lambda timeout: None))

        assert met == []

    def test_result(self, together):
        """What rank 0's save comes to is returned on all ranks."""
        results = {}

        def do(rank):
            if rank.number == 0:
                rank.save.complete(Manifest(contents="state", epoch=3))
            results[rank.number] = rank.agreement.result(rank.save)

        together(do)

        assert results[0] == results[1] and results[1].epoch == 3

    def test_result_that_failed(self, together):
        """Or raised, and counts as seen there."""

        def do(rank):
            if rank.number == 0:
                rank.save.fail(CheckpointWriteError("a.pt", 1, OSError(28, "no space")))
            with pytest.raises(CheckpointWriteError, match="no space") as info:
                rank.agreement.result(rank.save)
            assert info.value.seen

        together(do)

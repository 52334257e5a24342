"""Rounds of messages between ranks, which are threads here; torch.distributed is replaced by queues."""

from __future__ import annotations

import gc
import queue
import threading

import pytest
import torch

from trainbus import rank_table
from trainbus.errors import RankError
from trainbus.rank_table import RankTable


class Store(dict):
    """What process groups keep notes in."""

    set = dict.__setitem__
    get = dict.__getitem__

    def check(self, keys):
        return all(key in self for key in keys)


class Group:
    """What stands for a process group."""


class Distributed:
    """As much of torch.distributed as a table needs."""

    def __init__(self, size):
        self.size, self.here, self.store = size, threading.local(), Store()
        self.queues = {(a, b): queue.Queue() for a in range(size) for b in range(size)}
        self.destroyed = []
        self.groups = {}  # by rank; held as torch holds them
        self.group = self
        self.WORLD = self
        self.seconds = 30.0

    def get_group_store(self):
        return self.store

    def PrefixStore(self, name, store):
        return store

    def get_rank(self):
        return self.here.rank

    def get_world_size(self):
        return self.size

    def new_group(self, **options):
        if "no group" in self.store:
            raise RuntimeError("timed out")
        self.groups[self.here.rank] = Group()
        return self.groups[self.here.rank]

    def destroy_process_group(self, group):
        assert self.groups.pop(self.here.rank) is group
        self.destroyed.append(self.here.rank)

    def send(self, tensor, dst, group=None):
        self.queues[self.here.rank, dst].put(tensor.clone())

    def recv(self, tensor, src, group=None):
        try:
            tensor.copy_(self.queues[src, self.here.rank].get(timeout=self.seconds))
        except queue.Empty:
            raise RuntimeError("timed out") from None

    def gather(self, tensor, into, dst, group):
        if self.here.rank != dst:
            self.send(tensor, dst)
            return
        into[dst].copy_(tensor)
        for rank in range(1, self.size):
            self.recv(into[rank], rank)

    def broadcast(self, tensor, src, group):
        if self.here.rank != src:
            self.recv(tensor, src)
            return
        for rank in range(1, self.size):
            self.send(tensor, rank)


@pytest.fixture
def meet(monkeypatch):
    """Return a function that runs *do(rank, table)* on each rank of *come*, and returns what came of each."""

    def run(do, size=3, come=None, seconds=30.0, timeout=60.0, **store):
        fake = Distributed(size)
        fake.seconds = seconds
        fake.store.update(store)
        monkeypatch.setattr(rank_table, "dist", fake)
        monkeypatch.setattr(rank_table, "_GRACE", 0.5)
        results = {}

        def live(rank):
            fake.here.rank = rank
            try:
                results[rank] = do(rank, RankTable(timeout))
            except Exception as error:
                results[rank] = error

        threads = [threading.Thread(target=live, args=(rank,)) for rank in come or range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        run.fake = fake
        return results

    return run


class TestExchange:
    @pytest.mark.parametrize("length", [0, 1, rank_table._INLINE, rank_table._INLINE + 1, 100_000])
    def test_words_and_answer(self, meet, length):
        """Rank 0 gets what each says, in order, of any length, and all get its answer."""
        words = [bytes([rank]) * length for rank in range(3)]

        def do(rank, table):
            return [
                table.exchange("one", words[rank], lambda said: b"".join(said)),
                table.exchange("two", b"", lambda said: b"!" * length),
            ]

        assert meet(do) == {rank: [b"".join(words), b"!" * length] for rank in range(3)}

    def test_default_device(self, meet):
        """Messages lie in host memory, wherever the script has tensors made by default."""

        def do(rank, table):
            with torch.device("meta"):
                return RankTable(60.0)._word.device.type

        assert set(meet(do).values()) == {"cpu"}

    def test_left_halfway(self, meet):
        """A rank that leaves amid a round, as by Ctrl-C, does not take the rest of it for the next one."""

        def do(rank, table):
            if rank == 1:

                def interrupted():
                    raise KeyboardInterrupt

                hear, table._hear = table._hear, interrupted
                with pytest.raises(KeyboardInterrupt):
                    table.exchange("one", b"", lambda said: b"stale")
                table._hear = hear
            return table.exchange("two" if rank == 1 else "one", b"", lambda said: b"stale")

        results = meet(do, size=2)
        assert results[0] == b"stale"
        assert "it failed before. It was left by KeyboardInterrupt at one" in str(results[1])

    def test_different_places(self, meet):
        """Ranks that come to different places hear of it at once, all of them, whatever they bring."""

        def do(rank, table):
            return table.exchange(
                "the save" if rank == 0 else "the end of a batch", b"x" * 999, lambda said: b""
            )

        for error in meet(do).values():
            assert isinstance(error, RankError) and error.missing == []
            assert "rank 0 came to the save; ranks 1, 2 came to the end of a batch" in str(error)
            assert "if rank == 0:" in str(error)

    def test_nobody_comes_twice(self, meet):
        """A table that failed once says so again, at once."""

        def do(rank, table):
            with pytest.raises(RankError):
                table.exchange(f"place {rank}", b"", lambda said: b"")
            return table.exchange("here", b"", lambda said: b"")

        for error in meet(do).values():
            assert "Cannot meet the other ranks at here: it failed before. The ranks are not" in str(error)


class TestWhoDidNotCome:
    def test_time_out(self, meet):
        """Those that waited name those that did not come, how long, why that usually is and what to raise."""
        results = meet(lambda rank, table: table.exchange("the save", b"", len), 4, [0, 2], 0.3, timeout=0.3)

        assert sorted(results) == sorted(meet.fake.destroyed) == [0, 2]
        for error in results.values():
            assert isinstance(error, RankError) and error.missing == [1, 3]
            assert "Cannot go on at the save: ranks 1, 3 did not come within 0.3 s" in str(error)
            assert "if rank == 0:" in str(error) and "Handler(rank_timeout=...)" in str(error)

    def test_death(self, meet):
        """A connection that is lost long before the time-out means that a process has ended."""
        results = meet(lambda rank, table: table.exchange("the save", b"", len), 3, [0, 1], 0.3, timeout=60)

        for error in results.values():
            assert error.missing == [2]
            assert "rank 2 did not come, and the connection is gone" in str(error)

    def test_this_one_was_late(self, meet):
        """A rank that comes when the others have given up is told so."""
        gone = {"waited 1 1": "60", "waited 1 2": "60"}
        results = meet(lambda rank, table: table.exchange("the save", b"", len), 3, [0], 0.1, **gone)

        assert results[0].missing == [] and "the other ranks had given up waiting" in str(results[0])

    def test_group_ends_with_the_scripts(self, meet):
        """When the script destroys its process groups, nothing of ours keeps that of a table alive."""
        tables = meet(lambda rank, table: table)
        assert all(table._group is meet.fake.groups[rank] for rank, table in tables.items())

        meet.fake.groups.clear()
        gc.collect()

        assert all(table._group is None for table in tables.values())

    def test_no_group(self, meet):
        """Where not all ranks make a handler, those that do say which others do not."""
        results = meet(lambda rank, table: None, 3, [0, 2], timeout=0.0, **{"no group": ""})

        for error in results.values():
            assert isinstance(error, RankError) and 1 in error.missing
            assert "Cannot go on at Handler(...)" in str(error)

from __future__ import annotations

import os
import threading

import pytest

from trainbus.checkpoint.chunk_writers import ChunkWriters

WAIT = 30


@pytest.fixture(name="writers")
def _writers():
    writers = ChunkWriters(threads=2, chunk_bytes=4096)
    writers.start()
    yield writers
    writers.close()


class TestMemory:
    def test_one_chunk_more_than_threads(self, writers):
        """
        While each thread writes one, another can be filled; a fourth has to wait for a free one.
        """
        chunks = [writers.take() for _ in range(3)]
        got = threading.Event()
        waiting = threading.Thread(target=lambda: (writers.take(), got.set()))
        waiting.start()

        assert not got.wait(0.05)
        writers.give_back(chunks[0])
        assert got.wait(WAIT)
        waiting.join(WAIT)

    def test_chunks_are_reused(self, writers):
        """
        No memory is made for a file that comes after another.
        """
        first = {writers.take().ctypes.data for _ in range(1)}
        chunks = [writers.take(), writers.take()]
        first |= {chunk.ctypes.data for chunk in chunks}
        for chunk in chunks:
            writers.give_back(chunk)

        assert {writers.take().ctypes.data, writers.take().ctypes.data} <= first

    def test_aligned(self, writers):
        """
        A chunk begins at a page, as writing past the page cache needs.
        """
        assert writers.take().ctypes.data % os.sysconf("SC_PAGESIZE") == 0


class TestThreads:
    def test_rests_before_each(self):
        """
        Whoever has filled a chunk rests before it goes to the disk.
        """
        done = []
        writers = ChunkWriters(threads=0, chunk_bytes=4096, rest=lambda: done.append("rest"))
        for number in range(2):
            writers.write(None, lambda number=number: done.append(number))

        assert done == ["rest", 0, "rest", 1]

    def test_written_at_the_same_time(self, writers):
        """
        Two chunks are written by two threads at once.
        """
        together = threading.Barrier(2)
        done = threading.Semaphore(0)
        for _ in range(2):
            writers.write(writers.take(), lambda: (together.wait(WAIT), done.release()))

        assert done.acquire(timeout=WAIT)
        assert done.acquire(timeout=WAIT)

    def test_caller_keeps_step_with_the_disk(self, writers):
        """
        As many writes are taken as there are threads; the next one is taken when one is done.
        """
        gate, taken = threading.Event(), threading.Event()
        for _ in range(2):
            writers.write(None, lambda: gate.wait(WAIT))
        calling = threading.Thread(target=lambda: (writers.write(None, lambda: None), taken.set()))
        calling.start()

        assert not taken.wait(0.05)
        gate.set()
        assert taken.wait(WAIT)
        calling.join(WAIT)

    def test_without_threads(self):
        """
        With no threads, the caller writes.
        """
        names = []
        writers = ChunkWriters(threads=0, chunk_bytes=4096)

        writers.write(writers.take(), lambda: names.append(threading.current_thread()))

        assert names == [threading.current_thread()]
        writers.take()

    def test_close_finishes_what_was_handed_over(self):
        """
        Threads end after their last chunk, and can be started again.
        """
        writers = ChunkWriters(threads=1, chunk_bytes=4096)
        writers.start()
        (thread,) = writers._threads
        gate, done = threading.Event(), threading.Event()
        writers.write(writers.take(), lambda: (gate.wait(WAIT), done.set()))

        writers.close()
        gate.set()
        thread.join(WAIT)

        assert done.is_set()
        assert not thread.is_alive()
        writers.start()
        again = threading.Event()
        writers.write(writers.take(), again.set)
        assert again.wait(WAIT)
        writers.close()

    def test_started_again_before_the_last_has_ended(self):
        """
        Threads that begin while others still end do not end with them.
        """
        writers = ChunkWriters(threads=1, chunk_bytes=4096)
        writers.start()
        gate = threading.Event()
        writers.write(None, lambda: gate.wait(WAIT))
        writers.close()
        writers.start()
        gate.set()

        for _ in range(3):
            done = threading.Event()
            writers.write(None, done.set)
            assert done.wait(WAIT)
        writers.close()

    def test_closed_while_a_caller_waits(self, writers):
        """
        A write that waits for a thread when all are told to end is done by its caller.
        """
        gate, ready = threading.Event(), threading.Semaphore(0)
        for _ in range(2):
            writers.write(None, lambda: (ready.release(), gate.wait(WAIT)))
        for _ in range(2):
            assert ready.acquire(timeout=WAIT)
        written_by: list[str] = []

        def write() -> None:
            for _ in range(3):
                writers.write(None, lambda: written_by.append(threading.current_thread().name))

        calling = threading.Thread(target=write, name="caller", daemon=True)
        calling.start()
        calling.join(0.05)
        writers.close()
        gate.set()
        calling.join(WAIT)

        assert written_by == ["caller"] * 3

    def test_child_begins_anew(self, writers):
        """
        A forked child shares neither memory nor threads with its parent.
        """
        chunk = writers.take()
        chunk[:] = 1
        writers.give_back(chunk)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                writers.start()
                mine = writers.take()
                done = threading.Event()
                writers.write(mine, done.set)
                code = 0 if done.wait(WAIT) and not mine.any() else 2
            finally:
                os._exit(code)

        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert chunk.all()

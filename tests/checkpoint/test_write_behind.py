from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from pathlib import Path

import pytest

from trainbus.checkpoint import write_behind
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.write_behind import WriteBehind

from .interpreter_lock import is_let_go_by

WAIT = 30
DATA = memoryview(bytes(range(256)) * (64 << 12))
"""64 MiB: what a disk is busy with for some milliseconds."""

in_c = pytest.mark.skipif(write_behind.begin_write is None, reason="built without a C compiler")


@pytest.fixture(name="fd")
def _fd(tmp_path):
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture(name="made_by", params=[pytest.param("C", marks=in_c), "Python"])
def _made_by(request, monkeypatch):
    if request.param == "Python":
        monkeypatch.setattr(write_behind, "begin_write", None)


class Noted(Disk):
    """Knows which threads wrote."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def write(self, fd: int, data: memoryview, position: int) -> int:
        self.threads.append(threading.current_thread())
        return super().write(fd, data, position)


class TestMemory:
    def test_chunks_are_reused(self):
        """
        No memory is made for a file that comes after another.
        """
        behind = WriteBehind(chunk_bytes=4096)
        chunks = [behind.take() for _ in range(3)]
        addresses = {chunk.ctypes.data for chunk in chunks}
        for chunk in chunks:
            behind.give_back(chunk)

        assert {behind.take().ctypes.data for _ in range(3)} == addresses

    def test_no_two_owners(self):
        """
        A chunk that is in use is nobody else's.
        """
        behind = WriteBehind(chunk_bytes=4096)

        assert behind.take().ctypes.data != behind.take().ctypes.data

    def test_given_back_twice(self):
        """
        A chunk that is given back twice has one owner at a time all the same.
        """
        behind = WriteBehind(chunk_bytes=4096)
        chunk = behind.take()

        behind.give_back(chunk)
        behind.give_back(chunk)

        assert behind.take().ctypes.data != behind.take().ctypes.data

    def test_aligned(self):
        """
        A chunk begins at a page, as writing past the page cache needs.
        """
        assert WriteBehind(chunk_bytes=4096).take().ctypes.data % os.sysconf("SC_PAGESIZE") == 0

    def test_child_begins_anew(self):
        """
        A forked child does not touch its parent's memory.
        """
        behind = WriteBehind(chunk_bytes=4096)
        chunk = behind.take()
        chunk[:] = 1
        behind.give_back(chunk)
        pid = os.fork()
        if pid == 0:
            os._exit(2 if behind.take().any() else 0)

        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert chunk.all()


@pytest.mark.usefixtures("made_by")
class TestBegin:
    @pytest.mark.parametrize("most", [0, 2])
    def test_writes_at_a_position(self, fd, most):
        """
        The bytes stand where they were to, and the answer is how many they are.
        """
        finish = WriteBehind(most=most).begin(Disk(), fd, memoryview(b"abc"), 5)

        assert finish() == 3
        assert os.pread(fd, 99, 0) == bytes(5) + b"abc"

    @pytest.mark.parametrize("most", [0, 2])
    def test_error(self, most):
        """
        What the system refuses is raised by who waits, with its number.
        """
        finish = WriteBehind(most=most).begin(Disk(), -1, memoryview(b"abc"), 0)

        with pytest.raises(OSError) as refused:
            finish()
        assert refused.value.errno == errno.EBADF

    def test_rests_before_each(self, fd):
        """
        Whoever asks for a write rests before it begins.
        """
        sizes = []
        behind = WriteBehind(rest=lambda: sizes.append(os.fstat(fd).st_size))
        for number in range(2):
            behind.begin(Disk(), fd, memoryview(b"a"), number)()

        assert sizes == [0, 1]

    def test_many_at_a_time(self, fd):
        """
        Writes that go on together do not mix up their bytes.
        """
        behind = WriteBehind()
        finish = [behind.begin(Disk(), fd, DATA[n << 20 : n + 1 << 20], n << 20) for n in range(16)]

        assert [one() for one in reversed(finish)] == [1 << 20] * 16
        assert os.pread(fd, 32 << 20, 0) == DATA[: 16 << 20]

    def test_another_disk(self, fd):
        """
        A disk that takes the place of the real one is asked, on a Python thread.
        """
        disk = Noted()

        assert WriteBehind().begin(disk, fd, memoryview(b"abc"), 0)() == 3
        assert [thread.name for thread in disk.threads] == ["trainbus-disk"]

    def test_a_method_put_in_its_place(self, fd, monkeypatch):
        """
        So is one of which only this method was replaced.
        """
        disk = Disk()
        monkeypatch.setattr(disk, "write", lambda fd, data, position: 7)

        assert WriteBehind().begin(disk, fd, memoryview(b"abc"), 0)() == 7

    def test_by_the_caller(self, fd):
        """
        Where no write may be unfinished, the caller makes it.
        """
        disk = Noted()
        WriteBehind(most=0).begin(disk, fd, memoryview(b"abc"), 0)

        assert disk.threads == [threading.current_thread()]

    def test_no_more_threads(self, fd, monkeypatch):
        """
        Where the system has no thread left, the caller makes it too.
        """

        def refuse(*_args: object) -> None:
            raise BlockingIOError(errno.EAGAIN, "no more threads")

        def refuse_in_python(_self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        if write_behind.begin_write is not None:
            monkeypatch.setattr(write_behind, "begin_write", refuse)
        monkeypatch.setattr(threading.Thread, "start", refuse_in_python)

        assert WriteBehind().begin(Disk(), fd, memoryview(b"abc"), 0)() == 3
        assert os.pread(fd, 99, 0) == b"abc"


@in_c
class TestThreadInC:
    def test_is_none_of_python(self, fd):
        """
        No thread that needs the interpreter writes to the real disk.
        """
        before = threading.active_count()
        finish = WriteBehind().begin(Disk(), fd, DATA, 0)

        assert threading.active_count() == before
        assert finish() == len(DATA)

    def test_keeps_the_bytes(self, fd):
        """
        Memory that is being written does not go away, whoever else lets go of it.
        """
        data = bytearray(DATA[:1000])
        finish = WriteBehind().begin(Disk(), fd, memoryview(data), 0)
        with pytest.raises(BufferError):
            data.clear()

        assert finish() == 1000
        data.clear()

    def test_forgotten(self, fd):
        """
        A write that nobody waits for has ended when nothing refers to it any more.
        """
        WriteBehind().begin(Disk(), fd, DATA, 0)
        gc.collect()

        assert os.fstat(fd).st_size == len(DATA)

    def test_forgotten_in_a_child(self, fd):
        """
        A child that was forked meanwhile has no such thread, and does not wait for it.
        """
        finish = WriteBehind().begin(Disk(), fd, DATA, 0)
        pid = os.fork()
        if pid == 0:
            signal.alarm(WAIT)
            del finish
            gc.collect()
            os._exit(0)

        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert finish() == len(DATA)

    def test_waiting_leaves_the_interpreter_to_others(self, fd):
        """
        Other threads run while one waits for its write.
        """
        assert is_let_go_by(lambda: WriteBehind().begin(Disk(), fd, DATA[: 1 << 20], 0)())

    def test_waited_for_twice(self, fd):
        """
        The second who waits is told.
        """
        finish = WriteBehind().begin(Disk(), fd, memoryview(b"abc"), 0)
        finish()

        with pytest.raises(ValueError):
            finish()

    @pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="Linux tells about threads there")
    def test_signals_are_left_to_others(self, fd):
        """
        The thread blocks all signals, and who has begun it none more than before.
        """
        before = set(os.listdir("/proc/self/task"))
        finish = WriteBehind().begin(Disk(), fd, DATA, 0)
        (thread,) = set(os.listdir("/proc/self/task")) - before
        while not os.fstat(fd).st_size:  # until it writes, its signals are those of its beginning
            pass
        status = Path(f"/proc/self/task/{thread}/status").read_text()
        finish()

        (blocked,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigBlk"))
        assert int(blocked, 16) & 1 << signal.SIGTERM - 1
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading

import pytest
import xxhash

import trainbus
from trainbus.checkpoint import digest
from trainbus.checkpoint.digest import hash_bytes

PIECE = 1000


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Two threads take turns from four pieces on."""
    monkeypatch.setattr(digest, "_PIECE", PIECE)
    monkeypatch.setattr(digest, "_WORTH_SHARING", 4 * PIECE)


@pytest.fixture(name="file")
def _file(tmp_path):
    """A file of ten pieces and a half, open for reading."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(10 * PIECE + PIECE // 2))
    with path.open("rb") as file:
        yield file


def hashed(file, size: int) -> str:
    hasher = xxhash.xxh3_128(b"before")
    hash_bytes(hasher, file.fileno(), size)
    return hasher.hexdigest()


def expected(file, size: int) -> str:
    file.seek(0)
    return xxhash.xxh3_128(b"before" + file.read()[:size]).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 2000, 3999, 4000, 4001, 5000, 9999, 10_500])
def test_same_as_at_once(file, size):
    """
    Just the first bytes are hashed, in their order, after what was hashed before.
    """
    assert hashed(file, size) == expected(file, size)


@pytest.mark.parametrize("size", [10_501, 11_000, 12_000, 13_001, 50_000])
def test_file_that_is_shorter(file, size):
    """
    Of a file that was cut off, what is there is hashed.
    """
    assert hashed(file, size) == expected(file, 10_500)


def test_disk_that_reads_little_at_a_time(file, monkeypatch):
    """
    A read that returns less than asked for is gone on with.
    """
    read = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, parts, at: read(fd, [parts[0][:300]], at))

    assert hashed(file, 10_500) == expected(file, 10_500)


@pytest.mark.parametrize("bad", range(11))
def test_disk_that_fails(file, monkeypatch, bad):
    """
    A piece that cannot be read raises what the disk said, whichever thread reads it, and none is left.
    """
    read = os.preadv

    def failing(fd, parts, at):
        if at == bad * PIECE:
            raise OSError(errno.EIO, "the disk is gone")
        return read(fd, parts, at)

    monkeypatch.setattr(os, "preadv", failing)

    with pytest.raises(OSError, match="the disk is gone"):
        hashed(file, 10_500)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("trainbus-hash")]


def test_two_threads_read(file, monkeypatch):
    """
    While a thread has not hashed its piece yet, another one reads the next.
    """
    read = os.preadv
    together = threading.Barrier(2)

    def meeting(fd, parts, at):
        if at < 2 * PIECE:
            together.wait(30)
        return read(fd, parts, at)

    monkeypatch.setattr(os, "preadv", meeting)

    assert hashed(file, 10_500) == expected(file, 10_500)


def test_while_the_interpreter_exits(tmp_path):
    """
    A large file can still be verified by what runs at the interpreter's exit.
    """
    path = tmp_path / "a.pt"
    trainbus.save({"a": bytes(20 << 20)}, path)
    code = (
        "import atexit, sys; from trainbus import verify; atexit.register(lambda: print(verify(sys.argv[1])))"
    )

    child = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)

    assert (child.stderr, child.returncode) == ("", 0)
    assert child.stdout.startswith("Manifest(")

"""What is queued is written before the interpreter is gone, on each Python there is."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

import trainbus

# Only the standard library, so that it runs where no torch is installed.
SCRIPT = """
import os, sys, threading, time
sys.path.insert(0, {root!r})
from trainbus.checkpoint.background_writer import BackgroundWriter, PendingSave
assert not {{"torch", "numpy", "xxhash", "blinker"}} & set(sys.modules)

class Manifest:
    size = 3

def write_to(path):
    def write():
        time.sleep(0.2)
        with open(path, "w") as file:
            file.write("all")
        return Manifest()
    return write

def fail():
    raise OSError(28, "No space left on device")

def report(event, **fields):
    print(event, fields["path"], flush=True)

def main():
    writer = BackgroundWriter(report, max_pending=3)
    def save(path, write):
        pending = PendingSave(path, global_step=7)
        if writer.admit(pending):
            writer.submit(pending, write)
        return pending
{body}

if __name__ == "__main__":
    main()
"""

RETURN = """
    for name in ("a", "b", "c"):
        save(name, write_to(name))
    return
"""
RAISE = """
    save("a", write_to("a"))
    raise RuntimeError("mine")
"""
LATE_THREAD = """
    save("a", write_to("a"))
    def train_on():
        threading.main_thread().join()
        time.sleep(0.1)
        save("b", write_to("b"))
    threading.Thread(target=train_on).start()
"""
FAIL = """
    save("a", fail)
    save("b", write_to("b"))
"""
CHILD = """
    import multiprocessing
    child = multiprocessing.get_context("fork").Process(target=save, args=("a", write_to("a")))
    child.start()
    child.join(30)
    assert child.exitcode == 0
"""


def _find(name: str) -> str | None:
    if name == "this one":
        return sys.executable
    # Version managers keep their versions side by side; their shims may have none behind them.
    beside = Path(sys.base_prefix).parent.glob(f"*/bin/{name}")
    found = [path for path in (shutil.which(name), *map(str, beside)) if path]
    return next((path for path in found if _runs(path)), None)


def _runs(python: str) -> bool:
    done = subprocess.run([python, "-c", "pass"], capture_output=True, timeout=60, check=False)
    return done.returncode == 0


def run(folder: Path, body: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    root = str(Path(trainbus.__file__).parents[1])
    (folder / "script.py").write_text(SCRIPT.format(root=root, body=body))
    return subprocess.run(
        [python, "script.py"], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", ["this one", "python3.11", "python3.12", "python3.13", "python3.14"])
class TestEachPython:
    def test_return_right_after_submit(self, tmp_path, name):
        """
        Files submitted just before main returns are complete.
        """
        python = _find(name)
        if python is None:
            pytest.skip(f"{name} is not installed")

        done = run(tmp_path, RETURN, python)

        assert (done.returncode, done.stderr) == (0, "")
        assert [(tmp_path / path).read_text() for path in "abc"] == ["all"] * 3
        assert done.stdout.split() == [
            "checkpoint_saved",
            "a",
            "checkpoint_saved",
            "b",
            "checkpoint_saved",
            "c",
        ]


class TestWays:
    def test_exception(self, tmp_path):
        """
        An exception that ends the script keeps its exit code and the file is complete.
        """
        done = run(tmp_path, RAISE)

        assert done.returncode == 1
        assert "RuntimeError: mine" in done.stderr
        assert (tmp_path / "a").read_text() == "all"

    def test_thread_that_outlives_main(self, tmp_path):
        """
        A thread of the user's that goes on after main has returned can still save.
        """
        done = run(tmp_path, LATE_THREAD)

        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "b").read_text() == "all"

    def test_failure_nobody_saw(self, tmp_path):
        """
        A save that failed unseen is one line on stderr, and exit code 74.
        """
        done = run(tmp_path, FAIL)

        assert done.returncode == 74
        (line,) = done.stderr.splitlines()
        assert line.startswith("trainbus: Cannot write checkpoint 'a' of global step 7: [Errno 28]")
        assert (tmp_path / "b").read_text() == "all"

    def test_forked_process(self, tmp_path):
        """
        A forked multiprocessing child finishes its files too.
        """
        done = run(tmp_path, CHILD)

        assert (done.returncode, done.stderr) == (0, "")
        assert (tmp_path / "a").read_text() == "all"


# A process that says when it is ready for Ctrl-C, then saves a file that is complete once `go` is there.
WAYS = """
    import multiprocessing, signal

    def write_when_told(path):
        def write():
            while not os.path.exists("go"):
                time.sleep(0.01)
            if {disk!r} == "failing":
                raise OSError(28, "No space left on device")
            with open(path, "w") as file:
                file.write("all")
            return Manifest()
        return write

    flush = writer.flush
    writer.flush = lambda: (print("draining", flush=True), flush())

    def work():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        save("a", write_when_told("a"))
        print("ready", os.getpid(), flush=True)
        if {way!r} in ("return", "exception", "exit"):
            open("go", "w").close()
        if {way!r} == "exception":
            raise RuntimeError("mine")
        if {way!r} == "exit":
            sys.exit(0)
        if {way!r} != "return":
            for _ in range(600):  # a signal from just before one of these is noticed behind it
                time.sleep(0.1)

    if {process!r} == "main":
        work()
    else:
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
        child.join(60)
        print("exit code", child.exitcode, flush=True)
"""


@pytest.mark.parametrize("disk", ["good", "failing"])
@pytest.mark.parametrize("process", ["main", "fork", "spawn"])
@pytest.mark.parametrize("way", ["return", "exception", "exit", "Ctrl-C", "Ctrl-C twice", "Ctrl-C thrice"])
class TestMatrix:
    def test_no_lost_save_ends_with_code_0(self, tmp_path, way, process, disk):
        """
        However a process ends, its save is complete, or its exit code is not 0 and stderr names the save.
        """
        code, err = leave(tmp_path, way, process, disk)

        complete = (tmp_path / "a").exists()
        assert complete == (disk == "good" and way != "Ctrl-C thrice")
        if complete:
            assert (tmp_path / "a").read_text() == "all"
            assert (code == 0) == (way in ("return", "exit"))
        else:
            assert code == 74
            assert "Cannot write checkpoint 'a' of global step 7" in err
        if way == "exception":
            assert "RuntimeError: mine" in err


def leave(folder: Path, way: str, process: str, disk: str) -> tuple[int, str]:
    """Run the script, interrupt it as *way* says; return its exit code, or its child's, and stderr."""
    root = str(Path(trainbus.__file__).parents[1])
    kind = "main" if process == "spawn" else process
    body = WAYS.format(way=way, process=kind, disk=disk)
    (folder / "script.py").write_text(SCRIPT.format(root=root, body=body))
    (folder / "parent.py").write_text(SPAWN)
    command = [sys.executable, "parent.py" if process == "spawn" else "script.py"]
    with (
        open(folder / "err", "w+") as err,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=err, text=True) as running,
    ):
        try:
            assert running.stdout is not None
            interrupt(folder, way, running.stdout)
            out = running.stdout.read()
            running.wait(60)
        finally:
            running.kill()
        err.seek(0)
        code = running.returncode if process == "main" else int(re.findall(r"exit code (-?\d+)", out)[0])
        return code, err.read()


def interrupt(folder: Path, way: str, output: IO[str]) -> None:
    """Press Ctrl-C as often as *way* says, each time when the process has come to where it is to be met."""
    word, pid = output.readline().split()
    assert word == "ready"
    for number in range({"Ctrl-C": 1, "Ctrl-C twice": 2, "Ctrl-C thrice": 3}.get(way, 0)):
        if number:
            assert output.readline() == "draining\n"
        os.kill(int(pid), signal.SIGINT)
    if way != "Ctrl-C thrice":
        (folder / "go").touch()


SPAWN = """
import multiprocessing
import script

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=script.main)
    child.start()
    child.join(60)
    print("exit code", child.exitcode, flush=True)
"""

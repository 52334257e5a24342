"""What is queued is written before the interpreter is gone, on each Python there is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

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
        A save that failed unseen is printed in one line.
        """
        done = run(tmp_path, FAIL)

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

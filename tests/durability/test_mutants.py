"""Each protection taken away in turn: some test fails for each, so that none can get lost unnoticed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CHECKPOINT = "trainbus/checkpoint"


class Mutant(NamedTuple):
    """A protection, where it stands, what is there instead, and the tests that must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


COMMIT = "tests/checkpoint/test_commit.py"
LOAD = "tests/checkpoint/test_load.py"
WRITER = "tests/checkpoint/test_background_writer.py"
TEMPORARY = "tests/checkpoint/test_temporary.py"
LOCK = "tests/checkpoint/test_template_lock.py"
FAULTS = "tests/durability/test_faults.py"

MUTANTS = [
    Mutant("file not synced", "commit.py", "        disk.fsync(fd)\n", "", COMMIT),
    Mutant(
        "folder not synced",
        "commit.py",
        "        try:\n            disk.fsync_folder(folder)\n        except",
        "        try:\n            pass\n        except",
        COMMIT,
    ),
    Mutant(
        "failed sync of the folder ignored",
        "commit.py",
        "raise UnsyncedNameError(error.errno, error.strerror or str(error)) from error",
        "pass",
        FAULTS,
    ),
    Mutant(
        "failed sync repeated",
        "commit.py",
        "        disk.fsync(fd)\n",
        "        with contextlib.suppress(OSError):\n            disk.fsync(fd)\n        disk.fsync(fd)\n",
        FAULTS,
    ),
    Mutant(
        "failed close ignored",
        "commit.py",
        "    disk.close(fd)\n    return final",
        "    _close_quietly(disk, fd)\n    return final",
        COMMIT,
    ),
    Mutant(
        "errno of a write lost", "commit.py", "raise stream.error from error", "raise", f"{COMMIT} {FAULTS}"
    ),
    Mutant(
        "parent of a new folder not synced",
        "disk.py",
        "self.fsync_folder(parent)",
        "pass",
        "tests/checkpoint/test_disk.py",
    ),
    Mutant(
        "existing file opened",
        "disk.py",
        "os.O_CREAT | os.O_EXCL |",
        "os.O_CREAT |",
        "tests/checkpoint/test_disk.py",
    ),
    Mutant(
        "link followed",
        "disk.py",
        'os.O_RDWR | _flag("O_NOFOLLOW")',
        "os.O_RDWR",
        f"{TEMPORARY} {LOCK}",
    ),
    Mutant(
        "unfinished file left behind",
        "temporary.py",
        "    except BaseException:\n        with contextlib.suppress(OSError):\n"
        "            disk.unlink(folder, name)\n        raise\n    finally:",
        "    finally:",
        COMMIT,
    ),
    Mutant("living swept", "temporary.py", "if not disk.lock(fd):", "if False:", TEMPORARY),
    Mutant("swept file written on", "temporary.py", "os.fstat(fd).st_nlink > 0", "True", TEMPORARY),
    Mutant(
        "removal before the new file is durable",
        "job_runner.py",
        "        if self._write(job):\n",
        "        for given, path in job.removals:\n            self._remove_file(job, given, path)\n"
        "        if self._write(job):\n",
        WRITER,
    ),
    Mutant(
        "stuck thread waited for",
        "background_writer.py",
        "            self._give_up(self._patience.verdict(running))",
        "            pass",
        f"{WRITER} -k Stuck -o faulthandler_timeout=5 -o faulthandler_exit_on_timeout=true",
    ),
    Mutant(
        "exit code kept",
        "interpreter_exit.py",
        "    os._exit(EXIT_CODE)\n",
        "",
        "tests/checkpoint/test_exit.py tests/checkpoint/test_interpreter_exit.py",
    ),
    Mutant(
        "failed once is failed for good",
        "retries.py",
        "_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE}",
        "_TRANSIENT = {0}",
        FAULTS,
    ),
    Mutant(
        "lock kept by forked children",
        "template_lock.py",
        "os.register_at_fork(after_in_child=_forget_in_child)",
        "",
        LOCK,
    ),
    Mutant("digest not compared", "verify.py", "if hasher.hexdigest() != ", "if False and 0 != ", LOAD),
    Mutant(
        "digest compared too late",
        "load.py",
        "    if ending is not None and verify:\n        check_digest(file, path, ending)\n",
        "",
        LOAD,
    ),
    Mutant("any code loaded", "load.py", "weights_only=not trust_pickle", "weights_only=False", LOAD),
    Mutant(
        "deflated records taken",
        "load.py",
        "record.compress_type != zipfile.ZIP_STORED",
        "False",
        f"{LOAD} tests/hostile/test_archives.py",
    ),
    Mutant(
        "sparse indices not checked",
        "unpickling.py",
        "check_sparse_tensor_invariants(True)",
        "check_sparse_tensor_invariants(False)",
        f"{LOAD} tests/hostile/test_archives.py",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """Copy what the tests need, to be changed and put back for each mutant."""
    folder = tmp_path_factory.mktemp("mutants")
    for name in ("trainbus", "trainbus_callbacks", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "setup.py", "pyproject.toml"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    return folder


def run(folder, tests):
    """Run some tests of a copy; return the exit code of pytest and what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"},
    )
    return done.returncode, done.stdout[-3000:]


@pytest.mark.full
class TestMutants:
    def test_without_any_all_pass(self, copy):
        """The tests that are to notice pass on the copy as it is."""
        code, output = run(
            copy, " ".join(sorted({one for mutant in MUTANTS for one in mutant.tests.split(" -")[0].split()}))
        )

        assert code == 0, output

    @pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
    def test_is_noticed(self, copy, mutant):
        """Without this protection a test fails."""
        path = copy / CHECKPOINT / mutant.file
        whole = path.read_text()
        assert whole.count(mutant.old) == 1, f"{mutant.old!r} is not once in {mutant.file}: mend the list"
        path.write_text(whole.replace(mutant.old, mutant.new))
        try:
            code, output = run(copy, mutant.tests)
        finally:
            path.write_text(whole)

        assert code == 1, output

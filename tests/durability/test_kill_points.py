"""SIGKILL in front of every call to the disk that a save makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

SCRIPT = os.path.join(os.path.dirname(__file__), "kill_points.py")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(10, id="small"),
        pytest.param(6 << 20, id="in chunks past the cache", marks=pytest.mark.full),
    ],
)
def results(request, tmp_path_factory):
    """Return what was found after each kill, the last being the save that nobody killed."""
    folder = tmp_path_factory.mktemp("kills") / "run"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, SCRIPT, str(folder), str(request.param)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


class TestKill:
    def test_is_tried_at_every_call(self, results):
        """The kills went through the whole road, removal included, and then a save came through."""
        *killed, last = results
        calls = [one["call"] for one in killed]

        assert {"create", "lock", "write", "fsync", "rename", "fsync_folder", "unlink"} <= set(calls)
        assert calls.index("fsync") < calls.index("rename") < calls.index("unlink")
        assert all(one["status"] == signal.SIGKILL for one in killed)
        assert (last["status"], last["value"], last["names"]) == (0, 2.0, ["last.pt"])

    def test_leaves_the_old_file_or_the_new(self, results):
        """Wherever it comes, the file is one of the two, whole; from the rename on the new one."""
        renamed = [one["call"] for one in results].index("rename")

        assert [one["value"] for one in results[: renamed + 1]] == [1.0] * (renamed + 1)
        assert {one["value"] for one in results[renamed + 1 :]} == {2.0}

    def test_comes_before_the_removal_or_after(self, results):
        """What the new file makes superfluous is there until the new name is synced."""
        calls = [one["call"] for one in results]
        removed = calls.index("unlink")

        assert all(one["names"] == ["last.pt", "old.pt"] for one in results[: removed + 1])
        assert all(one["names"] == ["last.pt"] for one in results[removed + 1 :])
        assert calls[:removed].count("fsync_folder") == 2

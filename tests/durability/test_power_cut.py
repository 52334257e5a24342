"""The power is cut while checkpoints are written: what was reported as saved is there afterwards.

The cut is the kernel's own: the file system is shut down without another byte reaching the device,
then mounted again. A disk's own cache and torn sectors are not part of it.
"""

from __future__ import annotations

import pytest

CUTS = 120
LARGE_CUTS = 10
MUTANT_CUTS = 100  # each is noticed with more than one chance in four
KINDS = ["ext4", "ext4-writeback", "xfs"]


class TestPowerCut:
    def test_once(self, ask, tmp_path):
        """After one power cut each file is whole and nothing that was reported as saved is missing."""
        outcome = ask("saving_loop.powered_off", folder=str(tmp_path), kind="ext4", times=1)

        assert outcome["problems"] == []

    @pytest.mark.full
    @pytest.mark.parametrize("kind", KINDS)
    def test_again_and_again(self, ask, tmp_path, request, kind):
        """
        New names, one that is overwritten and numbered ones with retention all hold what they were
        reported to hold, or what was being written, and what was reported as removed is gone.
        """
        cuts = request.config.getoption("--runs") or CUTS

        outcome = ask(
            "saving_loop.powered_off", folder=str(tmp_path), kind=kind, times=cuts, limit=60 + 2 * cuts
        )

        assert outcome["problems"] == []
        assert outcome["cuts"] == cuts
        assert outcome["saves"] > cuts

    @pytest.mark.full
    @pytest.mark.parametrize("kind", KINDS)
    def test_large_files(self, ask, tmp_path, request, kind):
        """The same holds for files of several chunks, which go past the page cache."""
        cuts = request.config.getoption("--runs") or LARGE_CUTS

        outcome = ask(
            "saving_loop.powered_off",
            folder=str(tmp_path),
            kind=kind,
            times=cuts,
            mebibytes=18,
            limit=60 + 5 * cuts,
        )

        assert outcome["problems"] == []

    @pytest.mark.full
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("broken", ["fsync", "fsync_folder"])
    def test_a_missing_sync_is_noticed(self, ask, tmp_path, kind, broken):
        """A disk that leaves out one of the two syncs breaks a promise, and these tests see it."""
        outcome = ask(
            "saving_loop.powered_off",
            folder=str(tmp_path),
            kind=kind,
            times=MUTANT_CUTS,
            broken=broken,
            limit=200,
        )

        assert outcome["problems"] != []

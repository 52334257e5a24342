"""Disks that refuse for real: full, limited, failing late, read-only, gone. Nothing is lost in silence."""

from __future__ import annotations

import pytest

OLD, NEW = 1, 2
ONLY_OLD = {"files": {"a.pt": OLD}, "unfinished": 0}
ONLY_NEW = {"files": {"a.pt": NEW}, "unfinished": 0}


def assert_refused_and_then_saved(outcome, error):
    """The typed error had its number, the old file stayed alone, and the next save went well."""
    assert outcome["refused"] == error
    assert outcome["then"] == ONLY_OLD
    assert outcome["again"] is None
    assert outcome["files"] == {"a.pt": NEW}


def assert_no_silence(outcomes, error):
    """Each save either failed with *error* and left the old file alone, or put the new one in its place."""
    for point, refused, there in outcomes:
        assert refused in (None, error), point
        assert there == (ONLY_NEW if refused is None else ONLY_OLD), point


class TestFullDisk:
    def test_each_page(self, ask, tmp_path):
        """Whatever the number of pages left, a save fits or fails with ENOSPC, and leaves nothing behind."""
        outcome = ask("refusing_disks.full_at_each_page", folder=str(tmp_path))

        assert_no_silence(outcome["outcomes"], "ENOSPC")
        refused = [room for room, error, _ in outcome["outcomes"] if error]
        assert refused == list(range(len(refused)))
        assert outcome["pages"] - len(refused) in (0, 1)  # a manifest's length varies by some bytes

    @pytest.mark.full
    @pytest.mark.parametrize("mebibytes", [1, 15, 33])
    @pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
    def test_half_way(self, ask, tmp_path, kind, mebibytes):
        """A save that fits by half fails with ENOSPC; the next one succeeds as soon as there is room."""
        options = "size=64m" if kind == "tmpfs" else ""

        outcome = ask(
            "refusing_disks.full", folder=str(tmp_path), kind=kind, mebibytes=mebibytes, options=options
        )

        assert_refused_and_then_saved(outcome, "ENOSPC")

    @pytest.mark.full
    def test_no_more_names(self, ask, tmp_path):
        """A disk with room and without inodes is a full one too."""
        outcome = ask("refusing_disks.without_names", folder=str(tmp_path))

        assert_refused_and_then_saved(outcome, "ENOSPC")

    def test_training(self, ask, tmp_path):
        """The error ends a training within two steps, with the checkpoint of the step before on the disk."""
        outcome = ask("refusing_disks.full_under_training", folder=str(tmp_path))

        assert outcome["refused"] == "ENOSPC"
        assert outcome["step"] <= 4
        assert outcome["files"] == {"last.pt": 2}
        assert outcome["unfinished"] == 0


class TestLimitedFiles:
    @pytest.mark.parametrize("stride", [151, pytest.param(1, marks=pytest.mark.full)])
    def test_each_byte(self, ask, tmp_path, stride):
        """Wherever a file may not grow any more, the save fails with EFBIG and is never cut short."""
        outcome = ask("refusing_disks.limited", folder=str(tmp_path), stride=stride, limit=300)

        assert_no_silence(outcome["outcomes"], "EFBIG")
        refused = [limit for limit, error, _ in outcome["outcomes"] if error]
        assert len(refused) >= outcome["size"] // stride
        assert outcome["outcomes"][-1][1] is None

    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["ext4", "xfs", "tmpfs"])
    def test_chunks(self, ask, tmp_path, request, kind):
        """The same holds where chunks go past the page cache, at their edges and in between."""
        tries = request.config.getoption("--runs") or 30

        outcome = ask(
            "refusing_disks.limited_in_chunks",
            folder=str(tmp_path),
            kind=kind,
            tries=tries,
            limit=60 + 2 * tries,
        )

        assert_no_silence(outcome["outcomes"], "EFBIG")
        assert [error for limit, error, _ in outcome["outcomes"] if limit < outcome["size"] // 2].count(
            None
        ) == 0
        assert outcome["outcomes"][-1][1] is None


class TestFailingLate:
    @pytest.mark.full
    @pytest.mark.parametrize(("mebibytes", "saves"), [(0.5, 40), (3, 8), (14, 4), (33, 2)])
    def test_writes_that_are_lost_afterwards(self, ask, tmp_path, mebibytes, saves):
        """Of a disk that takes all bytes and fails to keep them, only what it kept is reported as saved."""
        outcome = ask(
            "refusing_disks.written_back_to_nothing", folder=str(tmp_path), mebibytes=mebibytes, saves=saves
        )

        assert outcome["refusals"] != []
        assert set(outcome["refusals"]) <= {"EIO", "ENOSPC", "EROFS"}
        assert outcome["left"] == []
        # What failed in the very last step may have come through.
        for name, number in outcome["durable"].items():
            assert outcome["files"].get(name, 0) >= number, name

    @pytest.mark.full
    @pytest.mark.parametrize("mebibytes", [0, 33])
    @pytest.mark.parametrize("kind", ["ext4", "xfs"])
    def test_gone(self, ask, tmp_path, kind, mebibytes):
        """A disk that goes away makes the save fail, and has the old file when it comes back."""
        outcome = ask("refusing_disks.gone", folder=str(tmp_path), kind=kind, mebibytes=mebibytes)

        assert outcome["refused"] in ("EIO", "EROFS")
        assert outcome["files"] == {"a.pt": OLD}

    @pytest.mark.full
    @pytest.mark.parametrize("kind", ["ext4", "xfs"])
    def test_gone_before_the_last_sync(self, ask, tmp_path, kind):
        """A disk that goes away between the rename and the sync of the folder makes the save fail."""
        outcome = ask("refusing_disks.gone_after_rename", folder=str(tmp_path), kind=kind)

        assert outcome["refused"] in ("EIO", "EROFS")
        assert outcome["files"] == {"a.pt": OLD}


class TestForbidden:
    @pytest.mark.parametrize("name", ["a.pt", "b.pt", "new/a.pt"])
    @pytest.mark.parametrize(
        ("where", "error"),
        [("read_only", "EROFS"), pytest.param("immutable", "EPERM", marks=pytest.mark.full)],
    )
    def test_no_writing(self, ask, tmp_path, where, error, name):
        """Where nothing may be written, the save says so, and works as soon as it may."""
        outcome = ask(f"refusing_disks.{where}", folder=str(tmp_path), name=name)

        assert outcome == {"refused": error, "then": ONLY_OLD, "again": None}


class TestNoBypass:
    @pytest.mark.full
    @pytest.mark.parametrize(("kind", "refuses"), [("ramfs", True), ("tmpfs", None), ("ext4", False)])
    def test_page_cache_instead(self, ask, tmp_path, kind, refuses):
        """Large files are whole whether or not the file system can write past the page cache."""
        outcome = ask("refusing_disks.without_bypass", folder=str(tmp_path), kind=kind, mebibytes=40)

        assert outcome["refuses"] is refuses or refuses is None
        assert outcome["refused"] is None
        assert outcome["files"] == {"a.pt": NEW}


class TestRoom:
    @pytest.mark.full
    @pytest.mark.parametrize("mebibytes", [1, 20, 33])
    @pytest.mark.parametrize("kind", ["tmpfs", "ext4", "xfs"])
    def test_no_more_than_bytes(self, ask, tmp_path, kind, mebibytes):
        """A saved file takes as much of the disk as it is long, also where the disk claims room ahead."""
        outcome = ask("refusing_disks.room_of", folder=str(tmp_path), kind=kind, mebibytes=mebibytes)

        assert 0 <= outcome["room"] - outcome["size"] < 1 << 16

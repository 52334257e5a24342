"""``trainbus prune``: what it removes, what always stays, and what it says."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil

import pytest
import torch
from typer.testing import CliRunner

from trainbus import Handler, read_manifest
from trainbus.checkpoint.commit import commit
from trainbus.cli.app import app
from trainbus.testing import FaultyDisk


def prune(*arguments):
    """Run the command; return its exit code, the lines it printed, and what it said of trouble."""
    done = CliRunner().invoke(app, ["prune", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit)
    return done.exit_code, done.stdout.splitlines(), " ".join(done.stderr.replace("│", "").split())


def write(folder, losses, *, stream="a", monitor="val_loss", prefix="m", handler=None):
    """Save a file for each loss, one an epoch, judged by *monitor*."""
    handler = handler or Handler(torch.nn.Linear(1, 1))
    with handler:
        for epoch, loss in enumerate(losses):
            manifest = handler.save_async(
                folder / f"{prefix}{epoch}.pt",
                stream=stream,
                logs={"val_loss": loss, "acc": 1 - loss},
                monitor=monitor,
                mode="min" if monitor else None,
                score=loss if monitor else None,
            ).result()
            rewrite(folder / f"{prefix}{epoch}.pt", dataclasses.replace(manifest, epoch=epoch))


def rewrite(path, manifest):
    """Give a file another manifest."""
    state = torch.load(path, weights_only=True)
    commit(path, manifest, lambda stream: torch.save(state, stream))


def names(folder):
    return sorted(os.listdir(folder))


class TestRules:
    @pytest.mark.parametrize(
        "rules, left",
        [
            (["--keep-last", 2], ["m1.pt", "m3.pt", "m4.pt"]),
            (["--keep-best", "val_loss:2"], ["m1.pt", "m3.pt", "m4.pt"]),
            (["--keep-best", "acc:1:min"], ["m0.pt", "m1.pt", "m4.pt"]),
            (["--keep-every", 3], ["m1.pt", "m2.pt", "m4.pt"]),
            (["--keep-every", 3, "--keep-last", 2], ["m1.pt", "m2.pt", "m3.pt", "m4.pt"]),
        ],
    )
    def test_what_stays(self, tmp_path, rules, left):
        """A file stays if a rule says so; the best and the newest always do."""
        write(tmp_path, [0.9, 0.1, 0.5, 0.2, 0.6])
        code, lines, _ = prune(tmp_path, *rules)

        assert code == 0 and names(tmp_path) == left
        assert len(lines) == 5 - len(left) and all(line.startswith("removed  ") for line in lines)

    def test_dry_run(self, tmp_path):
        """With --dry-run it says what would go, in the order it would, and removes nothing."""
        write(tmp_path, [0.1, 0.9, 0.8, 0.7])
        before = names(tmp_path)
        _, lines, told = prune(tmp_path, "--keep-last", 1, "--dry-run")

        assert lines == [f"would remove  {tmp_path}/m1.pt", f"would remove  {tmp_path}/m2.pt"]
        assert "2 of 4 checkpoints would be removed, 0.0 MB" in told and names(tmp_path) == before

    def test_each_stream_and_run(self, tmp_path):
        """Two streams, and two runs that do not continue each other, are pruned each by itself."""
        write(tmp_path, [0.1, 0.2], stream="a", monitor=None, prefix="a")
        write(tmp_path, [0.1, 0.2], stream="b", monitor=None, prefix="b")
        write(tmp_path, [0.1, 0.2], stream="b", monitor=None, prefix="c")
        prune(tmp_path, "--keep-last", 1)

        assert names(tmp_path) == ["a1.pt", "b1.pt", "c1.pt"]

    def test_two_streams_of_a_run(self, tmp_path):
        """What two callbacks of one run have saved is counted apart."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            for stream in "aabb":
                for epoch in range(2):
                    handler.save_async(tmp_path / f"{stream}{epoch}.pt", stream=stream).result()
        prune(tmp_path, "--keep-last", 1)

        assert names(tmp_path) == ["a1.pt", "b1.pt"]

    def test_direction_of_the_newest(self, tmp_path):
        """Where files were judged in both directions, that of the newest counts."""
        write(tmp_path, [0.2, 0.1, 0.3])
        newest = read_manifest(tmp_path / "m2.pt")
        rewrite(tmp_path / "m2.pt", dataclasses.replace(newest, mode="max"))
        _, lines, _ = prune(tmp_path, "--keep-best", "val_loss:2")

        assert lines == [f"removed  {tmp_path}/m1.pt"]

    def test_a_continued_run(self, tmp_path):
        """The files of a run and of those it continues are counted together."""
        write(tmp_path, [0.1, 0.2], monitor=None)
        handler = Handler(torch.nn.Linear(1, 1))
        handler.load(tmp_path / "m1.pt")
        write(tmp_path, [0.1], monitor=None, prefix="n", handler=handler)
        prune(tmp_path, "--keep-last", 2)

        assert names(tmp_path) == ["m1.pt", "n0.pt"]

    def test_left_alone(self, tmp_path):
        """Interrupted, damaged and foreign files neither count nor go."""
        write(tmp_path, [0.1, 0.2, 0.3], monitor=None)
        rewrite(tmp_path / "m0.pt", dataclasses.replace(read_manifest(tmp_path / "m0.pt"), interrupted=True))
        (tmp_path / "m1.pt").write_bytes((tmp_path / "m1.pt").read_bytes()[:-40])
        torch.save({}, tmp_path / "foreign.pt")
        (tmp_path / "notes.txt").write_text("mine")
        before = names(tmp_path)
        prune(tmp_path, "--keep-last", 1)

        assert names(tmp_path) == before

    def test_links(self, tmp_path):
        """Links and copies neither count nor go, and what they lead to is judged by itself."""
        write(tmp_path, [0.1, 0.2, 0.3])
        for name, target in (("a.pt", "m0.pt"), ("latest.pt", "m2.pt"), ("z.pt", "m2.pt")):
            (tmp_path / name).symlink_to(target)
        shutil.copy(tmp_path / "m1.pt", tmp_path / "copy.pt")
        _, _, told = prune(tmp_path, "--keep-last", 1, "--keep-best", "val_loss:1")

        assert names(tmp_path) == ["a.pt", "copy.pt", "latest.pt", "m0.pt", "m2.pt", "z.pt"]
        assert "1 of 3 checkpoints removed" in told

    def test_file_that_cannot_be_removed(self, tmp_path):
        """It is named with the reason, the others go, and the exit code tells."""
        write(tmp_path, [0.1, 0.2, 0.3, 0.4], monitor=None)
        with FaultyDisk(errno.EACCES, calls=["unlink"]):
            code, lines, told = prune(tmp_path, "--keep-last", 1)

        assert code == 1 and names(tmp_path) == ["m0.pt", "m3.pt"]
        assert lines == [f"removed  {tmp_path}/m1.pt", f"removed  {tmp_path}/m2.pt"]
        assert "m0.pt: Permission denied" in told and "2 of 4 checkpoints removed" in told

    def test_json(self, tmp_path):
        """With --json each removed file is an object with its size."""
        write(tmp_path, [0.1, 0.2], monitor=None)
        size = os.path.getsize(tmp_path / "m0.pt")
        _, lines, _ = prune(tmp_path, "--keep-last", 1, "--json")

        assert [json.loads(line) for line in lines] == [
            {"path": str(tmp_path / "m0.pt"), "size": size, "removed": True}
        ]


class TestMistakes:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ([], "nothing says which checkpoints stay. Give --keep-last"),
            (["--keep-best", "val_loss"], "--keep-best 'val_loss' cannot be read"),
            (["--keep-best", "val_loss:0"], "--keep-best 'val_loss:0' cannot be read"),
            (["--keep-best", ":2"], "--keep-best ':2' cannot be read"),
            (["--keep-best", "acc:2"], "no file here was judged by 'acc', so nobody knows"),
            (["--keep-best", "loss:2:min"], "no file here has the metric 'loss'"),
        ],
    )
    def test_rules(self, tmp_path, arguments, message):
        """A rule that is missing or cannot be followed removes nothing, and the message says why."""
        write(tmp_path, [0.1, 0.2, 0.3])
        code, _, told = prune(tmp_path, *arguments)

        assert code == 2 and message in told and len(names(tmp_path)) == 3

    def test_no_folder(self, tmp_path):
        """A folder that is none is refused."""
        code, _, told = prune(tmp_path / "nowhere", "--keep-last", 1)

        assert code == 2 and "is no folder" in told

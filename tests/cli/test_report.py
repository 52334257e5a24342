"""``trainbus report``: what the data says of a run, what the page holds of it, and what it replaces."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import trainbus
from trainbus import Handler
from trainbus.cli.app import app
from trainbus.cli.report import page
from trainbus.cli.report.gather import gather
from trainbus.testing import FakeHandler, FaultyDisk
from trainbus_callbacks import History, KeepLast, ModelCheckpoint, read_history


def report(*arguments):
    """Run the command; return its exit code, what it printed, and what it said of trouble."""
    done = CliRunner().invoke(app, ["report", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, " ".join(done.stderr.replace("│", "").split())


def train(folder, epochs, *, die_at=None, history=True, **options):
    """Run or continue a tiny training of two batches an epoch; leave it unfinished after a step."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    handler = Handler(model, optimizer)
    if history:
        handler.add_callback(History(folder / "history.jsonl", every=1))
    options = {"monitor": "val_loss", **options}
    handler.add_callback(ModelCheckpoint(folder / "m_{epoch}.pt", **options))
    handler.resume(folder)
    for epoch in handler.epochs(epochs):
        for _ in handler.batches(range(2)):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            handler.log(loss=1 / (1 + handler.global_step))
            if die_at == handler.global_step:
                handler.finish_writing()
                return
        handler.log(val_loss=abs(epoch - 1) + 0.5)
    handler.flush()
    handler.emit("train_end")
    handler.close()


@pytest.fixture
def folder(tmp_path):
    """The folder of the run."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def data_of(folder):
    """Return what the page would be made from."""
    return gather(str(folder), read_history(folder / "history.jsonl"))


class TestCheckpoints:
    def test_fates(self, folder):
        """Each save says whether its file is there, was replaced, removed, or is gone."""
        train(folder, 4, keep=KeepLast(2))
        with Handler(torch.nn.Linear(1, 1)) as other:
            other.add_callback(History(folder / "history.jsonl"))
            other.save(folder / "again.pt")
            other.save(folder / "again.pt")
            other.save(folder / "lost.pt")
        os.unlink(folder / "lost.pt")

        # The other handler never trained, so what it did stands among the lines of the first.
        fates = {(one.file, one.fate) for one in data_of(folder).checkpoints}
        assert {("m_1.pt", "removed"), ("m_2.pt", "kept"), ("m_3.pt", "kept"), ("m_4.pt", "kept")} <= fates
        assert {("again.pt", "replaced"), ("lost.pt", "gone")} <= fates

    def test_marks(self, folder):
        """The best and the newest are those that `trainbus ls` names."""
        train(folder, 4)
        data = data_of(folder)

        assert (data.monitor, data.mode) == ("val_loss", "min")
        assert [one.file for one in data.checkpoints if one.best] == ["m_2.pt"]
        assert [one.file for one in data.checkpoints if one.newest] == ["m_4.pt"]

    def test_loop_that_emits_epochs_alone(self, folder):
        """A run that counts no steps stands over its epochs."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(History(folder / "history.jsonl"))
            handler.add_callback(ModelCheckpoint(folder / "m_{epoch}.pt", monitor="val_loss"))
            handler.emit("train_begin")
            for epoch in range(3):
                handler.emit("epoch_end", epoch=epoch, logs={"val_loss": 1 / (1 + epoch)})
            handler.emit("train_end")
        data = data_of(folder)

        (curve,) = data.curves
        assert (curve.steps, curve.epochs) == ([1, 2, 3], [0, 1, 2])
        assert [data.place_of(one) for one in data.checkpoints] == [1, 2, 3]
        assert report(folder, "-o", folder / "r.html")[0] == 0
        text = (folder / "r.html").read_text()
        assert "epochs completed" in text and "epoch 3, step" not in text

    def test_came_late(self, folder):
        """A save that was given up and came after all stands there once, as saved."""
        train(folder, 1)
        lines = (folder / "history.jsonl").read_text().splitlines()
        saved = json.loads(next(line for line in lines if '"saved"' in line))
        failed = {**saved, "outcome": "failed", "reason": "it hung", "requested": saved["requested"] + 1e-4}
        at = next(index for index, line in enumerate(lines) if '"saved"' in line)
        lines.insert(at, json.dumps(failed))
        (folder / "history.jsonl").write_text("\n".join(lines) + "\n")

        data = data_of(folder)
        assert [one.fate for one in data.checkpoints] == ["kept"] and data.totals.failed == 0

    def test_other_metric(self, folder):
        """--monitor and --mode say by what one is the best."""
        train(folder, 3)
        code, said, _ = report(folder, "--json", "--monitor", "loss", "--mode", "max")

        assert code == 0
        assert [one["file"] for one in json.loads(said)["checkpoints"] if one["best"]] == ["m_1.pt"]

    def test_costs(self, folder):
        """Each save has what it cost, and the totals are their sums."""
        train(folder, 3)
        data = data_of(folder)
        totals = data.totals

        assert all(one.lost > 0 and one.to_durable > 0 for one in data.checkpoints)
        assert totals.lost == pytest.approx(sum(one.lost for one in data.checkpoints))
        assert (totals.saves, totals.files) == (3, 3)
        assert totals.bytes == sum((folder / f"m_{i}.pt").stat().st_size for i in (1, 2, 3))
        assert 0 < totals.overlapped <= totals.writing
        kinds = [span.kind for span in data.spans]
        assert kinds.count("training") == 1 and kinds.count("copying") == kinds.count("writing") == 3

    def test_failed(self, folder):
        """A save of which there is no file says why."""
        handler = FakeHandler(auto_complete=False)
        handler.add_callback(History(folder / "history.jsonl"))
        handler.bus.emit("train_begin")
        handler.save_async(folder / "a.pt")
        handler.saves[0].fail(OSError(errno.ENOSPC, "No space left on device"))
        handler.bus.emit("train_end")
        data = data_of(folder)

        (one,) = data.checkpoints
        assert one.fate == "failed" and "No space left" in one.reason
        assert (data.totals.failed, data.totals.saves) == (1, 0)

    def test_put_back(self, folder):
        """A file that was put back by hand is there, whatever was recorded of it."""
        train(folder, 2, keep=KeepLast(1), monitor=None)
        (folder / "m_2.pt").rename(folder / "m_2.bak")
        data = data_of(folder)
        assert [(one.file, one.fate) for one in data.checkpoints][:2] == [
            ("m_1.pt", "removed"),
            ("m_2.pt", "gone"),
        ]

        (folder / "m_2.bak").rename(folder / "m_1.pt")
        files = [(one.file, one.fate, one.newest) for one in data_of(folder).checkpoints]
        assert files == [("m_1.pt", "removed", False), ("m_2.pt", "gone", False), ("m_1.pt", "kept", True)]

    def test_older_one_put_back(self, folder):
        """So is an older file under a name that was used again."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(History(folder / "history.jsonl"))
            handler.save(folder / "a.pt")
            older = (folder / "a.pt").read_bytes()
            handler.save(folder / "a.pt")
        (folder / "a.pt").write_bytes(older)

        found = [(one.fate, one.newest) for one in data_of(folder).checkpoints]
        assert found == [("kept", True), ("replaced", False)]

    def test_moved_folder(self, folder, tmp_path):
        """A folder that was moved tells the same."""
        train(folder, 2)
        before = [(one.file, one.fate) for one in data_of(folder).checkpoints]
        folder.rename(tmp_path / "moved")

        assert [(one.file, one.fate) for one in data_of(tmp_path / "moved").checkpoints] == before

    def test_files_below(self, folder):
        """Files in folders inside of this one are looked at; other places that are named are not."""
        handler = FakeHandler(run_id="r")
        handler.add_callback(History(folder / "history.jsonl"))
        handler.bus.emit("train_begin")
        for path in (folder / "sub" / "a.pt", folder.parent / "b.pt"):
            path.parent.mkdir(exist_ok=True)
            trainbus.save({}, path)
            handler.save_async(path)
        handler.bus.emit("train_end")

        assert [one.fate for one in data_of(folder).checkpoints] == ["kept", "elsewhere"]


class TestInterrupted:
    def test_continued(self, folder):
        """What a killed process had done beyond the checkpoint is no part of the curves, but is counted."""
        train(folder, 4, die_at=5)
        train(folder, 4)
        data = data_of(folder)

        curve = next(one for one in data.curves if (one.name, one.scope) == ("loss", "batch"))
        assert curve.steps == list(range(1, 9))
        assert [(part.first_step, part.last_step, part.ended) for part in data.parts] == [
            (0, 5, False),
            (4, 8, True),
        ]
        assert (data.parts[0].done_again, data.totals.done_again) == (1, 1)
        assert data.parts[1].start == pytest.approx(data.parts[0].seconds)

    def test_gone_back(self, folder):
        """Checkpoints beyond the one that the run went back to are marked; so is all of a vain attempt."""
        train(folder, 3)
        for name in ("m_2.pt", "m_3.pt"):
            (folder / name).rename(folder.parent / name)
        train(folder, 2, die_at=4)
        train(folder, 4)
        data = data_of(folder)

        abandoned = [one.global_step for one in data.checkpoints if one.abandoned]
        assert abandoned == [4, 6]
        assert [one.global_step for one in data.checkpoints if not one.abandoned] == [2, 4, 6, 8]
        epochs = next(one for one in data.curves if one.name == "val_loss")
        assert epochs.steps == [2, 4, 6, 8]

    def test_other_run(self, folder):
        """Of several runs in a folder the newest is shown, and files of others are counted only."""
        train(folder, 2)
        with pytest.warns(RuntimeWarning, match="did not resume"):
            model = torch.nn.Linear(1, 1)
            with Handler(model) as handler:
                handler.add_callback(History(folder / "history.jsonl"))
                handler.add_callback(ModelCheckpoint(folder / "m_{epoch}.pt"))
                handler.emit("train_begin")
                handler.emit("epoch_end", epoch=0, logs={"loss": 9.0})
        data = data_of(folder)

        assert data.run_id == handler.run_id and [one.file for one in data.checkpoints] == ["m_1.pt"]
        assert any("1 checkpoint of other runs" in note for note in data.notes)

    def test_unrecorded_run_is_newer(self, folder):
        """A run without a history that is newer than the recorded one is shown from its files."""
        train(folder, 1)
        time.sleep(0.01)
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.save(folder / "new.pt")
        data = data_of(folder)

        assert data.run_id == handler.run_id and not data.parts
        assert any("Nothing was recorded" in note for note in data.notes)


class TestWithoutHistory:
    def test_files_alone(self, folder):
        """The files alone give the checkpoints and their metrics, and what is missing is said."""
        train(folder, 3, history=False)
        data = gather(str(folder))

        assert [(one.fate, one.lost) for one in data.checkpoints] == [("kept", None)] * 3
        (curve,) = [one for one in data.curves if one.name == "val_loss"]
        assert (curve.scope, curve.steps, curve.values) == ("checkpoint", [2, 4, 6], [1.5, 0.5, 1.5])
        assert data.totals.lost is None and not data.spans
        assert any("Nothing was recorded" in note and "History" in note for note in data.notes)

    def test_begun_later(self, folder):
        """Files from before the history began are there too, and their number is told."""
        train(folder, 2, history=False)
        train(folder, 3)
        data = data_of(folder)

        assert [one.lost is None for one in data.checkpoints] == [True, True, False]
        assert any("What 2 saves of this run cost was not recorded" in note for note in data.notes)

    def test_damaged(self, folder):
        """A damaged file is named with its reason, and the others are shown."""
        train(folder, 2, history=False)
        (folder / "m_1.pt").write_bytes((folder / "m_1.pt").read_bytes()[:-9])
        data = gather(str(folder))

        assert [one.file for one in data.checkpoints] == ["m_2.pt"]
        assert list(data.damaged) == ["m_1.pt"] and any("m_1.pt" in note for note in data.notes)


class TestJson:
    def test_is_the_data(self, folder):
        """--json prints all that the page is made from, strictly JSON, and writes nothing."""
        train(folder, 2)
        with open(folder / "history.jsonl", "a") as file:
            line = {"record": "metrics", "time": 1, "scope": "epoch", "epoch": 9, "global_step": 4}
            print(json.dumps({**line, "logs": {"odd": "nan"}}), file=file)
        code, said, _ = report(folder, "--json")
        found = json.loads(said, parse_constant=pytest.fail)

        assert code == 0 and found["totals"]["saves"] == 2
        assert next(one for one in found["curves"] if one["name"] == "odd")["values"] == ["nan"]
        assert sorted(os.listdir(folder)) == ["history.jsonl", "m_1.pt", "m_2.pt"]


class TestPage:
    def test_written(self, folder, tmp_path):
        """The page tells the totals in words and has a row for each save."""
        train(folder, 3)
        code, said, _ = report(folder, "-o", tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()

        assert code == 0 and "3 saves" in said
        assert "For 3 saves the training stood still for" in text
        assert text.count("<tr") == 1 + 3 and text.count('class="tag best"') == 1
        assert all(f'id="{name}"' in text for name in ("metrics", "costs", "timeline"))

    def test_names_are_text(self, folder, tmp_path):
        """Names of metrics and files that look like HTML or templates are shown as they are written."""
        evil = '<img src=x onerror="alert(1)">%{x}</script>'
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(History(folder / "history.jsonl"))
            handler.emit("train_begin")
            handler.save_async(folder / "<script>x<.pt", logs={evil: 1.0}, stream="<b>", score=math.nan)
            handler.emit("epoch_end", epoch=0, logs={evil: 1.0})
        report(folder, "-o", tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        library = page.get_plotlyjs()

        assert library in text
        rest = text.replace(library, "")
        assert "<img" not in rest and "<b>" not in rest and "<script>x" not in rest
        assert rest.count("<script") == rest.count("</script") == 3
        assert "&lt;img src=x" in rest
        # In the charts' data too, where Plotly would take it for layout.
        assert "\\u003cimg" not in rest

    def test_names_that_are_none(self, folder, tmp_path):
        """A history whose files and metrics have impossible names is shown all the same."""
        odd = "sub/\0\ud800\n"
        begin = {"record": "begin", "time": 1.0, "run_id": odd}
        save = {"record": "save", "time": 2.0, "outcome": "saved", "file": odd, "logs": {odd: 1.0}}
        lines = [begin, save, {**save, "outcome": "failed", "reason": odd, "stream": odd}]
        (folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

        assert report(folder, "-o", tmp_path / "r.html")[0] == 0
        code, said, _ = report(folder, "--json")
        assert code == 0 and [one["fate"] for one in json.loads(said)["checkpoints"]] == [
            "elsewhere",
            "failed",
        ]

    def test_loads_nothing(self, folder, tmp_path):
        """The page's policy allows nothing to be fetched, and only its own two scripts to run."""
        train(folder, 1)
        report(folder, "-o", tmp_path / "r.html")
        text = (tmp_path / "r.html").read_text()
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]

        assert policy.startswith("default-src 'none';")
        assert len(re.findall(r"'sha256-[\w+/=]{44}'", policy)) == 2
        assert "unsafe-eval" not in policy and "script-src 'unsafe-inline'" not in policy
        assert not re.search(
            r"<(link|img|iframe|script)[^>]*(src|href)=", text.replace(page.get_plotlyjs(), "")
        )

    @pytest.mark.parametrize("logs", [{}, {"loss": math.nan}, {"loss": math.inf, "val_loss": math.nan}])
    def test_nothing_to_draw(self, folder, tmp_path, logs):
        """A run without metrics, or with none that is finite, gets its page all the same."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(History(folder / "history.jsonl"))
            handler.emit("train_begin")
            handler.save_async(folder / "a.pt", logs=logs)
            handler.emit("epoch_end", epoch=0, logs=logs)

        assert report(folder, "-o", tmp_path / "r.html")[0] == 0

    def test_empty_folder(self, folder, tmp_path):
        """A folder without a checkpoint gives a page that says so, and the terminal says it too."""
        code, _, told = report(folder, "-o", tmp_path / "r.html")
        assert code == 0 and told == f"No checkpoints of a training in {folder}."
        assert "There is no checkpoint of a training in this folder." in (tmp_path / "r.html").read_text()

    def test_many(self, folder):
        """Long curves are thinned so that their peaks stay."""
        from trainbus.cli.report import metrics_figure
        from trainbus.cli.report.run_data import Curve, RunData

        values = [0.0] * 50_000
        values[31_234] = 7.0
        steps = list(range(1, 50_001))
        curve = Curve(name="loss", scope="batch", steps=steps, epochs=[0] * 50_000, values=values)
        figure = metrics_figure.metrics_figure(RunData(folder="/x", made=0.0, curves=[curve]))

        drawn = figure.data[0].y
        assert len(drawn) <= metrics_figure.MOST_POINTS + 2 and max(drawn) == 7.0


class TestOutput:
    def test_replaces_a_report(self, folder, tmp_path):
        """An earlier report is replaced without asking."""
        target = tmp_path / "r.html"
        assert report(folder, "-o", target)[0] == 0
        train(folder, 1)
        assert report(folder, "-o", target)[0] == 0

        assert "m_1.pt" in target.read_text()

    def test_stdout(self, folder, monkeypatch):
        """With - the page, and nothing else, is on the standard output, and no file is written."""
        monkeypatch.chdir(folder)
        train(folder, 1)
        before = sorted(os.listdir())
        code, said, told = report(folder, "-o", "-")

        assert (code, told) == (0, "") and sorted(os.listdir()) == before
        assert said.startswith("<!") and said.rstrip().endswith("</html>") and "m_1.pt" in said

    def test_something_else(self, folder, tmp_path):
        """Anything else stays, unless --force is given."""
        target = tmp_path / "r.html"
        target.write_text("<html>mine</html>")
        code, _, told = report(folder, "-o", target)
        assert code == 2 and "no report of trainbus" in told and target.read_text() == "<html>mine</html>"

        assert report(folder, "-o", target, "--force")[0] == 0
        assert "trainbus report" in target.read_text()

    def test_disk_full(self, folder, tmp_path):
        """A disk that refuses leaves what was there, and nothing unfinished."""
        target = tmp_path / "r.html"
        report(folder, "-o", target)
        before = target.read_bytes()
        with FaultyDisk(errno.ENOSPC, calls=["write"], times=math.inf):
            done = CliRunner().invoke(app, ["report", str(folder), "-o", str(target)])

        assert done.exit_code == 1 and "No space left" in str(done.exception)
        assert target.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["r.html", "run"]

    @pytest.mark.parametrize("output", ["missing/r.html", "run"])
    def test_nowhere(self, folder, tmp_path, output):
        """A folder that is missing, or in the page's place, is named."""
        done = CliRunner().invoke(app, ["report", str(folder), "-o", str(tmp_path / output)])

        assert done.exit_code in (1, 2)
        assert output.split("/")[-1] in str(done.exception) + " ".join(done.stderr.replace("│", "").split())


class TestMistakes:
    def test_no_folder(self, tmp_path):
        """Something that is no folder is refused."""
        code, _, told = report(tmp_path / "none")
        assert code == 2 and "is no folder. `report` takes a folder" in told

    def test_no_history(self, folder):
        """A history that was named and is not there is an error; one that was not named is not."""
        code, _, told = report(folder, "--history", folder / "x.jsonl", "--json")
        assert code == 2 and "cannot be read: No such file" in told
        assert report(folder, "--json")[0] == 0

    @pytest.mark.parametrize("lines", [1, 20])
    def test_no_history_at_all(self, folder, tmp_path, lines):
        """How much of a history cannot be read is told on the terminal, and not on the page alone."""
        train(folder, 1)
        (tmp_path / "text").write_text("hello\n" * lines)
        code, _, told = report(folder, "--history", tmp_path / "text", "-o", tmp_path / "r.html")

        assert code == 0 and told.startswith(f"{lines} line")
        assert f"of the history {tmp_path}/text cannot be read" in told

    def test_no_plotly(self, folder, tmp_path):
        """Without plotly the extra is named, and --json works all the same; torch is not imported."""
        code = (
            "import sys; sys.modules['plotly'] = None\n"
            "from trainbus.cli.report import run\n"
            "options = dict(history=None, monitor=None, mode=None, force=False)\n"
            "run(sys.argv[1], sys.argv[2], as_json=True, **options)\n"
            "assert 'torch' not in sys.modules\n"
            "from trainbus.errors import MissingExtraError\n"
            "try:\n"
            "    run(sys.argv[1], sys.argv[2], as_json=False, **options)\n"
            "except MissingExtraError as error:\n"
            "    print(error)\n"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, folder, tmp_path / "r.html"],
            capture_output=True,
            text=True,
            timeout=60,
        )

        assert done.returncode == 0, done.stderr
        assert 'pip install "trainbus[report]"' in done.stdout and not (tmp_path / "r.html").exists()


class TestOverlap:
    @pytest.mark.parametrize(
        "still, busy, expected",
        [
            ([], [(0, 1)], 0),
            ([(0, 2)], [(1, 4)], 1),
            ([(1, 2), (3, 5)], [(0, 4)], 2),
            ([(5, 6)], [(0, 4)], 0),
        ],
    )
    def test_subtracted(self, still, busy, expected):
        """The writer's time in which the training stood still is no overlap."""
        from trainbus.cli.report.run_data import _standing_still_while_writing

        spans = [SimpleNamespace(kind="copying", start=a, end=b) for a, b in still]
        spans += [SimpleNamespace(kind="writing", start=a, end=b) for a, b in busy]

        assert _standing_still_while_writing(spans) == expected

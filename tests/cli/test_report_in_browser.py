"""The page of ``trainbus report`` as people see it: opened in a real browser and looked at as a picture."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from trainbus import Handler
from trainbus.cli.app import app
from trainbus.cli.report import chart
from trainbus_callbacks import History, ModelCheckpoint

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LIGHT, DARK = (251, 251, 250), (20, 23, 27)  # --paper of page.html

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium to open the page in"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a run that was cut off in its third epoch and continued."""
    folder = tmp_path_factory.mktemp("report")
    for until in (25, None):
        model = torch.nn.Linear(300, 300)
        optimizer = torch.optim.AdamW(model.parameters())
        handler = Handler(model, optimizer)
        handler.add_callback(History(folder / "history.jsonl", every=1))
        handler.add_callback(ModelCheckpoint(folder / "last.pt", save_freq=4))
        best = ModelCheckpoint(folder / "best.pt", monitor="val_loss", save_best_only=True)
        handler.add_callback(best)
        handler.resume(folder)
        _train(handler, model, optimizer, until)
    done = CliRunner().invoke(app, ["report", str(folder), "-o", str(folder / "report.html")])
    assert done.exit_code == 0, done.output
    return folder / "report.html"


def _train(handler, model, optimizer, until):
    for epoch in handler.epochs(4):
        for _ in handler.batches(range(10)):
            model(torch.ones(1, 300)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            handler.log(loss=2 / (1 + handler.global_step))
            if handler.global_step == until:
                handler.finish_writing()
                return
        handler.log(val_loss=1 / (2 + epoch))
    handler.emit("train_end")
    handler.close()


def look(path, size, *options):
    """Open the page; return its picture, and what the browser's console said."""
    picture = Path(path).with_suffix(".png")
    picture.unlink(missing_ok=True)
    profile = f"--user-data-dir={picture.parent / 'browser'}"
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *("--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND"),
        *("--enable-logging=stderr", "--virtual-time-budget=5000", profile),
        *(f"--screenshot={picture}", f"--window-size={size[0]},{size[1]}", *options, f"file://{path}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Image.open(picture).convert("RGB"), lines


def colors_of(picture):
    """Return how many pixels there are of each colour."""
    return {rgb: count for count, rgb in picture.getcolors(1 << 24)}


def pixels_near(picture, color, distance=24):
    """Return how many pixels have that colour, as far as an eye can tell."""
    wanted = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return sum(
        count
        for rgb, count in colors_of(picture).items()
        if max(abs(a - b) for a, b in zip(rgb, wanted, strict=True)) <= distance
    )


class TestPicture:
    @pytest.mark.parametrize(
        "options, paper", [((), LIGHT), (("--blink-settings=preferredColorScheme=0",), DARK)]
    )
    def test_charts_are_drawn(self, report, options, paper):
        """By day and by night the charts are there in their colours, and the browser has nothing to say."""
        picture, console = look(report, (1200, 2600), *options)

        assert console == []
        assert picture.getpixel((2, 2)) == paper
        assert max(colors_of(picture).values()) < 0.9 * picture.width * picture.height
        for color in (chart.BLUE, chart.GREEN, chart.GREY):
            assert pixels_near(picture, color) > 1000, color
        for color in (chart.ORANGE, chart.PINK):
            assert pixels_near(picture, color) > 100, color

    def test_narrow(self, report):
        """On a telephone nothing stands out over the edge, and the charts are drawn as well."""
        picture, console = look(report, (500, 2600))

        assert console == []
        edge = picture.crop((picture.width - 8, 0, picture.width, picture.height))
        assert set(colors_of(edge)) == {LIGHT}
        assert pixels_near(picture, chart.GREEN) > 1000

    def test_without_scripts_it_is_still_a_page(self, report, tmp_path):
        """Where no script runs, the head and the table are there."""
        page = tmp_path / "page.html"
        page.write_text(re.sub(r"<script.*?</script>", "", report.read_text(), flags=re.DOTALL))
        picture, console = look(page, (1200, 2600))

        assert console == []
        assert pixels_near(picture, chart.PINK) > 100 and pixels_near(picture, chart.BLUE) < 50


class TestConsole:
    @pytest.mark.parametrize(
        "intruder",
        [
            '<img src="http://example.invalid/a.png">',
            '<script src="https://example.invalid/a.js"></script>',
            "<script>document.title = 'mine'</script>",
            '<img src="data:," onerror="document.title = 1">',
        ],
    )
    def test_intruders_are_stopped(self, report, tmp_path, intruder):
        """Something that would fetch from elsewhere, or a script that is not the page's, is refused by it."""
        page = tmp_path / "page.html"
        page.write_text(report.read_text().replace("<footer>", f"{intruder}<footer>"))

        assert any("Content Security Policy" in line for line in look(page, (800, 600))[1])

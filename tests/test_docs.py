"""Every block of the README and the docs runs, page by page, as it is printed."""

from __future__ import annotations

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trainbus
from trainbus import events

ROOT = Path(__file__).parent.parent
LONG = "tutorial.md"  # it trains again and again, for twenty seconds
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"^```(?P<fence>\{code-block\} )?(?P<language>python|console|bash)\n(?P<text>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
OPTIONS = re.compile(r"(:[a-z-]+:.*\n)+\n?")
FILE_NAME = re.compile(r"(?:#!.*\n)?# (\w+\.(?:py|sh))\n")  # begins a block that is a file of its own
COMMAND = re.compile(r"^\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)", re.MULTILINE)
SHIMS = {
    "python": f'exec "{sys.executable}" "$@"',
    "trainbus": f'exec "{sys.executable}" -c "from trainbus.cli import main; main()" "$@"',
}


@pytest.fixture(autouse=True)
def _one_thread():
    """Models of these sizes gain nothing from more, and lose much where the cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """Return a function that runs a command as a user would type it; `python` and `trainbus` are ours."""
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / ".bin"
    programs.mkdir()
    for name, line in SHIMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{line}\n")
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
    }

    def run(command: str) -> str:
        # timeout ends all that the command has started, not the shell alone.
        whole = ["timeout", "--kill-after=1", "120", "bash", "-c", command]
        done = subprocess.run(whole, env=environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    return run


def blocks_of(page: Path):
    """Give language, line and text of each block that is run."""
    whole = page.read_text()
    for match in BLOCK.finditer(whole):
        text, line = match["text"], whole[: match.start("text")].count("\n")
        if match["fence"]:
            options = OPTIONS.match(text)
            line += options[0].count("\n") if options else 0
            text = text[options.end() :] if options else text
        yield match["language"], line, text


def run_commands(page: Path, line: int, text: str, shell) -> None:
    """Run each command; what it prints is compared, where ``...`` stands for anything."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for match in COMMAND.finditer(text):
        said = shell(match["command"])
        assert doctest.OutputChecker().check_output(match["output"], said, flags), (
            f"{page.name}, line {line + 1}: $ {match['command']}\nprinted\n{said}\nand not\n{match['output']}"
        )


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.full) if page.name == LONG else page for page in PAGES],
    ids=lambda page: page.name,
)
def test_blocks_run(page, shell):
    """
    The blocks of a page run one after the other: Python in one session, commands in its folder.

    A block that begins with ``# name.py`` or ``# name.sh`` becomes that file, which a later one runs.
    """
    session: dict[str, object] = {"__name__": "__main__"}
    blocks = list(blocks_of(page))
    for number, (language, line, text) in enumerate(blocks):
        if name := FILE_NAME.match(text):
            Path(name[1]).write_text(text)
            assert any(name[1] in later for _, _, later in blocks[number + 1 :]), (
                f"nothing runs {name[1]} of {page.name}"
            )
        elif language == "console":
            run_commands(page, line, text, shell)
        elif language == "python":
            exec(compile("\n" * line + text, str(page), "exec"), session)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    """The pages that Sphinx does not read have no link to a file that is not there."""
    links = re.findall(r"(?<!!)\[[^]]+\]\(([^)#]+)", (ROOT / page).read_text())
    assert [link for link in links if "://" not in link and not (ROOT / link).is_file()] == []


class TestReference:
    def test_the_command_line_page_names_each_option(self):
        """Each command has a section, and each option of it is named there or at the top."""
        typer = pytest.importorskip("typer")
        app = pytest.importorskip("trainbus.cli.app").app
        top, *rest = re.split(
            r"^## ", (ROOT / "docs/reference/command-line.md").read_text(), flags=re.MULTILINE
        )
        sections = {name: text for name, _, text in (section.partition("\n") for section in rest)}
        for name, command in typer.main.get_command(app).commands.items():
            assert f"`{name}" in top and name in sections
            for option in command.params:
                if option.param_type_name == "option":
                    assert any(written in top + sections[name] for written in option.opts), (
                        name,
                        option.opts,
                    )

    def test_the_events_page_has_the_pseudocode_of_the_catalogue(self):
        """The loop on the page of events is the one in the code, which names each event."""
        (drawn,) = re.findall(
            r"\.\. code-block:: text\n\n(.*?)\n\nEvery event", inspect.getdoc(events) or "", flags=re.DOTALL
        )
        page = (ROOT / "docs/reference/events.md").read_text()
        assert f"```text\n{inspect.cleandoc(drawn)}\n```" in page
        assert all(re.search(rf"\b{name}\b", drawn) for name in events.EVENTS)

    def test_the_api_page_has_each_public_name(self):
        """What `import trainbus` gives is on the page of its API."""
        page = (ROOT / "docs/reference/api.md").read_text()
        assert [n for n in trainbus.__all__ if n != "__version__" and not re.search(rf"\b{n}\b", page)] == []

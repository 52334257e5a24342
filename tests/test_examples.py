"""The examples of the docs run as they are printed, and what they say after a restart is exact."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = {path.name: path for path in sorted((Path(__file__).parent.parent / "docs/examples").glob("*.py"))}

# What of its length each takes: as long as by default, and a first part of it that a restart continues.
LENGTHS = {
    "accumulation.py": ("4", "2"),
    "ema.py": ("4", "2"),
    "fit.py": ("4", "2"),
    "gan.py": ("4", "2"),
    "mixed_precision.py": ("4", "2"),
    "plain_loop.py": ("4", "2"),
    "steps.py": ("40", "23"),
}
OTHERS = {"ddp.py", "fsdp.py", "early_stopping.py", "fake_events.py"}  # two are run in tests/distributed


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
    """Return a function that runs an example in a folder and returns the lines it prints of itself."""

    def run(name: str, *arguments: str, folder: str = "") -> list[str]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        monkeypatch.chdir(place)
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


class TestExamples:
    def test_each_is_run(self):
        """No example is left out here."""
        assert set(EXAMPLES) == {*LENGTHS, *OTHERS}

    @pytest.mark.parametrize("name", LENGTHS)
    def test_goes_on_exactly(self, say, name):
        """An example that is run in two parts says, digit for digit, what it says in one."""
        length, part = LENGTHS[name]

        whole = say(name, length, folder="whole")
        first = say(name, part, folder="parts")
        second = say(name, length, folder="parts")

        results = [line for line in whole if line.startswith(("epoch ", "step "))]
        assert len(results) >= 4
        assert set(results) - set(first), "the first part was the whole"
        assert set(results) - set(second), "the second part began anew"
        told = [line for line in [*first, *second] if line.startswith(("epoch ", "step "))]
        assert list(dict.fromkeys(told)) == results

    @pytest.mark.parametrize("name", LENGTHS)
    def test_a_finished_run_does_nothing(self, say, name):
        """An example that is run again after its end has at most its last, unsaved batches to do."""
        length, _ = LENGTHS[name]
        whole = say(name, length)
        again = say(name, length)
        assert len(again) <= 1
        assert set(again) <= set(whole)

    def test_early_stopping_stays_stopped(self, say):
        """A run that was stopped early trains nothing when it is run again, and says the same of its end."""
        whole = say("early_stopping.py")
        again = say("early_stopping.py")
        assert sum(line.startswith("epoch ") for line in whole) > 4
        assert not any(line.startswith("epoch ") for line in again)
        assert again[-2:] == whole[-2:]
        assert whole[-2].startswith("stopped after epoch ")

    def test_fake_events_pass(self, say):
        """The tests in the example of a test pass."""
        assert say("fake_events.py") == ["2 tests passed"]

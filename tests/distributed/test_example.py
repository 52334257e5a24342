"""The examples for several processes run under torchrun as their pages say."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "docs/examples"


@pytest.mark.full
@pytest.mark.parametrize("name", ["ddp.py", "fsdp.py"])
def test_goes_on_exactly(torchrun, tmp_path, name):
    """Run in two parts it says, digit for digit, what it says in one; finished, it does little."""

    def say(epochs: int, folder: str) -> list[str]:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        printed = torchrun(2, EXAMPLES / name, epochs, cwd=place)
        assert "Error" not in printed, printed
        return [line for line in printed.splitlines() if line.startswith("epoch ")]

    whole = say(4, "whole")
    first, second, third = say(2, "parts"), say(4, "parts"), say(4, "parts")

    assert len(whole) == 4 and first == whole[:2] and second == whole[2:]
    assert third in ([], whole[-1:])  # the batches behind its last save

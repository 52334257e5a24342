"""Each source of random numbers goes on from a captured state bit by bit."""

from __future__ import annotations

import io
import logging
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from trainbus.state import rng
from trainbus.state.plain_types import from_plain, to_plain

DRAWS: dict[str, Callable[[], Any]] = {
    "python": lambda: [random.random() for _ in range(700)],
    "python gauss": lambda: [random.gauss() for _ in range(3)],
    "numpy": lambda: np.random.rand(700).tolist(),
    "numpy normal": lambda: np.random.standard_normal(3).tolist(),
    "torch": lambda: torch.rand(700).tolist(),
    "torch normal": lambda: torch.randn(3).tolist(),
}


@pytest.fixture(autouse=True)
def _everything_as_before() -> Iterator[None]:
    before = rng.capture()
    rng._warn_once.cache_clear()
    yield
    rng.restore(before)


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(to_plain(state), file)
    file.seek(0)
    return from_plain(torch.load(file, weights_only=True), "a.pt")


class FakeCuda:
    """CUDA devices whose random state is one tensor each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, initialized: bool = True) -> None:
        self.states = [torch.tensor([number], dtype=torch.uint8) for number in range(count)]
        for name, fake in {
            "is_initialized": lambda: initialized,
            "is_available": lambda: count > 0,
            "device_count": lambda: count,
            "get_rng_state": lambda index: self.states[index].clone(),
            "set_rng_state": self.set,
        }.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    def set(self, state: torch.Tensor, index: int) -> None:
        self.states[index] = state


class TestCaptureAndRestore:
    @pytest.mark.parametrize("source", DRAWS)
    @pytest.mark.parametrize("drawn", [0, 1, 3])
    def test_each_source(self, source: str, drawn: int) -> None:
        """A source gives the same numbers again after its state went through a file."""
        draw = DRAWS[source]
        for _ in range(drawn):
            draw()
        state = through_a_file(rng.capture())
        expected = draw()
        draw()

        rng.restore(state)

        assert draw() == expected

    @pytest.mark.parametrize("kind", [np.random.PCG64, np.random.Philox, np.random.SFC64])
    def test_other_bit_generator(self, kind: Any) -> None:
        """A bit generator that the user has installed is captured as what it is."""
        before = np.random.get_bit_generator()  # type: ignore[attr-defined]
        np.random.set_bit_generator(kind(3))  # type: ignore[attr-defined]
        try:
            state = through_a_file(rng.capture())
            expected = np.random.rand(5).tolist()

            rng.restore(state)

            assert np.random.rand(5).tolist() == expected
        finally:
            np.random.set_bit_generator(before)  # type: ignore[attr-defined]

    def test_bit_generator_gone(self, caplog: pytest.LogCaptureFixture) -> None:
        """A state of another bit generator than the present one is left out, with a warning."""
        state = rng.capture()
        state["numpy"]["bit_generator"] = "PCG64"

        rng.restore(state)

        assert "NumPy's random state is left as it is" in caplog.text

    def test_draws_nothing(self) -> None:
        """Capturing changes no state."""
        first, second = rng.capture(), rng.capture()

        assert first["python"] == second["python"]
        assert torch.equal(first["torch"], second["torch"])
        assert torch.equal(first["numpy"]["state"]["key"], second["numpy"]["state"]["key"])

    def test_state_is_nobody_elses(self) -> None:
        """A captured state stays what it is while numbers are drawn."""
        np.random.seed(1)
        state = rng.capture()
        copy = through_a_file(state)

        for draw in DRAWS.values():
            draw()

        assert torch.equal(state["torch"], copy["torch"])
        assert torch.equal(state["numpy"]["state"]["key"], copy["numpy"]["state"]["key"])

    def test_missing_parts(self) -> None:
        """What a state does not hold stays as it is."""
        random.seed(3)
        expected = random.getstate()

        rng.restore({"torch": torch.get_rng_state()})

        assert random.getstate() == expected

    def test_numpy_not_imported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that has not imported NumPy's random numbers has no state of them."""
        monkeypatch.delitem(sys.modules, "numpy.random")

        assert rng.capture().keys() == {"python", "torch"}


class TestDevices:
    def test_each_cuda_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Every CUDA device is captured and restored by its index."""
        cuda = FakeCuda(monkeypatch, 3)
        state = through_a_file(rng.capture())
        cuda.states = [torch.zeros(1)] * 3

        rng.restore(state)

        assert [one.item() for one in cuda.states] == [0, 1, 2]

    def test_without_devices(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The states of the process alone can be asked for."""
        FakeCuda(monkeypatch, 2)

        assert rng.capture(devices=False).keys() == {"python", "numpy", "torch"}

    def test_cuda_not_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Capturing does not initialize CUDA."""
        FakeCuda(monkeypatch, 2, initialized=False)

        assert "cuda" not in rng.capture()

    @pytest.mark.parametrize(("saved", "here"), [(3, 1), (1, 3), (2, 0)])
    def test_other_number_of_devices(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, saved: int, here: int
    ) -> None:
        """With more or fewer devices, those that both have are restored, and that is said once."""
        FakeCuda(monkeypatch, saved)
        state = rng.capture()
        state["cuda"] = [one + 10 for one in state["cuda"]]
        cuda = FakeCuda(monkeypatch, here)

        rng.restore(state)
        rng.restore(state)

        common = min(saved, here)
        expected = [number + 10 if number < common else number for number in range(here)]
        assert [one.item() for one in cuda.states] == expected
        (record,) = caplog.records
        assert f"of {saved} CUDA devices and this process has {here}" in record.getMessage()
        assert (record.name, record.levelno) == ("trainbus", logging.WARNING)

    def test_mps(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        """MPS is captured and restored where it is there, and missed where it is not."""
        restored: list[int] = []
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7]))
        monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: restored.append(state.item()))
        state = rng.capture()
        rng.restore(state)
        assert restored == [7]

        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
        rng.restore(state)

        assert restored == [7]
        assert "MPS" in caplog.text

    @pytest.mark.gpu
    def test_real_cuda(self) -> None:
        """Numbers drawn on a GPU go on bit by bit."""
        torch.rand(3, device="cuda")
        state = through_a_file(rng.capture())
        expected = torch.randn(100, device="cuda").tolist()

        rng.restore(state)

        assert torch.randn(100, device="cuda").tolist() == expected

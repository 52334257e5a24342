"""The global random states of this process: Python, NumPy, torch and its devices."""

from __future__ import annotations

import functools
import logging
import random
import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["capture", "restore"]

logger = logging.getLogger("trainbus")


def capture(*, devices: bool = True) -> dict[str, Any]:
    """
    Return the random state of everything that draws without being handed a generator.

    Starts no device, waits for none, and draws nothing. Takes about 50 microseconds.

    Args:
        devices: Include every CUDA device, if CUDA is initialized, and MPS.

    Returns:
        Plain values and CPU tensors that nobody else holds: ``"python"``, ``"torch"``, and as far as
        they are in use ``"numpy"``, ``"cuda"`` (a list, by device index) and ``"mps"``.
    """
    state: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    # Importing numpy.random would seed it: what nobody imported, nobody has drawn from.
    if "numpy.random" in sys.modules:
        state["numpy"] = _with_tensors(sys.modules["numpy.random"].get_state(legacy=False))
    if devices and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    if devices and torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore(state: Mapping[str, Any]) -> None:
    """
    Go on from *state*, as `capture` returned it or as it was loaded from a file.

    What *state* does not hold stays as it is. If its devices are not those of this process,
    what both have is restored, and a warning says so once.
    """
    if "python" in state:
        random.setstate(state["python"])
    if "torch" in state:
        torch.set_rng_state(state["torch"].cpu())
    if "numpy" in state:
        _restore_numpy(state["numpy"])
    # A state without its devices is one that was captured without them, or before CUDA was used.
    if "cuda" in state:
        _restore_cuda(state["cuda"])
    if "mps" in state:
        _restore_mps(state["mps"])


def _restore_numpy(state: dict[str, Any]) -> None:
    import numpy as np

    try:
        np.random.set_state(_with_arrays(state))
    except (TypeError, ValueError) as error:  # of another bit generator, see numpy.random.set_bit_generator
        _warn_once(
            f"NumPy's random state is left as it is: the one in the checkpoint does not fit ({error})."
        )


def _restore_cuda(states: list[torch.Tensor]) -> None:
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here != len(states):
        _warn_once(
            f"The checkpoint holds the random states of {len(states)} CUDA devices and this process has "
            f"{here}: the first {min(here, len(states))} are restored. Random numbers drawn on the "
            "others are not those of an uninterrupted run."
        )
    for index, state in enumerate(states[:here]):
        torch.cuda.set_rng_state(state.cpu(), index)


def _restore_mps(state: torch.Tensor) -> None:
    if torch.backends.mps.is_available():
        torch.mps.set_rng_state(state.cpu())
    else:
        _warn_once("The checkpoint holds the random state of an MPS device and this process has none.")


def _with_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """Replace arrays by tensors, so that the state is plain without any list of NumPy paths."""
    return {key: _with_tensors(v) if isinstance(v, dict) else _to_tensor(v) for key, v in state.items()}


def _to_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if hasattr(value, "dtype") else value


def _with_arrays(state: dict[str, Any]) -> dict[str, Any]:
    return {key: _with_arrays(v) if isinstance(v, dict) else _to_array(v) for key, v in state.items()}


def _to_array(value: Any) -> Any:
    return value.cpu().numpy() if isinstance(value, torch.Tensor) else value


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)

"""The metrics of a moment, of which some are still being computed; read where waiting costs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainbus.loop.metrics import Logs, as_scalar

__all__ = ["UnreadMetrics"]


class UnreadMetrics:
    """
    What *logs* say now, whatever happens to them later. Making one never waits for a device.

    Training thread; `read` may be called on any.

    Args:
        logs: Values that are no single real number are left out.

    Attributes:
        known: Those that are there already, by name.
    """

    def __init__(self, logs: Mapping[str, Any]) -> None:
        self.known: dict[str, float] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        for name, value in (logs.unread() if isinstance(logs, Logs) else logs).items():
            try:
                scalar = as_scalar(name, value)
                if isinstance(scalar, torch.Tensor) and scalar.is_cuda and not scalar.is_complex():
                    self._waiting[name] = scalar
                else:
                    self.known[name] = float(scalar)
            except (TypeError, ValueError, OverflowError, RuntimeError):
                continue
        self._order = list(logs)
        self._ready = [_event(device) for device in {value.device for value in self._waiting.values()}]

    def read(self) -> dict[str, float]:
        """Return all of them as floats. Waits until the devices have computed them."""
        for event in self._ready:
            event.synchronize()
        read = {name: value.item() for name, value in self._waiting.items()}
        values = {**self.known, **read}
        return {name: values[name] for name in self._order if name in values}


def _event(device: torch.device) -> torch.cuda.Event:
    """Return an event of that device that is over once all that the calling thread asked of it is."""
    # Whoever waits for it sleeps instead of spinning on a core.
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event

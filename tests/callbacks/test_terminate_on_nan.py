"""TerminateOnNaN: stops at the batch whose metric is no number, and says which."""

from __future__ import annotations

import math

import pytest

from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import TerminateOnNaN


def steps_of(values, callback, name="loss"):
    """Run fake batches with these values; return the handler, whose global_step is the last one."""
    handler = FakeHandler()
    handler.add_callback(callback)
    emit_run(handler.bus, epochs=1, batches=len(values), batch_logs={name: values})
    return handler


class TestStops:
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_names_it(self, bad):
        """The run ends with the batch, and the reason names metric, value and step."""
        handler = steps_of([1.0, bad, 1.0], TerminateOnNaN())

        assert handler.global_step == 2
        assert handler.stop_reason == f"loss is {bad} at step 2."

    def test_every(self):
        """It looks only at every n-th batch."""
        handler = steps_of([math.nan, 1.0, math.nan, math.nan, 1.0], TerminateOnNaN(every=2))

        assert handler.stop_reason == "loss is nan at step 4."

    def test_others(self):
        """Metrics that are not named, not there or no number stop nothing."""
        assert not steps_of([math.nan], TerminateOnNaN(), name="other").stopped
        assert not steps_of(["text"], TerminateOnNaN()).stopped
        assert steps_of([math.nan], TerminateOnNaN("loss", "other"), name="other").stopped

    def test_mistakes(self):
        """What names no metric, or no number of batches, is refused at construction."""
        with pytest.raises(ValueError, match=r"takes names of metrics.*5"):
            TerminateOnNaN(5)
        for every in (0, True, 1.5):
            with pytest.raises(ValueError, match="every counts training batches"):
                TerminateOnNaN(every=every)

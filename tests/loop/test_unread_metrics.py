"""The metrics of a moment: as they were, and read where waiting costs nothing."""

from __future__ import annotations

import math
import threading

import numpy as np
import pytest
import torch

from trainbus.loop.metrics import Logs, RunningMean
from trainbus.loop.unread_metrics import UnreadMetrics


class TestOnTheHost:
    @pytest.mark.parametrize(
        "value",
        [
            2,
            2.0,
            np.float32(2),
            np.int64(2),
            np.array([2.0]),
            torch.tensor(2),
            torch.full((1,), 2.0, requires_grad=True),
            torch.nn.Parameter(torch.tensor(2.0)),
            torch.tensor(2.0, dtype=torch.bfloat16),
        ],
    )
    def test_all_are_known_at_once(self, value):
        """Numbers, NumPy scalars and host tensors of one element are floats, each under its name."""
        metrics = UnreadMetrics({"loss": value})

        assert metrics.known == metrics.read() == {"loss": 2.0}
        assert type(metrics.known["loss"]) is float

    @pytest.mark.parametrize(
        "value", ["2", None, torch.ones(2), [2.0], 10**400, torch.tensor(1j), np.array(["x"])]
    )
    def test_what_is_no_real_number_is_left_out(self, value):
        """A value that is no one real number is left out, and the others are kept."""
        assert UnreadMetrics({"odd": value, "loss": 1.0}).read() == {"loss": 1.0}

    def test_are_those_of_the_moment(self):
        """What changes in place afterwards does not change them."""
        loss = torch.tensor(1.0)
        metrics = UnreadMetrics({"loss": loss})
        loss += 1

        assert metrics.read() == {"loss": 1.0}

    def test_means_are_taken_as_they_stand(self):
        """A running mean of an event's logs is taken without reading it for the receivers."""
        mean = RunningMean()
        mean.add(torch.tensor(1.0), 1)
        mean.add(torch.tensor(4.0), 2)
        logs = Logs({"loss": mean, "none": RunningMean()})
        metrics = UnreadMetrics(logs)
        mean.add(torch.tensor(100.0), 1)

        read = metrics.read()
        assert read["loss"] == 3.0
        assert math.isnan(read["none"])

    def test_keep_their_order(self):
        """They come in the order they were logged in."""
        assert list(UnreadMetrics({"b": 1, "a": torch.tensor(2), "c": 3.0}).read()) == ["b", "a", "c"]


@pytest.mark.gpu
class TestOnADevice:
    def test_nothing_is_waited_for_until_they_are_read(self, without_waiting):
        """Metrics that a GPU is still computing are taken without a wait, and another thread reads them."""
        torch.cuda.synchronize()
        with without_waiting():
            torch.cuda._sleep(200_000_000)
            loss = torch.full((), 1.0, device="cuda") * 3
            metrics = UnreadMetrics({"loss": loss, "step": 5})
            loss += 1
        found = {}
        reader = threading.Thread(target=lambda: found.update(metrics.read()))
        reader.start()
        reader.join()

        assert metrics.known == {"step": 5.0}
        assert found == {"loss": 3.0, "step": 5.0}

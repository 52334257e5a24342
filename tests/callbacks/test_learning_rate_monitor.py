"""LearningRateMonitor: what the rates are called, and who sees them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from trainbus import Handler
from trainbus.testing import FakeHandler, emit_run
from trainbus_callbacks import LearningRateMonitor


def logged(optimizer, **options):
    """Return what one fake epoch logs."""
    handler = FakeHandler()
    handler.optimizer = optimizer
    handler.add_callback(LearningRateMonitor(**options))
    emit_run(handler.bus, epochs=1)
    return handler.logged


def groups(*groups):
    """An optimizer, as far as it is looked at."""
    return SimpleNamespace(param_groups=list(groups))


class TestNames:
    @pytest.mark.parametrize(
        ("optimizer", "names"),
        [
            (None, {}),
            (groups({"lr": 0.1}), {"lr": 0.1}),
            (groups({"lr": 0.1}, {"lr": 0.2}), {"lr/0": 0.1, "lr/1": 0.2}),
            (groups({"lr": 0.1, "name": "body"}, {"lr": 0.2}), {"lr/body": 0.1, "lr/1": 0.2}),
            ({"g": groups({"lr": 0.1}), "d": groups({"lr": 0.2})}, {"lr/g": 0.1, "lr/d": 0.2}),
            ({"g": groups({"lr": 0.1}, {"lr": 0.2})}, {"lr/g/0": 0.1, "lr/g/1": 0.2}),
            (groups({"lr": torch.tensor(0.5)}), {"lr": 0.5}),
        ],
    )
    def test_rates(self, optimizer, names):
        """Each group of each optimizer has one name."""
        assert logged(optimizer) == names

    def test_more(self):
        """Momentum and weight decay are logged where they are wanted and there are any."""
        adam = groups({"lr": 0.1, "betas": (0.8, 0.99), "weight_decay": 0.01})

        assert logged(adam, momentum=True, weight_decay=True) == {
            "lr": 0.1,
            "momentum": 0.8,
            "weight_decay": 0.01,
        }
        assert logged(groups({"lr": 0.1}), momentum=True) == {"lr": 0.1}


def test_seen_by_the_others(tmp_path):
    """Receivers of the same event and the manifest of a save then hold the rate."""
    module = torch.nn.Linear(1, 1)
    seen = []
    with Handler(module, torch.optim.SGD(module.parameters(), lr=0.25)) as handler:
        handler.on("epoch_end", lambda logs: seen.append(dict(logs)))
        handler.add_callback(LearningRateMonitor())
        for _ in handler.epochs(1):
            for _ in handler.batches([0]):
                pass

    assert seen == [{"lr": 0.25}]

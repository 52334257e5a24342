"""A small run for the tests of loops."""

from __future__ import annotations

import pytest
import torch

from trainbus import Handler
from trainbus.testing import EventRecorder


@pytest.fixture
def handler():
    """A handler of a linear model with SGD, closed at the end."""
    model = torch.nn.Linear(2, 1)
    with Handler(model, torch.optim.SGD(model.parameters(), lr=0.1)) as handler:
        yield handler


@pytest.fixture
def recorder(handler):
    """What the handler's bus delivered."""
    return EventRecorder(handler.bus)


@pytest.fixture
def step(handler):
    """A function that makes one optimizer step."""

    def step():
        handler.module(torch.ones(1, 2)).sum().backward()
        handler.optimizer.step()
        handler.optimizer.zero_grad()

    return step

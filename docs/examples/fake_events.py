"""
A callback tested by telling it of events: no model, no data, milliseconds.

    python fake_events.py           # or: pytest fake_events.py
"""

from trainbus import Callback
from trainbus.testing import FakeHandler, emit_run


class SaveWhenLearningRateDrops(Callback):
    """Save the run before an epoch that is trained with a smaller learning rate than the last one."""

    def __init__(self):
        self.lr = None

    def on_epoch_end(self, handler, epoch, logs):
        if self.lr is not None and logs["lr"] < self.lr:
            handler.save_async(f"run/before_drop_{epoch}.pt")
        self.lr = logs["lr"]

    def state_dict(self):
        return {"lr": self.lr}

    def load_state_dict(self, state):
        self.lr = state["lr"]


def test_saves_when_the_learning_rate_drops():
    handler = FakeHandler()
    handler.add_callback(SaveWhenLearningRateDrops())

    emit_run(handler.bus, epochs=4, logs={"lr": [0.1, 0.1, 0.01, 0.01]})

    assert [save.path for save in handler.saves] == ["run/before_drop_2.pt"]


def test_remembers_the_learning_rate_across_a_restart():
    first, second = SaveWhenLearningRateDrops(), SaveWhenLearningRateDrops()
    handler = FakeHandler()
    handler.add_callback(first)
    emit_run(handler.bus, epochs=2, logs={"lr": [0.1, 0.1]})

    second.load_state_dict(first.state_dict())
    handler = FakeHandler(resumed=True)
    handler.add_callback(second)
    emit_run(handler.bus, epochs=3, logs={"lr": [0.1, 0.1, 0.01]}, first_epoch=2)

    assert [save.path for save in handler.saves] == ["run/before_drop_2.pt"]


if __name__ == "__main__":
    test_saves_when_the_learning_rate_drops()
    test_remembers_the_learning_rate_across_a_restart()
    print("2 tests passed")

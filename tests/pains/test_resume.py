"""What people suffered from when a run was started again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

import trainbus
from trainbus import Callback, CheckpointFolder, Handler
from trainbus.errors import UnsavableStateError
from trainbus.testing import assert_resumes_exactly
from trainbus_callbacks import ModelCheckpoint


def dropout_training(folder, *, save_freq=2):
    """Train with a shuffled loader, dropout, momentum and a scheduler."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(16, 2), torch.randn(16, 1))
    model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Dropout(), torch.nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    with Handler(model, optimizer, scheduler=scheduler) as handler:
        handler.add_callback(ModelCheckpoint(folder / "last.pt", save_freq=save_freq))
        handler.resume(folder)
        handler.fit(DataLoader(data, 4, shuffle=True), epochs=3, loss_fn=mse_loss)


class TestMidEpoch:
    def test_the_data_begins_anew_in_the_order_of_the_first_epoch(self):
        """A run killed in the middle of its second epoch sees the batches it had not seen, in their order."""
        assert_resumes_exactly(dropout_training, kill_at=[("train_batch_end", 6)])

    def test_random_numbers_are_not_restored_when_epochs_are_saved(self):
        """Dropout and the order of the epochs that follow are as if nothing had happened."""

        def train(folder):
            dropout_training(folder, save_freq="epoch")

        assert_resumes_exactly(train, kill_at=[("epoch_end", 1), ("train_batch_end", 10)])

    def test_the_loader_is_another_one_without_a_word(self, caplog):
        """A run continued with another batch size is told that samples may come twice."""
        for size in (4, 2):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.resume(".")
                for _ in handler.epochs(1):
                    for _ in handler.batches(DataLoader(torch.zeros(16, 1), size, shuffle=True)):
                        if size == 4 and handler.batch == 1:
                            handler.save("a.pt")
                            break

        assert "samples may come twice or not at all" in caplog.text


class TestCounters:
    def test_how_to_go_on_at_epoch_27(self):
        """It goes on at the epoch, the step and the learning rate where it was."""

        def run(epochs):
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
            scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            rates = []
            with Handler(torch.nn.Linear(1, 1), optimizer, scheduler=scheduler) as handler:
                handler.add_callback(ModelCheckpoint("last.pt"))
                handler.on("epoch_end", lambda: (optimizer.step(), scheduler.step()))
                handler.resume(".")
                for epoch in handler.epochs(epochs):
                    for _ in handler.batches(range(3)):
                        pass
                    rates.append((epoch, handler.global_step, scheduler.get_last_lr()[0]))
            return rates

        before, after = run(27), run(29)

        assert before[-1][:2] == (26, 81)
        assert [rate[:2] for rate in after] == [(27, 84), (28, 87)]
        assert [rate[2] for rate in after] == pytest.approx([0.9**27, 0.9**28])

    def test_a_finished_run_is_trained_again(self, train):
        """A finished run that is started again does nothing."""
        train([0.5, 0.4], ModelCheckpoint("last.pt"))

        handler = train([9.0, 9.0], ModelCheckpoint("last.pt"), resume=True)

        assert (handler.epoch, trainbus.read_manifest("last.pt").logs) == (2, {"val_loss": 0.4})

    def test_means_of_the_epoch_begin_anew(self):
        """The mean over an epoch is that of all its batches, also when it was interrupted."""
        means = []
        for last in (1, 3):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.on("epoch_end", lambda logs: means.append(logs["loss"]))
                handler.on("train_batch_end", lambda handler: handler.save("a.pt"))
                handler.resume(".")
                for _ in handler.epochs(1):
                    for batch in handler.batches([1.0, 2.0, 3.0, 6.0]):
                        handler.log(loss=batch)
                        if last == 1 and handler.batch == 1:
                            handler.stop()

        assert means == [3.0]


class TestFiles:
    def test_the_newest_file_is_damaged(self, train, caplog):
        """A damaged file is named and passed over, and the one before it is taken."""
        train([0.5, 0.4], ModelCheckpoint("{epoch}.pt"))
        with open("2.pt", "r+b") as file:
            file.seek(200)
            file.write(b"!")

        with Handler(torch.nn.Linear(1, 1, bias=False)) as handler:
            assert handler.resume(".").epoch == 0

        assert "Passed over while resuming" in caplog.text and "2.pt" in caplog.text

    def test_files_saved_by_hand_are_not_found(self):
        """Whoever saved it and under which name, the newest file of the folder is resumed from."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.save("my-own-name.weights")

        with Handler(torch.nn.Linear(1, 1)) as handler:
            assert handler.resume(".") is not None

    def test_after_going_back_the_abandoned_future_is_resumed(self, train):
        """The newest is what was saved last, not what has the most steps."""
        train([0.5] * 5, ModelCheckpoint("old_{epoch}.pt"))
        with Handler(torch.nn.Linear(1, 1, bias=False)) as handler:
            handler.load("old_2.pt")
            handler.add_callback(ModelCheckpoint("new_{epoch}.pt"))
            next(epochs := handler.epochs(9))
            next(epochs)

        assert CheckpointFolder(".").latest().path.endswith("new_3.pt")

    def test_a_hyper_parameter_makes_the_file_unloadable(self):
        """What weights_only=True would not load is refused in the first second, with place and remedy."""

        class Settings:
            def state_dict(self):
                return {"data": Path("data")}

            def load_state_dict(self, state):
                """Take nothing."""

        with pytest.raises(
            UnsavableStateError, match=r"state\['extra'\]\['settings'\]\['data'\].*str\(value\)"
        ):
            with Handler(torch.nn.Linear(1, 1), extra={"settings": Settings()}) as handler:
                next(handler.epochs(1))


class Counts(Callback):
    def __init__(self):
        self.epochs = 0

    def on_epoch_end(self):
        self.epochs += 1

    def state_dict(self):
        return {"epochs": self.epochs}

    def load_state_dict(self, state):
        self.epochs = state["epochs"]


class TestWhatIsRestored:
    def test_the_state_of_callbacks_has_to_be_restored_by_hand(self, train):
        """The state of each callback is in every full checkpoint, and given back."""
        train([0.5, 0.4], ModelCheckpoint("last.pt"), Counts())
        counts = Counts()

        train([0.5, 0.4, 0.3], ModelCheckpoint("last.pt"), counts, resume=True)

        assert counts.epochs == 3

    def test_it_depends_on_whether_callbacks_are_added_before_the_load(self):
        """A callback that is added after the load is given its state then."""
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(Counts()).epochs = 7
            handler.save("a.pt")

        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.resume(".")
            assert handler.add_callback(Counts()).epochs == 7

    def test_the_file_of_the_best_does_not_know_that_it_is_the_best(self, train):
        """The state in a file already counts that file."""
        train([0.5], ModelCheckpoint("best.pt", monitor="val_loss", save_best_only=True))

        (state,) = trainbus.load("best.pt")["callbacks"].values()
        assert (state["best_score"], state["best_path"]) == (0.5, "best.pt")

    def test_a_model_that_is_built_by_its_first_batch_cannot_be_restored(self):
        """Layers that know their size only after a batch are restored before it, and go on exactly."""
        weights = []
        for epochs in (1, 2):
            model = torch.nn.LazyLinear(1)
            with Handler(model, optimizer := torch.optim.SGD(model.parameters(), lr=0.1)) as handler:
                if handler.resume(".") is None:
                    model(torch.ones(1, 3))
                else:
                    assert torch.equal(model.weight, weights[0])
                handler.add_callback(ModelCheckpoint("last.pt"))
                for _ in handler.epochs(epochs):
                    optimizer.zero_grad()
                    model(torch.ones(1, 3)).sum().backward()
                    optimizer.step()
            weights.append(model.weight.detach().clone())

        assert torch.allclose(weights[0] - weights[1], torch.full((1, 3), 0.1))

    def test_the_gradient_scaler_begins_anew(self):
        """The scale of mixed precision goes on where it was."""
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))  # it has its scale from the first use on
        with Handler(torch.nn.Linear(1, 1), scaler=scaler) as handler:
            handler.save("a.pt")

        fresh = torch.amp.GradScaler("cpu")
        with Handler(torch.nn.Linear(1, 1), scaler=fresh) as handler:
            handler.resume(".")

        assert fresh.get_scale() == 1024.0

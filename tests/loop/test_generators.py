"""The generators: what they hand out, what they emit, and when they do not."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import trainbus
from trainbus import Handler
from trainbus.errors import TrainbusError
from trainbus.testing import EventRecorder

BATCH = ["train_batch_begin", "train_batch_end"]


class TestEpochs:
    def test_emits_in_order(self, handler, recorder):
        """A whole training has the order of the catalogue, epoch_end after validation."""
        for _ in handler.epochs(1):
            for _ in handler.batches([1, 2]):
                pass
            for _ in handler.val_batches([3]):
                pass

        assert recorder.names == [
            "train_begin",
            "epoch_begin",
            *BATCH,
            *BATCH,
            "val_begin",
            "val_batch_begin",
            "val_batch_end",
            "val_end",
            "epoch_end",
            "train_end",
        ]

    def test_counts(self, handler):
        """Epochs and batches are 0-based, global_step counts completed batches."""
        seen = []
        handler.on(
            "train_batch_begin", lambda epoch, batch, global_step: seen.append((epoch, batch, global_step))
        )
        handler.on(
            "train_batch_end", lambda epoch, batch, global_step: seen.append((epoch, batch, global_step))
        )
        for epoch in handler.epochs(2):
            for _ in handler.batches("ab"):
                assert (handler.epoch, handler.batch) == (epoch, seen[-1][1])

        assert seen == [
            (0, 0, 0),
            (0, 0, 1),
            (0, 1, 1),
            (0, 1, 2),
            (1, 0, 2),
            (1, 0, 3),
            (1, 1, 3),
            (1, 1, 4),
        ]
        assert (handler.epoch, handler.global_step, handler.total_epochs) == (2, 4, 2)

    def test_n_is_the_total(self, handler):
        """A finished run yields nothing; a longer total continues it."""
        assert list(handler.epochs(2)) == [0, 1]
        assert list(handler.epochs(2)) == []
        assert list(handler.epochs(3)) == [2]

    def test_logs_of_the_epoch(self, handler, recorder):
        """epoch_end carries the weighted means, the val_ ones, and what was set outside of a batch."""
        for _ in handler.epochs(1):
            for batch in handler.batches([torch.zeros(3, 1), torch.zeros(1, 1)]):
                handler.log(loss=torch.tensor(float(len(batch))))
            for _ in handler.val_batches([torch.zeros(2, 1)]):
                handler.log(loss=0.5)
            handler.log(lr=0.1)

        (payload,) = recorder.of("epoch_end")
        assert dict(payload["logs"]) == {"loss": 2.5, "val_loss": 0.5, "lr": 0.1}
        assert dict(recorder.of("val_end")[0]["logs"]) == {"val_loss": 0.5}
        assert [dict(p["logs"]) for p in recorder.of("train_batch_end")] == [{"loss": 3.0}, {"loss": 1.0}]

    def test_weight_is_the_first_dimension(self, handler, recorder):
        """The batch's first tensor tells the weight, however it is nested; weight= overrides it."""
        for _ in handler.epochs(1):
            for value, _ in enumerate(
                handler.batches([{"ids": ["a"], "x": (torch.zeros(3),)}, [torch.zeros(1)]])
            ):
                handler.log(a=value)
                handler.log(b=value, weight=1)

        assert dict(recorder.of("epoch_end")[0]["logs"]) == {"a": 0.25, "b": 0.5}

    def test_metrics_logged_at_epoch_end_reach_later_receivers(self, handler):
        """What a receiver of epoch_end logs is seen by the receivers after it."""
        seen = []
        handler.on("epoch_end", lambda handler: handler.log(lr=0.1), priority=-1)
        handler.on("epoch_end", lambda logs: seen.append(dict(logs)))
        for _ in handler.epochs(1):
            pass

        assert seen == [{"lr": 0.1}]

    def test_metrics_logged_at_the_end_of_a_batch_are_the_batchs(self, handler):
        """What a receiver of train_batch_end logs is averaged like what the body logs."""
        seen = []
        handler.on("train_batch_end", lambda handler, batch: handler.log(norm=float(batch)), priority=-1)
        handler.on("train_batch_end", lambda logs: seen.append(dict(logs)))
        handler.on("val_batch_end", lambda handler, batch: handler.log(norm=float(batch)))
        handler.on("epoch_end", lambda logs: seen.append(dict(logs)))
        for _ in handler.epochs(1):
            list(handler.batches([torch.zeros(1), torch.zeros(3)]))
            list(handler.val_batches([torch.zeros(1), torch.zeros(1)]))

        assert seen == [{"norm": 0.0}, {"norm": 1.0}, {"norm": 0.75, "val_norm": 0.5}]

    @pytest.mark.parametrize("n", [-1, 2.0, True, None])
    def test_refuses_nonsense(self, handler, n):
        """The total is an int, and the error comes at the call, not at the first epoch."""
        with pytest.raises(
            ValueError, match=r"epochs\(n\) needs the run's total as an int of at least 0, got"
        ):
            handler.epochs(n)

    def test_receiver_errors_reach_the_loop(self, handler):
        """An exception of a receiver comes out of the for statement, naming the receiver."""

        def broken(epoch):
            raise KeyError("metric")

        handler.on("epoch_end", broken)
        with pytest.raises(KeyError) as info:
            for _ in handler.epochs(1):
                pass

        assert "broken" in info.value.__notes__[0]


class TestBreak:
    def test_batch_with_a_step_counts(self, handler, recorder, step):
        """A batch left by break counts if an optimizer stepped; its end is emitted by the next call."""
        for _ in handler.epochs(1):
            for _ in handler.batches([1, 2, 3]):
                step()
                break
            assert recorder.names[-1] == "train_batch_begin"
            handler.log(x=1.0)
            assert recorder.names[-1] == "train_batch_end"

        assert handler.global_step == 1
        assert recorder.names[-2:] == ["epoch_end", "train_end"]

    def test_batch_without_a_step_does_not_count(self, handler, recorder):
        """A batch left before anything was learnt from it is as if never handed out."""
        for _ in handler.epochs(1):
            for _ in handler.batches([1, 2, 3]):
                break

        assert handler.global_step == 0
        assert "train_batch_end" not in recorder.names
        assert recorder.names[-2:] == ["epoch_end", "train_end"]

    def test_batches_kept_in_a_variable_are_closed(self, handler, recorder, step):
        """epochs() closes the batches() it handed out, also where a variable keeps them alive."""
        for _ in handler.epochs(1):
            kept = handler.batches([1, 2])
            for _ in kept:
                step()
                break

        assert recorder.names[-4:] == [*BATCH, "epoch_end", "train_end"]

    def test_another_loop_counts_what_was_left(self, handler, recorder, step):
        """A batch left by break in a loop that a variable keeps alive is counted when the next begins."""
        for _ in handler.epochs(1):
            kept = handler.batches([1, 2, 3])
            for _ in kept:
                step()
                break
            for _ in handler.batches([4]):
                step()

        assert handler.global_step == 2 and recorder.names.count("train_batch_end") == 2

    def test_two_loops_at_once(self, handler):
        """Two loops cannot take turns: each batch counts once."""
        with pytest.raises(TrainbusError, match=r"another one was begun before it ended.*iterable of pairs"):
            for _ in handler.epochs(1):
                for _ in zip(handler.batches([1, 2]), handler.batches([3, 4]), strict=True):
                    pass

    def test_closing_emits_nothing(self, handler, recorder):
        """A generator that is thrown away emits nothing, because its errors would be discarded."""
        epochs = handler.epochs(2)
        next(epochs)
        batches = handler.batches([1])
        next(batches)
        before = list(recorder.names)
        del batches, epochs
        gc.collect()

        assert recorder.names == before

    def test_out_of_validation(self, handler, recorder):
        """A validation left by break ends with what it has seen."""
        for _ in handler.epochs(1):
            for _ in handler.batches([1]):
                pass
            for value in handler.val_batches([1.0, 2.0, 3.0]):
                handler.log(loss=value)
                if value == 2.0:
                    break

        assert recorder.names[-4:] == ["val_batch_end", "val_end", "epoch_end", "train_end"]
        assert dict(recorder.of("epoch_end")[0]["logs"]) == {"val_loss": 1.5}

    def test_out_of_epochs(self):
        """break out of epochs() ends the training when the with block is left."""
        model = torch.nn.Linear(1, 1)
        with Handler(model) as handler:
            recorder = EventRecorder(handler.bus)
            for _ in handler.epochs(5):
                break
            assert recorder.names[-1] == "epoch_begin"

        assert recorder.names[-1] == "train_end"


class TestHeldValidation:
    """A validation left by break that a variable, or a progress bar around it, keeps alive."""

    def held(self, handler):
        """Begin a validation of three batches, leave it in its second one, and keep it."""
        kept = handler.val_batches([1, 2, 3])
        for batch in kept:
            handler.log(loss=batch)
            if batch == 2:
                break
        return kept

    def test_ends_with_the_epoch(self, handler, recorder):
        """It ends before its epoch does, whose logs have its means."""
        for _ in handler.epochs(1):
            kept = self.held(handler)

        assert recorder.names[-3:] == ["val_end", "epoch_end", "train_end"]
        assert recorder.of("epoch_end")[0]["logs"]["val_loss"] == 1.5
        assert list(kept) == []

    def test_ends_with_the_next_one(self, handler, recorder):
        """It ends before the next validation begins."""
        for _ in handler.epochs(1):
            kept = self.held(handler)
            for _ in handler.val_batches([4]):
                pass

        assert [name for name in recorder.names if name in ("val_begin", "val_end")] == [
            *("val_begin", "val_end"),
            *("val_begin", "val_end"),
        ]
        assert list(kept) == []

    def test_ends_with_its_batch(self, handler, recorder):
        """Inside of a training batch, it ends before that batch does."""
        for _ in handler.epochs(1):
            for batch in handler.batches("ab"):
                if batch == "a":
                    kept = self.held(handler)
                else:
                    handler.log(loss=0.0)

        assert recorder.names.index("val_end") < recorder.names.index("train_batch_end")
        assert list(kept) == []


class TestValidationOutsideOfTraining:
    def test_of_a_loaded_checkpoint(self, tmp_path):
        """A checkpoint of an epoch's end is validated with all batches, as often as one likes."""
        model = torch.nn.Linear(1, 1)
        with Handler(model) as handler:
            for _ in handler.epochs(1):
                for _ in handler.batches([1]):
                    pass
                for _ in handler.val_batches([1, 2]):
                    pass
                handler.on("epoch_end", lambda: handler.save(tmp_path / "a.pt"))
        with Handler(model) as handler:
            handler.load(tmp_path / "a.pt")

            assert [list(handler.val_batches([3, 4])) for _ in range(2)] == [[3, 4], [3, 4]]

    def test_behind_a_finished_run(self, tmp_path):
        """A run that was finished when it was started again is tested with all batches."""
        seen = []
        for _ in range(2):
            with Handler(torch.nn.Linear(1, 1)) as handler:
                handler.resume(tmp_path)
                handler.on("epoch_end", lambda handler: handler.save(tmp_path / "a.pt"))
                for _ in handler.epochs(1):
                    for _ in handler.batches([1]):
                        pass
                    for _ in handler.val_batches([1]):
                        pass
                seen.append(list(handler.val_batches([2, 3])))

        assert seen == [[2, 3], [2, 3]]

    @pytest.mark.parametrize("when", ["train_batch_end", "epoch_end"])
    def test_behind_a_stopped_run(self, handler, when):
        """A run that was stopped, amid an epoch or at its end, is tested with all batches."""
        handler.on(when, lambda: handler.stop(), once=True)
        for _ in handler.epochs(2):
            for _ in handler.batches([1, 2]):
                pass

        assert [list(handler.val_batches([3, 4])) for _ in range(2)] == [[3, 4], [3, 4]]

    @pytest.mark.parametrize("when", ["train_batch_end", "val_batch_end"])
    def test_is_no_part_of_the_run(self, tmp_path, when):
        """A file that is saved behind such a test is continued as if there had been none."""
        model = torch.nn.Linear(1, 1)
        with Handler(model) as handler:
            handler.on(when, lambda: handler.stop(), once=True)
            for _ in handler.epochs(1):
                for _ in handler.batches([1, 2]):
                    pass
                for batch in handler.val_batches([3, 4]):
                    handler.log(loss=batch)
            for batch in handler.val_batches([50, 60]):
                handler.log(loss=batch, other=batch)
            handler.save(tmp_path / "a.pt")
        progress = trainbus.load(tmp_path / "a.pt")["progress"]
        assert progress["in_validation"] == (when == "val_batch_end")
        seen, logs = [], []
        with Handler(model) as handler:
            handler.bus.on("epoch_end", lambda **payload: logs.append(dict(payload["logs"])))
            handler.load(tmp_path / "a.pt")
            for _ in handler.epochs(1):
                seen += handler.batches([1, 2])
                for batch in handler.val_batches([3, 4]):
                    seen.append(batch)
                    handler.log(loss=batch)

        assert seen == ([2, 3, 4] if when == "train_batch_end" else [3, 4])
        assert logs == [{"val_loss": 3.5}]


class TestStop:
    def test_in_the_middle(self, handler, recorder):
        """stop() mid-epoch: the batches end, train_end follows without epoch_end."""
        for _ in handler.epochs(3):
            for batch in handler.batches([1, 2, 3]):
                if batch == 2:
                    handler.stop("enough")
            for _ in handler.val_batches([1]):
                pytest.fail("no validation after a stop in the middle")

        assert recorder.names[-2:] == ["train_batch_end", "train_end"]
        assert recorder.of("train_end")[0]["reason"] == "enough"
        assert (handler.epoch, handler.global_step, handler.stopped) == (0, 2, True)

    def test_in_the_last_batch(self, handler, recorder):
        """stop() in the last batch leaves the epoch whole."""
        for _ in handler.epochs(3):
            for batch in handler.batches([1, 2]):
                if batch == 2:
                    handler.stop()

        assert recorder.names[-2:] == ["epoch_end", "train_end"]
        assert handler.epoch == 1

    def test_at_epoch_end(self, handler, recorder):
        """stop() at epoch_end ends the training after that epoch."""
        handler.on("epoch_end", lambda handler: handler.stop("early"))

        assert list(handler.epochs(3)) == [0]
        assert recorder.names[-2:] == ["epoch_end", "train_end"]

    def test_in_validation(self, handler, recorder):
        """stop() in a validation ends it; it is not the epoch's end, because its metrics are not whole."""
        for _ in handler.epochs(3):
            for _ in handler.batches([1]):
                pass
            for value in handler.val_batches([1, 2, 3]):
                handler.log(loss=value)
                handler.stop()

        assert recorder.names.count("val_batch_begin") == 1
        assert recorder.names[-1] == "train_end"
        assert "epoch_end" not in recorder.names


class TestBatches:
    def test_outside_of_an_epoch(self, handler):
        """batches() without epochs() says where it belongs."""
        with pytest.raises(TrainbusError, match=r"outside of an epoch.*for epoch in handler.epochs\(n\)"):
            next(handler.batches([1]))

    def test_two_loaders_in_one_epoch(self, handler, recorder):
        """Two loops in one epoch count on."""
        for _ in handler.epochs(1):
            list(handler.batches("ab"))
            list(handler.batches("c"))

        assert [p["batch"] for p in recorder.of("train_batch_end")] == [0, 1, 2]

    def test_loading_meanwhile_ends_the_loop(self, handler, tmp_path):
        """A loop over counters that a load has moved says so instead of counting wrongly."""
        handler.save(tmp_path / "a.pt")
        with pytest.raises(
            TrainbusError, match=r"Cannot continue this epochs\(\) loop: a checkpoint was loaded"
        ):
            for _ in handler.epochs(2):
                handler.load(tmp_path / "a.pt")

    def test_loading_weights_meanwhile_is_fine(self, handler, tmp_path):
        """Rolling back the weights alone does not disturb the loop."""
        handler.save(tmp_path / "a.pt")
        for _ in handler.epochs(2):
            handler.load(tmp_path / "a.pt", only=("module",))

        assert handler.epoch == 2


class TestSteps:
    def test_goes_round(self, handler, recorder):
        """Training counted in steps goes round the loader; each whole round is an epoch."""
        assert list(handler.steps(5, "ab")) == ["a", "b", "a", "b", "a"]
        assert [p["epoch"] for p in recorder.of("epoch_end")] == [0, 1, 2]
        assert [p["batch"] for p in recorder.of("train_batch_end")] == [0, 1, 0, 1, 0]
        assert recorder.names[-2:] == ["epoch_end", "train_end"]

    @pytest.mark.parametrize(("steps", "epoch"), [(3, 1), (4, 2)])
    def test_longer_run_continues_the_last_round(self, handler, tmp_path, steps, epoch):
        """The last round is only over if its loader was; a resumed run goes on where it stood."""
        list(handler.steps(steps, "ab"))
        handler.save(tmp_path / "a.pt")
        handler.load(tmp_path / "a.pt")
        rest = handler.steps(6, "ab")

        assert (next(rest), handler.epoch) == ("b" if steps == 3 else "a", epoch)
        assert list(rest) == (["a", "b"] if steps == 3 else ["b"])

    def test_longer_run_of_the_same_handler_goes_on(self, handler):
        """More steps on the same handler go on in the middle of the round."""
        assert list(handler.steps(3, loader := ["a", "b"])) == ["a", "b", "a"]
        assert list(handler.steps(5, loader)) == ["b", "a"]
        assert handler.epoch == 2

    def test_n_is_the_total(self, handler):
        """A finished run yields nothing."""
        list(handler.steps(3, "ab"))
        assert list(handler.steps(3, "ab")) == []

    def test_lets_go_of_the_loader(self, handler):
        """A loader that is not used up is let go of when the handler is closed: its workers may end."""

        class Loader:
            def __iter__(self):
                self.iterator = weakref.ref(iterator := (number for number in range(9)))
                return iterator

        loader = Loader()
        for _ in handler.steps(2, loader):
            pass
        assert loader.iterator() is not None

        handler.close()

        assert loader.iterator() is None

    def test_validation_within_a_step(self, handler, recorder):
        """A validation in the body of a step is in that batch's logs, and in the epoch's."""
        for _ in handler.steps(2, [1.0, 2.0]):
            handler.log(loss=1.0)
            if handler.global_step == 1:
                for value in handler.val_batches([4.0, 6.0]):
                    handler.log(loss=value)

        first, second = (dict(p["logs"]) for p in recorder.of("train_batch_end"))
        assert first == {"loss": 1.0}
        assert second == {"loss": 1.0, "val_loss": 5.0}
        assert dict(recorder.of("epoch_end")[0]["logs"]) == {"loss": 1.0, "val_loss": 5.0}

    def test_empty_loader(self, handler):
        """A loader that gives nothing is an error, not an endless loop."""
        with pytest.raises(TrainbusError, match="gave no batch in a whole pass"):
            list(handler.steps(3, []))

    def test_break(self, recorder, handler, step):
        """break out of steps() counts the batch if an optimizer stepped."""
        for _ in handler.steps(5, "ab"):
            step()
            break
        handler.flush()

        assert handler.global_step == 1


class TestEmit:
    """Loops written by hand move the counters with their events."""

    def test_epochs(self, handler):
        """epoch_end of epoch e completes it."""
        handler.emit("train_begin")
        handler.emit("epoch_begin", epoch=4)
        assert handler.epoch == 4
        handler.emit("epoch_end", epoch=4, logs={"val_loss": 0.5})
        assert handler.epoch == 5

    def test_batches(self, handler, recorder):
        """train_batch_end counts a batch, at the index it names."""
        handler.emit("train_batch_end", logs={"loss": 1.0})
        handler.emit("train_batch_end", batch=7)

        assert [(p["batch"], p["global_step"]) for p in recorder.of("train_batch_end")] == [(0, 1), (7, 2)]
        assert dict(recorder.of("train_batch_end")[0]["logs"]) == {"loss": 1.0}

    def test_own_events_pass_through(self, handler):
        """Other events go to the bus as they are."""
        seen = []
        handler.bus.declare("gradient_norm", ["norm"])
        handler.on("gradient_norm", lambda norm: seen.append(norm))
        handler.emit("gradient_norm", norm=2.0)

        assert seen == [2.0]

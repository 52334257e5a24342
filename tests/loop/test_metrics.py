"""Metrics: averaged on the device, read lazily, gathered over ranks."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate

from trainbus import ranks
from trainbus.loop.metrics import Logs, Metrics, RunningMean, as_scalar


class CountingTensor(torch.Tensor):
    """Counts how often its value is read."""

    reads = 0

    def item(self):
        CountingTensor.reads += 1
        return super().item()


class TestRunningMean:
    @pytest.mark.parametrize("kind", [float, torch.tensor])
    def test_is_weighted(self, kind):
        """Each value counts by its weight."""
        mean = RunningMean()
        mean.add(kind(1.0), 3)
        mean.add(kind(5.0), 1)

        assert mean.value() == 2.0

    @pytest.mark.parametrize("weight", [torch.tensor(3), np.int64(3), np.float32(3)])
    def test_takes_any_weight(self, weight):
        """A weight may be a tensor, whose value is not read, or a NumPy scalar; what comes out is a float."""
        mean = RunningMean()
        mean.add(1.0, as_scalar("weight", weight))
        mean.add(torch.tensor(5.0), 1)

        assert mean.value() == 2.0 and type(mean.value()) is float

    def test_mixes_numbers_and_tensors(self):
        """Numbers and tensors can be logged under one name."""
        mean = RunningMean()
        mean.add(torch.tensor(1.0), 1)
        mean.add(2.0, 1)
        mean.add(torch.tensor(6.0), 1)

        assert mean.value() == 3.0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool])
    def test_sums_in_double_precision(self, dtype):
        """A thousand small-precision ones add up exactly."""
        mean = RunningMean()
        for _ in range(1000):
            mean.add(torch.ones((), dtype=dtype), 1.0)

        assert mean.value() == 1.0
        assert mean.total.dtype == torch.float64

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.uint8])
    def test_small_precision_weights(self, dtype):
        """Weights add up exactly whatever their type, and so does what they are multiplied with."""
        mean = RunningMean()
        for _ in range(1000):
            mean.add(torch.tensor(200, dtype=dtype), torch.tensor(200, dtype=dtype))
            mean.add(0.0, torch.tensor(200, dtype=dtype))

        assert mean.value() == 100.0
        assert float(mean.weight) == 400_000.0

    def test_survives_inference_mode(self):
        """A sum begun under inference_mode goes on outside of it."""
        mean = RunningMean()
        with torch.inference_mode():
            mean.add(torch.tensor(1.0), 1)
        mean.add(torch.tensor(3.0), 1)

        assert mean.value() == 2.0

    def test_without_weight_is_nan(self):
        """Nothing logged is not zero."""
        assert np.isnan(RunningMean().value())


class TestLogs:
    def test_converts_when_read(self):
        """A tensor's value is read when somebody looks, and once."""
        CountingTensor.reads = 0
        logs = Logs({"loss": torch.tensor(0.5).as_subclass(CountingTensor)})

        assert "loss" in logs and list(logs) == ["loss"] and len(logs) == 1
        assert CountingTensor.reads == 0
        assert (logs["loss"], logs["loss"]) == (0.5, 0.5)
        assert CountingTensor.reads == 1

    def test_gives_python_floats(self):
        """What is read is a plain float, whatever was logged."""
        logs = Logs({"a": torch.tensor(1.5), "b": RunningMean(3.0, 2.0)})

        assert {name: type(value) for name, value in logs.items()} == {"a": float, "b": float}

    def test_is_read_only(self):
        """A receiver cannot change what the others see."""
        with pytest.raises(
            TypeError, match=r"Cannot set logs\['loss'\]: .* read-only. Record a metric with handler.log"
        ):
            Logs({"loss": 1.0})["loss"] = 2.0

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda logs: logs.update(f1=1.0), r"call logs\.update\(\)"),
            (lambda logs: logs.update({"f1": 1.0}), r"call logs\.update\(\)"),
            (lambda logs: logs.pop("loss", None), r"call logs\.pop\(\)"),
            (lambda logs: logs.popitem(), r"call logs\.popitem\(\)"),
            (lambda logs: logs.setdefault("loss", 1.0), r"call logs\.setdefault\(\)"),
            (lambda logs: logs.clear(), r"call logs\.clear\(\)"),
            (lambda logs: logs.__delitem__("loss"), r"remove logs\['loss'\]"),
            (lambda logs: operator.ior(logs, {"f1": 1.0}), r"change the logs by \|="),
        ],
    )
    def test_does_nothing_that_changes_a_dict(self, change, words):
        """What would change a dict says what to do instead, and changes nothing."""
        logs = Logs({"loss": 1.0})
        with pytest.raises(TypeError, match=f"Cannot {words}: .* Record a metric with handler.log"):
            change(logs)

        assert logs == {"loss": 1.0}


class TestAsScalar:
    def test_copies_the_tensor(self):
        """A metric that changes later does not change the logged value."""
        value = torch.tensor(1.0, requires_grad=True)
        logged = as_scalar("loss", value)
        with torch.no_grad():
            value.fill_(9.0)

        assert logged.item() == 1.0
        assert not logged.requires_grad

    @pytest.mark.parametrize("value", [torch.ones(1, 1), np.float32(1), np.ones(1)])
    def test_takes_one_element(self, value):
        """One element is one number, whatever the shape."""
        assert float(as_scalar("x", value)) == 1.0

    def test_refuses_divided_tensors(self):
        """Of a tensor that is divided among ranks its whole is to be logged; a copy on each is one's own."""
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            mesh = init_device_mesh("cpu", (1,))
            replicated = DTensor.from_local(torch.tensor(2.0), mesh, [Replicate()])
            part = DTensor.from_local(torch.tensor(2.0), mesh, [Partial()])
            assert type(as_scalar("norm", replicated)) is torch.Tensor
            with pytest.raises(TypeError, match=r"Log norm\.full_tensor\(\), on every rank"):
                as_scalar("norm", part)
        finally:
            dist.destroy_process_group()

    @pytest.mark.parametrize("value", [torch.ones(2), np.ones(2), "0.5", None, [1.0]])
    def test_refuses_others(self, value):
        """What is no number is refused by name."""
        with pytest.raises(TypeError, match=r"Cannot log loss=.*one element.*mean"):
            as_scalar("loss", value)


class TestMetrics:
    def test_averages_batches_over_the_epoch(self):
        """Batch metrics are averaged by weight; metrics of the epoch stay as given."""
        metrics = Metrics()
        metrics.log_batch("loss", torch.tensor(1.0), 3)
        metrics.log_batch("loss", torch.tensor(5.0), 1)
        metrics.log_epoch("lr", 0.1)

        assert dict(metrics.epoch_logs()) == {"loss": 2.0, "lr": 0.1}

    def test_prefixes_validation_once(self):
        """Validation metrics are named val_..., also when they were already."""
        metrics = Metrics()
        outer = metrics.begin_validation()
        metrics.log_validation("loss", 1.0, 1)
        metrics.log_validation("val_acc", 0.5, 1)

        assert dict(metrics.end_validation(outer, within_batch=False)) == {"val_loss": 1.0, "val_acc": 0.5}
        assert dict(metrics.epoch_logs()) == {"val_loss": 1.0, "val_acc": 0.5}

    def test_validation_within_a_batch_joins_its_logs(self):
        """A validation in the body of a batch lets that batch be judged by it."""
        metrics = Metrics()
        metrics.begin_batch()
        metrics.log_batch("loss", 2.0, 1)
        outer = metrics.begin_validation()
        metrics.log_validation("loss", 1.0, 1)
        metrics.end_validation(outer, within_batch=True)

        assert dict(metrics.batch_logs) == {"loss": 2.0, "val_loss": 1.0}

    def test_state_continues_bit_for_bit(self):
        """Sums that were saved in the middle end in the same bits."""
        values = torch.rand(50, generator=torch.Generator().manual_seed(0))
        whole, first, second = Metrics(), Metrics(), Metrics()
        for value in values:
            whole.log_batch("loss", value, 7)
        for value in values[:20]:
            first.log_batch("loss", value, 7)
        second.load_state_dict(first.state_dict())
        for value in values[20:]:
            second.log_batch("loss", value, 7)

        assert dict(second.epoch_logs()) == dict(whole.epoch_logs())

    def test_gathers_names_that_some_ranks_logged(self, monkeypatch):
        """Over ranks: one gather, weighted; a name only one rank knows takes part."""
        other = {"loss": (30.0, 10.0), "only_there": (4.0, 2.0)}
        calls = []
        monkeypatch.setattr(ranks, "world_size", lambda: 2)
        monkeypatch.setattr(ranks, "gather", lambda mine, what: calls.append(mine) or [mine, other])
        metrics = Metrics()
        metrics.log_batch("loss", 1.0, 10)

        assert dict(metrics.epoch_logs()) == {"loss": 2.0, "only_there": 2.0}
        assert calls == [{"loss": (10.0, 10)}]

"""What `Handler.log` is given: averaged over an epoch on the device, turned into floats when read.

Reading a tensor's value makes the host wait for the GPU. So nothing here reads one
until somebody looks at the `Logs` of an event.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from trainbus import ranks
from trainbus.loop.read_only import ReadOnlyLogs

__all__ = ["Logs", "Metrics", "RunningMean"]


class RunningMean:
    """
    A weighted mean whose sum stays where its values are.

    Attributes:
        total: Sum of value x weight: a Python float, or a 0-dim float64 tensor on the
            device of the newest value (float32 where the device has no float64).
        weight: Sum of the weights; a tensor if one of them was.
    """

    __slots__ = ("total", "weight")

    def __init__(self, total: float | torch.Tensor = 0.0, weight: float | torch.Tensor = 0.0) -> None:
        self.total = total
        self.weight = weight

    def add(self, value: float | torch.Tensor, weight: float | torch.Tensor) -> None:
        """Add one value; both are numbers or 0-dim tensors (any device, dtype). Never waits for a device."""
        if isinstance(weight, torch.Tensor):
            weight = _wide(weight)  # sums of bfloat16 stand still at 256
            self.weight = self.weight + weight
            value, weight = (_wide(value) if isinstance(value, torch.Tensor) else value) * weight, 1.0
        else:
            self.weight = self.weight + weight
        if not isinstance(value, torch.Tensor):
            self.total = self.total + value * weight
        elif isinstance(self.total, torch.Tensor) and self.total.device == value.device:
            # Out of place: a sum begun under inference_mode may not be changed outside of it.
            self.total = torch.add(self.total, value, alpha=weight)
        else:
            wide = _wide(value)
            sum_so_far = self.total.to(wide.device) if isinstance(self.total, torch.Tensor) else self.total
            self.total = wide * weight + sum_so_far

    def value(self) -> float:
        """Return the mean (NaN without weight). Waits for the device if the sum is on one."""
        weight = float(self.weight)
        return float(self.total) / weight if weight else float("nan")

    def unread(self) -> float | torch.Tensor:
        """Return the mean, as a 0-dim tensor of its own if a device computes it. Never waits for one."""
        if isinstance(self.total, torch.Tensor) or isinstance(self.weight, torch.Tensor):
            return torch.as_tensor(self.total / self.weight)
        return self.value()


class Logs(ReadOnlyLogs):
    """
    The metrics of an event, by name; a value becomes a Python float when it is first read.

    Read-only for receivers. One object is handed to all receivers of an event, so what a
    receiver adds with `Handler.log` during ``epoch_end`` is seen by those after it.
    """

    __slots__ = ()

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        if isinstance(value, RunningMean):
            value = self._values[name] = value.value()
        elif isinstance(value, torch.Tensor):
            value = self._values[name] = value.item()
        return value

    def unread(self) -> dict[str, Any]:
        """Return the values as they are: floats, or 0-dim tensors that nobody has read yet."""
        return {
            name: value.unread() if isinstance(value, RunningMean) else value
            for name, value in self._values.items()
        }

    def put(self, name: str, value: Any) -> None:
        """Add or replace one metric; for the loop, not for receivers."""
        self._values[name] = value

    def joined(self, given: Mapping[str, Any] | None) -> Logs:
        """Add what a loop by hand gives an event, and return itself; for the loop, as `put`."""
        for name, value in (given or {}).items():
            self.put(name, value)
        return self


class Metrics:
    """The metrics of the epoch under way. Lives on the training thread."""

    def __init__(self) -> None:
        self.begin_epoch()

    def begin_epoch(self) -> None:
        """Forget the last epoch."""
        self._means: dict[str, RunningMean] = {}
        self._given: dict[str, Any] = {}
        self._validated: dict[str, RunningMean] = {}
        self._validating: dict[str, RunningMean] | None = None
        self._batch = Logs()
        self._before_batch: dict[str, RunningMean] = {}

    # -- logging

    def log_batch(self, name: str, value: Any, weight: float | torch.Tensor) -> None:
        """Add a metric of the training batch at hand."""
        scalar = as_scalar(name, value)
        self._means.setdefault(name, RunningMean()).add(scalar, weight)
        self._batch.put(name, scalar)

    def log_validation(self, name: str, value: Any, weight: float | torch.Tensor) -> None:
        """Add a metric of the validation batch at hand; it is called ``val_<name>`` from here on."""
        assert self._validating is not None
        name = validation_name(name)
        scalar = as_scalar(name, value)
        self._validating.setdefault(name, RunningMean()).add(scalar, weight)
        self._batch.put(name, scalar)

    def log_epoch(self, name: str, value: Any) -> None:
        """Set a metric of the epoch, as given."""
        self._given[name] = as_scalar(name, value)

    # -- what events carry

    def begin_batch(self) -> None:
        """Start the logs of a new batch, of training or validation."""
        self._batch = Logs()

    def begin_training_batch(self) -> None:
        """Start the logs of a new training batch; remember the means as they are without it."""
        self.begin_batch()
        self._before_batch = {
            name: RunningMean(mean.total, mean.weight) for name, mean in self._means.items()
        }

    @property
    def batch_logs(self) -> Logs:
        """The logs of the batch at hand; complete when its ``..._batch_end`` is emitted."""
        return self._batch

    def begin_validation(self) -> Logs:
        """Start a validation; returns the training batch's logs, to be given back at its end."""
        training_logs, self._batch = self._batch, Logs()
        self._validating = {}
        return training_logs

    def end_validation(self, training_logs: Logs, *, within_batch: bool, counts: bool = True) -> Logs:
        """
        Finish a validation and return its means, this rank's own.

        Args:
            training_logs: What `begin_validation` returned.

            within_batch: The validation ran inside the body of a training batch; that
                batch's logs then hold its means too, so that it can be saved by them.

            counts: The epoch's logs hold them.
        """
        means = self._validating or {}
        self._validating = None
        if counts:
            self._validated.update(means)
        self._batch = training_logs
        if within_batch:
            for name, mean in means.items():
                training_logs.put(name, mean)
        return Logs(means)

    def drop_validation(self, training_logs: Logs) -> None:
        """Forget a validation that was cut short; it is done again as a whole after a resume."""
        self._validating = None
        self._batch = training_logs

    def epoch_logs(self) -> Logs:
        """
        Return the epoch's metrics over all ranks.

        Collective when a process group exists: one gather of ``{name: (sum, weight)}``, so
        that a name only some ranks logged takes part without a hang. Metrics set as given
        count with weight 1 from each rank that set them.
        """
        means = {**self._means, **self._validated}
        if ranks.world_size() == 1:
            return Logs({**means, **self._given})
        mine = {name: (float(mean.total), float(mean.weight)) for name, mean in means.items()}
        mine |= {name: (float(value), 1.0) for name, value in self._given.items()}
        gathered: dict[str, RunningMean] = {}
        for sums in ranks.gather(mine, "the metrics of an epoch"):
            for name, (total, weight) in sums.items():
                mean = gathered.setdefault(name, RunningMean())
                mean.total = mean.total + total
                mean.weight = mean.weight + weight
        return Logs(gathered)

    # -- resume

    def state_dict(self, *, before_batch: bool = False) -> dict[str, Any]:
        """
        Return the sums so far; a validation under way is left out, because it begins anew.

        Args:
            before_batch: Leave the training batch at hand out too, because a run that loads them repeats it.
        """
        means = self._before_batch if before_batch else self._means
        return {
            "means": {name: (mean.total, mean.weight) for name, mean in means.items()},
            "validated": {name: (mean.total, mean.weight) for name, mean in self._validated.items()},
            "given": dict(self._given),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the sums of a checkpoint."""
        self.begin_epoch()
        self._means = {name: RunningMean(*pair) for name, pair in state.get("means", {}).items()}
        self._validated = {name: RunningMean(*pair) for name, pair in state.get("validated", {}).items()}
        self._given = dict(state.get("given", {}))


def _wide(scalar: torch.Tensor) -> torch.Tensor:
    return scalar.to(torch.float32 if scalar.device.type == "mps" else torch.float64)


def _local(name: str, value: Any) -> torch.Tensor:
    if not all(placement.is_replicate() for placement in value.placements):
        raise TypeError(
            f"Cannot log {name}: it is a DTensor of which each rank has a part, as clip_grad_norm_ returns "
            f"it for a module of fully_shard. Log {name}.full_tensor(), on every rank."
        )
    local: torch.Tensor = value.to_local()
    return local


def validation_name(name: str) -> str:
    """Return *name* with ``val_`` before it, unless that or ``val/`` is there already."""
    return name if name.startswith(("val_", "val/")) else f"val_{name}"


def as_scalar(name: str, value: Any) -> float | torch.Tensor:
    """
    Return a number, or a 0-dim tensor of our own on the device of *value*.

    Raises:
        TypeError: If *value* is neither a number nor has exactly one element, or is divided among ranks.
    """
    if isinstance(value, (int, float)):
        return value
    if hasattr(value, "full_tensor"):  # a DTensor; as a metric it would need a collective wherever it is read
        value = _local(name, value)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().reshape(()).clone()
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # a NumPy scalar or array
        return float(value.item())
    raise TypeError(
        f"Cannot log {name}={value!r}: a metric is a number or a tensor with one element. "
        "Reduce it first, e.g. with .mean()."
    )


def batch_size(batch: Any) -> float:
    """Return the first dimension of the first tensor in *batch* (nested), or 1 without one."""
    tensor = _first_tensor(batch)
    return tensor.shape[0] if tensor is not None and tensor.ndim else 1


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, Mapping):
        batch = tuple(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((t for t in map(_first_tensor, batch) if t is not None), None)
    return None

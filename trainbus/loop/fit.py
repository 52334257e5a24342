"""`Handler.fit`: a whole training, written with the generators that are there for everybody."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, IterableDataset

from trainbus.console import console_lines
from trainbus.errors import TrainbusError
from trainbus.state.optimizer_types import load_exactly

if TYPE_CHECKING:
    from trainbus.handler import Handler

__all__ = ["fit"]


def fit(
    handler: Handler,
    train_loader: Iterable[Any],
    val_loader: Iterable[Any] | None = None,
    *,
    epochs: int,
    loss_fn: Callable[[Any, Any], torch.Tensor] | None = None,
    train_step: Callable[..., Any] | None = None,
    val_step: Callable[..., Any] | None = None,
    device: str | torch.device | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    step_scheduler: str = "epoch",
    scheduler_metric: str | None = None,
) -> None:
    """
    Train for *epochs* in all; continue where a resumed run stood.

    One training batch is ``train_step``, backward, and every *accumulate* batches (and at the
    end of an epoch) clip, optimizer step, scheduler step. Prints to stdout what happens to
    checkpoints, unless logging is configured for ``trainbus``.

    Args:
        train_loader: Batches; with *loss_fn*, pairs ``(inputs, targets)``.

        val_loader: Batches to validate on after each epoch, without gradients, in eval mode.

        epochs: The run's total.

        loss_fn: ``loss_fn(model(inputs), targets)``; enough for most models.

        train_step:
            ``train_step(model, batch)`` instead; returns the loss, or a dict of metrics whose
            ``"loss"`` is it; a batch's weight in the averages is its first dimension.

        val_step: The same for validation; by default *train_step*.

        device: Where the module and the batches go; by default they stay where they are.

        accumulate: Batches per optimizer step.

        clip_norm: Largest norm of the gradients, more than 0; see ``torch.nn.utils.clip_grad_norm_``.

        autocast: ``torch.bfloat16`` or ``torch.float16`` for mixed precision.

        step_scheduler: ``"epoch"`` or ``"batch"``; a scheduler steps before the epoch's
            checkpoint is taken, or after each optimizer step.

        scheduler_metric: The metric that a ``ReduceLROnPlateau`` is given; by default
            ``val_loss``, or ``loss`` without a *val_loader*.

    Raises:
        ValueError: If an argument is out of its range or two contradict each other.
        TrainbusError: If *train_loader* has no batch for an epoch.
    """
    plan = _Plan(handler, loss_fn, train_step, val_step, device, accumulate, clip_norm, autocast)
    plan.check()
    if step_scheduler not in ("epoch", "batch"):
        raise ValueError(f"step_scheduler must be 'epoch' or 'batch', got {step_scheduler!r}.")
    plan.scheduler_per_batch = step_scheduler == "batch"
    if plan.scheduler_per_batch and isinstance(handler.scheduler, ReduceLROnPlateau):
        raise ValueError(
            "step_scheduler='batch' does not go with ReduceLROnPlateau, which is given a metric of the "
            "epoch. Use step_scheduler='epoch'."
        )
    plan.scheduler_metric = scheduler_metric or ("loss" if val_loader is None else "val_loss")
    plan.move_to_device()
    with contextlib.ExitStack() as stack:
        if handler.rank == 0:
            stack.enter_context(console_lines())
        stack.enter_context(handler.on("epoch_begin", plan.note_new_epoch))
        if not plan.scheduler_per_batch:
            stack.enter_context(handler.on("epoch_end", plan.step_scheduler_with, priority=-50))
        for _ in handler.epochs(epochs):
            plan.train_one_epoch(train_loader)
            if val_loader is not None:
                plan.validate(val_loader)
        handler.flush()


@dataclass
class _Plan:
    """The arguments of one `fit`, and one method for each line of a loop by hand."""

    handler: Handler
    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    train_step: Callable[..., Any] | None
    val_step: Callable[..., Any] | None
    device: str | torch.device | None
    accumulate: int
    clip_norm: float | None
    autocast: torch.dtype | None
    scheduler_per_batch: bool = False
    scheduler_metric: str = "val_loss"
    is_new_epoch: bool = False  # begun here, with no batch of it so far

    def check(self) -> None:
        if (self.loss_fn is None) == (self.train_step is None):
            raise ValueError("fit() needs either loss_fn or train_step: what the loss of a batch is.")
        if isinstance(self.accumulate, bool) or not isinstance(self.accumulate, int) or self.accumulate < 1:
            raise ValueError(f"accumulate must be an int of at least 1, got {self.accumulate!r}.")
        if self.clip_norm is not None and not self.clip_norm > 0:  # NaN is refused too
            raise ValueError(
                f"clip_norm must be more than 0, or None for gradients as they are, got {self.clip_norm!r}."
            )
        for name in ("module", "optimizer", "scheduler"):
            if isinstance(getattr(self.handler, name), Mapping):
                raise ValueError(  # noqa: TRY004 - the type is right elsewhere
                    f"fit() trains one {name}, this handler has several: "
                    f"{', '.join(getattr(self.handler, name))}. Write the loop with epochs() and batches()."
                )
        if self.handler.optimizer is None:
            raise ValueError("fit() needs an optimizer: Handler(module, optimizer).")

    def move_to_device(self) -> None:
        if self.device is None:
            return
        self.handler.module.to(self.device)
        optimizer = self.handler.optimizer
        # A resumed optimizer's state came to where the parameters were before this move.
        if optimizer.state:
            load_exactly(optimizer, optimizer.state_dict(), {})

    def note_new_epoch(self) -> None:
        self.is_new_epoch = True

    def train_one_epoch(self, loader: Iterable[Any]) -> None:
        handler = self.handler
        handler.model.train()
        waiting = 0  # batches whose gradients no step has used yet
        total = _sure_length(loader)
        for raw in handler.batches(loader):
            self.is_new_epoch = False
            waiting += 1
            steps = waiting == self.accumulate or handler.batch + 1 == total
            # Where nobody knows which batch is the last to be stepped with, each may be.
            with self._gradients_kept_local(not steps and total is not None):
                metrics = self._loss_of(self.train_step, raw)
                self._backward(metrics["loss"])
            if steps:
                self._optimizer_step()
                waiting = 0
            handler.log(**metrics)
        if waiting:  # no length told of the last one; also after a stop, for no checkpoint holds gradients
            self._optimizer_step()
        if self.is_new_epoch and not handler.stopped:  # a continued one may be over
            raise TrainbusError(
                f"Cannot train epoch {handler.epoch + 1}: the loader {loader!r} gave no batch in a whole "
                "pass. Give fit() something that can be iterated over again and again."
            )

    @torch.no_grad()
    def validate(self, loader: Iterable[Any]) -> None:
        self.handler.model.eval()
        for raw in self.handler.val_batches(loader):
            self.handler.log(**self._loss_of(self.val_step or self.train_step, raw))

    def step_scheduler_with(self, logs: Mapping[str, Any]) -> None:
        scheduler = self.handler.scheduler
        if scheduler is None:
            return
        if not isinstance(scheduler, ReduceLROnPlateau):
            scheduler.step()
        elif self.scheduler_metric in logs:
            scheduler.step(logs[self.scheduler_metric])
        else:
            raise ValueError(
                f"ReduceLROnPlateau cannot step: {self.scheduler_metric!r} is not among this epoch's metrics "
                f"({', '.join(logs) or 'none'}). Name one of them as scheduler_metric."
            )

    # -- one batch

    def _loss_of(self, step: Callable[..., Any] | None, raw: Any) -> dict[str, Any]:
        batch = to_device(raw, self.device) if self.device is not None else raw
        with self._precision():
            if step is not None:
                result = step(self.handler.model, batch)
            else:
                assert self.loss_fn is not None
                inputs, targets = batch
                result = self.loss_fn(self.handler.model(inputs), targets)
        if isinstance(result, torch.Tensor):
            return {"loss": result}
        if isinstance(result, Mapping) and "weight" in result:
            raise ValueError(
                f"A step's metric cannot be named 'weight', got {result!r}: handler.log takes that for the "
                "batch's weight in the averages. Give it another name."
            )
        if isinstance(result, Mapping) and isinstance(result.get("loss"), torch.Tensor):
            return dict(result)
        raise ValueError(
            f"A step must return the loss as a tensor, or a dict of metrics with 'loss', got {result!r}."
        )

    def _backward(self, loss: torch.Tensor) -> None:
        scaler = self.handler.scaler
        if self.accumulate > 1:
            loss = loss / self.accumulate
        (scaler.scale(loss) if scaler is not None else loss).backward()

    def _optimizer_step(self) -> None:
        optimizer, scaler = self.handler.optimizer, self.handler.scaler
        if self.clip_norm is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(self.handler.module.parameters(), self.clip_norm)
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.scheduler_per_batch and self.handler.scheduler is not None:
            self.handler.scheduler.step()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        where = torch.device(self.device) if self.device is not None else _device_of(self.handler.module)
        return torch.autocast(where.type, dtype=self.autocast)

    def _gradients_kept_local(self, more_to_come: bool) -> contextlib.AbstractContextManager[Any]:
        # DDP averages gradients over the ranks in each backward, unless the forward was run like this too.
        no_sync = getattr(self.handler.model, "no_sync", None)
        return no_sync() if more_to_come and no_sync is not None else contextlib.nullcontext()


def _sure_length(loader: Iterable[Any]) -> int | None:
    """Return how many batches *loader* gives, None if it may give another number than it says."""
    if isinstance(loader, (list, tuple)):
        return len(loader)
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None
    try:
        return len(loader)
    except (TypeError, NotImplementedError):  # its sampler has none
        return None


def to_device(batch: Any, device: str | torch.device) -> Any:
    """
    Return *batch* on *device*: tensors, and what has a ``to``, in tuples, lists and dicts of any class.

    Tensors in pinned memory are not waited for.
    """
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if callable(getattr(type(batch), "to", None)):  # of the class: entries may be attributes
        moved = batch.to(device)
        return batch if moved is None else moved  # some move in place
    if isinstance(batch, dict) and type(batch) is not dict:
        own = copy.copy(batch)
        for name, item in batch.items():
            own[name] = to_device(item, device)
        return own
    if isinstance(batch, Mapping):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(item, device) for item in batch)
    return batch


def _device_of(module: torch.nn.Module) -> torch.device:
    parameters: Iterator[torch.Tensor] = module.parameters()
    return next(parameters, torch.empty(0)).device

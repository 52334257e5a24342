"""EMA: an exponential moving average of the weights, which is what is validated and saved."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from trainbus.callback import Callback
from trainbus_callbacks.arguments import require_count

__all__ = ["EMA"]

_FIRST, _LAST = -1_000.0, 1_000.0  # of all receivers, so that the others see one set of weights only


class EMA(Callback):
    """
    Keep an exponential moving average of the weights; validate with it and save it.

    After each optimizer step, ``average = decay * average + (1 - decay) * weights``, by
    `torch.optim.swa_utils.AveragedModel` on the device of the weights, which holds a copy of the module.
    From ``val_begin`` to ``val_end`` and throughout ``epoch_end`` the two are exchanged in place: the module
    holds the average, so validations judge it, and a file that is saved there has it as its ``module``. At
    every other event the module holds the weights in training. The set that is not in the module is in the
    file's ``callbacks``, so a full checkpoint has both and `Handler.resume` puts each in its place, bit for
    bit; add the callback before or after ``resume``, with the same module. What several modules of a handler
    share has one average and is exchanged once.

    Training thread. The exchange takes the time of three copies of the weights and the memory of the largest
    tensor.

    Args:
        decay: How much of the average stays at an update.
        every: Update after so many training batches.
        start_step: Training batches before the first update, which takes the weights as they are.
        use_buffers: Average the buffers too, such as the running means of a BatchNorm; else the module's own
            are used with both sets.

    Raises:
        ValueError: If *decay* is not between 0 and 1, or a count is none.
    """

    priority = -10  # before what looks at the weights at the end of a batch

    def __init__(
        self, decay: float = 0.999, *, every: int = 1, start_step: int = 0, use_buffers: bool = False
    ) -> None:
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f"decay must be a number from 0 to 1, such as 0.999, got {decay!r}.")
        require_count("every", every, "training batches", least=1)
        require_count("start_step", start_step, "training batches", least=0)
        self.decay = decay
        self.every = every
        self.start_step = start_step
        self.use_buffers = use_buffers
        self._average: AveragedModel | None = None  # of all modules together, for they may share parameters
        self._averaged: dict[str, torch.nn.Module] = {}  # in it, by the module's name; "" of the only one
        self._updates = 0
        self._is_exchanged = False
        self._undo: list[Callable[[], Any]] = []

    def averaged(self, name: str = "") -> torch.nn.Module:
        """
        Return the module whose weights are the average, to evaluate with or to export.

        Amid a validation and ``epoch_end`` it holds the weights in training; the handler's own module holds
        the average then.

        Args:
            name: Which one, if the handler has several.

        Raises:
            KeyError: There is none yet: training has not begun, and nothing was loaded.
        """
        if name not in self._averaged:
            raise KeyError(
                f"There is no average of {name!r}: they are made when training begins, or loaded, for "
                "each of the handler's modules. Call averaged() after that, with one of their names."
            )
        return self._averaged[name]

    # -- events

    def on_train_begin(self, handler: Any) -> None:
        """Copy the module, if no checkpoint brought an average; else bring that to where the module is."""
        self._make_averages(handler)
        self._follow(handler)
        self._unsubscribe()
        bus = handler.bus
        self._undo = [
            bus.on("val_begin", self._show, priority=_FIRST).cancel,
            bus.on("val_end", self._hide, priority=_LAST).cancel,
            bus.on("epoch_end", self._show, priority=_FIRST).cancel,
            bus.on("epoch_end", self._hide, priority=_LAST).cancel,
            bus.on("exception", self._hide, priority=_FIRST).cancel,
            bus.on("train_end", self._hide, priority=_FIRST).cancel,
        ]

    def on_train_batch_end(self, handler: Any, global_step: int) -> None:
        """Take the new weights into the average, if an optimizer stepped."""
        if not self._undo:  # it was added amid a training
            self.on_train_begin(handler)
        self._hide(handler)  # a validation in the batch's body may have been cut short
        if handler.accumulating or global_step <= self.start_step or global_step % self.every:
            return
        assert self._average is not None
        self._average.update_parameters(_together(handler))
        self._updates += 1

    def on_train_end(self) -> None:
        """Stop exchanging."""
        self._unsubscribe()

    def detach(self) -> None:
        """Cancel the subscriptions to all buses."""
        self._unsubscribe()
        super().detach()

    # -- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """
        Return the set of weights that the module does not hold.

        Returns:
            ``weights``: by module the state dict, the average unless ``is_exchanged``; ``counts`` as
            `AveragedModel` keeps them; ``updates``: how often it was updated.
        """
        return {
            "weights": {name: module.state_dict() for name, module in self._averaged.items()},
            "counts": dict.fromkeys(self._averaged, self._average and self._average.n_averaged),
            "updates": self._updates,
            "is_exchanged": self._is_exchanged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a file's set, and exchange the two if the module was loaded with the average."""
        handler = self._attached[-1][0].handler
        self._updates, self._is_exchanged = state.get("updates", 0), state.get("is_exchanged", False)
        weights = state.get("weights", {})
        if not weights:
            return
        self._make_averages(handler)
        assert self._average is not None
        for name, module in self._averaged.items():
            module.load_state_dict(weights[name])
            self._average.n_averaged.copy_(state["counts"][name])
        self._hide(handler)

    # -- inside

    def _make_averages(self, handler: Any) -> None:
        if self._average is None:
            average = get_ema_multi_avg_fn(self.decay)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(
                _together(handler), multi_avg_fn=average, use_buffers=self.use_buffers
            )
            copies: Any = self._average.module
            self._averaged = {name: copies[i] for i, (name, _) in enumerate(_modules(handler))}

    def _follow(self, handler: Any) -> None:
        for name, module in _modules(handler):
            devices = {one.device for one in itertools.chain(module.parameters(), module.buffers())}
            if len(devices) == 1:  # a module on several stays where it was put when it was loaded
                self._averaged[name].to(devices.pop())

    def _show(self, handler: Any) -> None:
        if self._updates and not self._is_exchanged:
            self._exchange(handler)

    def _hide(self, handler: Any) -> None:
        if self._is_exchanged:
            self._exchange(handler)

    @torch.no_grad()
    def _exchange(self, handler: Any) -> None:
        assert self._average is not None
        # In place: graphs, optimizers and tied weights go by the tensors there are.
        pairs = zip(self._tensors(_together(handler)), self._tensors(self._average.module), strict=True)
        # Back in the opposite order, for memory that several tensors are views of is exchanged several times.
        for mine, other in list(pairs)[:: -1 if self._is_exchanged else 1]:
            kept = mine.clone()
            mine.copy_(other)
            other.copy_(kept)
        self._is_exchanged = not self._is_exchanged

    def _tensors(self, module: torch.nn.Module) -> Iterator[torch.Tensor]:
        yield from module.parameters()
        if self.use_buffers:
            yield from module.buffers()

    def _unsubscribe(self) -> None:
        while self._undo:
            self._undo.pop()()


def _modules(handler: Any) -> list[tuple[str, torch.nn.Module]]:
    module = handler.module
    return list(module.items()) if isinstance(module, Mapping) else [("", module)]


def _together(handler: Any) -> torch.nn.ModuleList:
    return torch.nn.ModuleList(module for _, module in _modules(handler))

"""Optimizer steps wait for what is still being copied; and which tensors only they change.

The hooks are torch's global ones, so optimizers that nobody told us of are seen as well. One fence
serves the process, because a hook cannot tell whose tensors an optimizer of another class writes to.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from trainbus.checkpoint.background_copy import BackgroundCopy

__all__ = ["hold", "is_stepping", "knows", "owned_tensors", "raise_fence", "wait"]

# What torch.compile says of a step compiled with fullgraph=True: a graph cannot wait for the host.
_WHY_NO_FULL_GRAPH = (
    "with snapshot='overlap' trainbus waits here for the checkpoint being copied; compile this step "
    "without fullgraph=True, or use snapshot='auto'"
)

_lock = threading.Lock()
_held: list[tuple[BackgroundCopy, Callable[[float], None]]] = []
_hooks: list[Any] = []
_users = 0
_stepping: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_captured: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def raise_fence() -> Callable[[], None]:
    """Let optimizer steps wait for what is held, until the function that this returns is called."""
    global _users
    with _lock:
        _users += 1
        if not _hooks:
            _hooks.append(register_optimizer_step_pre_hook(_before_step))
            _hooks.append(register_optimizer_step_post_hook(_after_step))
    lowered = False

    def lower() -> None:
        global _users
        nonlocal lowered
        with _lock:
            if not lowered:
                lowered = True
                _users -= 1
            if not _users:
                while _hooks:
                    _hooks.pop().remove()
                _stepping.clear()

    return lower


def hold(copy: BackgroundCopy, charge: Callable[[float], None]) -> None:
    """
    Let no optimizer step before *copy* allows it.

    Args:
        copy: What is being copied, or about to be.
        charge: Called with the seconds that a step had to wait, on its thread.
    """
    with _lock:
        _held.append((copy, charge))


def wait() -> None:
    """
    Return when the tensors that are being copied may be changed by this thread.

    Raises:
        SnapshotChangedError: Only of copies that are checked: somebody changed them already.
    """
    if not _held:
        return
    with torch.profiler.record_function("trainbus: wait for the copy"):
        # A copy, because each entry goes from the list.
        for entry in _held.copy():
            _wait_for(entry)


def _wait_for(entry: tuple[BackgroundCopy, Callable[[float], None]]) -> None:
    copy, charge = entry
    begun = time.perf_counter()
    try:
        copy.let_change()
    except Exception:
        _let_go(entry)
        raise
    finally:
        charge(time.perf_counter() - begun)
    # Not after Ctrl-C: the copy goes on, and the next step has to wait for it.
    _let_go(entry)


def _let_go(entry: tuple[BackgroundCopy, Callable[[float], None]]) -> None:
    with _lock:
        if entry in _held:
            _held.remove(entry)


def knows(optimizers: Iterable[Any]) -> bool:
    """Tell whether one of *optimizers* is known to write to its tensors in its step alone."""
    return any(_is_known(optimizer) for optimizer in optimizers)


def is_stepping() -> bool:
    """Tell whether some optimizer is inside of its step."""
    return len(_stepping) > 0


def owned_tensors(optimizers: Iterable[Any]) -> Mapping[int, torch.Tensor]:
    """
    Return the tensors that nothing but a step of *optimizers* changes, by address.

    Parameters that require grad, and the optimizers' states; only of optimizers whose class is
    exactly one of ``torch.optim``, for others may write outside of ``step``. Left out is what an
    optimizer that is none of these was seen to step as well, and what was stepped while a CUDA
    graph was captured: its replay calls no hook.
    """
    owned: dict[int, torch.Tensor] = {}
    for optimizer in optimizers:
        if _is_known(optimizer) and optimizer not in _captured:
            tensors = _tensors_of(optimizer)
            owned.update(zip(map(torch.Tensor.data_ptr, tensors), tensors, strict=True))
    for stranger in [one for one in _seen if not _is_known(one) or one in _captured]:
        for tensor in _tensors_of(stranger):
            owned.pop(tensor.data_ptr(), None)
    owned.pop(0, None)
    return owned


def _is_known(optimizer: Any) -> bool:
    kind = type(optimizer)
    return kind.__module__.split(".")[:2] == ["torch", "optim"] and isinstance(
        optimizer, torch.optim.Optimizer
    )


def _tensors_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    groups, states = optimizer.param_groups, optimizer.state.values()
    parameters = [one for group in groups for one in group["params"] if one.requires_grad]
    values = [one for state in states if isinstance(state, Mapping) for one in state.values()]
    # Of others, be they no tensors at all, nobody knows where they lie.
    return [
        one
        for one in (*parameters, *values)
        if type(one) in (torch.nn.Parameter, torch.Tensor) and one.layout is torch.strided
    ]


@torch.compiler.disable(reason=_WHY_NO_FULL_GRAPH)  # type: ignore[no-untyped-call, untyped-decorator]
def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    _seen.add(optimizer)
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        # Nothing may be waited for here, and nothing is when the graph is replayed.
        _captured.add(optimizer)
        return
    wait()
    _stepping.add(optimizer)


@torch.compiler.disable(reason=_WHY_NO_FULL_GRAPH)  # type: ignore[no-untyped-call, untyped-decorator]
def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    # Where a step raises, this is left out: the next whole step of that optimizer makes up for it.
    _stepping.discard(optimizer)


def _begin_open_in_child() -> None:
    global _lock
    # What the parent was copying is no business of the child's, and its lock may be held there.
    _lock = threading.Lock()
    _held.clear()
    _stepping.clear()


os.register_at_fork(after_in_child=_begin_open_in_child)

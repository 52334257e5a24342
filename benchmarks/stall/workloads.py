"""What is trained while the peers save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.stall.gpt import GPT, Shape

__all__ = ["WORKLOADS", "Unavailable", "Workload", "runnable", "select", "tensors_of"]


class Unavailable(Exception):
    """A workload or a peer cannot run here; says why."""


class Workload:
    """
    A training without its loop.

    Attributes:
        module, optimizer: What is saved.
        constant: Whether at each moment all elements of all parameters are one number, so that
            a file says by itself whether it is torn.
        settling: Steps that are shorter than others after the host was busy with something else,
            because the device went on meanwhile.
    """

    constant = False
    settling = 0

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        self.optimizer = optimizer

    def step(self, batch: int, before_update: Callable[[], None]) -> None:
        """Train one batch; call *before_update* before the optimizer touches the state."""
        raise NotImplementedError

    def settle(self) -> None:
        """Wait as a loop does at the end of a step."""

    def state(self) -> dict[str, Any]:
        """Return what all peers save: live tensors."""
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def state_bytes(self) -> int:
        """Return the bytes of all tensors in `state`."""
        return sum(tensor.nbytes for _, tensor in tensors_of(self.state()))


def tensors_of(state: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over the tensors in nested dicts and lists, each with its place."""
    if isinstance(state, torch.Tensor):
        yield path, state
    elif isinstance(state, dict):
        for key, value in state.items():
            yield from tensors_of(value, f"{path}/{key}")
    elif isinstance(state, list | tuple):
        for index, value in enumerate(state):
            yield from tensors_of(value, f"{path}/{index}")


class HostIdle(Workload):
    """The device is busy and the host waits for it; then the optimizer changes every byte at once."""

    constant = True

    def __init__(self, size: int, tensors: int, seconds: float) -> None:
        elements = size // 4 // tensors
        module = nn.ParameterList(nn.Parameter(torch.zeros(elements)) for _ in range(tensors))
        # With this learning rate and gradient, a step adds one to every parameter in place.
        super().__init__(module, torch.optim.SGD(module.parameters(), lr=1.0))
        minus_one = torch.full((elements,), -1.0)
        for parameter in module.parameters():
            parameter.grad = minus_one
        self._seconds = seconds

    def step(self, batch: int, before_update: Callable[[], None]) -> None:
        """Sleep as long as the device computes, then update."""
        time.sleep(self._seconds)
        before_update()
        self.optimizer.step()


class Training(Workload):
    """A GPT trained with fused AdamW on random tokens that lie on its device."""

    def __init__(self, shape: Shape, batch_size: int, device: str) -> None:
        torch.manual_seed(0)
        module = GPT(shape).to(device)
        super().__init__(module, torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True))
        self._device = torch.device(device)
        self._count = batch_size * shape.context
        self._shape = (batch_size, shape.context)
        self._tokens = torch.randint(shape.vocabulary, (8 * self._count + 1,), device=device)
        self._previous: torch.cuda.Event | None = None
        self.settling = 3 if self._device.type == "cuda" else 0

    def step(self, batch: int, before_update: Callable[[], None]) -> None:
        """Forward, backward, update; on a GPU in bfloat16 where autocast says so."""
        start = batch % 8 * self._count
        window = self._tokens[start : start + self._count + 1]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = self.module(window[:-1].view(self._shape), window[1:].view(self._shape))
        loss.backward()
        before_update()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def settle(self) -> None:
        """On a GPU wait for the step before this one, as a loop that logs a loss does; it stays busy."""
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            if self._previous is not None:
                self._previous.synchronize()
            self._previous = event


@dataclass(frozen=True)
class Definition:
    """
    Attributes:
        name: As on the command line.
        save_every: Steps from a save to the next.
        build: Makes the workload, given the mebibytes that ``--size-mib`` asked for.
        cuda: Whether it needs a CUDA device.
        warmup: Steps before anything is timed. A GPU's clock falls while it becomes warm: by 2 % in
            the first 60 steps on an H200.
    """

    name: str
    save_every: int
    build: Callable[[int], Workload]
    cuda: bool = False
    warmup: int = 5


def _host_idle(tensors: int, seconds: float) -> Callable[[int], Workload]:
    return lambda size_mib: HostIdle(size_mib << 20, tensors, seconds)


def _cpu(size_mib: int) -> Workload:
    return Training(Shape(layers=6, width=384, heads=6, context=128, vocabulary=256), 4, "cpu")


def _gpu(shape: Shape, batch_size: int, needed_gib: int) -> Callable[[int], Workload]:
    def build(size_mib: int) -> Workload:
        memory = torch.cuda.get_device_properties(0).total_memory
        if memory < needed_gib << 30:
            raise Unavailable(f"needs {needed_gib} GiB of device memory, there are {memory >> 30}")
        return Training(shape, batch_size, "cuda")

    return build


_GPT2 = Shape(layers=12, width=768, heads=12, context=1024, vocabulary=50304)  # 124 million
_GPT_1_3B = Shape(layers=24, width=2048, heads=16, context=1024, vocabulary=50304)

WORKLOADS = {
    definition.name: definition
    for definition in (
        Definition("host-idle-64", 20, _host_idle(64, 0.1)),
        Definition("host-idle-4096", 20, _host_idle(4096, 0.1)),
        Definition("host-idle-64-20ms", 20, _host_idle(64, 0.02)),
        Definition("host-idle-4096-20ms", 20, _host_idle(4096, 0.02)),
        Definition("cpu", 10, _cpu),
        Definition("gpu", 50, _gpu(_GPT2, batch_size=16, needed_gib=24), cuda=True, warmup=40),
        Definition("gpu-1.3b", 50, _gpu(_GPT_1_3B, batch_size=4, needed_gib=60), cuda=True, warmup=40),
    )
}


def runnable(names: list[str]) -> list[str]:
    """
    Return the workloads that *names* mean, as `select` does.

    Raises:
        Unavailable: One is not known, or needs a CUDA device and there is none.
    """
    chosen = select(names, list(WORKLOADS))
    for name in chosen:
        if WORKLOADS[name].cuda and not torch.cuda.is_available():
            raise Unavailable(f"{name!r} needs a CUDA device and there is none here")
    return chosen


def select(names: list[str], known: list[str]) -> list[str]:
    """
    Return the *known* names meant by *names*: the name itself, or else all that continue it with a dash.

    Raises:
        Unavailable: One means none.
    """
    chosen: list[str] = []
    for name in names:
        matching = [name] if name in known else [one for one in known if one.startswith(f"{name}-")]
        if not matching:
            raise Unavailable(f"{name!r} is not known; there are {', '.join(known)}")
        chosen += [one for one in matching if one not in chosen]
    return chosen

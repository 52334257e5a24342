"""The one door to CUDA: streams, events and memory. Tests put a simulated device behind it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

__all__ = ["Cuda"]


class Cuda:
    """
    The calls that snapshots make to devices. None but `allocate` waits for one, page-locking aside.

    Streams and events are torch's. What is copied goes to the calling thread's current stream of the
    tensors' device.
    """

    def serves(self, device: torch.device) -> bool:
        """Tell whether a device's work is ordered by streams, so that it needs this."""
        return device.type == "cuda"

    def stream(self, device: torch.device) -> Any:
        """Return a new stream, beside all others."""
        return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def current_stream(self, device: torch.device) -> Any:
        """Return the stream that the calling thread's work for a device goes to."""
        return torch.cuda.current_stream(device)

    def work_for(self, device: torch.device) -> None:
        """Make *device* the calling thread's current one, for good."""
        # A thread begins on device 0; whatever it asks there takes half a gigabyte of it for a context.
        torch.cuda.set_device(device)

    def use(self, stream: Any) -> contextlib.AbstractContextManager[Any]:
        """Let the calling thread's work go to *stream* meanwhile. Its current device stays the stream's."""
        self.work_for(stream.device)
        return torch.cuda.stream(stream)

    def event(self) -> Any:
        """Return a new event. Whoever waits for it sleeps: spinning would take a core from training."""
        return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    def copy(self, into: list[torch.Tensor], outof: list[torch.Tensor]) -> None:
        """Have each of *outof* copied over its counterpart; pageable memory of the host is waited for."""
        torch._foreach_copy_(into, outof, non_blocking=True)

    def allocate(self, size: int, device: torch.device) -> torch.Tensor:
        """Return that many bytes of a device; raises ``torch.OutOfMemoryError``."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def unused_bytes(self, device: torch.device) -> tuple[int, int]:
        """Return the bytes that this process could still get on a device, and all that it has."""
        free, total = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + cached, total

    def lock_pages(self, address: int, size: int, device: torch.device) -> str | None:
        """
        Page-lock memory of the host, without the GIL; return why that was refused, or None.

        Args:
            address, size: The memory, in bytes.
            device: One that will write into it.
        """
        # Not set for good: this may be the thread that trains.
        with torch.cuda.device(device):
            status = torch.cuda.cudart().cudaHostRegister(address, size, 0)  # type: ignore[no-untyped-call]
            if int(status) == 0:
                return None
            # The runtime keeps the error for the thread's next kernel, which would be blamed for it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device)
            return str(status)

    def unlock_pages(self, address: int) -> None:
        """Let memory go that `lock_pages` has locked."""
        with contextlib.suppress(RuntimeError):
            torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

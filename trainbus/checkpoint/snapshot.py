"""What a save is written from: a copy of the state that stays as it is until it is released."""

from __future__ import annotations

from typing import Any

from trainbus.checkpoint.archive import Image
from trainbus.checkpoint.background_copy import BackgroundCopy
from trainbus.checkpoint.staging_memory import StagingBuffer, StagingMemory

__all__ = ["Snapshot"]


class Snapshot:
    """
    A copy of a state that stays as it is until it is released.

    Attributes:
        state: The same nesting; its tensors lie in the staging memory, and are complete after
            `wait`. None once released.
        copy: What is still to be copied; None if nothing is.
        waits: Whether tensors that *copy* reads must not change until they are copied.
        image: What a file can be written from, once the copy is complete. None once released.
        buffer: The memory.
        size: Bytes that were copied; what is written of them is at least as long.
        seconds_at_once: Of the calling thread, spent copying within the host.
    """

    def __init__(
        self,
        state: Any,
        image: Image,
        memory: StagingMemory,
        buffer: StagingBuffer,
        *,
        size: int = 0,
        seconds_at_once: float = 0.0,
    ) -> None:
        self.size = size
        self.seconds_at_once = seconds_at_once
        self.state = state
        self.image: Image | None = image
        self.copy: BackgroundCopy | None = None
        self.waits = False
        self._memory = memory
        self.buffer = buffer

    def wait(self) -> None:
        """
        Block until the copy is complete.

        Raises:
            SnapshotChangedError: A tensor was changed before it was copied.
            Exception: Whatever kept the background from copying.
        """
        if self.copy is not None:
            self.copy.wait()

    def release(self) -> None:
        """
        Give the memory back for the next snapshot. Any thread may call it, also twice.

        Blocks while the memory is being written to. Tensors taken out of `state` must not be
        used any more: their values will change.
        """
        if self.copy is not None:
            # Where it was never begun, because of an error, nobody will.
            self.copy.withdraw(RuntimeError("the snapshot was given up before it was copied"))
            self.copy.wait_until_arrived()
        self.state = self.image = None
        self._memory.release(self.buffer)

"""One save on its way from live state to the writer's queue: room, snapshot, job.

The road that every save of trainbus takes, with or without a handler.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import torch

from trainbus.checkpoint.background_writer import BackgroundWriter
from trainbus.checkpoint.chunk_writers import ChunkWriters
from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.file_format import Manifest
from trainbus.checkpoint.pending_save import PendingSave
from trainbus.checkpoint.staging_copy import take_snapshot
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.errors import CheckpointWriteError

__all__ = ["Saver"]


class Saver:
    """
    Copies states on the calling thread and has them written on the background one.

    Attributes:
        writer: The background writer; flush and close it there.
        seconds_lost: Time that callers spent in `save`, summed.

    Args:
        report: Called on the writer thread with an event's name and fields.
        max_pending: Saves that may be unfinished at once; each has host memory of its own.
        on_busy: What a save does when there are that many: ``"wait"``, ``"skip"`` or ``"replace"``.
    """

    def __init__(self, report: Callable[..., None], *, max_pending: int = 1, on_busy: str = "wait") -> None:
        self._chunks = ChunkWriters()
        self.writer = BackgroundWriter(
            report, max_pending=max_pending, on_busy=on_busy, helpers=(self._chunks,)
        )
        self.seconds_lost = 0.0
        self._memory = StagingMemory(max_pending)

    def save(
        self,
        pending: PendingSave,
        collect: Callable[[], Any],
        manifest: Manifest,
        *,
        removals: Sequence[str] = (),
    ) -> None:
        """
        Queue the save that *pending* stands for. When this returns, the state may change in any way.

        Blocks while the writer is full (see ``on_busy``) and while the state is copied.

        Args:
            pending: Learns what becomes of the save; also of a failure in here.
            collect: Called on this thread, once there is room, for the state, as `to_plain` makes it.
            manifest: Everything the file will say of itself but size and digest.
            removals: Files to remove once this one is durable.
        """
        begun = time.perf_counter()
        try:
            self._save(pending, collect, manifest, removals)
        finally:
            self.seconds_lost += time.perf_counter() - begun

    def _save(
        self, pending: PendingSave, collect: Callable[[], Any], manifest: Manifest, removals: Sequence[str]
    ) -> None:
        assert pending.path is not None
        if not self.writer.admit(pending):
            return
        try:
            snapshot = take_snapshot(collect(), self._memory)
        except Exception as error:
            failure = CheckpointWriteError(pending.path, pending.global_step, error)
            failure.__cause__ = error
            self.writer.fail(pending, failure)
            return
        # Taken now: the script may change its working directory before the writer gets here.
        path = os.path.abspath(pending.path)

        def write() -> Manifest:
            return commit(
                path, manifest, lambda stream: _serialize(snapshot.state, stream), writers=self._chunks
            )

        self.writer.submit(pending, write, removals=removals, release=snapshot.release)


def _serialize(state: Any, stream: BinaryIO) -> None:
    # Set on this thread, because torch's options belong to one each. Other tools check these sums.
    torch.serialization.set_crc32_options(True)
    torch.save(state, stream)

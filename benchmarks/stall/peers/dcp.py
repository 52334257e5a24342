"""
``torch.distributed.checkpoint.async_save`` in three configurations, each with one save at a time.

Sources: the PyTorch recipe "Asynchronous Saving with Distributed Checkpoint (DCP)" (thread; wait
for the future before the next save; "Fully Asynchronous Staging with DefaultStager": keep one
stager, wait for ``staging_completion`` before ``optimizer.step()``), and torchtitan's
``components/checkpoint.py`` with ``async_mode = "async_with_pinned_mem"`` (process, all four
staging options, `maybe_wait_for_staging`). Its docstrings say which options need CUDA.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from benchmarks.stall.peers.base import Peer, emptied, flat
from benchmarks.stall.workloads import Workload

__all__ = ["Process", "Staged", "Thread"]


class Thread(Peer):
    """As in the recipe's first example: staged in the call, written by a thread."""

    fsync = "files"
    background = True

    def __init__(self, workload: Workload, folder: str) -> None:
        super().__init__(workload, folder)
        # The process that DCP starts finds this one by address; nothing leaves the machine.
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        rendezvous = f"file://{os.path.abspath(folder)}/.rendezvous"
        dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
        self._written: Future[Any] | None = None

    def save(self, path: str) -> Callable[[], object]:
        """Wait for the save before, then begin one."""
        self._wait()
        self._written = self._begin(path)
        return self._written.result

    def _begin(self, path: str) -> Future[Any]:
        return dcp.async_save(self.workload.state(), checkpoint_id=path)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        """Wait for the last save."""
        self._wait()
        dist.destroy_process_group()

    def load(self, path: str) -> dict[str, torch.Tensor]:
        """Load into a state of the same shape, as DCP does."""
        state = emptied(self.workload.state())
        dcp.load(state, checkpoint_id=path)
        return flat(state)


class Staged(Thread):
    """As in the recipe's last example: staged on a thread (pinned on a GPU) up to the next update."""

    checkpointer = AsyncCheckpointerType.THREAD
    # Another process would have to see the staged bytes; a thread sees them anyway, and shared
    # memory costs a file descriptor a tensor.
    shared_memory = False

    def __init__(self, workload: Workload, folder: str) -> None:
        super().__init__(workload, folder)
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=cuda,
                use_shared_memory=self.shared_memory,
                use_async_staging=True,
                use_non_blocking_copy=cuda,
            )
        )
        # torch 2.11's stager empties itself after each use and fails at the next one ("KeyError: <class
        # 'type'>"). What it keeps, the page-locked memory, is what makes it fast; later ones keep it.
        self._empty = self._stager._state_dict_stager.close
        self._stager._state_dict_stager.close = lambda: None
        self._staged: Future[None] | None = None

    def _begin(self, path: str) -> Future[Any]:
        response: Any = dcp.async_save(
            self.workload.state(),
            checkpoint_id=path,
            async_checkpointer_type=self.checkpointer,
            async_stager=self._stager,
        )
        self._staged = response.staging_completion
        return response.upload_completion

    def before_update(self) -> None:
        """Wait until the copy is made: the fence that the loop has to put there by hand."""
        if self._staged is not None:
            self._staged.result()
            self._staged = None

    def close(self) -> None:
        """Wait for the last save."""
        self._wait()
        self._stager.close()
        self._empty()
        super().close()


class Process(Staged):
    """As torchtitan's ``async_with_pinned_mem``: staged in shared memory, written by a process."""

    checkpointer = AsyncCheckpointerType.PROCESS
    shared_memory = True
    processes = True

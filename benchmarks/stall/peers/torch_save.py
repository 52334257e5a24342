"""
What people write by hand.

Source: the PyTorch tutorial "Saving and Loading Models", where a dict of state dicts goes
through ``torch.save``.
"""

from __future__ import annotations

import os

import torch

from benchmarks.stall.peers.base import Peer

__all__ = ["TorchSave", "TorchSaveFsync"]


class TorchSave(Peer):
    """``torch.save(state, path)``: a crash leaves half a file, a power cut perhaps none."""

    fsync = "no"

    def save(self, path: str) -> None:
        """Write in the foreground."""
        torch.save(self.workload.state(), path)


class TorchSaveFsync(Peer):
    """The same made durable by hand: temporary file, ``torch.save``, fsync, rename, fsync of the folder."""

    fsync = "yes"

    def save(self, path: str) -> None:
        """Write in the foreground and return when the file is on the disk under its name."""
        temporary = f"{path}.tmp"
        with open(temporary, "wb") as file:
            torch.save(self.workload.state(), file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
        folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

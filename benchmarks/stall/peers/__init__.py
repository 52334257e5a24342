"""
The ways to save that are compared. Each is configured as its own documentation recommends.

``MAKERS`` names for each peer the module and the class; modules are imported in the process
that measures the peer, so that none pays for the imports of another.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from benchmarks.stall.workloads import Unavailable, Workload

if TYPE_CHECKING:
    from benchmarks.stall.peers.base import Peer

__all__ = ["MAKERS", "NO_SAVES", "OURS", "make"]

NO_SAVES = "no-saves"
OURS = "trainbus-auto"

MAKERS = {
    NO_SAVES: ("base", "Peer"),
    "trainbus-auto": ("ours", "Auto"),
    "trainbus-overlap": ("ours", "Overlap"),
    "torch-save": ("torch_save", "TorchSave"),
    "torch-save-fsync": ("torch_save", "TorchSaveFsync"),
    "ignite": ("frameworks", "Ignite"),
    "lightning": ("frameworks", "Lightning"),
    "torchsnapshot": ("frameworks", "TorchSnapshot"),
    "dcp-thread": ("dcp", "Thread"),
    "dcp-staged": ("dcp", "Staged"),
    "dcp-process": ("dcp", "Process"),
}


def make(name: str, workload: Workload, folder: str) -> Peer:
    """
    Make the peer *name*, which will save *workload* into *folder*.

    Raises:
        Unavailable: What it needs is not installed.
    """
    module, maker = MAKERS[name]
    try:
        found = importlib.import_module(f"{__name__}.{module}")
        peer: Peer = getattr(found, maker)(workload, folder)
    except ImportError as error:
        raise Unavailable(f"cannot be imported: {error}") from error
    return peer

"""What the tests of the checkpoint package share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainbus.checkpoint.commit import commit
from trainbus.checkpoint.copy_thread import CopyThread
from trainbus.checkpoint.manifest import Manifest

Write = Callable[..., Manifest]


@pytest.fixture(name="write")
def _write() -> Write:
    """Commit a state: ``write(path, state, **manifest_fields)``."""

    def write(path: str | Path, state: Any, **fields: Any) -> Manifest:
        manifest = Manifest(**{"contents": "state", **fields})
        return commit(path, manifest, lambda stream: torch.save(state, stream))

    return write


@pytest.fixture(name="thread")
def _thread() -> Iterator[CopyThread]:
    """One that runs and copies in the background."""
    thread = CopyThread()
    thread.start()
    yield thread
    thread.close()

"""What tests of several rooms ask for."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
import warnings
from types import SimpleNamespace

import pytest

from trainbus.checkpoint import interpreter_exit


def pytest_addoption(parser):
    """Let the long tests be made longer."""
    parser.addoption(
        "--runs", type=int, default=None, help="repetitions of each test that is a matter of chance"
    )


def pytest_runtest_setup(item):
    """Skip what needs a CUDA device where there is none, also when it was asked for by its marker."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")


@pytest.fixture(autouse=True)
def _no_failure_is_told_at_exit(monkeypatch):
    """Keep the saves that a test makes fail from becoming the exit code of pytest."""
    monkeypatch.setattr(interpreter_exit, "_failures", [])


@pytest.fixture
def unconfigured_logging(monkeypatch):
    """Cut the logger off from the root, where pytest has handlers that would count as configured logging."""
    logger = logging.getLogger("trainbus")
    monkeypatch.setattr(logger, "parent", None)
    monkeypatch.setattr(logger, "handlers", [])
    yield
    gc.collect()  # a bar whose run did not end lets go of the logger when it is collected: now


@pytest.fixture
def without_waiting():
    """Return a context in which torch raises where the host would wait for a CUDA device."""

    @contextlib.contextmanager
    def context():
        import torch

        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
                torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return context


@pytest.fixture
def until_writing_rests(monkeypatch):
    """Return an optimizer's hook: the disk takes nothing before it, and it returns when a writer rests."""
    from trainbus.checkpoint import disk, throttle

    stepping, resting, write = threading.Event(), threading.Event(), disk.Disk.write

    def write_later(self, *args):
        assert stepping.wait(30)
        return write(self, *args)

    def hook(*_):
        stepping.set()
        assert resting.wait(30)

    monkeypatch.setattr(disk.Disk, "write", write_later)
    clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda seconds: resting.set())
    monkeypatch.setattr(throttle, "time", clock)
    return hook


@pytest.fixture
def save_sharded():
    """Save a sharded checkpoint from a world of one: ``save_sharded(path, state, **manifest_fields)``."""
    import torch.distributed as dist

    from trainbus import Manifest
    from trainbus.checkpoint.sharded import ShardedSaver

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    saver = ShardedSaver(dist.new_group(backend="gloo"))

    def save(path, state, **fields):
        return saver.save(path, state, lambda: Manifest(**{"contents": "state", **fields})).result(60)

    yield save
    saver.close()
    dist.destroy_process_group()

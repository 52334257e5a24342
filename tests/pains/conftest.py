"""A training in three lines, a disk that waits, and processes that are killed."""

from __future__ import annotations

import multiprocessing
import threading

import pytest
import torch

from trainbus import Handler
from trainbus.testing import FaultyDisk

WAIT = 60.0


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train():
    """
    Train by hand: in epoch N the weight becomes N, and the loss is the one given for it.

    Return the handler, which is closed. *resume* takes what the folder holds.
    """

    def train(losses, *callbacks, resume=False, **options):
        module = torch.nn.Linear(1, 1, bias=False)
        with Handler(module, **options) as handler:
            for callback in callbacks:
                handler.add_callback(callback)
            if resume:
                handler.resume(".")
            for epoch in handler.epochs(len(losses)):
                torch.nn.init.constant_(module.weight, epoch)
                handler.log(val_loss=losses[epoch])
        return handler

    return train


@pytest.fixture
def stuck_disk():
    """Give a disk on which no file is finished before ``stuck_disk.go()``."""
    gate = threading.Event()
    with FaultyDisk(calls=["fsync"], before=lambda name, number: gate.wait(WAIT)) as disk:
        disk.go = gate.set
        yield disk
        gate.set()


@pytest.fixture
def in_process():
    """Call a function in a forked process; return the exit code, negative for a signal."""

    def in_process(function):
        def call():
            torch.set_num_threads(1)
            function()

        process = multiprocessing.get_context("fork").Process(target=call)
        process.start()
        process.join(WAIT)
        assert not process.is_alive()
        return process.exitcode

    return in_process

"""
Saves over an earlier checkpoint in forked processes, each killed at another call to the disk.

Prints one JSON line for each: at which call it was killed, and what stands there afterwards. Run
as ``python kill_points.py FOLDER ELEMENTS``; one process imports torch for all of them.
"""

from __future__ import annotations

import json
import os
import signal
import sys

import torch

import trainbus
from trainbus.checkpoint.temporary import TEMPORARY
from trainbus.testing import FaultyDisk


def save_and_die(folder: str, elements: int, at: int) -> None:
    """Save 2.0 over 1.0 and remove the file before; be killed in front of the *at*-th call."""
    torch.set_num_threads(1)

    def die(name: str, number: int) -> None:
        if number == at:
            with open(os.path.join(folder, "..", "killed-at"), "w") as file:
                file.write(name)
            os.kill(os.getpid(), signal.SIGKILL)

    with FaultyDisk(before=die):
        with trainbus.Handler(torch.nn.ParameterList([torch.full((elements,), 2.0)])) as handler:
            handler.save_async(
                os.path.join(folder, "last.pt"), weights_only=True, removals=[os.path.join(folder, "old.pt")]
            ).result()
            handler.flush()


def run(folder: str, elements: int, at: int) -> dict[str, object]:
    """Prepare, fork, wait, look."""
    for name in ("old.pt", "last.pt"):
        trainbus.save({"0": torch.full((elements,), 1.0)}, os.path.join(folder, name))
    note = os.path.join(folder, "..", "killed-at")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            save_and_die(folder, elements, at)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    call = None
    if os.path.exists(note):
        with open(note) as file:
            call = file.read()
        os.remove(note)
    names = sorted(os.listdir(folder))
    last = trainbus.load(os.path.join(folder, "last.pt"))["0"]
    result = {
        "call": call,
        "status": status,
        "value": float(last[0]) if bool((last == last[0]).all()) else None,
        "names": [name for name in names if not TEMPORARY.fullmatch(name)],
    }
    for name in names:
        os.remove(os.path.join(folder, name))
    return result


def main() -> None:
    """Go on until a save comes through."""
    folder, elements = sys.argv[1], int(sys.argv[2])
    at = 1
    while True:
        result = run(folder, elements, at)
        print(json.dumps(result), flush=True)
        if result["call"] is None:
            return
        at += 1


if __name__ == "__main__":
    main()

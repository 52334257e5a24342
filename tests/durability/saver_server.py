"""Does what the tests of this folder ask for, each time in a process of its own; spoken to in JSON lines.

Forked, because torch takes seconds to import, and because whatever is mounted, limited, patched or
killed for one question must not be seen by the next. A request names a function of a module beside
this file and its arguments; the answer is what it returns, or why it could not be asked here.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

import torch
from volumes import Unavailable, die_with_parent

import trainbus
import trainbus_callbacks

# Loaded when they are first used: that is here, and not after each fork.
LOADED = (trainbus.Handler, trainbus.save, trainbus_callbacks.ModelCheckpoint)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Call the function that was asked for."""
    module, function = request["function"].split(".")
    try:
        return {"result": getattr(importlib.import_module(module), function)(**request["arguments"])}
    except Unavailable as error:
        return {"skip": str(error)}
    except BaseException:
        return {"error": traceback.format_exc()}


def answer_in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Fork for one request."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        die_with_parent()
        os.close(read)
        torch.set_num_threads(1)
        with os.fdopen(write, "w") as file:
            json.dump(answer(request), file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if text else {"error": f"it ended with {os.waitstatus_to_exitcode(status)}"}


def main() -> None:
    """Answer until nobody asks any more."""
    # Gloo writes to the output by itself, which is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer_in_child(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()

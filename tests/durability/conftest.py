"""One server for all tests of this folder; see ``saver_server.py``."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SERVER = Path(__file__).parent / "saver_server.py"


class Server:
    """Asks a process that has torch; a question that this machine cannot answer skips the test."""

    def __init__(self) -> None:
        # In a session of its own: Ctrl-C is for pytest, which then ends this one.
        self.process = subprocess.Popen(
            [sys.executable, SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )

    def __call__(self, function: str, *, limit: float = 110.0, **arguments: Any) -> Any:
        """Return what ``module.function(**arguments)`` returns there; paths are given as text."""
        request = {"function": function, "arguments": arguments}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], limit)[0]:
            self.process.kill()
            pytest.fail(f"{function}({arguments}) was not over after {limit} s")
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else {"error": "the server has died"}
        if "skip" in answer:
            pytest.skip(answer["skip"])
        if "error" in answer:
            pytest.fail(f"{function}({arguments}): {answer['error']}", pytrace=False)
        return answer["result"]

    def close(self) -> None:
        """End it. What it has mounted goes with it."""
        try:
            self.process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


@pytest.fixture(scope="session")
def ask():
    """Ask the server: ``ask("module.function", argument=...)``."""
    server = Server()
    yield server
    server.close()

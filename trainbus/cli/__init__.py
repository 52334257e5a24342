"""The ``trainbus`` command: one subcommand a file. Needs the extra ``cli``."""

from __future__ import annotations

import sys

from trainbus.errors import TrainbusError

__all__ = ["main"]


def main() -> None:
    """Run the command line and exit. What the user can mend is one line on stderr, not a traceback."""
    try:
        from trainbus.cli.app import app

        app()
    except (TrainbusError, OSError) as error:  # such as a folder that may not be read
        sys.exit(f"trainbus: {error}")
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in ("typer", "rich", "tqdm"):
            raise
        sys.exit(f'trainbus needs {package} for its command line: pip install "trainbus[cli]"')

"""Prints what trainbus logs while a training runs, for those who have not configured logging."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["ConsoleLines", "console_lines"]

logger = logging.getLogger("trainbus")


class ConsoleLines(logging.Handler):
    """
    Hands each record's message to a function, one call a line.

    Attributes:
        write: The function; called on the thread that logs, under the handler's lock.
    """

    def __init__(self, write: Callable[[str], object] = print) -> None:
        super().__init__()
        self.write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record. What goes wrong is reported the way logging does it, and stops nothing."""
        try:
            self.write(self.format(record))
        except Exception:
            self.handleError(record)


@contextmanager
def console_lines(write: Callable[[str], object] = print) -> Iterator[None]:
    """
    Hand what trainbus logs from INFO upwards to *write*, until the context ends.

    Does nothing if the user has configured logging. Inside of another such context it
    redirects that one's lines, so that a progress bar within `Handler.fit` stays whole.
    """
    installed = next((h for h in logger.handlers if isinstance(h, ConsoleLines)), None)
    if installed is not None:
        outer, installed.write = installed.write, write
        try:
            yield
        finally:
            installed.write = outer
    elif logger.hasHandlers():
        yield
    else:
        lines, level = ConsoleLines(write), logger.level
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.removeHandler(lines)

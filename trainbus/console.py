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
        shown_elsewhere: Records of this level and above are left to the handlers further up.
    """

    def __init__(self, write: Callable[[str], object] = print, shown_elsewhere: int | None = None) -> None:
        super().__init__()
        self.write = write
        self.shown_elsewhere = shown_elsewhere

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record. What goes wrong is reported the way logging does it, and stops nothing."""
        try:
            if self.shown_elsewhere is None or record.levelno < self.shown_elsewhere:
                self.write(self.format(record))
            elif logger.parent is not None:
                logger.parent.callHandlers(record)
        except Exception:
            self.handleError(record)


@contextmanager
def console_lines(write: Callable[[str], object] = print) -> Iterator[None]:
    """
    Hand what trainbus logs from INFO upwards to *write*, until the context ends.

    Does nothing if the user has configured logging to show INFO. Handlers that show only more
    serious records go on showing those. Inside of another such context it redirects that one's
    lines, so that a progress bar within `Handler.fit` stays whole.
    """
    installed = next((h for h in logger.handlers if isinstance(h, ConsoleLines)), None)
    if installed is not None:
        outer, installed.write = installed.write, write
        try:
            yield
        finally:
            installed.write = outer
    elif logger.hasHandlers() and logger.isEnabledFor(logging.INFO):
        yield
    else:
        elsewhere = logger.getEffectiveLevel() if logger.hasHandlers() else None
        lines, level, propagate = ConsoleLines(write, elsewhere), logger.level, logger.propagate
        logger.addHandler(lines)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        try:
            yield
        finally:
            logger.setLevel(level)
            logger.propagate = propagate
            logger.removeHandler(lines)

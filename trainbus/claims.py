"""Who writes which file in this process, so that a notebook cell run again does not write twice."""

from __future__ import annotations

import logging
import weakref
from typing import Protocol

__all__ = ["claim"]

logger = logging.getLogger("trainbus")


class _Closable(Protocol):
    @property
    def closed(self) -> bool: ...

    def close(self) -> None: ...


_owners: dict[str, weakref.ref[_Closable]] = {}


def claim(path: str, owner: _Closable) -> None:
    """
    Make *owner* the one that writes *path* (absolute). Training thread.

    Another living owner is closed first: its pending saves are finished (this blocks), and
    its callbacks hear no more events.
    """
    reference = _owners.get(path)
    other = reference() if reference is not None else None
    if other is owner:
        return
    if other is not None and not other.closed:
        logger.warning("%r is now written by a new handler; the earlier one is closed.", path)
        other.close()
    _owners[path] = weakref.ref(owner)

"""Which failed writes are worth another try, and when. Pure: tells no time and touches no disk."""

from __future__ import annotations

import errno

__all__ = ["MOST_SECONDS", "MOST_TRIES", "PAUSES", "is_transient"]

MOST_TRIES = 3
"""Tries of one save, each on a file of its own: a sync that failed once says nothing the next time."""

MOST_SECONDS = 30.0
"""From the first failure on, no other try is begun later than this."""

PAUSES = (0.1, 1.0)
"""Seconds before the second and the third try."""

# A path that fails over, a server that is being restarted, a file handle that became stale.
# A full disk is none of these: what a new file makes superfluous goes only when that is durable.
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE}


def is_transient(error: BaseException) -> bool:
    """Tell whether the write that met *error* may succeed when tried again."""
    return isinstance(error, OSError) and error.errno in _TRANSIENT

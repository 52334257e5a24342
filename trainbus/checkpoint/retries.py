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
_TRANSIENT = {errno.EIO, errno.EAGAIN, errno.ESTALE}
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


def is_transient(error: BaseException, *, room_was_made: bool) -> bool:
    """
    Tell whether the same write may succeed when tried again.

    Args:
        error: What the last try met.
        room_was_made: Whether files were removed since.
    """
    if not isinstance(error, OSError):
        return False
    return error.errno in _TRANSIENT or (room_was_made and error.errno in _NO_ROOM)

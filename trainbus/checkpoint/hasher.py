"""The digest of a file, xxh3-128, in a form that C can continue."""

from __future__ import annotations

import ctypes
import functools
import weakref
from typing import Any, Protocol

import numpy as np
import xxhash

__all__ = ["Hasher", "HasherInC", "new_hasher"]


class Hasher(Protocol):
    """What objects of xxhash do."""

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Continue the digest over *data*, without the GIL."""

    def hexdigest(self) -> str:
        """Return the digest of what it was given so far."""


def new_hasher() -> Hasher:
    """Return an xxh3-128 of nothing: one that C can continue, if xxhash shows its functions."""
    library = _library()
    return xxhash.xxh3_128() if library is None else HasherInC(library)


class HasherInC:
    """
    An xxh3-128 whose state is known to C.

    Attributes:
        state: Its address. The state goes when this does.
        function: Address of what continues it: ``int function(void *state, const void *bytes, size_t size)``.

    Args:
        library: Has the functions of xxHash.
    """

    def __init__(self, library: Any) -> None:
        self.state = library.XXH3_createState()
        if not self.state:
            raise MemoryError("There is no memory for the state of a digest.")
        weakref.finalize(self, library.XXH3_freeState, self.state).atexit = False
        library.XXH3_128bits_reset(self.state)
        self._library = library
        self._update = _update_of(library)
        self.function = ctypes.cast(self._update, ctypes.c_void_p).value or 0

    def update(self, data: bytes | bytearray | memoryview, /) -> None:
        """Continue the digest over *data*, without the GIL."""
        given = np.frombuffer(data, dtype=np.uint8)
        self._update(self.state, given.ctypes.data, given.size)

    def hexdigest(self) -> str:
        """Return the digest of what it was given so far, as xxhash does."""
        digest = self._library.XXH3_128bits_digest(self.state)
        return f"{digest.high:016x}{digest.low:016x}"


class _Digest(ctypes.Structure):
    _fields_ = [("low", ctypes.c_uint64), ("high", ctypes.c_uint64)]


@functools.cache
def _library() -> Any:
    """
    Return the functions of xxHash that xxhash's wheels have built in and visible, or None.

    They are those of its documented, stable interface.
    """
    try:
        library = ctypes.CDLL(xxhash._xxhash.__file__)  # type: ignore[attr-defined]
        library.XXH3_createState.restype = ctypes.c_void_p
        library.XXH3_freeState.argtypes = (ctypes.c_void_p,)
        library.XXH3_128bits_reset.argtypes = (ctypes.c_void_p,)
        library.XXH3_128bits_digest.argtypes = (ctypes.c_void_p,)
        library.XXH3_128bits_digest.restype = _Digest
        _update_of(library).argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
        data = np.arange(9999, dtype=np.uint16).tobytes()
        trial = HasherInC(library)
        trial.update(data[:777])
        trial.update(data[777:])
        return library if trial.hexdigest() == xxhash.xxh3_128_hexdigest(data) else None
    except (AttributeError, OSError):
        return None


def _update_of(library: Any) -> Any:
    # The first one takes the widest instructions that the processor has; only builds for x86-64 have it.
    return getattr(library, "XXH3_128bits_update_dispatch", None) or library.XXH3_128bits_update

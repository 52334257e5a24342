from __future__ import annotations

import ctypes
import gc
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from trainbus.checkpoint import hasher
from trainbus.checkpoint.hasher import HasherInC, new_hasher

from .interpreter_lock import is_let_go_by

DATA = np.random.default_rng(1).bytes(5000)

shown = pytest.mark.skipif(
    hasher._library() is None, reason="needs a build of xxhash that shows its functions"
)


@pytest.fixture
def library(monkeypatch):
    """Lets a test put another library in the place of xxHash."""
    yield lambda fake: (
        hasher._library.cache_clear(),
        monkeypatch.setattr(hasher.ctypes, "CDLL", lambda path: fake),
    )
    hasher._library.cache_clear()


class TestNewHasher:
    @given(cuts=st.lists(st.integers(0, len(DATA)), max_size=5).map(sorted))
    def test_is_that_of_xxhash(self, cuts):
        """
        The digest is that of xxhash, in whatever pieces the bytes are given, and can be had at any time.
        """
        mine, bounds = new_hasher(), [0, *cuts, len(DATA)]
        for start, stop in pairwise(bounds):
            mine.update(DATA[start:stop])
            assert mine.hexdigest() == xxhash.xxh3_128_hexdigest(DATA[:stop])

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_kinds_of_bytes(self, kind):
        """
        It takes whatever has bytes, writable or not.
        """
        mine = new_hasher()
        mine.update(kind(DATA))

        assert mine.hexdigest() == xxhash.xxh3_128_hexdigest(DATA)

    def test_two_at_a_time(self):
        """
        Each has a state of its own.
        """
        one, other = new_hasher(), new_hasher()
        one.update(b"one")
        other.update(b"other")

        assert one.hexdigest() == xxhash.xxh3_128_hexdigest(b"one")

    def test_lets_others_run(self):
        """
        A Python thread runs while bytes are hashed.
        """
        data = bytes(8 << 20)
        mine = new_hasher()

        assert is_let_go_by(lambda: [mine.update(data) for _ in range(10)])

    @shown
    @pytest.mark.parametrize("missing", ["XXH3_createState", "XXH3_128bits_update", "XXH3_128bits_digest"])
    def test_function_that_is_hidden(self, library, missing):
        """
        Where xxhash does not show a function, xxhash itself hashes.
        """

        class Without:
            def __getattr__(self, name: str) -> object:
                if name.startswith(missing):
                    raise AttributeError(name)
                return getattr(real, name)

        real = hasher._library()
        library(Without())

        assert type(new_hasher()) is xxhash.xxh3_128

    @shown
    def test_function_that_does_something_else(self, library):
        """
        Where what is shown under these names gives another digest, xxhash itself hashes.
        """

        class Other:
            def __getattr__(self, name: str) -> object:
                return nothing if "update" in name else getattr(real, name)

        real = hasher._library()
        nothing = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
            lambda *_: 0
        )
        library(Other())

        assert type(new_hasher()) is xxhash.xxh3_128


@shown
class TestHasherInC:
    def test_continued_by_c(self):
        """
        What the function at its address is given, with its state, is part of the digest.
        """
        mine = new_hasher()
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        mine.update(DATA[:7])
        kind(mine.function)(mine.state, DATA[7:100], 93)

        assert mine.hexdigest() == xxhash.xxh3_128_hexdigest(DATA[:100])

    def test_frees_its_state(self):
        """
        Its state is freed with it, once.
        """
        freed: list[int] = []

        class Watched:
            def __getattr__(self, name: str) -> object:
                return freed.append if name == "XXH3_freeState" else getattr(real, name)

        real = hasher._library()
        mine = HasherInC(Watched())
        state = mine.state
        del mine
        gc.collect()

        assert freed == [state]
        real.XXH3_freeState(state)

    def test_no_memory(self):
        """
        Without memory for its state it is not made.
        """

        class Empty:
            @staticmethod
            def XXH3_createState() -> None:
                return None

        with pytest.raises(MemoryError, match="state of a digest"):
            HasherInC(Empty())

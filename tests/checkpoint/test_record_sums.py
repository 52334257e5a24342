from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainbus.checkpoint import record_sums
from trainbus.checkpoint.record_sums import add_to_sums

from .interpreter_lock import is_let_go_by

DATA = np.random.default_rng(0).bytes(100_000)

at_once = record_sums.sum_up is not None and record_sums._crc32_in_c() is not None
built = pytest.mark.skipif(
    not at_once, reason="needs a C compiler at installation, and a wheel of isal that shows its functions"
)
pieces = st.lists(
    st.tuples(st.integers(0, len(DATA)), st.integers(0, len(DATA))).map(sorted), min_size=0, max_size=12
)


@pytest.fixture(params=[pytest.param("at once", marks=built), "one by one", "without isal"])
def way(request, monkeypatch):
    """All ways to sum up, one after the other."""
    if request.param == "one by one":
        monkeypatch.setattr(record_sums, "sum_up", None)
    if request.param == "without isal":
        monkeypatch.setattr(record_sums, "isal_zlib", None)
        monkeypatch.setattr(record_sums, "crc32", zlib.crc32)
        record_sums._crc32_in_c.cache_clear()
    yield request.param
    record_sums._crc32_in_c.cache_clear()


def summed(ranges: list[tuple[int, int]], sums: np.ndarray) -> list[int]:
    """Return what *sums* come to over these ranges of `DATA`."""
    starts, stops = (np.array([one[end] for one in ranges], dtype=np.uint64) for end in (0, 1))
    add_to_sums(sums, memoryview(DATA), starts, stops - starts)
    return sums.tolist()


class TestAddToSums:
    @settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(ranges=pieces, before=st.integers(0, 2**32 - 1))
    def test_is_the_sum_of_a_zip(self, way, ranges, before):
        """
        Each sum is continued as zlib's ``crc32`` does, over pieces of any size, also of none.
        """
        expected = [zlib.crc32(DATA[start:stop], before) for start, stop in ranges]

        assert summed(ranges, np.full(len(ranges), before, dtype=np.uint32)) == expected

    def test_piece_by_piece(self, way):
        """
        A sum over two pieces, one after the other, is that over both.
        """
        sums = np.zeros(1, dtype=np.uint32)
        summed([(0, 70_001)], sums)

        assert summed([(70_001, len(DATA))], sums) == [zlib.crc32(DATA)]

    @built
    def test_without_python(self, monkeypatch):
        """
        With the extension nothing is called from Python for each piece.
        """
        record_sums._crc32_in_c()
        monkeypatch.setattr(record_sums, "crc32", lambda *_: pytest.fail("was called"))

        assert summed([(0, 9)] * 1000, np.zeros(1000, dtype=np.uint32)) == [zlib.crc32(DATA[:9])] * 1000

    def test_lets_others_run(self, way):
        """
        A Python thread runs while bytes are summed up.
        """
        sums = np.zeros(100, dtype=np.uint32)

        assert is_let_go_by(lambda: summed([(0, len(DATA))] * 100, sums))


@built
class TestSumUp:
    @pytest.mark.parametrize("lengths", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
    def test_lengths_differ(self, lengths):
        """
        As many addresses, sizes and sums are needed.
        """
        addresses, sizes = (np.zeros(count, dtype=np.uint64) for count in lengths[:2])
        sums = np.zeros(lengths[2], dtype=np.uint32)

        with pytest.raises(ValueError, match="as many addresses and sizes"):
            record_sums.sum_up(record_sums._crc32_in_c(), addresses, sizes, sums)

    def test_sums_that_are_no_numbers(self):
        """
        What is no sequence of 32-bit numbers is refused.
        """
        empty = np.zeros(0, dtype=np.uint64)

        with pytest.raises(ValueError, match="uint32"):
            record_sums.sum_up(record_sums._crc32_in_c(), empty, empty, bytearray(3))


class TestCrc32InC:
    def test_another_function(self, monkeypatch):
        """
        If the library has another function under that name, or none, pieces are summed up one by one.
        """
        for library in (FakeLibrary(), object()):
            monkeypatch.setattr(record_sums.ctypes, "CDLL", lambda path, library=library: library)
            record_sums._crc32_in_c.cache_clear()
            try:
                assert record_sums._crc32_in_c() is None
                assert summed([(0, 9)], np.zeros(1, dtype=np.uint32)) == [zlib.crc32(DATA[:9])]
            finally:
                record_sums._crc32_in_c.cache_clear()


class FakeLibrary:
    """Its function gives another sum."""

    class crc32_gzip_refl:
        def __new__(cls, before: int, data: bytes, size: int) -> int:
            return zlib.adler32(data)

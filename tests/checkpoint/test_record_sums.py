from __future__ import annotations

import zlib

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainbus.checkpoint import record_sums
from trainbus.checkpoint.hasher import HasherInC, new_hasher
from trainbus.checkpoint.record_sums import Gaps, Pieces, complete

from .interpreter_lock import is_let_go_by

DATA = np.random.default_rng(0).bytes(1_200_000)

at_once = record_sums.complete_in_c is not None and record_sums._crc32_in_c() is not None
built = pytest.mark.skipif(
    not (at_once and isinstance(new_hasher(), HasherInC)),
    reason="needs a C compiler at installation, and wheels of isal and xxhash that show their functions",
)
# Around the size of the blocks that the C function takes.
sizes = st.one_of(st.integers(0, 100), st.integers(262_100, 262_200), st.integers(0, 600_000))


@pytest.fixture(params=[pytest.param("at once", marks=built), "no compiler", "no isal", "xxhash hides it"])
def way(request, monkeypatch):
    """All ways to complete records, one after the other."""
    if request.param == "no compiler":
        monkeypatch.setattr(record_sums, "complete_in_c", None)
    if request.param == "no isal":
        monkeypatch.setattr(record_sums, "isal_zlib", None)
        monkeypatch.setattr(record_sums, "crc32", zlib.crc32)
        record_sums._crc32_in_c.cache_clear()
    yield request.param
    record_sums._crc32_in_c.cache_clear()


def hasher_of(way: str) -> record_sums.Hasher:
    return xxhash.xxh3_128() if way == "xxhash hides it" else new_hasher()


class Case:
    """Some pieces of memory, each with a gap behind it, and maybe one without."""

    def __init__(
        self, pieces: list[tuple[int, int]], *, one_more: int | None = None, before: int = 0
    ) -> None:
        ends = np.cumsum([size for pair in pieces for size in pair], dtype=np.uint64)
        self.gaps = Gaps(
            starts=ends[::2].copy(),
            bounds=np.cumsum([7, *(size for _, size in pieces)], dtype=np.uint64),
            parts=bytearray(DATA[-7 - sum(size for _, size in pieces) :]),
            sum_at=2,
        )
        piece_sizes = [size for size, _ in pieces] + ([] if one_more is None else [one_more])
        count = len(piece_sizes)
        starts = np.array([0, *ends[1::2].tolist()][:count], dtype=np.uint64)
        sums = np.full(count, before, dtype=np.uint32)
        self.pieces = Pieces(starts, np.array(piece_sizes, dtype=np.uint64), sums)
        total = sum(map(sum, pieces)) + (one_more or 0)
        self.memory = bytearray(DATA[:total]) + b"behind"
        self.total = total

    def expected(self) -> tuple[list[int], bytes]:
        """Return the sums, and the memory with the gaps filled in."""
        memory, sums = bytearray(self.memory), []
        for index, (start, size, sum_) in enumerate(zip(*(one.tolist() for one in self.pieces), strict=True)):
            sums.append(zlib.crc32(memory[start : start + size], sum_))
            if index < len(self.gaps.starts):
                begin, end = self.gaps.bounds[index : index + 2].tolist()
                part = self.gaps.parts[begin : begin + 2] + sums[-1].to_bytes(4, "little")
                part += self.gaps.parts[begin + 6 : end]
                memory[start + size : start + size + len(part)] = part
        return sums, bytes(memory)


class TestComplete:
    @settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        pieces=st.lists(st.tuples(sizes, st.integers(6, 40)), max_size=3).filter(
            lambda pieces: sum(map(sum, pieces)) < 900_000
        ),
        one_more=st.integers(0, 300_000),
        has_more=st.booleans(),
        before=st.integers(0, 2**32 - 1),
    )
    def test_all(self, way, pieces, one_more, has_more, before):
        """
        Each sum is continued as zlib's is and put into the gap behind, and all is hashed in its order.
        """
        case = Case(pieces, one_more=one_more if has_more or not pieces else None, before=before)
        hasher = hasher_of(way)
        hasher.update(b"before")
        sums, memory = case.expected()

        complete(memoryview(case.memory), case.pieces, case.gaps, hasher)

        assert case.pieces.sums.tolist() == sums
        assert case.memory == memory
        assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(b"before" + memory[: case.total])

    def test_piece_by_piece(self, way):
        """
        A sum over two pieces, one after the other, is that over both.
        """
        memory = bytearray(DATA[:99_999])
        sums, nothing = np.zeros(1, dtype=np.uint32), np.zeros(0, dtype=np.uint64)
        hasher = hasher_of(way)
        for start, end in ((0, 70_001), (70_001, 99_999)):
            place = (np.array([number], dtype=np.uint64) for number in (start, end - start))
            gaps = Gaps(nothing, np.zeros(1, dtype=np.uint64), bytearray(), 0)
            complete(memoryview(memory), Pieces(*place, sums), gaps, hasher)

        assert sums.tolist() == [zlib.crc32(memory)]
        assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(memory)

    @built
    def test_without_python(self, monkeypatch):
        """
        With the extension nothing is called from Python for each piece.
        """
        record_sums._crc32_in_c()
        monkeypatch.setattr(record_sums, "crc32", lambda *_: pytest.fail("was called"))
        monkeypatch.setattr(record_sums, "Turns", lambda: pytest.fail("was called"))
        case = Case([(9, 9)] * 1000)
        sums, memory = case.expected()

        complete(memoryview(case.memory), case.pieces, case.gaps, new_hasher())

        assert (case.pieces.sums.tolist(), case.memory) == (sums, memory)

    def test_lets_others_run(self, way):
        """
        A Python thread runs while bytes are summed up and hashed.
        """
        case = Case([(100_000, 9)] * 9)
        pieces = Pieces(*(np.tile(one, 100) for one in case.pieces))

        assert is_let_go_by(lambda: complete(memoryview(case.memory), pieces, case.gaps, hasher_of(way)))


@built
class TestBadInput:
    """To the C function, which must not touch what it is not given."""

    def refused(self, case: Case, pieces: Pieces, gaps: Gaps) -> None:
        before = bytes(case.memory), bytes(gaps.parts), bytes(pieces.sums)
        hasher = new_hasher()
        functions = record_sums._crc32_in_c(), hasher.function, hasher.state
        with pytest.raises(ValueError, match="Cannot complete"):
            record_sums.complete_in_c(functions, memoryview(case.memory), pieces, gaps)
        assert (bytes(case.memory), bytes(gaps.parts), bytes(pieces.sums)) == before
        assert hasher.hexdigest() == xxhash.xxh3_128_hexdigest(b"")

    @pytest.mark.parametrize("name", Pieces._fields)
    def test_lengths_of_pieces_differ(self, name):
        """
        As many starts, sizes and sums are needed.
        """
        case = Case([(10, 9)], one_more=10)

        self.refused(case, case.pieces._replace(**{name: getattr(case.pieces, name)[:1]}), case.gaps)

    @pytest.mark.parametrize("name", ["starts", "bounds"])
    def test_lengths_of_gaps_differ(self, name):
        """
        As many starts of gaps, and one bound more, are needed; and no more gaps than pieces.
        """
        case = Case([(10, 9), (10, 9)])

        self.refused(case, case.pieces, case.gaps._replace(**{name: getattr(case.gaps, name)[:1]}))

    def test_more_gaps_than_pieces(self):
        """
        A gap needs a piece before it.
        """
        case = Case([(10, 9), (10, 9)])

        self.refused(case, Pieces(*(one[:1].copy() for one in case.pieces)), case.gaps)

    def test_sums_that_are_no_numbers(self):
        """
        What is no sequence of 32-bit numbers is refused.
        """
        case = Case([], one_more=10)

        self.refused(case, Pieces(*(np.zeros(size, dtype=np.uint8) for size in (10, 10, 5))), case.gaps)

    @pytest.mark.parametrize(("start", "size"), [(0, 40), (40, 0), (30, 9), (2**64 - 1, 3), (3, 2**64 - 1)])
    def test_piece_outside(self, start, size):
        """
        A piece that is not on the memory is refused.
        """
        case = Case([(10, 9), (1, 6)])  # of 32 bytes, with what is behind them
        place = (np.array([10, number], dtype=np.uint64)[::-1].copy() for number in (start, size))

        self.refused(case, Pieces(*place, case.pieces.sums), case.gaps)

    @pytest.mark.parametrize("start", [27, 40, 2**64 - 1])
    def test_gap_outside(self, start):
        """
        A gap that is not on the memory is refused.
        """
        case = Case([(10, 9), (1, 6)])

        self.refused(case, case.pieces, case.gaps._replace(starts=np.array([10, start], dtype=np.uint64)))

    @pytest.mark.parametrize(
        "bounds", [(0, 9, 26), (0, 30, 9), (20, 9, 18), (9, 9, 18), (3, 8, 18), (0, 9, 2**64 - 1)]
    )
    def test_part_outside(self, bounds):
        """
        A part that is not among the parts, or has no room for the sum, is refused.
        """
        case = Case([(10, 9), (10, 9)])  # 25 bytes of parts
        numbers = (np.array(one, dtype=np.uint64) for one in ((0, 0), bounds))

        self.refused(case, case.pieces, Gaps(*numbers, case.gaps.parts, case.gaps.sum_at))


class TestCrc32InC:
    def test_another_function(self, monkeypatch, way):
        """
        If the library has another function under that name, or none, pieces are summed up one by one.
        """
        for library in (FakeLibrary(), object()):
            monkeypatch.setattr(record_sums.ctypes, "CDLL", lambda path, library=library: library)
            record_sums._crc32_in_c.cache_clear()
            assert record_sums._crc32_in_c() is None
            case = Case([(10, 9)])
            sums, _ = case.expected()
            complete(memoryview(case.memory), case.pieces, case.gaps, hasher_of(way))
            assert case.pieces.sums.tolist() == sums


class FakeLibrary:
    """Its function gives another sum."""

    class crc32_gzip_refl:
        def __new__(cls, before: int, data: bytes, size: int) -> int:
            return zlib.adler32(data)

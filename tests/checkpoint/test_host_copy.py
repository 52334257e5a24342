from __future__ import annotations

import os
import subprocess
import sys
import threading
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainbus.checkpoint import host_copy
from trainbus.checkpoint.host_copy import copy_all, uses_one_thread

from .interpreter_lock import is_let_go_by

TOO_LONG = 30
KIB, MIB = 1 << 10, 1 << 20
GUARD = 0xEE

built = pytest.mark.skipif(
    host_copy.copy_past_caches is None, reason="needs a C compiler at installation, and x86-64"
)
# What is a multiple of nothing, and what lies next to the pieces, blocks and lines that are copied at a time.
sizes = st.one_of(
    st.integers(1, 300),
    st.builds(int.__add__, st.sampled_from([16 * KIB, 32 * KIB, MIB, 4 * MIB]), st.integers(-65, 65)),
)


@pytest.fixture(params=[pytest.param("past the caches", marks=built), "torch"])
def way(request, monkeypatch):
    """Both ways to copy, one after the other."""
    if request.param == "torch":
        monkeypatch.setattr(host_copy, "copy_past_caches", None)


class TestCopyAll:
    @pytest.mark.parametrize("threads", [1, 2, 5])
    def test_every_byte(self, way, threads):
        """
        Tensors of any dtype and size are copied, on any number of threads, and nothing beside them.
        """
        sources = [
            torch.arange(3 * MIB, dtype=torch.int32),
            torch.tensor([float("nan"), -0.0, 1.0]),
            torch.randn(1000, 77).bfloat16(),
            torch.tensor(True),
            torch.randn(5 * MIB).to(torch.complex64),
        ]
        room = [torch.full((source.numel() + 2,), 7).to(source.dtype) for source in sources]
        targets = [space[1:-1].view(source.shape) for space, source in zip(room, sources, strict=True)]

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            copy_all(targets, sources)
        finally:
            torch.set_num_threads(before)

        for target, source, space in zip(targets, sources, room, strict=True):
            assert torch.equal(bytes_of(target), bytes_of(source))
            assert space[0] == space[-1] == torch.tensor(7).to(space.dtype)

    def test_threads_end(self, way):
        """
        When the call returns, no thread that it needs is left.
        """
        sources = [torch.ones(4 * MIB) for _ in range(4)]
        targets = [torch.zeros(4 * MIB) for _ in range(4)]
        copy_all(targets, sources)  # torch keeps its own
        before = tasks()

        copy_all(targets, sources)

        assert tasks() <= before

    def test_lets_others_run(self, way):
        """
        A Python thread runs while the bytes are copied.
        """
        source, target = torch.ones(16 * MIB), torch.zeros(16 * MIB)

        assert is_let_go_by(lambda: copy_all([target], [source]))


@built
class TestCopyPastCaches:
    @settings(deadline=None, max_examples=40)
    @given(
        ranges=st.lists(st.tuples(sizes, st.integers(0, 130), st.integers(0, 130)), min_size=1, max_size=12),
        threads=st.integers(-1, 6),
    )
    def test_any_ranges(self, ranges, threads):
        """
        Ranges of any size that begin anywhere are copied, and no byte before or behind them.
        """
        sources = [torch.randint(256, (skip + size,), dtype=torch.uint8) for size, skip, _ in ranges]
        targets = [torch.full((skip + size + 64,), GUARD, dtype=torch.uint8) for size, _, skip in ranges]

        host_copy.copy_past_caches(
            array(
                "Q", [whole.data_ptr() + skip for whole, (_, _, skip) in zip(targets, ranges, strict=True)]
            ),
            array(
                "Q", [whole.data_ptr() + skip for whole, (_, skip, _) in zip(sources, ranges, strict=True)]
            ),
            array("Q", [size for size, _, _ in ranges]),
            threads,
        )

        for target, source, (size, source_skip, skip) in zip(targets, sources, ranges, strict=True):
            assert torch.equal(target[skip : skip + size], source[source_skip:])
            assert set(target[:skip].tolist()) | set(target[skip + size :].tolist()) == {GUARD}

    @pytest.mark.parametrize("threads", [1, 3])
    def test_as_many_threads_as_torch(self, threads):
        """
        It copies on as many threads as torch would use, the calling one among them.
        """
        source, target = torch.ones(16 * MIB), torch.zeros(16 * MIB)
        others = tasks()
        over, seen = threading.Event(), {0}

        def watch() -> None:
            mine = threading.get_native_id()
            while not over.is_set():
                seen.add(len(tasks() - others - {mine}))

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for _ in range(100):
                copy_all([target], [source])
                if threads - 1 in seen:
                    break
        finally:
            over.set()
            watcher.join(TOO_LONG)
            torch.set_num_threads(before)

        assert max(seen) == threads - 1

    @pytest.mark.parametrize("lengths", [(1, 2, 2), (2, 1, 2), (2, 2, 1)])
    def test_lengths_differ(self, lengths):
        """
        As many targets, sources and sizes are needed.
        """
        space = torch.zeros(64, dtype=torch.uint8)
        targets, sources = (array("Q", [space.data_ptr()] * count) for count in lengths[:2])

        with pytest.raises(ValueError, match="as many targets and sizes as sources"):
            host_copy.copy_past_caches(targets, sources, array("Q", [1] * lengths[2]), 1)

    def test_bytes_that_are_no_numbers(self):
        """
        What is no sequence of 64-bit numbers is refused.
        """
        with pytest.raises(ValueError, match="uint64"):
            host_copy.copy_past_caches(b"123", b"123", b"123", 1)


class TestUsesOneThread:
    def test_past_the_caches(self, monkeypatch):
        """
        Past the caches, no copy is left to one thread.
        """
        monkeypatch.setattr(host_copy, "copy_past_caches", lambda *_: None)

        assert not uses_one_thread([torch.empty(8)] * 100)

    def test_torch(self, monkeypatch):
        """
        Torch copies tensors of up to 32,768 elements on one thread.
        """
        monkeypatch.setattr(host_copy, "copy_past_caches", None)

        assert uses_one_thread([torch.empty(32_768)] * 100)
        assert not uses_one_thread([torch.empty(32_768)] * 99 + [torch.empty(32_769)])


class TestWithoutACompiler:
    def test_the_same_file(self, tmp_path):
        """
        Where nothing in C could be built a save gives the same file.
        """
        script = (
            "import sys\n"
            "for name in ('_nontemporal', '_writing') if sys.argv[2] == 'without' else ():\n"
            "    sys.modules[f'trainbus.checkpoint.{name}'] = None\n"
            "import torch, trainbus\n"
            "from trainbus.checkpoint import host_copy, record_sums\n"
            "assert not (host_copy.copy_past_caches or record_sums.complete_in_c) or sys.argv[2] == 'with'\n"
            "torch.manual_seed(0)\n"
            "with trainbus.Handler(torch.nn.Linear(999, 777)) as handler:\n"
            "    handler.save(sys.argv[1], weights_only=True)\n"
        )
        for name in ("with", "without"):
            subprocess.run([sys.executable, "-c", script, tmp_path / name, name], check=True)

        one, other = (torch.load(tmp_path / name) for name in ("with", "without"))

        assert one.keys() == other.keys() == {"weight", "bias"}
        assert all(torch.equal(one[key], other[key]) for key in one)


def tasks() -> set[int]:
    """Return the threads of this process, also those that Python does not know."""
    return {*map(int, os.listdir("/proc/self/task"))}


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as bytes: a NaN is not equal to itself."""
    return tensor.contiguous().view(-1).view(torch.uint8)

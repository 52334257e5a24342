from __future__ import annotations

import io
import logging
import mmap
import struct
import threading
import weakref
import zipfile
from typing import Any

import pytest
import torch
import xxhash

from trainbus.checkpoint import archive, image_records, record_sums, turns
from trainbus.checkpoint.archive import Image, write_archive
from trainbus.checkpoint.hasher import Hasher, new_hasher
from trainbus.checkpoint.zip_records import ROOM

from .forked import holds_in_child

WAIT = 30

in_c = pytest.mark.skipif(record_sums.complete_in_c is None, reason="built without a C compiler")


class Parts(io.BytesIO):
    """Notes what was written in place: where it came to stand, and where it lay; and what was hashed."""

    def __init__(self) -> None:
        super().__init__()
        self.in_place: list[tuple[int, int, int]] = []
        self.hashed_by_others: tuple[int, int] | None = None
        self.hasher = new_hasher()

    def leave_hashing(self, count: int) -> Hasher:
        self.hashed_by_others = self.tell(), self.tell() + count
        return self.hasher

    def write_in_place(self, data: memoryview) -> None:
        address = torch.frombuffer(data, dtype=torch.uint8).data_ptr() if len(data) else 0
        self.in_place.append((self.tell(), address, len(data)))
        self.write(data)


def on_image(*counts: int) -> tuple[Image, list[torch.Tensor]]:
    """Return an image with tensors of that many float32, their values all different."""
    sizes = [-(-(4 * count + ROOM) // 64) * 64 for count in counts]
    memory = mmap.mmap(-1, max(1, sum(sizes)))
    memory[:] = b"\xff" * len(memory)  # of the snapshot before
    tensors = [
        torch.frombuffer(memory, dtype=torch.float32, count=count, offset=sum(sizes[:index]))
        for index, count in enumerate(counts)
    ]
    for index, tensor in enumerate(tensors):
        torch.arange(float(tensor.numel()), out=tensor).add_(1000 * index)
    return Image(memoryview(memory)[: sum(sizes)], tensors, len(tensors)), tensors


@pytest.fixture
def small_batches(monkeypatch):
    """Let even small images be summed up, and written in place, in several batches."""
    monkeypatch.setattr(image_records, "_FIRST_BATCH", 4096)
    monkeypatch.setattr(image_records, "_LARGEST_BATCH", 3 * 4096)
    monkeypatch.setattr(archive, "_WORTH_IN_PLACE", 4096)


def written(state: Any, image: Image) -> Parts:
    stream = Parts()
    assert write_archive(state, image, stream)
    return stream


def assert_sums_hold(stream: Parts) -> None:
    """Check the sums in the directory, and those that stand behind each record."""
    file, data = zipfile.ZipFile(stream), stream.getvalue()
    assert file.testzip() is None
    for record in file.infolist():
        name, extra = struct.unpack("<HH", data[record.header_offset + 26 : record.header_offset + 30])
        end = record.header_offset + 30 + name + extra + record.file_size
        assert data[end : end + 8] == b"PK\x07\x08" + struct.pack("<I", record.CRC), record.filename


class TestFile:
    def test_tensors_that_are_still_copied(self):
        """
        What stands around the tensors is made before their bytes are there; these are waited for.
        """
        image, (tensor,) = on_image(1000)
        told: list[str] = []

        class State(dict):
            def __reduce__(self):
                told.append("pickled")
                return dict, (list(self.items()),)

        def arrive() -> None:
            told.append("arrived")
            tensor.fill_(7)

        stream = Parts()
        assert write_archive(State(tensor=tensor), image, stream, arrive)

        assert told == ["pickled", "arrived"]
        stream.seek(0)
        assert torch.load(stream, weights_only=False)["tensor"].eq(7).all()
        assert zipfile.ZipFile(stream).testzip() is None

    @pytest.mark.parametrize("mapped", [False, True])
    def test_is_loaded_by_torch(self, tmp_path, mapped):
        """
        Plain ``torch.load`` gives back what lies on the image and beside it; tied stays tied.
        """
        image, (first, second) = on_image(1000, 7)
        state = {"second": second, "first": first, "tied": first[5:9], "other": torch.ones(3), "step": 4}
        state["none"] = torch.zeros(0, 2)
        (tmp_path / "a.pt").write_bytes(written(state, image).getvalue())

        loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=mapped)

        for name in ("second", "first", "tied", "other", "none"):
            assert torch.equal(loaded[name], state[name])
        assert loaded["tied"].data_ptr() == loaded["first"].data_ptr() + 5 * 4
        assert loaded["step"] == 4

    @pytest.mark.usefixtures("small_batches")
    @pytest.mark.parametrize(
        "counts",
        [
            pytest.param((5000, 1, 250, 251), id="in pieces"),
            pytest.param((1024, 2000, 48, 1), id="up to where a batch ends"),
            pytest.param((10,) * 2000, id="many in a batch"),
        ],
    )
    def test_sums_are_right(self, counts):
        """
        The zip's sums hold, however records and what is summed up at once divide each other.
        """
        image, tensors = on_image(*counts)

        stream = written(tensors, image)

        assert_sums_hold(stream)
        file = zipfile.ZipFile(stream)
        sizes = [file.getinfo(f"archive/data/{key}").file_size for key in range(len(counts))]
        assert sizes == [4 * count for count in counts]

    def test_nothing_left_between(self):
        """
        Of what lay between the tensors before, nothing comes into the file.
        """
        image, tensors = on_image(10, 20, 30)

        assert b"\xff" * 4 not in written(tensors, image).getvalue()

    def test_nothing_on_the_image(self):
        """
        A state without a tensor on it is written as well.
        """
        image, _ = on_image()

        stream = written({"other": torch.ones(3), "step": 1}, image)
        stream.seek(0)

        assert torch.equal(torch.load(stream, weights_only=True)["other"], torch.ones(3))

    def test_where_torch_may_reckon(self, monkeypatch):
        """
        A reader that is told to reckon where records are looks for them all the same.
        """
        image, tensors = on_image(100, 200)
        stream = written(tensors, image)
        stream.seek(0)

        with torch.utils.serialization.config.patch({"load.calculate_storage_offsets": True}):
            loaded = torch.load(stream, weights_only=True)

        assert all(map(torch.equal, loaded, tensors))


class TestNextFile:
    @pytest.mark.usefixtures("small_batches")
    def test_other_values(self):
        """
        Files from the same image have sums of their own values, whatever stood between these before.
        """
        image, tensors = on_image(5000, 1, 250, 251)
        for number in range(3):
            image.memory[:] = bytes([number]) * len(image.memory)

            stream = written(tensors, image)

            assert_sums_hold(stream)
            stream.seek(0)
            assert all(map(torch.equal, torch.load(stream, weights_only=True), tensors))

    def test_laid_out_alike(self, monkeypatch):
        """
        What stands around the tensors is made once for files that are laid out alike.
        """
        made: list[int] = []

        class Counted(image_records.ImageRecords):
            def __init__(self, *arguments: Any) -> None:
                made.append(1)
                super().__init__(*arguments)

        monkeypatch.setattr(archive, "ImageRecords", Counted)
        image, tensors = on_image(100, 200)

        for step in range(3):
            written({"tensors": tensors, "step": step}, image)

        assert len(made) == 1

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda state: {**state, "text": "long" * 2000}, id="longer pickle"),
            pytest.param(lambda state: {**state, "step": 300}, id="a byte more"),
            pytest.param(lambda state: {"tensors": state["tensors"][::-1]}, id="other names"),
        ],
    )
    def test_laid_out_differently(self, change):
        """
        A file that is laid out differently from the one before is right too.
        """
        image, tensors = on_image(100, 200)
        state = {"tensors": tensors, "step": 1}
        written(state, image)

        stream = written(change(state), image)

        assert_sums_hold(stream)
        stream.seek(0)
        loaded = torch.load(stream, weights_only=True)
        assert all(map(torch.equal, loaded["tensors"], change(state)["tensors"]))


class TestReductions:
    def test_fork_meanwhile(self, monkeypatch):
        """
        A child that is forked while one thread finds them out finds out its own.
        """
        asked, told = threading.Event(), threading.Event()

        def wait(tensors: list[torch.Tensor]) -> None:
            asked.set()
            assert told.wait(WAIT)

        monkeypatch.setattr(archive, "Reductions", wait)
        images = [Image(memoryview(bytearray(64)), [], 0) for _ in range(2)]
        thread = threading.Thread(target=lambda: images[0].reductions)
        thread.start()
        assert asked.wait(WAIT)

        def claim() -> bool:
            archive.Reductions = list
            return images[1].reductions == []

        try:
            assert holds_in_child(claim)
        finally:
            told.set()
            thread.join(WAIT)


class TestPlaces:
    def test_are_remembered(self):
        """
        Where storages lie is asked once, not for each file.
        """
        image, tensors = on_image(10, 20)
        storages = [tensor.untyped_storage() for tensor in tensors]
        first = image.sorted(storages)

        again, others = image.sorted(list(storages))

        assert again is first[0]
        assert [place.size for place in again] == [40, 80]
        assert others == []

    @pytest.mark.parametrize("chosen", [[0], [1, 0], [0, 1, 2], []])
    def test_of_other_storages(self, chosen):
        """
        Others, fewer, more, or in another order, have their own places and names.
        """
        image, tensors = on_image(10, 20, 30)
        storages = [tensor.untyped_storage() for tensor in tensors]
        image.sorted(storages[:2])

        places, others = image.sorted([storages[index] for index in chosen])

        names = {place.size: place.name for place in places}
        assert names == {40 * (index + 1): f"archive/data/{n}" for n, index in enumerate(chosen)}
        assert others == []

    def test_elsewhere(self):
        """
        A storage that does not lie on the image is not kept for the next file.
        """
        image, tensors = on_image(10)
        other = torch.ones(3).untyped_storage()
        gone = weakref.ref(other)

        places, others = image.sorted([other, tensors[0].untyped_storage()])
        assert [place.name for place in places] == ["archive/data/1"]
        assert [name for name, _ in others] == ["archive/data/0"]
        del other, others

        assert gone() is None


class TestInPlace:
    @pytest.mark.usefixtures("small_batches")
    def test_image_is_not_copied(self):
        """
        All tensors are handed on from where they lie, at a multiple of a block of the file, piece by piece.
        """
        image, tensors = on_image(4000, 50, 7000, 3)

        stream = written(tensors, image)

        begin = stream.in_place[0][0]
        assert begin % 4096 == 0
        assert len(stream.in_place) > 2
        end = tensors[-1].data_ptr() + 12 - image.address
        assert sum(size for _, _, size in stream.in_place) == end
        assert all(at - begin == address - image.address for at, address, _ in stream.in_place)
        # One block of bytes, two, then three each time, and what is left.
        assert [size // 4096 for _, _, size in stream.in_place] == [1, 2, 3, 3, 1, 0]
        assert all(size % 4096 == 0 for _, _, size in stream.in_place[:-1])

    def test_small_file_is_copied(self):
        """
        Of a small state nothing is handed on by itself, so that it is written in one go.
        """
        image, tensors = on_image(4000, 50)

        assert written(tensors, image).in_place == []

    @pytest.mark.usefixtures("small_batches")
    def test_handed_on_only_when_complete(self):
        """
        What was handed on is what stands in the file at the end: nothing is filled in afterwards.
        """
        image, tensors = on_image(*[900] * 20)

        stream = written(tensors, image)

        begin = stream.in_place[0][0]
        end = begin + sum(size for _, _, size in stream.in_place)
        assert stream.getvalue()[begin:end] == bytes(image.memory[: end - begin])

    @pytest.mark.usefixtures("small_batches")
    @pytest.mark.parametrize("counts", [[900] * 20, [4096], [1024, 1024, 1000], [30, 50]])
    def test_hashed(self, counts):
        """
        The bytes of the image, with what stands between its tensors, are hashed once, in their order.
        """
        image, tensors = on_image(*counts)

        stream = written(tensors, image)

        begin, end = stream.hashed_by_others
        assert stream.hasher.hexdigest() == xxhash.xxh3_128_hexdigest(stream.getvalue()[begin:end])
        assert end - begin == tensors[-1].data_ptr() + tensors[-1].nbytes - image.address


class TestTurns:
    @pytest.mark.parametrize("way", [pytest.param("C", marks=in_c), "Python"])
    def test_for_each_tensor(self, monkeypatch, way):
        """
        Other threads are offered a turn at the interpreter for each tensor, in all that is done for each.
        """

        class Clock:
            now = slept = 0

            def perf_counter(self) -> int:
                self.now += 1
                return self.now

            def sleep(self, seconds: float) -> None:
                self.slept += 1

        clock = Clock()
        monkeypatch.setattr(turns, "time", clock)
        if way == "Python":
            monkeypatch.setattr(record_sums, "complete_in_c", None)
        image, tensors = on_image(*[10] * 100)
        archive._works()

        # The second time all is known but what the pickle names, and what Python itself copies.
        for things_done in (4, 1) if way == "C" else (5, 2):
            clock.slept = 0
            written(tensors, image)
            assert clock.slept == pytest.approx(100 * things_done, abs=5)


class TestFallback:
    def test_storage_elsewhere(self):
        """
        A storage that is not in the host's memory is left to ``torch.save``.
        """
        image, tensors = on_image(10)
        stream = Parts()

        assert not write_archive([*tensors, torch.UntypedStorage(3, device="meta")], image, stream)
        assert stream.getvalue() == b""

    def test_storage_that_was_not_met(self):
        """
        A state that lacks a tensor of the image is left to ``torch.save``, with nothing written.
        """
        image, tensors = on_image(10, 20)
        stream = Parts()

        assert not write_archive(tensors[:1], image, stream)
        assert stream.getvalue() == b""

    def test_torch_that_reads_something_else(self, monkeypatch, caplog):
        """
        If torch does not load what was written for trial, ``torch.save`` it is; that is said once.
        """
        monkeypatch.setattr(archive, "between", lambda *_: b"")
        archive._works.cache_clear()
        image, tensors = on_image(10)
        try:
            with caplog.at_level(logging.WARNING, "trainbus"):
                assert not write_archive(tensors, image, Parts())
                assert not write_archive(tensors, image, Parts())
        finally:
            archive._works.cache_clear()

        assert [record.getMessage() for record in caplog.records] == [
            f"torch {torch.__version__} reads another format: saves go through torch.save, slower."
        ]

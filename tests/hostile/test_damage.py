"""Whatever happens to the bytes of a checkpoint, it is found before a tensor is used, and resume goes on."""

from __future__ import annotations

import itertools
import logging
import os
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch

import trainbus
from trainbus import CheckpointCorruptError, CheckpointFolder, Handler

from .files import plain_zip, sealed

PAGE = 4096
Damaged = tuple[str, bytes]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, bytes]:
    """Checkpoints as this version writes them, by what wrote them."""
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (60_000,), dtype=torch.uint8, generator=generator)
    trainbus.save({"a": torch.arange(40), "b": [1, 2.5, "x"]}, folder / "save")
    trainbus.save(noise, folder / "64 KiB")
    trainbus.save(torch.zeros(60_000, dtype=torch.uint8), folder / "64 KiB of zeros")
    module = torch.nn.Linear(3, 2)
    with Handler(module, torch.optim.Adam(module.parameters()), config={"lr": 0.1}) as handler:
        handler.save(folder / "weights", weights_only=True)
        handler.save(folder / "state")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def found(path: Path, check: Callable[[Path], object]) -> bool:
    """Tell whether *check* refuses the file as it should; any other exception ends the test."""
    try:
        check(path)
    except CheckpointCorruptError as error:
        named = error.path == str(path) and repr(error.path) in str(error)
        return named and bool(error.reason) and error.reason in str(error)
    return False


def missed(path: Path, damaged: Iterable[Damaged]) -> list[str]:
    """Return what is done to a file and is not found, by verify or by load."""
    checks = {"verify": trainbus.verify, "load": trainbus.load}
    names = []
    with path.open("wb", buffering=0) as file:
        for what, data in damaged:
            os.pwrite(file.fileno(), data, 0)
            os.truncate(path, len(data))
            names += [f"{name}: {what}" for name, check in checks.items() if not found(path, check)]
    return names


def flips(data: bytes, step: int) -> Iterator[Damaged]:
    """Flip each bit of every *step*-th byte."""
    for at in range(0, len(data), step):
        for bit in range(8):
            flipped = bytes([data[at] ^ 1 << bit])
            yield f"bit {bit} of byte {at}", data[:at] + flipped + data[at + 1 :]


def pages(data: bytes) -> Iterator[Damaged]:
    """Zero, fill and swap pages, as far as that makes another file of it."""
    places = range(0, len(data), PAGE)
    for at in places:
        length = len(data[at : at + PAGE])
        for fill in (b"\0", b"\xff"):
            yield f"page at {at} filled with {fill!r}", data[:at] + fill * length + data[at + PAGE :]
    for a, b in itertools.combinations(places, 2):
        swapped = data[:a] + data[b : b + PAGE] + data[a + PAGE : b] + data[a : a + PAGE] + data[b + PAGE :]
        if swapped != data:
            yield f"pages at {a} and {b} swapped", swapped


def lengths(data: bytes, step: int = 1) -> Iterator[Damaged]:
    """Cut the file off, everywhere."""
    return ((f"cut off at {length}", data[:length]) for length in range(0, len(data), step))


def additions(data: bytes) -> Iterator[Damaged]:
    """Append bytes, also such as end a zip file once more."""
    end_record = data[data.rindex(b"PK\5\6") :]
    for more in (b"\0", b"\n", b"x", bytes(22), bytes(PAGE), end_record[:20] + b"\0\0", end_record, data):
        yield f"{len(more)} bytes appended", data + more


def shifts(data: bytes) -> Iterator[Damaged]:
    """Put bytes in front."""
    return ((f"{len(more)} bytes in front", more + data) for more in (b"\0", b"x", bytes(PAGE), data))


def moves(data: bytes) -> Iterator[Damaged]:
    """Lose and double single bytes, so that all behind them moves."""
    for at in range(len(data)):
        yield f"byte {at} lost", data[:at] + data[at + 1 :]
        yield f"byte {at} doubled", data[:at] + data[at : at + 1] + data[at:]


class TestEveryDamage:
    @pytest.mark.parametrize("name", ["save", "weights", "state"])
    def test_whole_file(self, tmp_path, files, name):
        """
        The files that are damaged here are fine before, so what is found is the damage.
        """
        path = tmp_path / "a.pt"

        assert missed(path, [("nothing", files[name])]) == ["verify: nothing", "load: nothing"]

    @pytest.mark.parametrize(("name", "step"), [("save", 17), ("weights", 17), ("state", 97)])
    def test_some_flipped_bits(self, tmp_path, files, name, step):
        """
        A flipped bit is found.
        """
        assert missed(tmp_path / "a.pt", flips(files[name], step)) == []

    @pytest.mark.full
    @pytest.mark.parametrize("name", ["save", "weights", "state"])
    def test_every_flipped_bit(self, tmp_path, files, name):
        """
        No single bit of a file can change unnoticed.
        """
        assert missed(tmp_path / "a.pt", flips(files[name], 1)) == []

    @pytest.mark.parametrize(("name", "step"), [("save", 1), ("weights", 1), ("state", 53)])
    def test_cut_off(self, tmp_path, files, name, step):
        """
        A file cut off anywhere is damaged.
        """
        assert missed(tmp_path / "a.pt", lengths(files[name], step)) == []

    @pytest.mark.full
    def test_cut_off_everywhere(self, tmp_path, files):
        """
        A file of the full state cut off at any of its bytes is damaged.
        """
        assert missed(tmp_path / "a.pt", lengths(files["state"])) == []

    @pytest.mark.parametrize("name", ["save", "weights", "state"])
    def test_appended(self, tmp_path, files, name):
        """
        Nothing can stand behind a file or in front of it.
        """
        data = files[name]

        assert missed(tmp_path / "a.pt", [*additions(data), *shifts(data)]) == []

    @pytest.mark.full
    @pytest.mark.parametrize("name", ["save", "weights"])
    def test_moved(self, tmp_path, files, name):
        """
        A byte lost or doubled is found, wherever it is.
        """
        data = files[name]

        assert missed(tmp_path / "a.pt", ((w, d) for w, d in moves(data) if d != data)) == []

    @pytest.mark.parametrize("name", ["64 KiB", "64 KiB of zeros"])
    def test_pages(self, tmp_path, files, name):
        """
        No page can be zeroed or filled and no two can change places, unless the file stays the same.
        """
        damaged = [(what, data) for what, data in pages(files[name]) if data != files[name]]

        assert len(damaged) > (150 if name == "64 KiB" else 30)
        assert missed(tmp_path / "a.pt", damaged) == []

    def test_page_of_an_earlier_file(self, tmp_path, files):
        """
        A page left over from what stood there before is found.
        """
        data, earlier = files["64 KiB"], files["64 KiB of zeros"]
        damaged = [
            (f"page at {at} of another file", data[:at] + earlier[at : at + PAGE] + data[at + PAGE :])
            for at in range(0, len(data), PAGE)
            if data[at : at + PAGE] != earlier[at : at + PAGE]
        ]

        assert len(damaged) >= (64 << 10) // PAGE - 1  # the first is but headers, equal in both
        assert missed(tmp_path / "a.pt", damaged) == []

    def test_two_bits(self, tmp_path, files, request):
        """
        Two flipped bits do not make up for each other.
        """
        data = files["save"]
        chance = random.Random(1)
        damaged = []
        for _ in range(request.config.getoption("--runs") or 300):
            changed = bytearray(data)
            for at in chance.sample(range(len(data)), 2):
                changed[at] ^= 1 << chance.randrange(8)
            damaged.append((f"{[at for at, byte in enumerate(changed) if byte != data[at]]}", bytes(changed)))

        assert missed(tmp_path / "a.pt", damaged) == []


class TestLostManifest:
    """Damage that could pass for a file that never had a manifest, which would be loaded unverified."""

    @pytest.fixture(params=[512, 1024])
    def one_bit_from_none(self, request):
        """A file whose comment has no length once one bit is flipped, and where that length stands."""
        body = plain_zip({"a": torch.arange(40)})
        padding = 0
        while len(data := sealed(body, config="x" * padding)) != len(body) + request.param:
            padding += max(1, len(body) + request.param - len(data))
            assert padding < 2000
        return data, len(body) - 2

    def test_one_bit_of_the_length(self, tmp_path, one_bit_from_none):
        """
        A flipped bit that makes the comment's length zero does not make the manifest vanish.
        """
        data, at = one_bit_from_none
        damaged = list(flips(data[at : at + 2], 1))
        whole = [(what, data[:at] + length + data[at + 2 :]) for what, length in damaged]

        assert any(length == b"\0\0" for _, length in damaged)
        assert missed(tmp_path / "a.pt", whole) == []

    @pytest.mark.parametrize("step", [331, pytest.param(7, marks=pytest.mark.full)])
    def test_any_other_length(self, tmp_path, files, step):
        """
        The comment's length can be no other, with its bytes all there and with as many as it says.
        """
        data = files["save"]
        at = data.rindex(b"PK\5\6") + 20
        right = len(data) - at - 2
        damaged = []
        for length in sorted({0, 1, right - 1, right + 1, *range(0, 65_536, step)} - {right}):
            said = data[:at] + length.to_bytes(2, "little") + data[at + 2 :]
            damaged.append((f"length {length}", said))
            if 0 < length < right:
                damaged.append((f"length {length}, cut off there", said[: at + 2 + length]))

        assert missed(tmp_path / "a.pt", damaged) == []

    def test_taken_off(self, tmp_path, files):
        """
        Without its whole manifest a file verifies as nothing and is not resumed from: it claims nothing.
        """
        data = files["state"]
        at = data.rindex(b"PK\5\6") + 20
        (tmp_path / "a.pt").write_bytes(data[:at] + b"\0\0")

        with pytest.raises(CheckpointCorruptError, match="it has no manifest"):
            trainbus.verify(tmp_path / "a.pt")
        assert trainbus.read_manifest(tmp_path / "a.pt") is None
        assert CheckpointFolder(tmp_path).latest() is None
        with Handler(torch.nn.Linear(3, 2)) as handler:
            assert handler.resume(tmp_path) is None

    def test_other_manifest(self, tmp_path):
        """
        The manifest of another file of the same size does not fit.
        """
        first, second = (sealed(plain_zip(torch.full((99,), value))) for value in (1, 2))
        assert len(first) == len(second)
        cut = first.rindex(b"PK\5\6")

        assert missed(tmp_path / "a.pt", [("other manifest", second[:cut] + first[cut:])]) == []


class TestResume:
    """A folder of three checkpoints whose newest is damaged."""

    @pytest.fixture
    def run(self, tmp_path):
        """The handler of a new run, whose module was all ones in the middle checkpoint."""
        module = torch.nn.Linear(3, 2)
        with Handler(module) as earlier:
            for value, name in enumerate(("old.pt", "before.pt", "newest.pt")):
                torch.nn.init.constant_(module.weight, value)
                earlier.save(tmp_path / name)
        with Handler(torch.nn.Linear(3, 2)) as handler:
            yield handler

    def resumed(self, handler, folder, caplog) -> tuple[str, bool]:
        """Resume; return which checkpoint was taken, and whether the log names the newest one."""
        torch.nn.init.constant_(handler.module.weight, 9)
        caplog.clear()
        with caplog.at_level(logging.INFO, "trainbus"):
            manifest = handler.resume(folder)
        (value,) = set(handler.module.weight.flatten().tolist())
        taken = {0.0: "old.pt", 1.0: "before.pt", 2.0: "newest.pt"}[value]
        assert manifest == trainbus.read_manifest(folder / taken)
        assert f"resumed from {folder / taken}: epoch" in caplog.text
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        return taken, any(str(folder / "newest.pt") in message for message in warnings)

    def check(self, handler, folder, caplog, damaged: Iterable[Damaged]) -> None:
        middle = trainbus.read_manifest(folder / "before.pt").sequence
        wrong = []
        for what, data in damaged:
            (folder / "newest.pt").write_bytes(data)
            result = self.resumed(handler, folder, caplog)
            if result != ("before.pt", True) and not (
                # One whose damage is that it no longer says it is newer is not reached.
                result == ("before.pt", False) and _sequence(folder / "newest.pt") < middle
            ):
                wrong.append((what, result))
        assert not wrong, wrong

    def test_nothing_damaged(self, tmp_path, caplog, run):
        """
        The newest is taken where it is whole, so the other tests see it refused.
        """
        assert self.resumed(run, tmp_path, caplog) == ("newest.pt", False)

    def test_kinds(self, tmp_path, caplog, run):
        """
        By each kind of damage the newest is passed over by name, and the one before it is taken.
        """
        data = (tmp_path / "newest.pt").read_bytes()
        sample = random.Random(2)
        damaged = [
            *sample.sample(list(flips(data, 11)), 40),
            *sample.sample(list(lengths(data[:-1]))[4:], 20),
            ("last byte lost", data[:-1]),
            *additions(data),
            *((what, changed) for what, changed in pages(data) if changed != data),
        ]

        # What neither begins nor ends as a checkpoint, or ends as a zip without a manifest, claims nothing.
        claims = [one for one in damaged if _claims_to_be_one(one[1])]
        assert len(claims) > 70
        self.check(run, tmp_path, caplog, claims)

    def test_something_in_front(self, tmp_path, caplog, run):
        """
        A newest file that begins with something else and ends in its manifest is named as well.
        """
        self.check(run, tmp_path, caplog, shifts((tmp_path / "newest.pt").read_bytes()))

    @pytest.mark.parametrize("size", [0, 3, 30_000])
    def test_nothing_left(self, tmp_path, caplog, run, size):
        """
        A newest file that is empty or nothing but zeros, as a power cut leaves them, does not stop a resume.
        """
        (tmp_path / "newest.pt").write_bytes(bytes(size))

        assert self.resumed(run, tmp_path, caplog)[0] == "before.pt"

    @pytest.mark.full
    def test_many_bits(self, tmp_path, caplog, run):
        """
        Whichever bit of the newest is flipped, the one before it is taken, and the newest is named.
        """
        data = (tmp_path / "newest.pt").read_bytes()

        self.check(run, tmp_path, caplog, flips(data, 101))

    @pytest.mark.full
    def test_every_bit_of_the_manifest(self, tmp_path, caplog, run):
        """
        Whichever bit of what the newest says of itself is flipped, the one before it is taken.
        """
        data = (tmp_path / "newest.pt").read_bytes()
        cut = data.rindex(b"PK\5\6")

        self.check(run, tmp_path, caplog, ((what, data[:cut] + end) for what, end in flips(data[cut:], 1)))

    def test_two_damaged(self, tmp_path, caplog, run):
        """
        Damaged ones are passed over until one is whole; nothing is loaded of any of them.
        """
        for name in ("newest.pt", "before.pt"):
            data = bytearray((tmp_path / name).read_bytes())
            data[len(data) // 2] ^= 4
            (tmp_path / name).write_bytes(data)

        assert self.resumed(run, tmp_path, caplog) == ("old.pt", True)
        assert "before.pt" in caplog.text

    def test_all_damaged(self, tmp_path, caplog, run):
        """
        Where none is whole there is nothing to resume from, and the run is as it was.
        """
        before = {name: value.clone() for name, value in run.module.state_dict().items()}
        for path in tmp_path.iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        with caplog.at_level(logging.WARNING, "trainbus"):
            assert run.resume(tmp_path) is None

        assert all(name in caplog.text for name in ("old.pt", "before.pt", "newest.pt"))
        assert all(value.equal(before[name]) for name, value in run.module.state_dict().items())
        assert not run.resumed


def _sequence(path: Path) -> float:
    try:
        manifest = trainbus.read_manifest(path)
    except CheckpointCorruptError:
        return float("inf")
    return manifest.sequence if manifest is not None else float("inf")


def _claims_to_be_one(data: bytes) -> bool:
    without = data[-22:-18] == b"PK\5\6"
    return not without and (data.startswith(b"PK\3\4") or b'"format":1' in data[-1000:])

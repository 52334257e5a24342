"""No pickle in a file is ever run: known gadgets in every container, mutants of them and of good files."""

from __future__ import annotations

import copyreg
import io
import logging
import os
import pickle
import random
import sys
import tarfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch

import trainbus
from trainbus import CheckpointCorruptError, Handler
from trainbus.checkpoint.outline import read_outline

from .conftest import CALLS, CHAINS, GADGETS, OPCODES, Mutator, Reduced, Site, opcode_samples
from .files import (
    MEMORY,
    Ops,
    Zip,
    archive,
    call,
    legacy,
    pickle_of,
    plain_zip,
    ref,
    sealed,
    storage,
    tensor,
    value,
)

pytestmark = [
    # Python warns of every fork beside threads; torch has some.
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    # Quantized tensors are deprecated and loaded all the same.
    pytest.mark.filterwarnings("ignore:.*quantize.*:UserWarning"),
]

SEED = 20_000
EXTENSIONS = {241: "mkdir", 4_097: "makedirs", 70_000: "mknod"}


@pytest.fixture
def site(tmp_path) -> Site:
    """A folder in which gadgets may do their worst."""
    fired = tmp_path / "fired"
    target = str(fired / "it")
    tools = tmp_path / "tools"
    fired.mkdir(), tools.mkdir()
    code = f"__import__('os').mkdir({target!r})"
    (tools / "hubconf.py").write_text(f"def entry():\n    {code}\n{code}\n")
    (tools / "evil.pkl").write_bytes(pickle.dumps(Reduced(os.mkdir, target), 2))
    return Site(
        str(fired), target, f"touch {target}", code, str(tools / "hubconf.py"), str(tools / "evil.pkl")
    )


def has_fired(site: Site) -> bool:
    """Tell whether a gadget did anything, once all processes it started have ended."""
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return any(os.scandir(site.fired))


def register_extensions() -> None:
    """Let the EXT opcodes mean something, as a library may do for its own classes."""
    for code, name in EXTENSIONS.items():
        copyreg.add_extension("os", name, code)


def tar_of(pickled: bytes) -> bytes:
    """Return the format of torch before 0.1.10, whose members are all the same pickle."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(pickled)
            tar.addfile(member, io.BytesIO(pickled))
    return stream.getvalue()


def containers(pickled: bytes) -> dict[str, bytes]:
    """Return files that hold a pickle, by what they pretend to be."""
    script = Zip()
    for name in ("data.pkl", "constants.pkl"):
        script.add(f"archive/{name}", pickled)
    script.add("archive/version", b"3\n")
    end = Zip().finish()
    return {
        "zip": archive(pickled),
        "sealed zip": sealed(archive(pickled)),
        "sealed state": sealed(archive(pickled), contents="state", sequence=7),
        "raw": pickled,
        "legacy": legacy(pickled),
        "sealed raw": sealed(pickled + end),
        "sealed legacy": sealed(legacy(pickled) + end),
        "tar": tar_of(pickled),
        "TorchScript": script.finish(),
        "sealed TorchScript": sealed(script.finish()),
    }


LOADS: dict[str, Callable[[str], object]] = {
    "load": trainbus.load,
    "unverified": lambda path: trainbus.load(path, verify=False),
    "meta": lambda path: trainbus.load(path, map_location="meta"),
    "as it was": lambda path: trainbus.load(path, map_location=None),
}

# What only running something that a file holds would raise.
_ALARMS = (
    *("exec", "compile", "import", "marshal.", "pickle.", "code.", "ctypes.", "object.__setattr__"),
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.", "pty.", "socket.", "urllib."),
)


def watch() -> list[str]:
    """Return a list that gets the alarming things this process does, from now on and for ever."""
    alarms: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_ALARMS) and not _is_own_import(event, args):
            alarms.append(f"{event}{args!r}"[:200])

    sys.addaudithook(hook)
    return alarms


def _is_own_import(event: str, args: tuple[Any, ...]) -> bool:
    """Tell whether torch imports a part of itself, a text encoding is looked up, or it belongs to that."""
    if event == "import" and args[0].partition(".")[0] in ("torch", "encodings"):
        return True
    frame = sys._getframe(2)
    while frame is not None and not frame.f_code.co_filename.startswith("<frozen importlib"):
        frame = frame.f_back
    return frame is not None


def kind_of_refusal(load: Callable[[str], object], path: str) -> str:
    try:
        load(path)
    except Exception as error:
        return type(error).__name__
    return "nothing"


class TestGadgets:
    @pytest.mark.full
    @pytest.mark.parametrize("name", GADGETS)
    def test_fires_under_pickle(self, in_child, site, name):
        """
        The gadget works: plain pickle runs it.
        """
        if name == "pip.main":
            pytest.importorskip("pip", reason="pip is not installed")
        pickled = GADGETS[name](site)

        def load() -> bool:
            register_extensions()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.dup2(0, 1)
            try:
                pickle.loads(pickled)
            except Exception:
                if not has_fired(site):
                    raise
            return has_fired(site)

        outcome = in_child(load)

        assert outcome.status == 0, outcome.value
        assert outcome.value is True

    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[pytest.mark.full] if at % 5 else []) for at, name in enumerate(GADGETS)],
    )
    def test_is_refused(self, in_child, tmp_path, site, name):
        """
        In whatever container and however loaded, the gadget is refused and nothing of it is run.
        """
        files = containers(GADGETS[name](site))
        for container, data in files.items():
            (tmp_path / container).write_bytes(data)

        def load() -> list[Any]:
            register_extensions()
            alarms = watch()
            refusals = [
                (container, way, kind_of_refusal(one, str(tmp_path / container)))
                for container in files
                for way, one in LOADS.items()
            ]
            return [refusals, alarms, has_fired(site)]

        outcome = in_child(load)

        assert outcome.status == 0, outcome.value
        refusals, alarms, fired = outcome.value
        assert not fired and alarms == []
        allowed = {"CheckpointCorruptError", "UntrustedPickleError"}
        wrong = [
            (container, way, kind)
            for container, way, kind in refusals
            if kind not in allowed or (container.startswith("sealed") and kind != "CheckpointCorruptError")
        ]
        assert wrong == []

    def test_alarm(self, in_child, site):
        """
        What would be run is seen by its traces too, not only by what it does.
        """

        def load() -> list[str]:
            alarms = watch()
            pickle.loads(GADGETS["builtins.eval"](site))
            return alarms

        alarms = in_child(load).value

        assert {alarm.partition("(")[0] for alarm in alarms} >= {"pickle.find_class", "compile", "exec"}

    def test_families(self):
        """
        There are many ways to run something by a pickle, and none is tried twice.
        """
        assert len(GADGETS) == len(CALLS) + len(CHAINS) + len(OPCODES) > 80

    @pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "STACK_GLOBAL"])
    def test_resume(self, tmp_path, site, caplog, name):
        """
        A hostile file that claims to be the newest of a folder is passed over by name.
        """
        folder = tmp_path / "run"
        with Handler(torch.nn.Linear(2, 1)) as handler:
            good = handler.save(folder / "good.pt")
            data = sealed(archive(GADGETS[name](site)), contents="state", sequence=99)
            (folder / "evil.pt").write_bytes(data)
            with caplog.at_level(logging.WARNING, "trainbus"):
                assert handler.resume(folder) == good

        assert f"Passed over while resuming: Checkpoint {str(folder / 'evil.pt')!r}" in caplog.text
        assert not any(os.scandir(site.fired))


# Functions and classes that torch lets a file name, all but bytearray: its memory is a test of its own.
NAMED = (
    *("collections OrderedDict", "collections Counter", "builtins set", "builtins complex", "_codecs encode"),
    *("torch Tensor", "torch Size", "torch device", "torch FloatStorage", "torch LongStorage"),
    *("torch FloatTensor", "torch.storage UntypedStorage", "torch.storage TypedStorage", "torch float32"),
    *("torch per_tensor_affine", "torch.nn.parameter Parameter", "torch.serialization _get_layout"),
    *(f"torch._utils _rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
    *(f"torch._utils _rebuild_{kind}" for kind in ("parameter_with_state", "qtensor", "sparse_tensor")),
    *(f"torch._utils _rebuild_{kind}" for kind in ("meta_tensor_no_storage", "nested_tensor")),
    *("torch._utils _rebuild_wrapper_subclass", "torch._utils _rebuild_device_tensor_from_cpu_tensor"),
    *("torch._utils _rebuild_device_tensor_from_numpy", "torch._tensor _rebuild_from_type_v2"),
)
STORAGE_BYTES = 64
STORAGES = {f"_{key}": bytes(STORAGE_BYTES) for key in range(6)}
# The last one only where there is no manifest.
FORESEEN = ("nothing", "CheckpointCorruptError", "UntrustedPickleError")


def good_pickles() -> list[bytes]:
    """Return states of every kind of value, each storage as long as those of STORAGES."""
    a = torch.arange(16, dtype=torch.float32)
    indices = torch.tensor([[0, 1, 2, 2], [0, 2, 0, 1]])
    values = torch.ones(4, dtype=torch.complex128)
    states = [
        {"a": a, "tied": a, "view": a[4:8], "n": torch.arange(8)},
        OrderedDict(weight=torch.nn.Parameter(a.reshape(4, 4)), t=a.reshape(2, 8).t()),
        {"sparse": torch.sparse_coo_tensor(indices, values, (3, 3), check_invariants=True)},
        {"quantized": torch.quantize_per_tensor(torch.zeros(64), 0.5, 3, torch.qint8)},
        {"optimizer": {"state": {0: {"step": a[0]}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99)}]}},
        [1, -1, 2**40, 2.5, 1j, None, True, "text", b"bytes", (1, (2, (3, ()))), {4, 5}, Counter("aab")],
        [torch.float32, torch.device("cpu"), torch.Size([2]), torch.strided, torch.empty(2, device="meta")],
    ]
    return [pickle_of(plain_zip(state)) for state in states]


def dictionary(site: Site) -> list[bytes]:
    """Return what to put into mutants: every opcode, every name that a file may try, a command to run."""
    tried = [path.rpartition(".")[::2] for path in ("os.system", "builtins.eval", "builtins.getattr")]
    names = [ref(*name) for name in (*map(str.split, NAMED), *tried)]
    values = [value(thing) for thing in (2**31 - 1, -1, "storage", ("cpu",))]
    return [*opcode_samples(), *names, *values, value(site.shell) + b"\x85R"]


@pytest.fixture
def try_all(in_child, tmp_path, site, request):
    """Load many pickles in children, ``try_all(pickled_by_seed, count)``; return how many became what."""
    path = tmp_path / "a.pt"
    progress = os.open(tmp_path / "progress", os.O_CREAT | os.O_RDWR)
    good = good_pickles()

    def load(pickled: bytes, seal: bool) -> str:
        data = archive(pickled, **STORAGES)
        path.write_bytes(sealed(data) if seal else data)
        return kind_of_refusal(trainbus.load, str(path))

    def batch(pickled_by_seed: Callable[[int], bytes], seeds: range) -> list[Any]:
        register_extensions()
        logging.disable()
        alarms = watch()
        kinds: Counter[str] = Counter()
        wrong = []
        for seed in seeds:
            os.pwrite(progress, b"%12d" % seed, 0)
            kind = load(pickled_by_seed(seed), seal=seed % 2 == 0)
            kinds[kind] += 1
            if kind not in FORESEEN[: 2 + seed % 2]:
                wrong.append((seed, kind))
            if alarms or os.path.exists(site.target):
                wrong.append((seed, str(alarms)))
                break
        return [kinds, wrong]

    def try_all(pickled_by_seed: Callable[[int], bytes], count: int) -> Counter[str]:
        baseline = in_child(lambda: [load(pickled, seal=True) for pickled in good * 20])
        assert set(baseline.value) == {"nothing"}, baseline.value
        total: Counter[str] = Counter()
        count = request.config.getoption("--runs") or count
        for begin in range(SEED, SEED + count, 500):
            seeds = range(begin, min(SEED + count, begin + 500))
            outcome = in_child(lambda seeds=seeds: batch(pickled_by_seed, seeds), timeout=120)
            last = int(os.pread(progress, 12, 0))
            assert outcome.status == 0, f"status {outcome.status} at seed {last}: {outcome.value}"
            kinds, wrong = outcome.value
            assert wrong == [], f"seeds and what became of them: {wrong}"
            assert outcome.growth - baseline.growth < MEMORY, f"{outcome.growth} bytes in {seeds}"
            total.update(kinds)
        assert not any(os.scandir(site.fired))
        return total

    yield try_all
    os.close(progress)


class TestMutants:
    @pytest.mark.parametrize("count", [300, pytest.param(20_000, marks=pytest.mark.full)])
    def test_of_files_and_gadgets(self, try_all, site, count):
        """
        No mutant runs anything, crashes the interpreter, takes memory or raises anything unforeseen.
        """
        gadgets = [gadget(site) for gadget in GADGETS.values()]
        mutator = Mutator(good_pickles() * 12 + gadgets, dictionary(site))

        total = try_all(lambda seed: mutator.mutant(random.Random(seed)), count)

        # Mutants that are all refused, or none of them, would test nothing.
        assert min(total["nothing"], total["CheckpointCorruptError"]) > total.total() / 50, total

    @pytest.mark.parametrize("count", [500, pytest.param(10_000, marks=pytest.mark.full)])
    def test_of_arguments(self, try_all, count):
        """
        What a file may call is called with anything at all, and refuses it or builds something.
        """
        floats, indices = tensor("FloatStorage", 16, 4, 4), tensor("LongStorage", 8, 2, 4)
        things = [floats, indices, tensor("LongStorage", 8, 8), storage("FloatStorage", 16), *_HARMLESS]
        names = [ref(*name.split()) for name in NAMED]

        def pickled(seed: int) -> bytes:
            chance = random.Random(seed)
            args = [chance.choice(things + names) for _ in range(chance.randrange(9))]
            return b"\x80\x02" + call(chance.choice(names), *args) + b"."

        assert try_all(pickled, count)["nothing"] > 0


_HARMLESS = (None, True, 0, 3, -1, 2**31, 2**62, -(2**63), 0.5, "x", "cpu", "torch.sparse_csr", (), (4,))
_HARMLESS += ((4, 4), (-1,), (2**62,), (2**31, 2**31), [], [1], {}, {"a": 1}, b"x", (1.5,), ("x",), ((),))


class TestWhatTorchAllows:
    """Pickles of names and opcodes that torch takes, and that are no state of anything."""

    def outcome(self, in_child, tmp_path, pickled: bytes):
        (tmp_path / "a.pt").write_bytes(sealed(archive(pickled, **STORAGES)))
        return in_child(lambda: kind_of_refusal(trainbus.load, str(tmp_path / "a.pt")))

    def test_control(self, in_child, tmp_path):
        """
        What a good state takes is nothing to what is looked for here.
        """
        outcome = self.outcome(in_child, tmp_path, b"\x80\x02" + tensor("FloatStorage", 16, 4, 4) + b".")

        assert outcome[:2] == (0, "nothing") and outcome.growth < MEMORY / 2

    def test_measure(self, in_child):
        """
        Memory that is given back before the end counts as well.
        """
        assert in_child(lambda: len(b"x" * (64 << 20))).growth > 60 << 20

    @pytest.mark.parametrize(
        "built",
        [
            tensor("FloatStorage", 2**30, 2**30),
            tensor("FloatStorage", 16, 2**30),
            call(ref("torch._utils", "_rebuild_tensor"), storage("FloatStorage", 16), -8, (4,), (1,)),
            call(ref("torch._utils", "_rebuild_tensor"), storage("FloatStorage", 16), 8, (16,), (1,)),
            call(ref("torch._utils", "_rebuild_tensor"), storage("FloatStorage", 16), 0, (4,), (-1,)),
            call(ref("torch._utils", "_rebuild_tensor"), storage("FloatStorage", 16), 0, (-4,), (1,)),
            call(ref("torch._utils", "_rebuild_tensor"), storage("FloatStorage", -1), 0, (4,), (1,)),
            call(ref("torch.storage", "UntypedStorage"), 2**60),
            Ops(value("storage") + b"Q"),
            Ops(b"Pstorage\n"),
            Ops(b"(" + value("module") + ref("collections", "OrderedDict") + value("f") + value("s") + b"tQ"),
            Ops(b"X\xff\xff\xff\x7fabc"),
        ],
    )
    def test_storage_that_is_not_there(self, in_child, tmp_path, built):
        """
        A tensor cannot reach behind its storage nor a storage behind its record, and no other id is known.
        """
        outcome = self.outcome(in_child, tmp_path, b"\x80\x02" + built + b".")

        assert outcome[:2] == (0, "CheckpointCorruptError") and outcome.growth < MEMORY

    def test_bytes_that_are_not_there(self, in_child, tmp_path):
        """
        No room is made for bytes that the pickle only speaks of.
        """
        (tmp_path / "a.pt").write_bytes(archive(b"\x80\x05\x96" + (1 << 30).to_bytes(8, "little") + b"abc."))
        outcome = in_child(lambda: kind_of_refusal(read_outline, tmp_path / "a.pt"))

        assert outcome[:2] == (0, "CheckpointCorruptError") and outcome.growth < MEMORY

    @pytest.mark.parametrize("put", [b"r\xff\xff\xff\x0f", b"p268435455\n"])
    def test_number_of_a_value(self, in_child, tmp_path, put):
        """
        The numbers by which a pickle calls its values take no memory; one flipped bit makes them great.
        """
        (tmp_path / "a.pt").write_bytes(archive(b"\x80\x02}" + put + b"."))
        outcome = in_child(lambda: read_outline(tmp_path / "a.pt"))

        assert outcome[:2] == (0, {}) and outcome.growth < MEMORY

    @pytest.mark.xfail(strict=True, reason="torch allows bytearray and encode, whose results have any length")
    @pytest.mark.parametrize("name", ["bytearray", "hex"])
    def test_little_that_becomes_much(self, in_child, tmp_path, name):
        """
        A kilobyte of pickle does not take hundreds of megabytes.
        """
        doubled = call(ref("_codecs", "encode"), "x", "latin1")
        for _ in range(26):
            doubled = call(ref("_codecs", "encode"), doubled, "hex")
        grown = {"bytearray": call(ref("builtins", "bytearray"), 128 << 20), "hex": doubled}[name]

        pickled = b"\x80\x02" + grown + b"."
        assert self.outcome(in_child, tmp_path, pickled).growth < MEMORY

    # Torch looks for words in its message by a pattern that takes the square of a name's length.
    @pytest.mark.full
    @pytest.mark.xfail(strict=True, reason="torch searches long names for hours before it refuses them")
    @pytest.mark.parametrize("wrap", [archive, lambda pickled: sealed(archive(pickled)), bytes])
    def test_long_name(self, in_child, tmp_path, wrap):
        """
        A name of 300 kilobytes is refused in no time.
        """
        (tmp_path / "a.pt").write_bytes(wrap(ref("c" * 300_000, "d") + b"."))

        assert in_child(lambda: kind_of_refusal(trainbus.load, str(tmp_path / "a.pt")), timeout=5).status == 0

    @pytest.mark.xfail(strict=True, reason="a MemoryError is taken for the machine's, whatever asked for it")
    def test_more_than_there_is(self, in_child, tmp_path):
        """
        A file that asks for more memory than any machine has is refused as damaged, so that resume goes on.
        """
        pickled = b"\x80\x02" + call(ref("builtins", "bytearray"), 2**60) + b"."

        assert self.outcome(in_child, tmp_path, pickled)[:2] == (0, "CheckpointCorruptError")

    @pytest.mark.xfail(strict=True, reason="Python hashes nested tuples by recursion without a limit")
    def test_deep_key(self, in_child, tmp_path):
        """
        A key of tuples nested without end does not crash the interpreter.
        """
        pickled = b"\x80\x02})" + b"\x85" * 300_000 + b"Ns."

        assert self.outcome(in_child, tmp_path, pickled)[:2] == (0, "CheckpointCorruptError")

    @pytest.mark.parametrize(
        "state",
        [
            {"trainbus.numpy": 5},
            {"trainbus.numpy": [], "trainbus.wrapped": True},
            {"trainbus.numpy": [[["a"], "array", "f4"]], "a": torch.ones(2, requires_grad=True)},
            {"trainbus.numpy": [[["a"], "scalar", "V"]], "a": 2**40},
        ],
    )
    def test_numpy_that_does_not_fit(self, tmp_path, state):
        """
        A forged list of NumPy values is damage, and raises what damage raises.
        """
        (tmp_path / "a.pt").write_bytes(sealed(plain_zip(state)))

        with pytest.raises(CheckpointCorruptError):
            trainbus.load(tmp_path / "a.pt")

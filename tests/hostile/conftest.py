"""What the tests of hostile files share: a process to do their worst in, hostile pickles, mutants."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import itertools
import json
import marshal
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import trainbus

from .files import Ops, archive, attr, call, method, plain_zip, ref, short, value


class Outcome(NamedTuple):
    """What became of work in a child: its exit status, what it returned, by how much its memory grew."""

    status: int
    value: Any
    growth: int


@pytest.fixture(scope="session", name="in_child")
def _in_child(tmp_path_factory) -> Callable[..., Outcome]:
    """
    Do work in a forked child: ``in_child(work, timeout=60)``.

    The work returns what JSON can hold. A child that crashes or hangs has a negative status.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the peak of a process's memory can be reset on Linux only")
    good = tmp_path_factory.mktemp("warm") / "good.pt"
    good.write_bytes(plain_zip({"a": torch.ones(3)}))
    bad = good.with_name("bad.pt")
    bad.write_bytes(archive(b"\x80\x02cos\nsystem\n."))

    def warm() -> None:
        # What is imported or paged in by a first load is not the growth that a file causes.
        for path in (good, bad):
            with contextlib.suppress(ValueError):
                trainbus.load(path)

    def in_child(work: Callable[[], Any], timeout: int = 60) -> Outcome:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.close(reader)
                answer = {"value": None, "growth": 0}
                try:
                    _settle_child(timeout)
                    warm()
                    _trim_heap()
                    Path("/proc/self/clear_refs").write_text("5")
                    before = _memory("VmRSS")
                    answer["value"] = work()
                    answer["growth"] = _memory("VmHWM") - before
                    status = 0
                except BaseException:
                    answer["value"] = traceback.format_exc()
                with open(writer, "w") as stream:
                    json.dump(answer, stream)
            finally:
                os._exit(status)
        os.close(writer)
        with open(reader) as stream:
            answer = stream.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Outcome(status, **json.loads(answer or '{"value": null, "growth": 0}'))

    return in_child


def _settle_child(timeout: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live in a forked child, and it would wait for them
    faulthandler.disable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(timeout)
    warnings.simplefilter("ignore")


def _trim_heap() -> None:
    # glibc keeps up to 64 MiB of freed heap; work that fits in there would not be seen to grow.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _memory(field: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


_LENGTH_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


class Mutator:
    """
    Makes broken pickles of whole ones, knowing where their opcodes begin and end.

    Args:
        pool: Whole pickles.
        dictionary: What may be put between two opcodes.
    """

    _EXTREMES = (b"\0", b"\xff", b"\x7f", b"\x80")

    def __init__(self, pool: list[bytes], dictionary: list[bytes]) -> None:
        self._pool = [_opcodes(pickled) for pickled in pool]
        self._dictionary = dictionary
        self._ways = (
            self._flip,
            self._number,
            self._splice,
            self._swap,
            self._double,
            self._drop,
            self._insert,
        )

    def mutant(self, chance: random.Random) -> bytes:
        """Return a mutant; the same one for the same *chance*."""
        parts = list(chance.choice(self._pool))
        for _ in range(chance.randint(1, 4)):
            chance.choice(self._ways)(parts, chance)
        return b"".join(parts)

    def _flip(self, parts: list[bytes], chance: random.Random) -> None:
        at = chance.randrange(len(parts))
        part = bytearray(parts[at] or b".")
        part[chance.randrange(len(part))] ^= 1 << chance.randrange(8)
        parts[at] = bytes(part)

    def _number(self, parts: list[bytes], chance: random.Random) -> None:
        # The argument becomes the greatest or least of its length: numbers, lengths, memo keys.
        at = chance.randrange(len(parts))
        extreme = chance.choice(self._EXTREMES)
        parts[at] = parts[at][:1] + extreme * (len(parts[at]) - 1)

    def _splice(self, parts: list[bytes], chance: random.Random) -> None:
        other = chance.choice(self._pool)
        begin, end = _range(other, chance)
        at = chance.randrange(len(parts))
        parts[at:at] = other[begin:end]

    def _swap(self, parts: list[bytes], chance: random.Random) -> None:
        a, b = chance.randrange(len(parts)), chance.randrange(len(parts))
        parts[a], parts[b] = parts[b], parts[a]

    def _double(self, parts: list[bytes], chance: random.Random) -> None:
        begin, end = _range(parts, chance)
        parts[end:end] = parts[begin:end] * chance.choice((1, 1, 2, 9))

    def _drop(self, parts: list[bytes], chance: random.Random) -> None:
        begin, end = _range(parts, chance)
        parts[begin:end] = [b""]

    def _insert(self, parts: list[bytes], chance: random.Random) -> None:
        at = chance.randrange(len(parts))
        parts[at:at] = chance.choices(self._dictionary, k=chance.randint(1, 3))


def _opcodes(pickled: bytes) -> list[bytes]:
    begins = [at for _, _, at in pickletools.genops(pickled)]
    return [pickled[a:b] for a, b in itertools.pairwise([*begins, len(pickled)])]


def _range(parts: list[bytes], chance: random.Random) -> tuple[int, int]:
    begin = chance.randrange(len(parts))
    return begin, min(len(parts), begin + chance.randint(1, 12))


def opcode_samples() -> list[bytes]:
    """Return every opcode of pickle with arguments small and large."""
    samples = []
    for opcode in pickletools.opcodes:
        code, kind = opcode.code.encode("latin-1"), opcode.arg
        if kind is None:
            samples.append(code)
        elif kind.n >= 0:
            samples += [code + fill * kind.n for fill in (b"\0", b"\1", b"\x7f", b"\xff")]
        elif kind.n == pickletools.UP_TO_NEWLINE:
            samples += [code + b"os\nsystem\n", code + b"5\n5\n"]
        else:
            width = _LENGTH_BYTES[kind.n]
            samples += [code + n.to_bytes(width, "little") + b"abc" for n in (3, 100)]
            samples.append(code + b"\xff" * (width - 1) + b"\x7f")
    return samples


class Site(NamedTuple):
    """What gadgets work with. One has fired once there is anything in *fired*."""

    fired: str
    target: str
    shell: str
    code: str
    script: str
    pickle: str


def compiled(s: Site) -> Ops:
    return call(ref("builtins", "compile"), s.code, "x", "exec")


def unmarshalled(s: Site) -> Ops:
    code = call(ref("marshal", "loads"), marshal.dumps(compile(s.code, "x", "exec")))
    return call(call(ref("types", "FunctionType"), code, {}))


MKDIR = ref("os", "mkdir")
MODULE = call(ref("builtins", "__import__"), "os")
PICKLE = call(ref("builtins", "__import__"), "pickle")
LIST = ref("builtins", "list")

# Functions that run what they are given, by where they are found.
CALLS: dict[str, Callable[[Site], tuple[Any, ...]]] = {
    "os.system": lambda s: (s.shell,),
    "posix.system": lambda s: (s.shell,),
    "os.mkdir": lambda s: (s.target,),
    "os.open": lambda s: (s.target, os.O_CREAT | os.O_WRONLY),
    "os.spawnvp": lambda s: (0, "touch", ["touch", s.target]),
    "os.posix_spawn": lambda s: ("/bin/sh", ["sh", "-c", s.shell], {}),
    "os.symlink": lambda s: ("x", s.target),
    "subprocess.Popen": lambda s: (["touch", s.target],),
    "subprocess.run": lambda s: (["touch", s.target],),
    "subprocess.check_output": lambda s: (["touch", s.target],),
    "subprocess.getoutput": lambda s: (s.shell,),
    "builtins.eval": lambda s: (s.code,),
    "builtins.exec": lambda s: (s.code,),
    "builtins.open": lambda s: (s.target, "w"),
    "functools.reduce": lambda s: (ref("os", "symlink"), ["x", s.target]),
    "runpy.run_path": lambda s: (s.script,),
    "runpy._run_code": lambda s: (compiled(s), {}),
    "pydoc.pipepager": lambda s: ("", s.shell),
    "pty.spawn": lambda s: (["touch", s.target],),
    "timeit.timeit": lambda s: (s.code, "pass", ref("time", "perf_counter"), 1),
    "cProfile.run": lambda s: (s.code, os.devnull),
    "profile.run": lambda s: (s.code, os.devnull),
    "multiprocessing.util.spawnv_passfds": lambda s: (b"/bin/sh", [b"sh", b"-c", s.shell.encode()], ()),
    "shelve.open": lambda s: (s.target,),
    "dbm.dumb.open": lambda s: (s.target, "c"),
    "sqlite3.connect": lambda s: (s.target,),
    "shutil.copyfile": lambda s: (s.script, s.target),
    "urllib.request.urlretrieve": lambda s: (f"file://{s.script}", s.target),
    "logging.FileHandler": lambda s: (s.target,),
    "venv.create": lambda s: (s.target,),
    "_osx_support._read_output": lambda s: (s.shell,),
    "pickle.loads": lambda s: (Path(s.pickle).read_bytes(),),
    "torch.load": lambda s: (s.pickle, None, PICKLE),
    "torch.save": lambda s: ([], s.target),
    "torch.from_file": lambda s: (s.target, True, 4),
    "torch.hub._load_local": lambda s: (os.path.dirname(s.script), "entry"),
    "torch.storage._load_from_bytes": lambda s: (Path(s.pickle).read_bytes(),),
    "torch.utils.collect_env.run": lambda s: (s.shell,),
    "torch.jit.unsupported_tensor_ops.execWrapper": lambda s: (s.code, {}, {}),
    "torch.fx.graph_module._exec_with_source": lambda s: (s.code, {}),
    "numpy.load": lambda s: (s.pickle, None, True),
    "numpy.save": lambda s: (s.target, [1]),
    "numpy.memmap": lambda s: (s.target, "u1", "w+", 0, (1,)),
    "numpy.f2py.crackfortran.myeval": lambda s: (f"0 * {s.code}",),
    "numpy.testing._private.utils.runstring": lambda s: (s.code, {}),
}

# Chains of calls, each on what the one before returned.
CHAINS: dict[str, Callable[[Site], bytes]] = {
    "os.popen": lambda s: method(call(ref("os", "popen"), s.shell), "read"),
    "builtins.compile": lambda s: call(ref("builtins", "exec"), compiled(s)),
    "builtins.__import__": lambda s: method(MODULE, "mkdir", s.target),
    "builtins.getattr": lambda s: call(attr(MODULE, "mkdir"), s.target),
    "builtins.vars": lambda s: call(
        call(attr(call(ref("builtins", "vars"), MODULE), "get"), "mkdir"), s.target
    ),
    "builtins.globals": lambda s: method(
        call(attr(attr(ref("shutil", "copyfile"), "__globals__"), "get"), "os"), "mkdir", s.target
    ),
    "builtins.map": lambda s: call(LIST, call(ref("builtins", "map"), MKDIR, [s.target])),
    "itertools.starmap": lambda s: call(LIST, call(ref("itertools", "starmap"), MKDIR, [(s.target,)])),
    "operator.attrgetter": lambda s: call(
        call(call(ref("operator", "attrgetter"), "mkdir"), MODULE), s.target
    ),
    "operator.methodcaller": lambda s: method(MODULE, "mkdir", s.target),
    "functools.partial": lambda s: call(call(ref("functools", "partial"), MKDIR, s.target)),
    "importlib.import_module": lambda s: method(
        call(ref("importlib", "import_module"), "posix"), "mkdir", s.target
    ),
    "importlib.machinery.SourceFileLoader": lambda s: method(
        call(ref("importlib.machinery", "SourceFileLoader"), "no_such", s.script), "load_module"
    ),
    "pkgutil.resolve_name": lambda s: call(call(ref("pkgutil", "resolve_name"), "os:mkdir"), s.target),
    "pydoc.locate": lambda s: call(call(ref("pydoc", "locate"), "os.mkdir"), s.target),
    "webbrowser.GenericBrowser": lambda s: method(
        call(ref("webbrowser", "GenericBrowser"), "touch"), "open", s.target
    ),
    "trace.Trace": lambda s: method(call(ref("trace", "Trace"), 0, 0), "run", s.code),
    "bdb.Bdb": lambda s: method(call(ref("bdb", "Bdb")), "run", s.code),
    "code.InteractiveInterpreter": lambda s: method(
        call(ref("code", "InteractiveInterpreter")), "runsource", s.code
    ),
    "ctypes.CDLL": lambda s: method(call(ref("ctypes", "CDLL"), None), "system", s.shell.encode()),
    "marshal.loads": unmarshalled,
    "torch.serialization._legacy_load": lambda s: call(
        ref("torch.serialization", "_legacy_load"),
        call(ref("builtins", "open"), s.pickle, "rb"),
        None,
        PICKLE,
    ),
    "pip.main": lambda s: call(ref("pip._internal", "main"), ["--log", s.target, "cache", "dir"]),
}

# Ways other than GLOBAL and REDUCE to the same end, as whole pickles.
OPCODES: dict[str, Callable[[Site], bytes]] = {
    "protocol 0": lambda s: b"cos\nmkdir\n(V%s\ntR." % s.target.encode(),
    "STACK_GLOBAL": lambda s: b"\x80\x04" + short("os") + short("mkdir") + b"\x93" + _in_tuple(s) + b"R.",
    "dotted STACK_GLOBAL": lambda s: (
        (b"\x80\x04" + short("pathlib") + short("Path.touch") + b"\x93")
        + (short("pathlib") + short("Path") + b"\x93" + _in_tuple(s) + b"R\x85R.")
    ),
    "FRAME": lambda s: pickle.dumps(Reduced(os.mkdir, s.target), 5),
    "INST": lambda s: b"(V%s\nios\nmkdir\n." % s.target.encode(),
    "OBJ": lambda s: b"\x80\x02(" + ref("subprocess", "Popen") + value(["touch", s.target]) + b"o.",
    "NEWOBJ": lambda s: (
        (b"\x80\x02" + ref("builtins", "tuple") + ref("builtins", "map") + b"(" + MKDIR)
        + (value([s.target]) + b"t\x81\x85\x81.")
    ),
    "NEWOBJ_EX": lambda s: (
        (b"\x80\x04" + ref("builtins", "tuple") + call(ref("builtins", "map"), MKDIR, [s.target]))
        + b"\x85}\x92."
    ),
    "BUILD": lambda s: (
        (b"\x80\x02" + call(ref("argparse", "Namespace")) + b"}" + value("__setstate__") + MKDIR)
        + (b"sb" + value(s.target) + b"b.")
    ),
    "BUILD of a partial": lambda s: (
        (b"\x80\x02" + call(ref("functools", "partial"), ref("builtins", "len")) + b"(" + MKDIR)
        + (value((s.target,)) + value({}) + b"Ntb)R.")
    ),
    "EXT1": lambda s: b"\x80\x02\x82\xf1" + _in_tuple(s) + b"R.",
    "EXT2": lambda s: b"\x80\x02\x83" + struct.pack("<H", 4_097) + _in_tuple(s) + b"R.",
    "EXT4": lambda s: b"\x80\x02\x84" + struct.pack("<i", 70_000) + _in_tuple(s) + b"R.",
    "memo": lambda s: b"\x80\x02" + MKDIR + b"q\x00h\x00" + _in_tuple(s) + b"R.",
    "in a dict": lambda s: b"\x80\x02}" + value("a") + call(MKDIR, s.target) + b"s.",
    "behind a good state": lambda s: b"\x80\x02" + value({"a": [1.0]}) + call(MKDIR, s.target) + b"\x86.",
}


class Reduced:
    """What pickle writes as a call of *function*."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._reduced = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self._reduced


def _in_tuple(s: Site) -> bytes:
    return value(s.target) + b"\x85"


def _call_of(path: str) -> Callable[[Site], bytes]:
    module, _, name = path.rpartition(".")
    return lambda s: b"\x80\x02" + call(ref(module, name), *CALLS[path](s)) + b"."


def _chain_of(name: str) -> Callable[[Site], bytes]:
    return lambda s: b"\x80\x02" + CHAINS[name](s) + b"."


GADGETS = {
    **{name: _call_of(name) for name in CALLS},
    **{name: _chain_of(name) for name in CHAINS},
    **OPCODES,
}

"""Files made by hand: pieces of pickles, zips that lie about themselves, manifests that fit all the same."""

from __future__ import annotations

import functools
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import torch
import xxhash

from trainbus.checkpoint.file_format import END_RECORD_BYTES, seal
from trainbus.checkpoint.manifest import Manifest

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
# A date of zero is one that zipfile refuses.
_DATE = 33


class Zip:
    """
    A zip file put together by hand: each record is told what to claim.

    Attributes:
        body: The records written so far.
        directory: Their entries in the central directory.
        count: How many entries there are.
    """

    def __init__(self) -> None:
        self.body = bytearray()
        self.directory = b""
        self.count = 0

    def add(
        self,
        name: str | bytes,
        data: bytes,
        *,
        method: int = 0,
        flags: int = 0,
        size: int | None = None,
        packed_size: int | None = None,
        offset: int | None = None,
        version: int = 20,
    ) -> None:
        """Write a record of *data* as it is; the other arguments are what its entries claim."""
        offset = len(self.body) if offset is None else offset
        size = len(data) if size is None else size
        packed_size = len(data) if packed_size is None else packed_size
        # Version needed, flags, method, time, date, checksum and both sizes, as both headers have them.
        common = (version, flags, method, 0, _DATE, zlib.crc32(data), packed_size, size)
        named = name.encode() if isinstance(name, str) else name
        self.body += _LOCAL.pack(b"PK\3\4", *common, len(named), 0) + named + data
        self.directory += _CENTRAL.pack(b"PK\1\2", 20, *common, len(named), 0, 0, 0, 0, 0, offset) + named
        self.count += 1

    def finish(
        self, *, size: int | None = None, offset: int | None = None, count: int | None = None
    ) -> bytes:
        """Return the file with an empty comment; the arguments are what its end claims."""
        count = self.count if count is None else count
        size = len(self.directory) if size is None else size
        offset = len(self.body) if offset is None else offset
        return bytes(self.body) + self.directory + _END.pack(b"PK\5\6", 0, 0, count, count, size, offset, 0)


def pickle_of(whole: bytes) -> bytes:
    """Return the pickle of a file of torch.save."""
    with zipfile.ZipFile(io.BytesIO(whole)) as opened:
        (name,) = (name for name in opened.namelist() if name.endswith("data.pkl"))
        return opened.read(name)


def archive(pickled: bytes, **data: bytes) -> bytes:
    """Return a zip as torch.save writes it, of a pickle and the bytes of storages by their key's name."""
    made = Zip()
    made.add("archive/data.pkl", pickled)
    made.add("archive/byteorder", b"little")
    for key, one in data.items():
        made.add(f"archive/data/{key.lstrip('_')}", one)
    made.add("archive/version", b"3\n")
    return made.finish()


def sealed(body: bytes, **fields: Any) -> bytes:
    """Return a zip file with a manifest whose digest is right."""
    cut = len(body) - END_RECORD_BYTES
    manifest = Manifest(**{"contents": "object", **fields})
    return body[:cut] + seal(manifest, body[cut:], cut, xxhash.xxh3_128(body[:cut]))[1]


def forged(body: bytes, rest: bytes, size: int | None = None) -> bytes:
    """Return a zip file whose comment has *rest* behind a right size and digest, be it JSON or not."""
    cut = len(body) - 2
    total = 0
    for _ in range(3):  # the size counts its own digits
        head = b'{"format":1,"size":%d,"digest":"%s",' % (total if size is None else size, b"0" * 32)
        total = len(body) + len(head) + len(rest)
    comment = head + rest
    data = body[:cut] + len(comment).to_bytes(2, "little") + comment
    digest = xxhash.xxh3_128_hexdigest(data).encode()
    return data.replace(head, head.replace(b"0" * 32, digest))


def legacy(pickled: bytes) -> bytes:
    """Return *pickled* as a file in the format of torch before 1.6."""
    before = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {"little_endian": True})
    return b"".join(pickle.dumps(part, 2) for part in before) + pickled + pickle.dumps([], 2)


def plain_zip(value: Any) -> bytes:
    """Return what plain torch.save writes."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


MIB = 1 << 20
MEMORY = 16 * MIB  # by how much a hostile file may make the process grow


class Ops(bytes):
    """A piece of a pickle that leaves one value on the stack."""


def value(thing: Any) -> bytes:
    return thing if isinstance(thing, Ops) else pickle.dumps(thing, 2)[2:-1]


def ref(module: str, name: str) -> Ops:
    return Ops(f"c{module}\n{name}\n".encode())


def call(function: Ops, *args: Any) -> Ops:
    return Ops(function + b"(" + b"".join(map(value, args)) + b"tR")


def method(thing: Any, name: str, *args: Any) -> Ops:
    return call(call(ref("operator", "methodcaller"), name, *args), thing)


def attr(thing: Any, name: str) -> Ops:
    return call(ref("builtins", "getattr"), thing, name)


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


def storage(kind: str, numel: int, key: str = "0") -> Ops:
    """Name a storage of the file."""
    named = (value("storage"), ref("torch", kind), value(key), value("cpu"), value(numel))
    return Ops(b"(" + b"".join(named) + b"tQ")


def tensor(kind: str, numel: int, *shape: int, key: str = "0") -> Ops:
    """Build a contiguous tensor on a storage of the file."""
    strides = tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))
    hooks = call(ref("collections", "OrderedDict"))
    rebuild = ref("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage(kind, numel, key), 0, shape, strides, False, hooks)


GOOD = b"\x80\x02" + tensor("FloatStorage", 16, 16) + b"."
BIG = b"\x80\x02" + tensor("FloatStorage", 16 * MIB, 16 * MIB) + b"."  # of 64 MiB
NUMBERS = bytes(64)


def good(**options: Any) -> Zip:
    """Return a good file, its storage written with *options*, that is not finished yet."""
    made = Zip()
    made.add("archive/data.pkl", GOOD)
    made.add("archive/data/0", NUMBERS, **options)
    made.add("archive/version", b"3\n")
    return made


def bomb(**options: Any) -> Zip:
    """Return a file of some kilobytes that holds 64 MiB of zeros, deflated."""
    made = Zip()
    made.add("archive/data.pkl", BIG)
    made.add("archive/version", b"3\n")
    made.add("archive/data/0", deflated_zeros(), **{"method": 8, "size": 64 * MIB, **options})
    return made


@functools.cache
def deflated_zeros() -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    return b"".join([packer.compress(bytes(MIB)) for _ in range(64)]) + packer.flush()


def overlapping() -> bytes:
    """Many records that are all the same megabyte."""
    made = good()
    at = len(made.body)
    made.add("archive/data/x", bytes(MIB))
    for key in range(64):
        made.add(f"archive/data/{key + 1}", b"", size=MIB, packed_size=MIB, offset=at)
    return made.finish()


def twice() -> bytes:
    made = good()
    made.add("archive/data/0", NUMBERS)
    return made.finish()


def in_front() -> bytes:
    """Records that begin behind something else, with offsets that count it."""
    made = Zip()
    made.body += b"PK\3\4" + bytes(60)
    made.add("archive/data.pkl", GOOD)
    made.add("archive/data/0", NUMBERS)
    made.add("archive/version", b"3\n")
    return made.finish()


def zip64(
    *, size: int | None = None, offset: int | None = None, entries: int | None = None, at: int = 0
) -> bytes:
    """Return a good file with a zip64 end that claims the arguments; *at* moves what its locator says."""
    made = good()
    begin = len(made.body)
    entries = made.count if entries is None else entries
    size = len(made.directory) if size is None else size
    record = struct.pack(
        "<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, size, begin if offset is None else offset
    )
    end_of_directory = begin + len(made.directory)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end_of_directory + at, 1)
    end = _END.pack(b"PK\5\6", 0, 0, made.count, made.count, len(made.directory), begin, 0)
    return bytes(made.body) + made.directory + record + locator + end


def two_directories() -> bytes:
    """A file with a harmless directory in the usual place, and one of a bomb where the locator points."""
    made = bomb()
    begin, directory, count = len(made.body), made.directory, made.count
    made.directory, made.count = b"", 0
    harmless = Zip()
    harmless.add("archive/data.pkl", BIG)
    harmless.add("archive/version", b"3\n")
    assert made.body.startswith(harmless.body)
    second = begin + len(directory) + 56
    records = [
        struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, n, n, len(listed), at)
        for n, listed, at in ((count, directory, begin), (harmless.count, harmless.directory, second))
    ]
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, begin + len(directory), 1)
    end = _END.pack(b"PK\5\6", 0, 0, 2, 2, len(harmless.directory), second, 0)
    return b"".join((made.body, directory, records[0], harmless.directory, records[1], locator, end))


def letters() -> bytes:
    """A megabyte that the pickle names in 100 ways, which are one if case does not count."""
    keys = ["".join("aA"[number >> bit & 1] for bit in range(7)) for number in range(100)]
    tensors = [tensor("FloatStorage", MIB // 4, MIB // 4, key=key) for key in keys]
    made = Zip()
    made.add("archive/data.pkl", b"\x80\x02(" + b"".join(tensors) + b"t.")
    made.add("archive/data/aaaaaaa", bytes(MIB))
    made.add("archive/version", b"3\n")
    return made.finish()


REFUSED: dict[str, Callable[[], bytes]] = {
    "deflated": lambda: bomb().finish(),
    "deflated, said to be stored": lambda: bomb(method=0).finish(),
    "deflated, said to be small": lambda: bomb(size=64).finish(),
    "deflated pickle": lambda: _with_pickle(method=8),
    "deflated to its own size": lambda: _deflated_to_its_own_size(),
    "version to come": lambda: good(version=99).finish(),
    "name that is no text": lambda: _with_name(b"\xff\xfe", flags=1 << 11),
    "unknown method": lambda: good(method=99).finish(),
    "encrypted": lambda: good(flags=1).finish(),
    "encrypted pickle": lambda: _with_pickle(flags=1),
    "record twice": twice,
    "overlapping": overlapping,
    "something in front": in_front,
    "behind the end": lambda: good(offset=2**31).finish(),
    "size behind the end": lambda: good(size=2**31, packed_size=2**31).finish(),
    "sizes that differ": lambda: good(size=2**31).finish(),
    "sizes that differ a little": lambda: good(packed_size=60).finish(),
    "pickle size behind the end": lambda: _with_pickle(size=2**31 - 1, packed_size=2**31 - 1),
    "no records": lambda: Zip().finish(),
    "directory behind the end": lambda: good().finish(offset=2**31),
    "directory larger than the file": lambda: good().finish(size=2**31),
    "directory in the records": lambda: good().finish(offset=0),
    "no pickle": lambda: _without_pickle(),
    "zip64 size": lambda: zip64(size=2**62),
    "zip64 negative size": lambda: zip64(size=2**64 - 1),
    "zip64 offset": lambda: zip64(offset=2**62),
    "zip64 count": lambda: zip64(entries=2**62),
}
OTHERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "zeros": lambda: bytes(MIB),
    "no zip": lambda: b"x" * MIB,
    "only an end": lambda: b"PK\5\6" + bytes(18),
    "many ends": lambda: b"PK\3\4" + b"PK\5\6" * MIB,
    "tensor of any size before 1.6": lambda: legacy(_unreadable_storage()),
}


def _with_pickle(**options: Any) -> bytes:
    made = Zip()
    made.add("archive/data.pkl", GOOD, **options)
    made.add("archive/data/0", NUMBERS)
    made.add("archive/version", b"3\n")
    return made.finish()


def _with_name(name: bytes, **options: Any) -> bytes:
    made = good()
    made.add(name, b"x", **options)
    return made.finish()


def _deflated_to_its_own_size() -> bytes:
    """A deflated record as long as what it becomes: three zeros as they are, empty blocks, the rest."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    rest = packer.compress(NUMBERS[3:]) + packer.flush()
    packed = b"\0\3\0\xfc\xff" + bytes(3) + b"\0\0\0\xff\xff" * 10 + rest
    assert len(packed) == len(NUMBERS) and zlib.decompress(packed, -15) == NUMBERS
    made = Zip()
    made.add("archive/data.pkl", GOOD)
    made.add("archive/data/0", packed, method=8)
    made.add("archive/version", b"3\n")
    return made.finish()


def _without_pickle() -> bytes:
    made = Zip()
    made.add("archive/version", b"3\n")
    return made.finish()


def _unreadable_storage() -> bytes:
    named = (value("storage"), ref("torch", "FloatStorage"), value("0"), value("cpu"), value(2**34))
    return b"\x80\x02(" + b"".join(named) + b"NtQ."

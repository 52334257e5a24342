"""What is in a file, by names, shapes and dtypes, without loading a tensor. Needs no torch, runs nothing."""

from __future__ import annotations

import io
import math
import os
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple

from trainbus.checkpoint.file_format import WHAT_TO_NAME, WITHOUT_PICKLE, open_regular
from trainbus.errors import CheckpointCorruptError

__all__ = ["Opaque", "TensorOutline", "read_outline"]

_MOST_BYTES = 256 << 20  # of the pickle, which holds names and plain values, no tensor's data
_DTYPES = {
    "BFloat16Storage": "bfloat16",
    "BoolStorage": "bool",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "QInt32Storage": "qint32",
    "QInt8Storage": "qint8",
    "QUInt8Storage": "quint8",
    "ShortStorage": "int16",
    "UntypedStorage": "uint8",
}


@dataclass(frozen=True)
class TensorOutline:
    """
    A tensor as its file describes it.

    Attributes:
        dtype: E.g. ``"float32"``.
        shape: Its sizes.
        nbytes: Of its values.
        storage: Name of the record with its data, "" for a tensor without one of its own.
        view: What of the storage it shows: offset and strides, in elements.
        layout: ``"strided"``, or ``"sparse"``, whose *nbytes* are those of its parts.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    storage: str
    view: tuple[int, tuple[int, ...]]
    layout: str = "strided"


class Opaque:
    """
    Stands for an object of a class that is none of plain values'. Nothing of the class is imported or run.

    Attributes:
        name: Of the class or function, with its module.
    """

    name = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Take whatever the pickle gives."""

    def __setstate__(self, state: Any) -> None:
        """Take the state, keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Take an item, keep nothing."""

    def append(self, item: Any) -> None:
        """Take an item, keep nothing."""

    extend = add = append


class _Storage(NamedTuple):
    dtype: str
    key: str
    itemsize: int


def read_outline(path: str | os.PathLike[str]) -> Any:
    """
    Return what was saved in a ``torch.save`` file, with a `TensorOutline` in each tensor's place.

    Reads the zip's directory and the pickle in it. What is neither tensor nor plain becomes `Opaque`.

    Raises:
        CheckpointCorruptError: The file cannot be read as one of ``torch.save``.
        OSError: It cannot be opened.
    """
    with open_regular(path) as file:
        try:
            return _read(file, path)
        except (CheckpointCorruptError, OSError):
            raise
        except Exception as error:  # whatever a pickle that nobody wrote can bring about
            raise CheckpointCorruptError(
                path, f"it cannot be read as a file of torch.save ({error})"
            ) from error


def _read(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    archive = zipfile.ZipFile(file)
    records = {record.filename: record for record in archive.infolist()}
    name = next((name for name in records if name.endswith("/data.pkl")), None)
    if name is None:
        raise CheckpointCorruptError(path, WITHOUT_PICKLE, instead=WHAT_TO_NAME)
    if records[name].file_size > _MOST_BYTES:
        raise CheckpointCorruptError(
            path,
            f"its names and plain values take {records[name].file_size} bytes, and {_MOST_BYTES} are read",
        )
    folder = name.removesuffix("data.pkl")
    sizes = {
        name.removeprefix(f"{folder}data/"): record.file_size
        for name, record in records.items()
        if name.startswith(f"{folder}data/")
    }
    content = io.BytesIO(archive.read(name))
    try:
        return _Outliner(content, sizes).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # what Python's unpickler raises has few words
        reason = f"its pickle is cut off or damaged: {type(error).__name__} {error}".rstrip()
        raise pickle.UnpicklingError(reason) from error


class _Outliner(pickle._Unpickler):
    """
    Takes nothing from outside but `OrderedDict` and `tuple`: every other name stands for itself.

    The unpickler in C has a table of all numbers up to the greatest by which a value is called, so that
    one flipped bit makes it take gigabytes. This one has a dict, and takes half as long again.
    """

    def __init__(self, stream: Any, sizes: Mapping[str, int]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._sizes = sizes
        self._classes: dict[str, type[Opaque]] = {}

    # Set by `load`.
    read: Callable[[int], bytes]
    append: Callable[[Any], None]

    def load_bytearray8(self) -> None:
        """Take bytes that are there, where the unpickler would make room for what is said first."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: load_bytearray8,
    }

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a name in the pickle."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch._utils" and name in _REBUILDERS:
            return _REBUILDERS[name]
        whole = f"{module}.{name}"
        if whole not in self._classes:
            self._classes[whole] = type("Opaque", (Opaque,), {"name": whole})
        return self._classes[whole]

    def persistent_load(self, pid: Any) -> _Storage:
        """Return what is known of a storage: ``("storage", its class, record, device, elements)``."""
        _, kind, key, _, elements = pid
        dtype = _DTYPES.get(kind.name.rpartition(".")[2], kind.name)
        return _Storage(dtype, str(key), self._sizes.get(str(key), 0) // max(1, int(elements)))


def _strided(storage: _Storage, offset: Any, size: Any, stride: Any, *rest: Any) -> TensorOutline:
    shape = tuple(int(one) for one in size)
    view = (int(offset), tuple(int(one) for one in stride))
    return TensorOutline(storage.dtype, shape, math.prod(shape) * storage.itemsize, storage.key, view)


def _of_dtype(
    storage: _Storage, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> TensorOutline:
    # Saved with a storage of bytes, for dtypes that have none of their own; their names say their bits.
    name = dtype.name.removeprefix("torch.")
    bits = re.search(r"\d+", name)
    itemsize = max(1, int(bits.group()) // 8) if bits else 1
    return _strided(_Storage(name, storage.key, itemsize), offset, size, stride)


def _sparse(layout: Any, parts: Any) -> TensorOutline:
    tensors = [part for part in parts if isinstance(part, TensorOutline)]
    shape = next(part for part in parts if isinstance(part, tuple))
    return TensorOutline(
        tensors[-1].dtype, shape, sum(one.nbytes for one in tensors), "", (0, ()), layout="sparse"
    )


def _parameter(data: TensorOutline, *rest: Any) -> TensorOutline:
    return data


_REBUILDERS = {
    "_rebuild_parameter": _parameter,
    "_rebuild_parameter_with_state": _parameter,
    "_rebuild_qtensor": _strided,
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_tensor": _strided,
    "_rebuild_tensor_v2": _strided,
    "_rebuild_tensor_v3": _of_dtype,
}

"""Which tensors of a damaged file are hurt, as far as the zip's own sums can tell."""

from __future__ import annotations

import os
import zipfile
import zlib

import torch

from trainbus.checkpoint.file_format import open_regular
from trainbus.checkpoint.load import load_file
from trainbus.checkpoint.nesting import path_to, tensors_in
from trainbus.errors import TrainbusError

__all__ = ["damaged_parts"]

_READ_AT_A_TIME = 1 << 20


def damaged_parts(path: str | os.PathLike[str]) -> list[str]:
    """
    Return what of a file is damaged, written as code (``state['module']['weight']``) or as records.

    Empty when the sums of all records are right: then the damage is between them. Blocks while the
    file is read, and once more, into memory, to name the tensors.

    Raises:
        OSError: It cannot be read.
    """
    records = _damaged_records(path)
    names = _names_of_storages(path) if records else {}
    return [names.get(record.rpartition("/")[2], record) for record in records]


def _damaged_records(path: str | os.PathLike[str]) -> list[str]:
    found = []
    with open_regular(path) as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception:
            return []  # without a directory there are no sums
        for record in archive.infolist():
            try:
                with archive.open(record) as stream:
                    while stream.read(_READ_AT_A_TIME):
                        pass
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError):
                found.append(record.filename)
    return found


def _names_of_storages(path: str | os.PathLike[str]) -> dict[str, str]:
    """
    Return where in the state each storage is used, by the name of its record; empty if that is not sure.

    ``torch.save`` numbers storages in the order in which it meets them, which is that of the state.
    """
    try:
        state, _ = load_file(path, verify=False)
        tensors = tensors_in(state)
    except (TrainbusError, OSError, TypeError, MemoryError):
        return {}
    names: dict[int, str] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided:
            names.setdefault(tensor.untyped_storage().data_ptr(), path_to(state, tensor))
    with open_regular(path) as file:
        sizes = [
            record.file_size for record in zipfile.ZipFile(file).infolist() if "/data/" in record.filename
        ]
    if len(names) != len(sizes):
        return {}
    return {str(number): name for number, name in enumerate(names.values())}

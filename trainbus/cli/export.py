"""``trainbus export``: the weights of a checkpoint as a safetensors file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import typer

from trainbus.checkpoint.load import load_checkpoint
from trainbus.checkpoint.manifest import Manifest
from trainbus.cli.whole_file import write_whole
from trainbus.errors import MissingExtraError, TrainbusError

__all__ = ["run"]

_SUFFIX = ".safetensors"


def run(file: str, target: str, *, force: bool, as_json: bool) -> None:
    """
    Write the weights in *file* to *target*, durably: a crash leaves what was there or the new file.

    Of a full checkpoint the module's are taken. Names of nested dicts, as of several modules, are joined
    with dots. Of tensors that are one and the same only the first is written; the others' names are in the
    metadata with its name, as `safetensors.torch.load_model` expects them.

    Args:
        file: A checkpoint, or any file of ``torch.save`` that holds weights; verified if it has a digest.
        target: Where to; its folder must be there.
        force: Replace a file that is there.
        as_json: Print one object, ``path``, ``tensors``, ``bytes`` and ``shared``, instead of a sentence.

    Raises:
        typer.BadParameter: *target* has another suffix or is there, or *file* holds no weights.
        MissingExtraError: safetensors is not installed.
    """
    target = os.path.expanduser(target)
    if not target.endswith(_SUFFIX):
        raise typer.BadParameter(f"{target!r} does not end in {_SUFFIX}, and `export` writes nothing else.")
    if os.path.lexists(target) and not force:
        raise typer.BadParameter(f"{target!r} is there already. Give --force to replace it.")
    try:
        from safetensors.torch import save
    except ModuleNotFoundError as error:
        raise MissingExtraError('export needs safetensors: pip install "trainbus[export]"') from error
    state, manifest = _read(file)
    tensors, shared = _once(dict(_named(_weights(state, manifest), "", file)))
    data = save(tensors, metadata={**_metadata(manifest), **shared})
    try:
        write_whole(target, data)
    except OSError as error:
        sys.exit(f"trainbus: cannot write {target!r}: {error.strerror}. What was there before still is.")
    if as_json:
        print(json.dumps({"path": target, "tensors": len(tensors), "bytes": len(data), "shared": shared}))
        return
    more = f", {len(shared)} name(s) that share one of them in its metadata" if shared else ""
    print(f"{target}: {len(tensors)} tensors, {len(data) / 1e6:,.1f} MB{more}.")


def _read(file: str) -> tuple[Any, Manifest | None]:
    try:
        return load_checkpoint(file)
    except (TrainbusError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def _weights(state: Any, manifest: Manifest | None) -> Any:
    return state["module"] if manifest is not None and manifest.contents == "state" else state


def _named(weights: Any, place: str, file: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors below *place* with their names; refuse anything else."""
    if not isinstance(weights, Mapping):
        kind = type(weights).__name__
        raise typer.BadParameter(
            f"{file!r} holds {f'{kind} {place!r}' if place else f'no dict but {kind}'}, and safetensors are "
            "named tensors only. Export a file of weights or a full checkpoint."
        )
    for name, value in weights.items():
        whole = f"{place}.{name}" if place else str(name)
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            yield whole, value.detach()
        else:
            yield from _named(value, whole, file)


def _once(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Return the tensors, each in memory of its own, and the names left out with those they stand for."""
    kept: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, tensor in tensors.items():
        identity = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        first = kept.setdefault(identity if tensor.numel() else name, name)
        if first != name:
            shared[name] = first
    return {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if name not in shared
    }, shared


def _metadata(manifest: Manifest | None) -> dict[str, str]:
    facts = {"format": "pt"}  # what other tools look for
    if manifest is None:
        return facts
    for name in ("run_id", "epoch", "global_step", "monitor", "score", "created"):
        facts[f"trainbus.{name}"] = str(getattr(manifest, name))
    return {**facts, "trainbus.logs": json.dumps(dict(manifest.logs))}

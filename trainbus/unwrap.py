"""The module inside its wrappers, so that saved names carry no ``module.`` and no ``_orig_mod.``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["unwrap"]


def unwrap(model: Any) -> Any:
    """Return *model* without DDP, DataParallel and ``torch.compile``; a dict of models, each so."""
    if isinstance(model, Mapping):
        return {name: unwrap(one) for name, one in model.items()}
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model

"""Which of torch's operations make memory of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Notes the operations that return memory of their own: neither an argument's nor in the given places."""

    def __init__(self, places: list[range]) -> None:
        super().__init__()
        self.found: list[str] = []
        self._places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not self._is_known(result, args):
            self.found.append(str(func))
        return result

    def _is_known(self, tensor: torch.Tensor, args: Any) -> bool:
        storage = tensor.untyped_storage()
        if storage.nbytes() == 0:
            return True
        given = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        return storage.data_ptr() in given or any(storage.data_ptr() in place for place in self._places)

"""What the callbacks that save have in common: file names of their own."""

from __future__ import annotations

import os
from typing import Any

from trainbus.callback import Callback
from trainbus_callbacks.naming import NameTemplate

__all__ = ["SavingCallback"]


class SavingCallback(Callback):
    """
    A callback that saves under a template of names.

    Args:
        filepath: The template, see `NameTemplate`.
    """

    def __init__(self, filepath: str | os.PathLike[str]) -> None:
        self._template = NameTemplate(filepath)

    def refuse_name_of_another(self, handler: Any) -> None:
        """
        Have names that no other callback of the run has. To be called at ``train_begin``.

        What one saves would take the place of the other's: a run that was interrupted, which is not resumed
        from by itself, that of the newest, or the newest that of the best.

        Raises:
            ValueError: Naming both.
        """
        for other in handler.callbacks.values():
            if not isinstance(other, SavingCallback) or other is self:
                continue
            if other._template.place == self._template.place:
                raise ValueError(
                    f"{self.state_key} and {other.state_key} are two callbacks with one name for their "
                    f"files, {self._template.text!r}: they would overwrite each other's. Give one of them "
                    "another name."
                )

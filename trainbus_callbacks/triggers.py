"""When to save. Pure functions."""

from __future__ import annotations

__all__ = ["batches_between_saves"]


def batches_between_saves(save_freq: str | int) -> int | None:
    """
    Return how many training batches lie between two saves; None: one save at the end of each epoch.

    Raises:
        ValueError: If *save_freq* is neither ``"epoch"`` nor a positive int. A bool is none.
    """
    if save_freq == "epoch":
        return None
    if type(save_freq) is int and save_freq > 0:
        return save_freq
    raise ValueError(
        f"save_freq must be 'epoch' or a positive int (batches from one save to the next), got {save_freq!r}."
    )

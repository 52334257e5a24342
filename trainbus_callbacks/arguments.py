"""Checks of arguments that several callbacks take."""

from __future__ import annotations

__all__ = ["require_count"]


def require_count(name: str, value: object, counted: str, *, least: int, or_none: bool = False) -> None:
    """
    Refuse what does not count anything.

    Args:
        name: Of the argument.
        value: What was given for it.
        counted: What it counts, e.g. ``"epochs"``.
        least: The smallest number allowed.
        or_none: Allow None.

    Raises:
        ValueError: If *value* is no int of at least *least*. A bool is none.
    """
    if or_none and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        rule = f"an int of at least {least}{' or None' * or_none}"
        raise ValueError(f"{name} counts {counted} and must be {rule}, got {value!r}.")

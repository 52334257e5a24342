"""How the commands write what is not theirs, and numbers."""

from __future__ import annotations

__all__ = ["printable"]


def printable(text: str) -> str:
    """Return *text* with a question mark for what could begin a line or colour the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)

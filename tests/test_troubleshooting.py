"""The page of messages holds those that the code gives: each is real, and none that matters is missing."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

import trainbus.errors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs/troubleshooting.md"
SOURCES = sorted([*ROOT.glob("trainbus/**/*.py"), *ROOT.glob("trainbus_callbacks/*.py")])
BLOCK = re.compile(r"^```text\n(.*?)^```", re.MULTILINE | re.DOTALL)
FORMAT = re.compile(r"%[-.*\d]*[sdrgf]|%%")
GAP = "\0"  # where a value goes in
LEAST = 12  # letters that make a sentence
LONGEST_VALUE = 75  # letters that a value may have in the page's messages

# What is said to those who test or use the command line stands on their pages.
ELSEWHERE = ("trainbus/testing/", "trainbus/cli/")
SAID_BY = {"log", "warning", "error", "exception", "warn", "_warn", "_warn_once", "refuse"}
RAISED = {name for name in trainbus.errors.__all__ if name.endswith(("Error", "Skipped"))}


def said(node: ast.AST, *, is_logged: bool = False) -> str | None:
    """Return a string as it is written, with gaps for what is filled in; None if it is no string."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return FORMAT.sub(GAP, node.value) if is_logged else node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(GAP if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (said(node.left) or GAP) + (said(node.right) or GAP)
    return None


def literal(message: str) -> int:
    return len(message.replace(GAP, "").strip())


@functools.cache
def written() -> list[re.Pattern[str]]:
    """Return all sentences in the code, wherever they stand."""
    found = set()
    for path in SOURCES:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in nodes:
            if id(node) in parts:
                continue
            for message in (said(node), said(node, is_logged=True)):
                if message is not None and literal(message) > LEAST:
                    found.add(message)
    return [pattern(message) for message in found]


def met_by_users() -> dict[str, str]:
    """Return warnings, also those in the log, and the errors of trainbus's own, and where they are given."""
    found: dict[str, str] = {}
    for path in SOURCES:
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(ELSEWHERE):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func).split(".")[-1]
            if name in RAISED or (name == "__init__" and place == "trainbus/errors.py"):
                arguments = node.args[:1]
            else:
                arguments = node.args if name in SAID_BY else []
            for argument in arguments:
                message = said(argument, is_logged=name in SAID_BY)
                if message is not None and literal(message) > LEAST:
                    found.setdefault(message, f"{place}:{argument.lineno}")
    return found


def pattern(message: str) -> re.Pattern[str]:
    """Return what finds a message with its gaps filled; its own words are groups."""
    words = [re.escape(part) for part in re.sub(r"\s+", " ", message).split(GAP)]
    return re.compile("[^\0]*?".join(f"({one})" for one in words))


def longest_gap(message: str) -> int:
    """Return how many characters in a row are in no sentence of the code."""
    known = bytearray(len(message))
    for one in written():
        for match in one.finditer(message):
            for group in range(1, one.groups + 1):
                start, end = match.span(group)
                known[start:end] = b"x" * (end - start)
    return max(map(len, known.decode().split("x")))


def on_the_page() -> list[str]:
    return [" ".join(text.split()) for text in BLOCK.findall(PAGE.read_text())]


class TestPage:
    @pytest.mark.parametrize("message", on_the_page(), ids=lambda message: message[:50])
    def test_each_message_is_one_that_the_code_gives(self, message):
        """A message of the page is one of the code's, from its first letter to its last."""
        assert any(one.fullmatch(message) for one in written())
        assert longest_gap(message) <= LONGEST_VALUE

    def test_none_is_left_out(self):
        """Each warning, and each error of trainbus's own, has its place on the page."""
        page = on_the_page()
        missing = {
            message.replace(GAP, "…"): place
            for message, place in met_by_users().items()
            if not any(pattern(message).search(one) for one in page)
        }
        assert not missing, "docs/troubleshooting.md should say what causes these, and what to do"

"""File-name templates: parsed and checked once, filled for each save. Pure: touches no disk.

A template is not a format string. A field's name is looked up literally, so that
``{val/loss:.3f}`` and ``{val.loss:.3f}`` are names like any other and no attribute or
index can be reached; what is filled in cannot make folders or leave the name's own.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from trainbus.errors import did_you_mean

__all__ = ["COUNTERS", "MAX_NAME_BYTES", "FilledName", "NameTemplate", "require_counters"]

MAX_NAME_BYTES = 200

COUNTERS = ("epoch", "batch", "global_step")

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<name>[^{}!:\[\]]+)(?::(?P<spec>[^{}]*))?\}|(?P<text>[^{}\0]+)")
_SPEC = re.compile(r"(?:.?[<>=^])?[-+ ]?0?\d{0,2}(?:\.\d{1,2})?[deEfFgG]?")
_UNSAFE = re.compile(r"[^A-Za-z0-9._=+-]")
_EXTENSION = re.compile(r"\.[A-Za-z][A-Za-z0-9]*\Z")
_LABEL = re.compile(r"[A-Za-z0-9]+=\Z")
# Longest value when a name is about to get too long: format(x, ".6g") of any float.
_SHORT_SPEC, _SHORT_LENGTH = ".6g", 13
# Stands for a field without a value until the separators around it are settled.
_HOLE = "\0"
_HOLES = re.compile(rf"(?:[_.=-]*{_HOLE})+[_.=-]*")
# Stands for any value while a pattern is being built.
_ANY = "\1"
_FILL = re.compile(r".(?=[<>=^])")


class _Field(NamedTuple):
    name: str
    spec: str


class FilledName(NamedTuple):
    """
    What a template became.

    Attributes:
        path: Folder and file name.
        missing: The fields that had no value, in order; they are not in the name.
    """

    path: str
    missing: tuple[str, ...]


def _no_path(template: object) -> TypeError:
    return TypeError(f"filepath must be a str or a path, e.g. 'best.pt', got {template!r}.")


class NameTemplate:
    """
    A path whose last component holds fields such as ``{epoch:03d}`` or ``{val_loss:.4f}``.

    The text around the fields is kept as written, ``~`` expanded. Fields are ``epoch``
    (1-based), ``batch`` (completed in this epoch), ``global_step`` and every name of the logs;
    a log of a counter's name does not disturb the counter. ``{{`` and ``}}`` are braces.

    Args:
        template: What the user wrote.

    Attributes:
        text: What the user wrote.
        folder: Everything before the last component, ``"."`` if there is nothing.
        last: The last component as written.

    Raises:
        TypeError: If *template* is no path.
        ValueError: If it cannot be read, or names no file.
    """

    def __init__(self, template: str | os.PathLike[str]) -> None:
        try:
            text = os.fspath(template)
        except TypeError:
            raise _no_path(template) from None
        if not isinstance(text, str):
            raise _no_path(template)
        self.text = text
        folder, self._parts = _split(_parse(text), text)
        self.folder = os.path.expanduser(folder) or "."
        self.last = "".join(map(_as_written, self._parts))
        self._prefix = os.path.join(os.path.expanduser(folder), "") if folder else ""
        self._check_length()

    def __repr__(self) -> str:
        return f"NameTemplate({self.text!r})"

    @property
    def place(self) -> str:
        """The template with its folder made absolute, to tell if two are the same."""
        return os.path.join(os.path.abspath(self.folder), self.last)

    def path_of(self, filename: str) -> str:
        """Return the path of a file of this name, as `fill` writes it."""
        return self._prefix + filename

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in order."""
        return tuple(part.name for part in self._parts if isinstance(part, _Field))

    def fill(
        self,
        *,
        epoch: int,
        batch: int,
        global_step: int,
        logs: Mapping[str, float],
        known: Iterable[str] = (),
        batch_mode: bool = False,
    ) -> FilledName:
        """
        Return the path of a save and the fields that had no value.

        A field without a value goes, with the separator and the ``label=`` it leaves; the epoch
        (with *batch_mode*: and the step) is added instead, so that names still differ.

        Args:
            epoch: 1-based.
            batch: Training batches completed in this epoch.
            global_step: Training batches completed over the run.
            logs: The metrics among `fields`, by name.
            known: Names of all metrics, to tell a misspelt field's label by.
            batch_mode: Whether saves happen between the ends of epochs.
        """
        values: dict[str, float] = {**logs, "epoch": epoch, "batch": batch, "global_step": global_step}
        missing = tuple(name for name in self.fields if name not in values)
        suffix = self._suffix(str(epoch), str(global_step) if batch_mode else None) if missing else ""
        nearest = {name: _nearest(name, {*known, *logs}) for name in missing}
        name = self._assemble([_value(field, values) for field in self._fields()], suffix, nearest)
        if len(os.fsencode(name)) > MAX_NAME_BYTES:
            short = [_value(field._replace(spec=_SHORT_SPEC), values) for field in self._fields()]
            name = self._assemble(short, suffix, nearest)
        return FilledName(self.path_of(name), missing)

    def matches(self, filename: str) -> bool:
        """Tell whether *filename* (without folder) can have been written under this template."""
        return any(pattern.fullmatch(filename) for pattern in self._patterns)

    @functools.cached_property
    def _patterns(self) -> list[re.Pattern[str]]:
        # Each set of log fields may have been missing.
        choices = [(_ANY,) if name in COUNTERS else (_ANY, None) for name in self.fields]
        patterns = []
        for values in itertools.product(*choices):
            names = {self._assemble(values, "", {})}
            if None in values:
                names = {self._assemble(values, self._suffix(_ANY, step), {}) for step in (None, _ANY)}
            patterns += [re.compile(re.escape(name).replace(_ANY, self._any_number)) for name in names]
        return patterns

    @property
    def _any_number(self) -> str:
        """A pattern of what any field may become, with the characters that fill one up to its width."""
        found = filter(None, (_FILL.match(field.spec) for field in self._fields()))
        fills = re.escape("".join(sorted({_UNSAFE.sub("_", fill[0]) for fill in found})))
        # One class, since several that overlap would try all ways to divide a long name among them.
        return f"(?:[-+._eE0-9{fills}]+|[-+_{fills}]*(?:inf|nan|INF|NAN)[_{fills}]*)"

    def _fields(self) -> Iterator[_Field]:
        return (part for part in self._parts if isinstance(part, _Field))

    def _suffix(self, epoch: str, step: str | None) -> str:
        parts = [] if "epoch" in self.fields else [f"epoch{epoch}"]
        if step is not None and "global_step" not in self.fields:
            parts.append(f"step{step}")
        return "_".join(parts)

    def _assemble(self, values: Sequence[str | None], suffix: str, nearest: Mapping[str, str]) -> str:
        """Return the name with *values* for its fields (None: without), *suffix* before its extension."""
        remaining = iter(values)
        name, text = "", ""
        for part in self._parts:
            if not isinstance(part, _Field):
                text = part
                name += text
                continue
            value = next(remaining)
            if value is None:
                label = _label(text, part.name, nearest.get(part.name))
                value, name = _HOLE, name[: len(name) - len(label)]
            name, text = name + value, ""
        last = self._parts[-1]
        extension = _EXTENSION.search(last) if isinstance(last, str) else None
        stem = name[: len(name) - len(extension[0])] if extension else name
        stem = _HOLES.sub(functools.partial(_close_hole, stem), stem)
        stem = "_".join(filter(None, (stem, suffix)))
        return self._visible(stem + (extension[0] if extension else ""))

    def _visible(self, name: str) -> str:
        """Return *name* such that a value at its begin makes no hidden file and nothing like an option."""
        return f"_{name}" if isinstance(self._parts[0], _Field) and name.startswith((".", "-")) else name

    def _check_length(self) -> None:
        literal = sum(len(os.fsencode(part)) for part in self._parts if isinstance(part, str))
        room = MAX_NAME_BYTES - literal - _SHORT_LENGTH * len(self.fields)
        # What may be added for fields without a value.
        room -= len("_epoch_step") + 2 * _SHORT_LENGTH if set(self.fields) - set(COUNTERS) else 0
        room -= isinstance(self._parts[0], _Field)  # see _visible
        if room < 0:
            raise ValueError(
                f"Cannot use {self.text!r}: with its fields filled, its last component may exceed "
                f"{MAX_NAME_BYTES} bytes. Shorten it by {-room} bytes."
            )


def require_counters(template: NameTemplate, moment: str) -> None:
    """
    Refuse a template with a metric in it, because which metrics there are depends on the *moment*.

    Raises:
        ValueError: Naming the first field that is none of `COUNTERS`.
    """
    other = next((name for name in template.fields if name not in COUNTERS), None)
    if other is not None:
        raise ValueError(
            f"filepath has the field {other!r}, and which metrics there are depends on the moment of "
            f"{moment}. Use {', '.join(COUNTERS)}."
        )


def _parse(text: str) -> list[str | _Field]:
    """Return literal text (each run of it in one piece) and fields, in order."""
    parts: list[str | _Field] = []
    position = 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            raise ValueError(
                f"Cannot read the template {text!r} at position {position} ({text[position:]!r}): a field is "
                "{name} or {name:spec}, its name free of {}!:[], and a brace itself is written twice."
            )
        position = token.end()
        if token["name"] is not None:
            parts.append(_checked(_Field(token["name"], token["spec"] or ""), text))
            continue
        literal = token["text"] or token[0][0]
        if parts and isinstance(last := parts[-1], str):
            parts[-1] = last + literal
        else:
            parts.append(literal)
    return parts


def _as_written(part: str | _Field) -> str:
    if isinstance(part, str):
        return part.replace("{", "{{").replace("}", "}}")
    return f"{{{part.name}:{part.spec}}}" if part.spec else f"{{{part.name}}}"


def _checked(field: _Field, text: str) -> _Field:
    try:
        if _SPEC.fullmatch(field.spec) is None:
            raise ValueError("it is not among what a name may hold")  # noqa: TRY301
        _value(field, {field.name: 1 if field.name in COUNTERS else 0.5})
    except ValueError as error:
        raise ValueError(
            f"Cannot use the format {field.spec!r} of {{{field.name}}} in the template {text!r}: {error}. "
            "Allowed: [[fill]align][sign][0][width][.precision][d|e|f|g], width and precision of at most "
            "two digits."
        ) from None
    return field


def _split(parts: list[str | _Field], text: str) -> tuple[str, list[str | _Field]]:
    """Return the folder and the parts of the last component."""
    separators = [i for i, part in enumerate(parts) if isinstance(part, str) and os.sep in part]
    if not separators:
        folder, last = "", parts
    else:
        cut = separators[-1]
        if any(isinstance(part, _Field) for part in parts[:cut]):
            raise ValueError(
                f"Cannot use {text!r}: a field stands in its folder. All files of one template lie in one "
                "folder; move the fields into the file's name."
            )
        folder, name = os.path.split(str(parts[cut]))
        last = [*([name] if name else []), *parts[cut + 1 :]]
    if not last or last in ([os.curdir], [os.pardir]):
        raise ValueError(f"Cannot use {text!r}: it names no file. Add a name, e.g. 'best.pt'.")
    if isinstance(last[0], str) and last[0].startswith("."):
        raise ValueError(
            f"Cannot use {text!r}: a hidden file is never found by resume. Take away the dot it begins with."
        )
    return folder, last


def _value(field: _Field, values: Mapping[str, float]) -> str | None:
    value = values.get(field.name)
    if value is None:
        return None
    if field.spec.endswith("d") and isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        value = round(value)
    return _UNSAFE.sub("_", format(value, field.spec))


def _nearest(name: str, known: Iterable[str]) -> str:
    # did_you_mean gives a sentence; the name is what stands between its quotes.
    return did_you_mean(name, known).partition("'")[2].rpartition("'")[0]


def _label(text: str, field: str, nearest: str | None) -> str:
    """Return the ``val_loss=`` that *text* ends with and that labels the field behind it."""
    for name in filter(None, (field, nearest)):
        if text.endswith(f"{name}="):
            return f"{name}="
    label = _LABEL.search(text)
    return label[0] if label else ""


def _close_hole(stem: str, hole: re.Match[str]) -> str:
    """Return what is left of holes and the separators around them: one separator, none at either end."""
    separators = hole[0].replace(_HOLE, "")
    return separators[:1] if hole.start() > 0 and hole.end() < len(stem) else ""

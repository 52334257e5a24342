"""Templates and metric names, hostile ones too, become one safe name in the folder that the user gave."""

from __future__ import annotations

import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainbus import Handler
from trainbus.testing import FakeHandler
from trainbus_callbacks import ModelCheckpoint
from trainbus_callbacks.naming import MAX_NAME_BYTES, NameTemplate

COUNTS = [pytest.param(250, id="some"), pytest.param(10_000, marks=pytest.mark.full, id="many")]
SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._=+-")
# What reading a value as a number looks at, and nothing of it has a name that a template could choose.
LOOKED_AT = {"__class__", "item", "numel", "size"}

HOSTILE_NAMES = (
    *(
        "../../up",
        "/etc/passwd",
        "~/up",
        "a/b",
        "..",
        ".",
        ".hidden",
        "-rf",
        "a b",
        "a\nb",
        "a\x1b[31mb",
        "a\0b",
    ),
    *(
        "x.__class__",
        "x.__class__.__init__.__globals__",
        "0",
        "__dict__",
        "%s",
        "%(a)s",
        "$HOME",
        "a" * 4_000,
    ),
    *("\N{RIGHT-TO-LEFT OVERRIDE}tp", "\N{SNOWMAN}" * 90, "CON", "a\\b", "\ud800", "epoch", "val_loss="),
)
hostile_names = st.sampled_from(HOSTILE_NAMES) | st.text(min_size=1, max_size=40)
names = st.sampled_from(("val_loss", "a", "epoch", "batch", "global_step", "val/loss")) | hostile_names
specs = st.sampled_from(
    (
        *("", ":", ":.4f", ":03d", ":>20", ":=+9.2e", ":99.99f", ":!>9", "::<9", ":\n<9", ":/>9"),
        *(":\N{SNOWMAN}^9", ":100", ":.100f", ":{a}", ":{a.b}", ":s", ":,", ":%", ":99999999999999", "!r"),
        *("!s:>9", "[0]", ".real", "[__class__]", ".__class__.__init__.__globals__[os]", "[0][1].a[b]!r:{c}"),
    )
)
literals = st.sampled_from(
    ("m", "_", "-", ".", "=", "{{", "}}", ".pt", "{", "}", "é", "best", "=", "~", " ")
) | st.text(max_size=6)
fields_ = st.builds("{{{}{}}}".format, names, specs)
folders = st.sampled_from(("", "run/", "a/b/", "../", "/tmp/x/", "./", "a//", "~no_such_user/"))
templates = st.builds(
    lambda folder, parts: folder + "".join(parts),
    folders,
    st.lists(literals | fields_, min_size=1, max_size=6),
) | st.text(alphabet=st.sampled_from("{}[]!:./a0_~\\\0%$"), max_size=25)
numbers = st.floats() | st.sampled_from((0.5, -0.5, 1e300, -1e300, 5e-324, math.nan, -math.inf))
metrics = st.dictionaries(names, numbers, max_size=4)


def given_many(count: int, request: pytest.FixtureRequest, **strategies: Any):
    """Let hypothesis call a function at once, *count* times or as often as ``--runs`` says."""
    often = settings(
        max_examples=request.config.getoption("--runs") or count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    return lambda function: often(given(**strategies)(function))()


def parsed(text: str) -> NameTemplate | None:
    """Return the template, or None if it was refused as it should be: at once, with the place."""
    try:
        return NameTemplate(text)
    except ValueError as error:
        message = str(error)
        place = re.search(r"at position (\d+) \(", message)
        if "Cannot read the template" in message:
            assert place is not None and repr(text[int(place[1]) :]) in message
        else:
            assert message.startswith("Cannot use") or isinstance(error, UnicodeEncodeError)
        assert type(error) is ValueError or "position" in message
        return None


def assert_contained(path: str, text: str, template: NameTemplate) -> None:
    """Require of a filled path that it is one visible file of safe characters in the template's folder."""
    folder, name = os.path.split(path)
    assert os.path.normpath(folder or ".") == os.path.normpath(template.folder)
    assert name and not name.startswith(".") and "\0" not in name
    assert len(os.fsencode(name)) <= MAX_NAME_BYTES
    # What was not written by the user himself.
    assert set(name) <= SAFE | set(text)


class SpyLogs(Mapping[str, Any]):
    """The logs of an event, which remember what was asked of them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.asked: list[Any] = []

    def __getitem__(self, key: Any) -> Any:
        self.asked.append(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __getattr__(self, name: str) -> Any:
        self.asked.append(f".{name}")
        raise AttributeError(name)


class SpyValue:
    """A metric that remembers which of its attributes were looked at. A number, as tensors are one."""

    def __init__(self, number: float | None) -> None:
        self.number = number
        self.looked: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        inner = object.__getattribute__(self, "__dict__")
        if name in ("looked", "number"):
            return inner[name]
        inner["looked"].add(name)
        if name == "item" and inner["number"] is not None:
            return lambda: inner["number"]
        if name == "numel" and inner["number"] is not None:
            return lambda: 1
        return object.__getattribute__(self, name)

    def __getitem__(self, key: Any) -> Any:
        object.__getattribute__(self, "__dict__")["looked"].add(f"[{key!r}]")
        raise KeyError(key)

    def __format__(self, spec: str) -> str:
        object.__getattribute__(self, "__dict__")["looked"].add(f"format {spec!r}")
        return "../../up"


class HostileFloat(float):
    """A number that would rather be a path."""

    def __format__(self, spec: str) -> str:
        return "/../../up"

    __str__ = __repr__ = lambda self: "/../../up"


class TestTemplates:
    @pytest.mark.parametrize("count", COUNTS)
    def test_any(self, request, count):
        """
        Any text is refused at construction with the place, or gives a safe name in its folder for any logs.
        """
        filled = 0

        @given_many(count, request, text=templates, logs=metrics, batch_mode=st.booleans())
        def check(text, logs, batch_mode):
            nonlocal filled
            template = parsed(text)
            if template is None:
                return
            filled += 1
            for values in (
                logs,
                {},
                dict.fromkeys(template.fields, -0.5),
                {**logs, **dict.fromkeys(template.fields, math.nan)},
            ):
                name = template.fill(
                    epoch=1, batch=2, global_step=3, logs=values, known=logs, batch_mode=batch_mode
                )
                assert_contained(name.path, text, template)

        assert filled > (request.config.getoption("--runs") or count) / 10

    @pytest.mark.parametrize("count", COUNTS)
    def test_numbers(self, request, count):
        """
        Whatever the numbers and formats are, the name has at most 200 bytes, all of them safe.
        """

        @given_many(
            count,
            request,
            values=st.lists(numbers, min_size=1, max_size=9),
            spec=st.from_regex(
                r"(:[^{}\n]?[<>=^]?[-+ ]?0?[0-9]{0,2}(\.[0-9]{1,2})?[deEfFgG]?)?", fullmatch=True
            ),
            counter=st.integers(1, 10**12),
        )
        def check(values, spec, counter):
            text = "runs/m" + "".join(f"{{f{at}{spec}}}_" for at in range(len(values))) + ".pt"
            template = parsed(text)
            if template is None:
                return
            logs = {f"f{at}": number for at, number in enumerate(values)}
            path = template.fill(epoch=counter, batch=counter, global_step=counter, logs=logs).path

            assert path.startswith("runs/m") and path.endswith(".pt")
            assert set(path.removeprefix("runs/")) <= SAFE and len(path) <= MAX_NAME_BYTES + len("runs/")

    @pytest.mark.parametrize("count", COUNTS)
    def test_metric_names(self, request, count):
        """
        The name of a metric is only ever compared: it is no path, no attribute and no index.
        """

        @given_many(count, request, name=hostile_names, number=numbers)
        def check(name, number):
            text = f"runs/m_{{{name}}}.pt"
            template = parsed(text)
            if set(name) & set("{}!:[]"):  # these end a name, so that it is another one, if any
                assert template is None or template.fields != (name,)
                return
            assert template is not None and template.fields == (name,)
            if name in ("epoch", "batch", "global_step"):
                return
            logs = {name: number, "runs": 1.0}
            path = template.fill(epoch=1, batch=2, global_step=3, logs=logs).path
            assert path == f"runs/m_{format(number)}.pt" or not math.isfinite(number)
            # What a part of the name would reach.
            near = dict.fromkeys({*re.split(r"\W+", name), *name[:50]} - {name}, 7.25)
            assert template.fill(epoch=1, batch=2, global_step=3, logs=near).path == "runs/m_epoch1.pt"

    @pytest.mark.parametrize("at", range(6))
    @pytest.mark.parametrize(
        "bad", ["{", "}", "{}", "{!r}", "{a!r}", "{a[0]}", "{a:{b}}", "{[0]}", "{:>3}", "\0"]
    )
    def test_place(self, bad, at):
        """
        A template that cannot be read is refused with the position at which its bad part begins.
        """
        with pytest.raises(ValueError, match=rf"^Cannot read the template .* at position {at} \("):
            NameTemplate("x" * at + bad + "y")

    @pytest.mark.parametrize("template", ["{x:.>9.1f}.pt", "{x:.^9.1f}_{epoch}.pt", "runs/{epoch:.>4}.pt"])
    def test_hidden(self, template):
        """
        No format makes a hidden file, which resume would not find.
        """
        try:
            path = NameTemplate(template).fill(epoch=1, batch=2, global_step=3, logs={"x": 0.5}).path
        except ValueError:
            return
        assert not os.path.basename(path).startswith(".")

    @pytest.mark.parametrize("template", ["{x}.pt", "{x:.2f}_{epoch}.pt", "runs/{x:->9.1f}.pt"])
    def test_option(self, template):
        """
        No value makes a name that other programs take for an option.
        """
        path = NameTemplate(template).fill(epoch=1, batch=2, global_step=3, logs={"x": -0.5}).path

        assert not os.path.basename(path).startswith("-")


class TestModelCheckpoint:
    @pytest.mark.parametrize("count", COUNTS)
    def test_nothing_is_looked_up(self, request, count):
        """
        Nothing of a metric is looked at but whether it is a number, and no key is asked for but its name.
        """

        @given_many(
            count,
            request,
            text=templates,
            values=st.dictionaries(names, st.none() | numbers, min_size=1, max_size=4),
            monitored=st.integers(0, 3),
        )
        def check(text, values, monitored):
            template = parsed(text)
            if template is None:
                return
            logs = SpyLogs({name: SpyValue(number) for name, number in values.items()})
            monitor = list(values)[monitored % len(values)]
            handler = FakeHandler()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                handler.add_callback(ModelCheckpoint(text, monitor, mode="min"))
                handler.bus.emit("epoch_end", logs=logs)

            (save,) = handler.saves
            assert_contained(save.path, text, template)
            assert set(logs.asked) <= {*values, monitor}
            assert set().union(*(value.looked for value in logs._values.values())) <= LOOKED_AT

    def test_spies(self):
        """
        The spies see what str.format would look up.
        """
        value, logs = SpyValue(0.5), SpyLogs({})
        assert f"{value:>9}" == "../../up"
        with pytest.raises(AttributeError):
            f"{value.__nothing__}"
        with pytest.raises(KeyError):
            f"{value[0]}"
        with pytest.raises(AttributeError):
            f"{logs.nothing}"

        assert value.looked == {"__nothing__", "[0]", "format '>9'"}
        assert logs.asked == [".nothing"]

    @pytest.mark.parametrize("template", ["m_{x}.pt", "m_{x:.2f}.pt", "{x:>20}.pt"])
    def test_hostile_number(self, template):
        """
        A number that formats itself as a path does not get to do so.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint(template))

        handler.bus.emit("epoch_end", logs={"x": HostileFloat(0.5)})

        assert "0.5" in handler.saves[0].path and "up" not in handler.saves[0].path

    @pytest.mark.parametrize("name", HOSTILE_NAMES, ids=range(len(HOSTILE_NAMES)))
    @pytest.mark.filterwarnings("ignore::RuntimeWarning")
    def test_files(self, tmp_path, monkeypatch, name):
        """
        Whatever a metric is called, one visible file is written, and it lies in the folder.
        """
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path))
        try:
            checkpoint = ModelCheckpoint(f"run/m_{{{name}}}_{{{name}:.3f}}.pt", name, mode="min")
        except ValueError:
            assert len(name) < 60 and set(name) & set("{}!:[]")
            return
        with Handler(torch.nn.Linear(1, 1)) as handler:
            handler.add_callback(checkpoint)
            handler.emit("epoch_end", epoch=0, logs={name: 0.5, "other": 1.0})

        (path,) = (path for path in tmp_path.rglob("*") if path.is_file())
        assert path.parent == tmp_path / "run" and not path.name.startswith((".", "-"))
        assert set(path.name) <= SAFE

    def test_warnings(self):
        """
        The name of a metric cannot begin a line of its own, nor colour one, in what is said of it.
        """
        handler = FakeHandler()
        handler.add_callback(ModelCheckpoint("m_{nothing}.pt"))

        with pytest.warns(RuntimeWarning) as caught:
            handler.bus.emit("epoch_end", logs={"x\nERROR: all is lost\x1b[31m": 0.5})

        assert all(str(one.message).isprintable() for one in caught)

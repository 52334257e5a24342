"""Templates are checked once, filled with safe values, and recognise what was written under them."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainbus_callbacks.naming import MAX_NAME_BYTES, NameTemplate


def fill(template, *, epoch=3, batch=7, global_step=1200, logs=None, batch_mode=False):
    return NameTemplate(template).fill(
        epoch=epoch, batch=batch, global_step=global_step, logs=logs or {}, batch_mode=batch_mode
    )


class TestFill:
    @pytest.mark.parametrize(
        ("template", "path"),
        [
            ("best.pt", "best.pt"),
            ("m{epoch}.pt", "m3.pt"),
            ("m{epoch:03d}.pt", "m003.pt"),
            ("m{epoch:03}.pt", "m003.pt"),
            ("m{epoch}_{batch}_{global_step:06d}.pt", "m3_7_001200.pt"),
            ("m{val_loss:.4f}.pt", "m0.1235.pt"),
            ("m{val_loss}.pt", "m0.123456.pt"),
            ("m{val_loss:.2e}.pt", "m1.23e-01.pt"),
            ("m{seen:06d}.pt", "m001000.pt"),
            ("m{val/loss:.3f}.pt", "m0.500.pt"),
            ("m{val.loss:.1f}.pt", "m0.2.pt"),
            ("{{m}}{epoch}.pt", "{m}3.pt"),
            ("runs/a b/m{epoch}.pt", "runs/a b/m3.pt"),
            ("/tmp/m{epoch}.pt", "/tmp/m3.pt"),
            ("/m.pt", "/m.pt"),
        ],
    )
    def test_fields(self, template, path):
        """
        Counters and metrics are looked up by their literal name and formatted; other text is kept.
        """
        logs = {"val_loss": 0.123456, "val/loss": 0.5, "val.loss": 0.25, "seen": 1000.0}

        assert fill(template, logs=logs) == (path, ())

    def test_logs_named_like_counters(self):
        """
        Metrics called epoch, batch or global_step do not disturb the counters.
        """
        logs = {"epoch": 99.0, "batch": 98.0, "global_step": 97.0}

        assert fill("{epoch}-{batch}-{global_step}.pt", logs=logs).path == "3-7-1200.pt"

    @pytest.mark.parametrize(
        ("template", "path"),
        [
            ("best_{val_los:.4f}.pt", "best_epoch3.pt"),
            ("best_{val_los}", "best_epoch3"),
            ("best-{a}-{b}.pt", "best_epoch3.pt"),
            ("m-{epoch}-{a:.2f}.pth", "m-3.pth"),
            ("m-{epoch}-loss={a:.2f}.pth", "m-3.pth"),
            ("m-{epoch}-val_los={val_los:.2f}.pth", "m-3.pth"),
            ("m-{epoch}-val_loss={val_los:.2f}.pth", "m-3.pth"),
            ("m{epoch}={a}.pth", "m3.pth"),
            ("{a:.2f}-{epoch}.pt", "3.pt"),
            ("best_{a}_final.pt", "best_final_epoch3.pt"),
            ("best{a}final.pt", "bestfinal_epoch3.pt"),
            ("{a}.pt", "epoch3.pt"),
            ("{a}", "epoch3"),
            ("m_{val_loss:.1f}_{a}.pt", "m_0.5_epoch3.pt"),
            ("m_v1.2_{a}", "m_v1.2_epoch3"),
        ],
    )
    def test_missing_field(self, template, path):
        """
        A field without a value goes with its label and separators, and the epoch is added instead.
        """
        name = fill(template, logs={"val_loss": 0.5})

        assert name.path == path
        assert name.missing == tuple(f for f in NameTemplate(template).fields if f in ("a", "b", "val_los"))

    @pytest.mark.parametrize(
        ("template", "path"),
        [
            ("best_{a:.4f}.pt", "best_epoch3_step1200.pt"),
            ("best_{a}_{global_step}.pt", "best_1200_epoch3.pt"),
            ("best_{a}_{epoch}.pt", "best_3_step1200.pt"),
        ],
    )
    def test_missing_field_between_epochs(self, template, path):
        """
        In batch mode the step is added as well; counters that are there are not added again.
        """
        assert fill(template, batch_mode=True).path == path

    def test_home(self, monkeypatch):
        """
        ``~`` is expanded in the folder.
        """
        monkeypatch.setenv("HOME", "/home/someone")

        assert fill("~/runs/best.pt").path == "/home/someone/runs/best.pt"

    def test_path_object(self):
        """
        A path object is a template like a string.
        """
        assert fill(Path("runs") / "m{epoch}.pt").path == os.path.join("runs", "m3.pt")

    @pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf")])
    @pytest.mark.parametrize("spec", ["", ":.3f", ":d"])
    def test_not_finite(self, value, text, spec):
        """
        NaN and infinity can be in a name.
        """
        assert fill(f"m{{x{spec}}}.pt", logs={"x": value}).path == f"m{text}.pt"

    @pytest.mark.parametrize("template", ["m{x:/>9.1f}.pt", "m{x:>9.1f}.pt", "m{x: .1f}.pt"])
    def test_unsafe_filling(self, template):
        """
        What a format puts into a name makes no folder and no space.
        """
        name = fill(template, logs={"x": 0.5}).path

        assert set(name) <= set("m0.5_pt")

    @given(
        value=st.floats() | st.integers(-(10**300), 10**300).map(float),
        spec=st.sampled_from(["", ":f", ":.99f", ":d", ":099d", ":.99e", ":>99.50g"]),
        fields=st.integers(1, 9),
    )
    def test_length_and_characters(self, value, spec, fields):
        """
        Whatever is filled in, the name is one component of safe characters and bounded length.
        """
        template = NameTemplate("".join(f"{{m{i}{spec}}}_" for i in range(fields)) + "x.pt")
        logs = {f"m{i}": value for i in range(fields)}

        name = template.fill(epoch=10**6, batch=1, global_step=10**9, logs=logs).path

        assert len(os.fsencode(name)) <= MAX_NAME_BYTES
        assert all(c.isascii() and (c.isalnum() or c in "._=+-") for c in name)
        assert template.matches(name)


class TestChecks:
    @pytest.mark.parametrize(
        "template",
        [
            "m{epoch",
            "m}.pt",
            "m{}.pt",
            "m{:03d}.pt",
            "m{epoch!r}.pt",
            "m{logs[val_loss]}.pt",
            "m{x:{width}}.pt",
            "m\0.pt",
        ],
    )
    def test_unreadable(self, template):
        """
        What is no field of our kind is refused at construction: conversions, indices, nested specs.
        """
        with pytest.raises(
            ValueError, match=r"Cannot read the template .* a field is \{name\} or \{name:spec\}"
        ):
            NameTemplate(template)

    def test_attributes_are_names(self):
        """
        A dot in a field is part of a name: no attribute is reached.
        """
        assert fill("m{epoch.__class__}.pt").missing == ("epoch.__class__",)

    @pytest.mark.parametrize(
        "field",
        ["x:100d", "x:.100f", "x:s", "x:%", "x:,", "epoch:.2d", "x:n", "x:=,", "epoch:.3", "x:99999999999f"],
    )
    def test_format(self, field):
        """
        Formats are bounded and tried at construction, so that the first save cannot fail by one.
        """
        with pytest.raises(ValueError, match=r"Cannot use the format .* at most two digits"):
            NameTemplate(f"m{{{field}}}.pt")

    @pytest.mark.parametrize("template", ["", "runs/", ".", "runs/..", "/"])
    def test_no_file(self, template):
        """
        A template that names no file is refused.
        """
        with pytest.raises(ValueError, match=r"names no file. Add a name"):
            NameTemplate(template)

    def test_hidden(self):
        """
        A hidden name is refused, because resume does not look at hidden files.
        """
        with pytest.raises(ValueError, match="hidden file is never found by resume"):
            NameTemplate("runs/.best.pt")

    def test_field_in_folder(self):
        """
        All files of a template lie in one folder.
        """
        with pytest.raises(ValueError, match="a field stands in its folder"):
            NameTemplate("runs/{epoch}/best.pt")

    def test_too_long(self):
        """
        A name that may get too long is refused before training, with the number of bytes.
        """
        NameTemplate("x" * 200)
        with pytest.raises(ValueError, match="Shorten it by 1 bytes"):
            NameTemplate("x" * 201)
        with pytest.raises(ValueError, match="may exceed 200 bytes"):
            NameTemplate("x" * 180 + "{val_loss}")

    @pytest.mark.parametrize("template", [None, 3, b"best.pt"])
    def test_type(self, template):
        """
        What is no text is refused.
        """
        with pytest.raises(TypeError):
            NameTemplate(template)


class TestMatches:
    @pytest.mark.parametrize(
        "name", ["m-003-0.1235.pt", "m-3.pt", "m-1000-nan.pt", "m-3_step1200.pt", "m-3-.5.pt"]
    )
    def test_own(self, name):
        """
        Files are recognised, also those that lacked a metric.
        """
        assert NameTemplate("runs/m-{epoch:03d}-{val_loss:.4f}.pt").matches(name)

    @pytest.mark.parametrize("spec", ["d>3", "x<9", "=^7.2f", "*<9", " >9.1f", "é^9", "a=+9.1e", "i>9"])
    @pytest.mark.parametrize("value", [3.0, -0.5, math.inf, -math.inf, math.nan])
    def test_filled_up(self, spec, value):
        """
        So are those in which a value is filled up to its width, with whatever character.
        """
        template = NameTemplate(f"m{{val_loss:{spec}}}.pt")

        name = template.fill(epoch=3, batch=1, global_step=1, logs={"val_loss": value}).path
        assert template.matches(name)
        assert not template.matches(f"k{name}") and not template.matches("m.txt")

    @pytest.mark.parametrize(
        "name",
        [
            "m-.pt",
            "n-003-0.1.pt",
            "m-003-0.1.pth",
            "m-3 1-0.1.pt",
            ".m-3.pt.tmp",
            "m-best.pt",
            "m-last-new.pt",
        ],
    )
    def test_foreign(self, name):
        """
        Files of other names are not.
        """
        assert not NameTemplate("runs/m-{epoch:03d}-{val_loss:.4f}.pt").matches(name)

    @given(
        present=st.sets(st.sampled_from(["a", "b", "c"])),
        template=st.sampled_from(
            ["{a}{b}{c}", "x_{a}-b={b}_y_{c}.pt", "{c}.{epoch}.{a}.{b}", "a={a}_{global_step}"]
        ),
        batch_mode=st.booleans(),
    )
    def test_round_trip(self, present, template, batch_mode):
        """
        Whatever was missing when a file was written, it is recognised.
        """
        one = NameTemplate(template)

        name = one.fill(
            epoch=4, batch=2, global_step=90, logs=dict.fromkeys(present, 0.5), batch_mode=batch_mode
        )

        assert one.matches(name.path)


class TestParts:
    def test_folder_and_last(self):
        """
        The folder is for looking around, the last component for naming the template.
        """
        template = NameTemplate("runs/a/{{x}}{epoch:03d}_{val/loss}.pt")

        assert (template.folder, template.last) == ("runs/a", "{{x}}{epoch:03d}_{val/loss}.pt")
        assert NameTemplate("best.pt").folder == "."

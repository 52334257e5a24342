"""``trainbus diff``: what two files do not have in common, and its exit code."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import trainbus
from trainbus.cli.app import app
from trainbus.cli.diff import relative_difference


@pytest.fixture
def diff(tmp_path):
    """Return what saves two states and compares the files: exit code, lines, and what is told of trouble."""

    def diff(a, b, *options, save=trainbus.save):
        for name, state in (("a.pt", a), ("b.pt", b)):
            save(state, tmp_path / name)
        done = CliRunner().invoke(app, ["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt"), *options])
        assert done.exception is None or isinstance(done.exception, SystemExit)
        return done.exit_code, done.stdout.splitlines(), done.stderr

    return diff


class TestDiff:
    @pytest.mark.parametrize("save", [trainbus.save, torch.save])
    def test_equal(self, diff, save):
        """Files with the same names and bits are equal, also where a value is NaN."""
        state = {"w": torch.tensor([1.0, math.nan]), "n": [1, {"x": math.nan}], "e": torch.empty(0)}

        assert diff(state, state, save=save)[:2] == (0, ["equal: the same names, and the same bits in each."])

    @pytest.mark.parametrize(
        "a, b, line",
        [
            ({"x": 1, "w": torch.ones(2)}, {"x": 1}, "w  only in A  (float32 [2])"),
            ({"m": {}}, {"m": {"b": torch.ones(1)}}, "m.b  only in B  (float32 [1])"),
            (
                {"w": torch.ones(2, 3)},
                {"w": torch.ones(3, 2)},
                "w  shape: float32 [2, 3] in A, float32 [3, 2] in B",
            ),
            (
                {"w": torch.ones(2)},
                {"w": torch.ones(2).half()},
                "w  dtype: float32 [2] in A, float16 [2] in B",
            ),
            (
                {"w": torch.tensor([1.0, 2.0, 4.0])},
                {"w": torch.tensor([1.0, 2.0, 3.0])},
                "w  differs in 1 values, relatively by at most 0.25  (float32 [3])",
            ),
            (
                {"w": torch.tensor([2**53, 1])},
                {"w": torch.tensor([2**53 + 1, 1])},
                "w  differs in 1 values, relatively by at most 0  (int64 [2])",
            ),
            ({"lr": 0.1}, {"lr": 0.2}, "lr  value: 0.1 in A, 0.2 in B"),
            ({"n": 1}, {"n": "1"}, "n  type: 1 in A, '1' in B"),
            ({"l": [1, 2]}, {"l": [1]}, "l  value: [1, 2] in A, [1] in B"),
            ({"l": [{"w": 1}, 5]}, {"l": [{"w": 2}, 5]}, "l.0.w  value: 1 in A, 2 in B"),
            ({"a\nb": 1}, {"a\nb": 2}, "a?b  value: 1 in A, 2 in B"),
            (
                {"t": (torch.ones(2),)},
                {"t": (torch.ones(2), torch.ones(2))},
                "t  value: (tensor([1., 1.]),) in A, (tensor([1., 1.]), tensor([1., 1.])) in B",
            ),
        ],
    )
    def test_difference(self, diff, a, b, line):
        """What differs is one line with its place and both sides, and the exit code is 1."""
        assert diff(a, b)[:2] == (1, [line])

    def test_nan_in_a_sequence(self, diff):
        """NaN is NaN in a list and a tuple too."""
        state = {"m": (math.nan, 4.0), "l": [math.nan]}
        code, lines, _ = diff(state, state)

        assert code == 0 and lines == ["equal: the same names, and the same bits in each."]

    def test_json(self, diff):
        """With --json each difference is an object of numbers that JSON knows."""
        code, (line,), _ = diff({"w": torch.tensor([math.inf])}, {"w": torch.tensor([1.0])}, "--json")

        assert code == 1
        assert json.loads(line) == {
            "name": "w",
            "kind": "value",
            "a": "float32 [1]",
            "b": "float32 [1]",
            "relative": "inf",
            "count": 1,
        }

    def test_damaged(self, diff, tmp_path):
        """A file that cannot be loaded is trouble, which has an exit code of its own."""
        trainbus.save({"w": torch.ones(1000)}, tmp_path / "a.pt")

        def damaged(state, path):
            trainbus.save(state, path)
            data = bytearray(path.read_bytes())
            data[1500] ^= 1
            path.write_bytes(data)

        code, _, told = diff({"w": torch.ones(1000)}, {"w": torch.ones(1000)}, save=damaged)
        assert code == 2 and "damaged" in told


class TestRelativeDifference:
    @pytest.mark.parametrize(
        "a, b, expected",
        [
            ([0.0], [-0.0], (0.0, 1)),
            ([1.0], [-1.0], (2.0, 1)),
            ([math.nan], [1.0], (math.inf, 1)),
            ([math.inf], [math.inf], (0.0, 0)),
            ([math.inf], [-math.inf], (math.inf, 1)),
            ([1.0, 0.0], [1.0, 5.0], (1.0, 1)),
        ],
    )
    def test_values(self, a, b, expected):
        """The greatest difference counts, by the greater of the two values."""
        assert relative_difference(torch.tensor(a), torch.tensor(b)) == expected

    def test_nan_of_other_bits(self):
        """Two NaNs of other bits are told of, and not apart."""
        nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)

        assert relative_difference(nan[:1], nan[1:]) == (0.0, 1)

    @pytest.mark.parametrize(
        "dtype", [torch.bool, torch.uint8, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]
    )
    def test_dtypes(self, dtype):
        """Any dtype can be compared."""
        relative, count = relative_difference(
            torch.ones(3).to(dtype), torch.tensor([1.0, 0.0, 1.0]).to(dtype)
        )

        assert (relative, count) == (1.0, 1)

    def test_sparse(self):
        """A sparse tensor is compared by its values."""
        assert relative_difference(torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse()) == (0.5, 2)

    @given(st.lists(st.floats(width=32), min_size=1, max_size=9))
    def test_with_itself(self, values):
        """Anything is equal to itself."""
        assert relative_difference(torch.tensor(values), torch.tensor(values)) == (0.0, 0)

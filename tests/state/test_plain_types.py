"""What `to_plain` lets through is loaded as it was; what it refuses would not be loaded at all."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import functools
import io
import math
import pathlib
import types
import uuid
import warnings
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainbus.errors import CheckpointCorruptError, UnsavableStateError
from trainbus.state.plain_types import find_problems, from_plain, to_plain


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int


@dataclasses.dataclass
class Config:
    size: int = 1


class MyDict(dict[str, int]):
    pass


class MyList(list[int]):
    pass


class MyTensor(torch.Tensor):
    pass


class MyArray(np.ndarray):
    pass


class Opaque:
    pass


def stored(value: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


def loaded(value: Any) -> Any:
    return torch.load(stored(value), weights_only=True)


def round_trip(state: Any) -> Any:
    return from_plain(loaded(to_plain(state)), "a.pt")


def same(one: Any, other: Any) -> bool:
    """Equal in type and value, NaN and the sign of zero included."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return same_tensor(one, other)
    if isinstance(one, (np.ndarray, np.generic)):
        return bool(
            one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
        )
    if isinstance(one, dict):
        return (
            list(map(repr, one)) == list(map(repr, other))
            and all(same(a, b) for a, b in zip(one.values(), other.values(), strict=True))
            and (not isinstance(one, OrderedDict) or same(vars(one), vars(other)))
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, (float, complex)):
        return repr(one) == repr(other)
    return bool(one == other)


def same_tensor(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (one.dtype, one.layout, one.requires_grad) != (other.dtype, other.layout, other.requires_grad):
        return False
    if one.layout is torch.strided and not one.is_quantized and not one.is_nested:
        return one.shape == other.shape and bytes(raw(one)) == bytes(raw(other))
    return one.is_nested or torch.equal(one.to_dense(), other.to_dense())


def raw(tensor: torch.Tensor) -> list[int]:
    flat = tensor.detach().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).tolist()


# Beta layouts warn once in a process, wherever they come up first.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.filterwarnings("ignore:.*quantiz"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

PLAIN_TENSORS = [
    torch.randn(2, 3),
    torch.nn.Parameter(torch.randn(2)),
    torch.zeros(0, 3),
    torch.tensor(4),
    torch.ones(3, dtype=torch.bfloat16),
    torch.ones(3).to(torch.float8_e4m3fn),
    torch.tensor([1, 2], dtype=torch.uint64),
    torch.randn(3, dtype=torch.complex64).conj(),
    torch.randn(4, 4).t(),
    torch.eye(3).to_sparse(),
]


def other_layouts() -> list[torch.Tensor]:
    return [
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ]


EVERY_TORCH_NAME = [getattr(torch, name) for name in dir(torch)]
TORCH_VALUES = [
    one for one in EVERY_TORCH_NAME if isinstance(one, (torch.dtype, torch.layout, torch.qscheme))
]
DEVICES = [torch.device(name) for name in ("cpu", "cuda", "cuda:3", "meta", "mps:0", "xpu:1")]
DTYPES = ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(2**2039) + 1, max_value=2**2039 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(st.characters(codec=None)),
    st.binary(min_size=1),
    st.sampled_from(TORCH_VALUES),
    st.sampled_from(DEVICES),
    st.lists(st.integers(0, 9)).map(torch.Size),
)
hashable = st.one_of(st.integers(), st.text(), st.booleans(), st.none(), st.binary(min_size=1))
keys = st.one_of(hashable, st.tuples(hashable, hashable), st.sampled_from(TORCH_VALUES))
plain_leaves = st.one_of(scalars, st.binary().map(bytearray), st.sets(keys), st.sampled_from(PLAIN_TENSORS))


def arrays() -> st.SearchStrategy[Any]:
    dtypes = st.builds(
        lambda order, code: np.dtype(order + code), st.sampled_from("<>"), st.sampled_from(DTYPES)
    )
    shapes = st.sampled_from([(), (0,), (3,), (2, 0), (2, 3)])
    return st.builds(
        lambda dtype, shape, data: (
            np.frombuffer((data * 96)[: 6 * dtype.itemsize], dtype)[: math.prod(shape)]
            .copy()
            .reshape(shape)
            .view(dtype)
        ),
        dtypes.filter(lambda dtype: dtype.kind != "b"),
        shapes,
        st.binary(min_size=1, max_size=8),
    )


numpy_scalars = st.one_of(
    st.builds(np.bool_, st.booleans()),
    st.builds(np.int8, st.integers(-128, 127)),
    st.builds(np.uint64, st.integers(0, 2**64 - 1)),
    st.builds(np.float16, st.floats(width=16, allow_nan=False)),
    st.builds(np.float32, st.floats(width=32, allow_nan=False)),
    st.builds(np.float64, st.floats(allow_nan=False)),
    st.builds(np.complex64, st.floats(width=32, allow_nan=False)),
    st.builds(np.str_, st.text(st.characters(exclude_categories=["Cs"]))),
    st.builds(np.bytes_, st.binary(min_size=1)),
)


def nested(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    def ordered(items: dict[Any, Any], metadata: Any) -> OrderedDict[Any, Any]:
        result = OrderedDict(items)
        result._metadata = metadata  # type: ignore[attr-defined]
        return result

    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.dictionaries(keys, inner, max_size=4),
            st.lists(inner, max_size=4),
            st.lists(inner, max_size=4).map(tuple),
            st.dictionaries(keys, inner, max_size=3).map(Counter),
            st.builds(ordered, st.dictionaries(st.text(), inner, max_size=3), st.dictionaries(keys, scalars)),
        ),
        max_leaves=12,
    )


thoroughly = settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))


REFUSED = [
    frozenset([1]),
    collections.defaultdict(list),
    collections.deque([1]),
    pathlib.PurePosixPath("a"),
    Colour.RED,
    Config(),
    datetime.datetime(2024, 1, 1),
    decimal.Decimal(1),
    torch.nn.Linear(1, 1),
    functools.partial(len),
    range(3),
    slice(3),
    torch.Generator(),
    np.random.default_rng(1),
    Level.LOW,
    Point(1),
    MyDict(a=1),
    MyList([1]),
    torch.ones(2).as_subclass(MyTensor),
    torch.nn.UninitializedParameter(),
    b"",
    1 << 2039,
    datetime.timedelta(1),
    fractions.Fraction(1, 2),
    uuid.UUID(int=1),
    types.SimpleNamespace(a=1),
    len,
    int,
    Ellipsis,
    np.dtype("f4"),
    np.ones((1, 1)).view(np.matrix),
    np.array([None]),
    np.array(["a"]),
    np.array(1, "M8[s]"),
    np.array([(1, 2.0)], "i4,f8"),
    np.datetime64(1, "s"),
    np.longdouble(1),
    Opaque(),
    {np.int64(3): 1},
    {Colour.RED: 1},
    {np.str_("a")},
    {("a", frozenset()): 1},
]


class TestTruth:
    @thoroughly
    @given(nested(plain_leaves))
    def test_plain_states(self, state: Any) -> None:
        """A state without NumPy is loaded by plain torch.load as it was given."""
        plain = to_plain(state)

        assert same(plain, state)
        assert same(loaded(plain), state)
        assert find_problems(state) == []

    @thoroughly
    @given(nested(st.one_of(plain_leaves, arrays(), numpy_scalars)))
    def test_states_with_numpy(self, state: Any) -> None:
        """A state with NumPy values anywhere is given back in type, dtype and value."""
        assert same(round_trip(state), state)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("order", "<>")
    def test_each_dtype(self, dtype: str, order: str) -> None:
        """Arrays of each dtype and byte order are given back as they were."""
        array = np.array([[0, 1, 2], [3, 4, 5]]).astype(order + dtype)

        assert same(round_trip({"a": array, "zero": array[1, 1:2].reshape(())})["a"], array)

    @pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
    def test_nothing_is_refused_in_vain(self, value: Any) -> None:
        """What is refused cannot be loaded with weights_only=True, or not even be saved."""
        with pytest.raises(UnsavableStateError):
            to_plain({"value": value})

        with pytest.raises(Exception, match=r"weights_only|pickle|Weights only"):
            loaded({"value": value})

    def test_storages(self) -> None:
        """A storage would be given back as another type, so it is refused."""
        storage = torch.ones(2).untyped_storage()

        assert type(loaded(storage)) is torch.TypedStorage
        assert find_problems([storage])

    def test_other_layouts(self) -> None:
        """Sparse, quantized and nested tensors are let through and loaded."""
        state = dict(enumerate(other_layouts()))

        assert same(round_trip(state), state)


class TestToPlain:
    def test_tensors_by_reference(self) -> None:
        """Tensors are neither copied nor touched."""
        tensor = torch.ones(3)

        assert to_plain([{"a": tensor}])[0]["a"] is tensor

    def test_containers_are_fresh(self) -> None:
        """Changing what was given later does not change the result."""
        state = {"list": [1], "set": {1}, "bytes": bytearray(b"a"), "array": np.ones(2), "inner": {}}
        plain = to_plain(state)

        state["list"].append(2)  # type: ignore[attr-defined]
        state["set"].add(2)  # type: ignore[attr-defined]
        state["bytes"].append(2)  # type: ignore[attr-defined]
        state["array"][0] = 5  # type: ignore[index]
        state["inner"]["a"] = 1  # type: ignore[index]

        assert [plain["list"], plain["set"], plain["bytes"]] == [[1], {1}, bytearray(b"a")]
        assert plain["array"].tolist() == [1, 1]
        assert plain["inner"] == {}

    def test_module_state(self) -> None:
        """A module's state dict keeps its type, order and metadata."""
        state = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).state_dict()

        result = round_trip(state)

        assert same(result, state)
        assert result._metadata["1"] == {"version": 2}

    def test_numpy_paths(self) -> None:
        """The paths, kinds and dtypes of NumPy values stand in the root."""
        plain = to_plain({"a": [np.float32(2), {3: np.ones(2, ">i2")}]})

        assert plain["trainbus.numpy"] == [
            [["a", 0], "scalar", "<f4"],
            [["a", 1, 3], "array", ">i2"],
        ]
        assert plain["a"][0] == 2.0
        assert type(plain["a"][0]) is float
        assert plain["a"][1][3].tolist() == [1, 1]

    @pytest.mark.parametrize(
        "root", [np.ones(2), np.float64(1), [np.ones(2)], (1, (np.int8(2),)), Counter({"a": np.int8(1)})]
    )
    def test_root_is_no_dict(self, root: Any) -> None:
        """A root that cannot hold the list of paths is wrapped, and unwrapped again."""
        assert set(to_plain(root)) == {"value", "trainbus.wrapped", "trainbus.numpy"}
        assert same(round_trip(root), root)

    def test_awkward_arrays(self) -> None:
        """Read-only arrays, negative strides and Fortran order are taken without a warning."""
        fixed = np.arange(4)
        fixed.flags.writeable = False
        state = {"fixed": fixed, "reversed": np.arange(6)[::-2], "fortran": np.ones((2, 3), order="F")}

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = round_trip(state)

        assert same(result, state)
        assert result["fixed"].flags.writeable

    def test_reserved_key(self) -> None:
        """The key that lists NumPy values is not for users."""
        with pytest.raises(UnsavableStateError, match=r"state\['trainbus.numpy'\]: trainbus uses this key"):
            to_plain({"trainbus.numpy": []})

    def test_all_problems_at_once(self) -> None:
        """Every problem is named, with its path as code and its remedy."""
        state = {
            "extra": {"when": datetime.datetime(2024, 1, 1), 3: [1, pathlib.PurePosixPath("a")]},
            "rows": ({np.int64(3): Colour.RED},),
        }

        with pytest.raises(UnsavableStateError) as info:
            to_plain(state)

        assert info.value.problems == find_problems(state)
        assert info.value.problems == [
            ("state['extra']['when']", "datetime.datetime: store value.isoformat()"),
            ("state['extra'][3][1]", "pathlib.PurePosixPath: store str(value)"),
            (
                "state['rows'][0][np.int64(3)]",
                "numpy.int64 as a key or member of a set: use a Python number, a string or a tuple of them",
            ),
            ("state['rows'][0][np.int64(3)]", f"{__name__}.Colour: store value.name, or value.value"),
        ]

    def test_many_problems(self) -> None:
        """A long list of problems is cut, and says by how many."""
        with pytest.raises(UnsavableStateError, match=r"\.\.\. and 80 more") as info:
            to_plain([range(3)] * 100)

        assert len(str(info.value).splitlines()) == 22

    @pytest.mark.parametrize(
        ("value", "remedy"),
        [
            (frozenset(), "frozenset: store set(value)"),
            (collections.defaultdict(), "collections.defaultdict: store dict(value)"),
            (collections.deque(), "collections.deque: store list(value)"),
            (Point(1), f"{__name__}.Point: store value._asdict()"),
            (Level.LOW, f"{__name__}.Level: store value.name, or value.value"),
            (Config(), f"{__name__}.Config: store dataclasses.asdict(value)"),
            (datetime.timedelta(1), "datetime.timedelta: store value.total_seconds()"),
            (decimal.Decimal(1), "decimal.Decimal: store str(value)"),
            (torch.nn.ReLU(), "torch.nn.modules.activation.ReLU: store value.state_dict()"),
            (torch.optim.SGD([torch.ones(1)]), "torch.optim.sgd.SGD: store value.state_dict()"),
            (
                functools.partial(len),
                "functools.partial: store its arguments, and name the function in the code",
            ),
            (range(1), "range: store (value.start, value.stop, value.step)"),
            (torch.Generator(), "torch._C.Generator: store value.get_state()"),
            (torch.ones(1).untyped_storage(), "torch.storage.UntypedStorage: store a tensor that uses it"),
            (np.random.default_rng(), "numpy.random._generator.Generator: store value.bit_generator.state"),
            (np.random.RandomState(1), "numpy.random.mtrand.RandomState: store value.get_state()"),
            (np.dtype("f4"), "numpy.dtypes.Float32DType: store str(value)"),
            (np.ones((1, 1)).view(np.matrix), "numpy.matrix: store numpy.asarray(value)"),
            (np.ones(1).view(MyArray), f"{__name__}.MyArray: store numpy.asarray(value)"),
            (np.ma.masked_array([1]), "numpy.ma.MaskedArray: store value.data and value.mask"),
            (np.array([None]), "a NumPy array of dtype object: store value.tolist()"),
            (np.array(["a"]), "a NumPy array of dtype str32: store value.tolist()"),
            (
                np.array(1, "M8[s]"),
                "a NumPy array of dtype datetime64[s]: store value.astype('int64') and its unit",
            ),
            (np.ones(1, "i4,f8"), "a NumPy array of dtype void96: store one array for each field"),
            (np.ones(1, np.longdouble), "store value.astype('float64')"),
            (np.longdouble(1), "numpy.longdouble: store float(value)"),
            (np.datetime64(1, "s"), "numpy.datetime64: store str(value)"),
            (MyDict(), f"{__name__}.MyDict: store dict(value)"),
            (torch.ones(1).as_subclass(MyTensor), "store value.as_subclass(torch.Tensor)"),
            (torch.nn.UninitializedParameter(), "run one batch through the module first"),
            (b"", "empty bytes: store None, or a bytearray"),
            (1 << 2039, "an int of more than 2039 bits: store hex(value)"),
            (Opaque(), "Opaque: store what it is made of: numbers, strings, lists, dicts, tensors"),
        ],
    )
    def test_remedies(self, value: Any, remedy: str) -> None:
        """Each ordinary type has a remedy of its own."""
        ((path, given),) = find_problems({"a": value})

        assert path == "state['a']"
        assert (
            remedy.replace("longdouble:", np.dtype(np.longdouble).name + ":", 1) in given or remedy in given
        )

    def test_cycle(self) -> None:
        """A container that contains itself is a problem with a path, not an endless walk."""
        state: dict[str, Any] = {"a": [1]}
        state["a"].append(state)

        assert find_problems(state) == [("state['a'][1]", "it contains itself: break the cycle")]

    def test_shared_container(self) -> None:
        """One container in two places is no cycle."""
        shared = [1]

        assert to_plain({"a": shared, "b": shared}) == {"a": [1], "b": [1]}

    def test_deepest(self) -> None:
        """What is nested as deep as allowed can be saved and loaded, and one level more is refused."""
        state: Any = 1
        for _ in range(201):
            state = {"a": [state]} if _ % 2 else (state,)
        deepest = state
        while find_problems(deepest):
            deepest = deepest["a"] if isinstance(deepest, dict) else deepest[0]

        loaded(to_plain(deepest))
        ((_, remedy),) = find_problems([deepest])
        assert remedy == "nested more than 200 deep: store it flat"

    def test_attributes_of_tensors(self) -> None:
        """Attributes that the user has set on a tensor are saved with it, so they are checked too."""
        tensor = torch.ones(2)
        tensor.name_of_mine = "a"  # type: ignore[attr-defined]
        assert loaded(to_plain(tensor)).name_of_mine == "a"
        tensor.other = {"a": frozenset()}  # type: ignore[attr-defined]

        assert find_problems([tensor]) == [("state[0].other['a']", "frozenset: store set(value)")]

    def test_numpy_in_attributes(self) -> None:
        """NumPy values in attributes are refused, because no path leads there."""
        state = OrderedDict(a=1)
        state._metadata = {"version": np.int64(2)}  # type: ignore[attr-defined]

        ((path, remedy),) = find_problems(state)

        assert path == "state._metadata"
        assert remedy == "NumPy inside an attribute: store a tensor or a Python number"


class TestFromPlain:
    def test_without_a_list(self) -> None:
        """What holds no list of NumPy values is given back as it is."""
        plain = {"a": torch.ones(2)}

        assert from_plain(plain, "a.pt") is plain

    def test_own_memory(self) -> None:
        """An array that is given back does not share memory with the loaded tensor."""
        plain = loaded(to_plain({"a": np.ones(3)}))
        tensor = plain["a"]

        array = from_plain(plain, "a.pt")["a"]
        tensor.zero_()

        assert array.tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "entry",
        [[["b"], "array", "<f8"], [["a", 3], "array", "<f8"], [["a"], "array", "nonsense"], ["a"], 3],
    )
    def test_list_does_not_fit(self, entry: Any) -> None:
        """A list of paths that does not fit the state is an error that says so."""
        with pytest.raises(CheckpointCorruptError, match="does not fit the rest"):
            from_plain({"a": [torch.ones(2)], "trainbus.numpy": [entry]}, "a.pt")

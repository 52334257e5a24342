"""States taken apart and put together again."""

from __future__ import annotations

import io
from collections import Counter, OrderedDict, defaultdict

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from trainbus.checkpoint.sharded_state import flatten, names_in, part_of, unflatten


def through_file(structure):
    """Return a structure as it comes out of a file."""
    file = io.BytesIO()
    torch.save(structure, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


A, B = torch.arange(3), torch.ones(2, 2)
STATES = {
    "nested": {"a": {"b": [A, {"c": B}]}, "d": 1},
    "integers": {1: A, "1": B, 2.5: None, False: "x"},
    "tuples": (A, (1, (B, "x")), []),
    "empty": {"a": {}, "b": [], "c": (), "d": set(), "e": None},
    "kinds": OrderedDict(b=A, a=Counter(x=2), c={1, 2}),
    "values only": {"a": {"b": [1, 2, (3,)]}, "c": "text"},
    "a tensor": A,
    "a value": 7,
    "dots": {"a.b": A, "a": {"b": B}},
    "set of tensors": {"a": {A}},
    "sparse": {"a": B.to_sparse(), "b": [A, B.to_sparse()]},
}


def same(a, b):
    """Tell whether two states are equal, in kinds of containers and order of keys too."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.layout == b.layout and torch.equal(a.to_dense(), b.to_dense())
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, set) and any(isinstance(one, torch.Tensor) for one in a):
        return same(list(a), list(b))
    return a == b


class TestFlatten:
    @pytest.mark.parametrize("name", STATES)
    def test_and_back(self, name):
        """A state comes back as it was, whatever its keys and containers are."""
        flat = flatten(STATES[name])

        assert same(unflatten(through_file(flat.structure), flat.tensors, flat.others), STATES[name])
        assert list(names_in(flat.structure)) == list(flat.tensors)
        assert set(flat.paths) == {*flat.tensors, *flat.values}

    def test_names_are_those_of_torch(self):
        """Tensors and values have the names under which torch.distributed.checkpoint looks for them."""
        model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3, 2)).sum().backward()
        optimizer.step()
        state = {"module": model.state_dict(), "optimizer": optimizer.state_dict(), "n": [1, [2, {"a": 3}]]}

        flat = flatten(state)

        theirs, paths = flatten_state_dict(state)
        assert {*flat.tensors, *flat.values} == set(theirs)
        assert flat.paths == paths

    def test_metadata_of_a_module(self):
        """What a module's state dict says of versions is kept."""
        state = nn.BatchNorm1d(2).state_dict()
        flat = flatten({"module": state})

        back = unflatten(through_file(flat.structure), flat.tensors)
        assert back["module"]._metadata == state._metadata

    def test_unknown_container(self):
        """A container whose tensors would go unnoticed is refused."""
        with pytest.raises(TypeError, match="Cannot copy a defaultdict"):
            flatten({"a": [defaultdict(list)]})

    @pytest.mark.parametrize(
        "structure", [("strange", 1), ("tensor", "none"), ("dict", "list", [], {}), ("list", "dict", []), 7]
    )
    def test_what_is_no_structure(self, structure):
        """Anything else is refused."""
        with pytest.raises((ValueError, TypeError, KeyError)):
            unflatten(structure, {})


class TestPart:
    @pytest.mark.parametrize("state", [{"a": A, "b": {"c": B}, "d": 1}, {"a": 1, "b": 2, "d": 3}])
    def test_of_some_keys(self, state):
        """A part holds the keys that were asked for, and names their tensors only."""
        flat = flatten(state)
        part = part_of(flat.structure, ["b", "none"])

        assert same(unflatten(part, flat.tensors), {"b": state["b"]})
        assert list(names_in(part)) == [name for name in flat.tensors if name.startswith("b")]

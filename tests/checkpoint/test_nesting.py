from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn

from trainbus.checkpoint.nesting import path_to, tensors_in, with_tensors

Pair = namedtuple("Pair", "left right")


class Mine(dict):
    """A mapping that nobody said how to rebuild."""


def same_objects(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return [id(tensor) for tensor in left] == [id(tensor) for tensor in right]


class TestTensorsIn:
    def test_every_container(self):
        """
        Tensors are found in each kind of container, nested, in the order of their places.
        """
        a, b, c, d, e, f = (torch.tensor(float(n)) for n in range(6))
        state = {"x": a, "y": [b, {"z": (c,)}], "o": OrderedDict(k=d), "n": Counter(m=e), "s": {f}}

        assert same_objects(tensors_in(state), [a, b, c, d, e, f])

    def test_once_each(self):
        """
        A tensor that stands in several places is returned once, at the first of them.
        """
        a, b = torch.ones(2), torch.ones(2)

        assert same_objects(tensors_in([a, {"again": a, "b": b}, (b, a)]), [a, b])

    def test_lone_tensor(self):
        """
        A tensor is a state with itself in it.
        """
        tensor = nn.Parameter(torch.ones(2))

        assert same_objects(tensors_in(tensor), [tensor])

    @pytest.mark.parametrize("state", [None, 3, "a", b"a", {}, [], (), set(), torch.Size([1, 2]), {"a": 1}])
    def test_none(self, state):
        """
        Plain values and empty containers hold no tensors.
        """
        assert tensors_in(state) == []

    def test_beside_the_items(self):
        """
        Tensors kept in the attributes of a state dict, as its ``_metadata`` is, are found too.
        """
        state, hidden = OrderedDict(a=torch.ones(1)), torch.ones(2)
        state._metadata = {"": {"scale": hidden}}

        assert same_objects(tensors_in(state), [state["a"], hidden])

    @pytest.mark.parametrize(
        "container",
        [
            Mine(a=torch.ones(1)),
            defaultdict(list, a=torch.ones(1)),
            Pair(torch.ones(1), 2),
            frozenset([torch.ones(1)]),
        ],
        ids=lambda container: type(container).__name__,
    )
    def test_unknown_container(self, container):
        """
        A container of another kind is refused by its name, however deep it stands.
        """
        with pytest.raises(TypeError, match=rf"Cannot copy a {type(container).__qualname__}: .* first"):
            tensors_in({"outer": [container]})


class TestWithTensors:
    def test_exchanged(self):
        """
        Each tensor is exchanged for its replacement, in all of its places.
        """
        a, b, new_a, new_b = (torch.tensor(float(n)) for n in range(4))
        state = {"a": a, "list": [b, a], "tuple": (b, 1), "set": {a}}

        copy = with_tensors(state, {id(a): new_a, id(b): new_b})

        assert copy["a"] is new_a
        assert same_objects(copy["list"], [new_b, new_a])
        assert copy["tuple"][0] is new_b
        assert same_objects(list(copy["set"]), [new_a])
        assert state["a"] is a

    @pytest.mark.parametrize(
        "state", [{"b": 1, "a": 2}, OrderedDict(b=1, a=2), Counter(b=1, a=2), [1, 2], (1, 2), {1, 2}]
    )
    def test_fresh_containers(self, state):
        """
        Containers are of the same kind, equal, in the same order, and never the given ones.
        """
        outer = [state]

        copy = with_tensors(outer, {})

        assert type(copy[0]) is type(state)
        assert copy == outer
        assert list(copy[0]) == list(state)
        # Python has but one tuple of equal constants.
        assert copy is not outer
        assert copy[0] is not state

    def test_attributes(self):
        """
        What a state dict carries in its attributes is rebuilt as its items are.
        """
        tensor, new = torch.ones(1), torch.zeros(1)
        state = OrderedDict()
        state._metadata = {"": {"version": 2, "scale": tensor}}

        copy = with_tensors(state, {id(tensor): new})

        assert copy._metadata == {"": {"version": 2, "scale": new}}
        assert copy._metadata[""] is not state._metadata[""]

    def test_other_values(self):
        """
        Everything else is taken over as it is.
        """
        size, value = torch.Size([1, 2]), object()

        copy = with_tensors([size, value], {})

        assert copy[0] is size
        assert copy[1] is value


class TestPathTo:
    @pytest.mark.parametrize(
        "path",
        [
            "state",
            "state['module']['weight']",
            "state['optimizer']['state'][0]['exp_avg']",
            "state[1][0]['it\\'s']",
            "state[('a', 1)]",
        ],
    )
    def test_written_as_code(self, path):
        """
        The path is the expression that gives the tensor.
        """
        tensor = torch.ones(2)
        states = {
            "state": tensor,
            "state['module']['weight']": {"module": OrderedDict(bias=torch.ones(2), weight=tensor)},
            "state['optimizer']['state'][0]['exp_avg']": {"optimizer": {"state": {0: {"exp_avg": tensor}}}},
            "state[1][0]['it\\'s']": [torch.ones(2), ({"it's": tensor},)],
            "state[('a', 1)]": {("a", 1): tensor},
        }

        found = path_to(states[path], tensor)

        assert eval(found, {"state": states[path]}) is tensor
        assert found.replace('"', "'") == path.replace("\\", "")

    def test_first_place(self):
        """
        Of several places the first is named.
        """
        tensor = torch.ones(2)

        assert path_to({"a": [torch.ones(2), tensor], "b": tensor}, tensor) == "state['a'][1]"

    @pytest.mark.parametrize("nested", [lambda tensor: {"a": {tensor}}, lambda tensor: {"a": 1}])
    def test_without_a_path(self, nested):
        """
        Where no expression gives the tensor, as in a set, the state as a whole is named.
        """
        tensor = torch.ones(2)

        assert path_to(nested(tensor), tensor) == "state"

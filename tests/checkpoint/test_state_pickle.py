from __future__ import annotations

import gc
import inspect
import io
import weakref
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import torch

from trainbus.checkpoint import state_pickle
from trainbus.checkpoint.state_pickle import Reductions, only_about, pickled

built = pytest.mark.skipif(not inspect.isbuiltin(only_about), reason="needs a C compiler at installation")


def of_torch(state: Any) -> bytes:
    """Return the pickle that ``torch.save`` makes."""
    file = io.BytesIO()
    torch.save(state, file)
    return zipfile.ZipFile(file).read("archive/data.pkl")


def state() -> dict[str, Any]:
    base = torch.arange(100.0)
    parameter = torch.nn.Parameter(torch.ones(3))
    return {
        "view": base[3:9],
        "tied": [base, base[3:9], parameter, parameter],
        "conj": torch.ones(3, dtype=torch.complex64).conj(),
        "negative": torch._neg_view(torch.ones(2)),
        "float8": torch.nn.Parameter(torch.ones(3).to(torch.float8_e4m3fn)),
        "uint16": torch.ones(3, dtype=torch.uint16),
        "sparse": torch.eye(3).to_sparse(),
        "sparse rows": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "meta": torch.empty(3, device="meta"),
        "empty": torch.zeros(0, 4),
        "plain": OrderedDict(a=[1, "a", None, 1.5], b=(torch.Size([3]), torch.float32, torch.device("cpu"))),
    }


def plain_tensors(nested: dict[str, Any]) -> list[torch.Tensor]:
    found = [one for one in (*nested.values(), *nested["tied"]) if isinstance(one, torch.Tensor)]
    return [one for one in found if one.layout is torch.strided and not one.is_quantized]


@pytest.fixture(params=[pytest.param("extension", marks=built), "Python"])
def way(request, monkeypatch):
    """Pickle with and without the extension."""
    if request.param == "Python":
        monkeypatch.setattr(state_pickle, "only_about", state_pickle.only_about_in_python)


@pytest.mark.filterwarnings("ignore")
class TestPickled:
    @pytest.mark.parametrize("known", [True, False])
    def test_is_what_torch_writes(self, way, known):
        """
        With and without what is known of the tensors, the pickle is that of ``torch.save``, byte for byte.
        """
        nested = state()
        reductions = Reductions(plain_tensors(nested) if known else [])

        for _ in range(2):  # what is known is not used up
            assert pickled(nested, reductions)[0] == of_torch(nested)

    def test_tensors_given_twice(self):
        """
        Nothing that was learned of a tensor is confused with what comes after it in memory.
        """
        parameters = [torch.nn.Parameter(torch.full((3,), float(number))) for number in range(50)]
        reductions = Reductions([*parameters, *parameters])
        others = [torch.ones(number) for number in range(1, 200)]

        assert pickled([parameters, others], reductions)[0] == of_torch([parameters, others])

    def test_storages_in_order(self):
        """
        The storages are those that the pickle numbers, each once.
        """
        first, second = torch.ones(2), torch.ones(5)
        nested = {"a": first, "b": second, "c": first[1:]}

        _, storages = pickled(nested, Reductions([first]))

        assert [one.data_ptr() for one in storages] == [first.data_ptr(), second.data_ptr()]

    def test_known_tensors_are_not_asked_again(self, monkeypatch):
        """
        A tensor that is known is pickled without its own reduction.
        """
        tensor, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3))
        reductions = Reductions([tensor, parameter])
        monkeypatch.setattr(torch.Tensor, "__reduce_ex__", lambda *_: pytest.fail("was asked"))

        assert len(pickled([tensor, parameter], reductions)[1]) == 2

    def test_hooks_of_tensors(self, way):
        """
        Dicts that are empty now and had something in them, or will have, are pickled as they are.
        """
        hooks: OrderedDict[str, int] = OrderedDict()
        tensor = torch.ones(2)
        reductions = Reductions([tensor])
        nested = {"tensor": tensor, "hooks": hooks, "again": hooks}

        assert pickled(nested, reductions)[0] == of_torch(nested)
        hooks["one"] = 1
        assert pickled(nested, reductions)[0] == of_torch(nested)

    def test_nothing_is_kept(self, way):
        """
        What was pickled is free afterwards without the garbage collector, which is paused during saves.
        """
        tensor = torch.ones(2)
        gone = weakref.ref(tensor)
        gc.disable()
        try:
            pickled([tensor], Reductions([]))
            del tensor
            assert gone() is None
        finally:
            gc.enable()


@built
class TestOnlyAbout:
    def test_other_types(self):
        """
        The function is asked about values of these very types, not of subclasses; others have no answer.
        """
        ask = only_about(frozenset((int, list)), lambda value: ("asked", value))

        assert [ask(value) for value in (1, [], True, "a", {}, None)] == [
            ("asked", 1),
            ("asked", []),
            None,
            None,
            None,
            None,
        ]

    def test_function_that_fails(self):
        """
        What the function raises is passed on.
        """
        with pytest.raises(ZeroDivisionError):
            only_about(frozenset((int,)), lambda value: 1 / value)(0)

    def test_types_that_are_no_frozenset(self):
        """
        Types that could change meanwhile are refused.
        """
        with pytest.raises(TypeError, match="frozenset"):
            only_about({int}, str)

    def test_function_is_let_go(self):
        """
        The function lives as long as what asks it.
        """

        class Function:
            def __call__(self, value: Any) -> Any:
                return value

        function = Function()
        gone = weakref.ref(function)
        ask = only_about(frozenset((int,)), function)
        del function

        assert ask(7) == 7 and gone() is not None
        del ask
        assert gone() is None

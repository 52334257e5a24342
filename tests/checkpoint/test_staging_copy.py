from __future__ import annotations

import io
import warnings
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from trainbus.checkpoint.staging_copy import take_snapshot
from trainbus.checkpoint.staging_memory import StagingMemory


def snapshot(state: Any) -> Any:
    return take_snapshot(state, StagingMemory()).state


def saved(state: Any) -> bytes:
    file = io.BytesIO()
    torch.save(state, file)
    return file.getvalue()


def reloaded(state: Any) -> Any:
    return torch.load(io.BytesIO(saved(state)), weights_only=True)


def same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if left.layout != right.layout or left.dtype != right.dtype or left.shape != right.shape:
        return False
    if left.is_quantized:
        return left.int_repr().equal(right.int_repr())
    return left.to_dense().equal(right.to_dense())


def plain_tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(10_000, dtype=torch.float32)
    complex_base = torch.randn(6, dtype=torch.complex64)
    return {
        "whole": torch.randn(7, 5),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "empty view": base[5:5],
        "view": base[100:110],
        "column": torch.randn(10, 10)[:, 3],
        "transposed": torch.randn(4, 6).t(),
        "expanded": torch.tensor([2.0]).expand(3, 4),
        "channels last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "overlapping": base.as_strided((5, 4), (2, 1), 7),
        "conj": complex_base.conj(),
        "neg": complex_base.conj().imag,
        "complex": torch.randn(3, dtype=torch.complex128),
        "bool": torch.tensor([True, False]),
        "half": torch.randn(5).half(),
        "bfloat16": torch.randn(5).bfloat16(),
        "float8": torch.randn(5).to(torch.float8_e4m3fn),
        "int8": torch.arange(3, dtype=torch.int8),
        "uint16": torch.arange(3, dtype=torch.int32).to(torch.uint16),
        "grad": torch.randn(3, requires_grad=True),
        "parameter": nn.Parameter(torch.randn(3)),
        "frozen": nn.Parameter(torch.randn(3), requires_grad=False),
        "buffer": nn.Buffer(torch.randn(3)),
    }


def odd_tensors() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            "coo": torch.eye(3).to_sparse(),
            "csr": torch.eye(3).to_sparse_csr(),
            "quantized": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
            "sparse parameter": nn.Parameter(torch.eye(2).to_sparse()),
        }


PLAIN = list(plain_tensors())
ODD = list(odd_tensors())


class TestTensors:
    @pytest.mark.parametrize("name", PLAIN)
    def test_equal_in_every_respect(self, name):
        """
        A copy has the values, type, strides and flags of its source.
        """
        source = plain_tensors()[name]

        copy = snapshot({"a": source})["a"]

        assert copy.dtype == source.dtype
        assert copy.stride() == source.stride()
        assert copy.tolist() == source.tolist()
        assert (copy.is_conj(), copy.is_neg()) == (source.is_conj(), source.is_neg())
        assert (type(copy), copy.requires_grad) == (type(source), source.requires_grad)
        assert copy.is_leaf

    @pytest.mark.parametrize("name", PLAIN)
    def test_changing_the_source_afterwards(self, name):
        """
        Right after the snapshot the source may change; the copy does not.
        """
        source = plain_tensors()[name]
        expected = source.detach().clone()

        copy = snapshot([source])[0]
        source.untyped_storage().fill_(0x55)

        assert copy.tolist() == expected.tolist()

    @pytest.mark.parametrize("name", PLAIN)
    def test_saved_and_loaded(self, name):
        """
        What is written of a copy loads as the source does.
        """
        source = plain_tensors()[name]

        loaded = reloaded(snapshot({"a": source}))["a"]

        assert loaded.tolist() == source.tolist()
        assert loaded.stride() == source.stride()

    @pytest.mark.parametrize("name", ODD)
    # Saving a quantized tensor warns of torch's own storage classes.
    @pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
    def test_without_plain_storage(self, name):
        """
        Sparse and quantized tensors are copied through their parts, and stay tied.
        """
        source = odd_tensors()[name]

        copy = snapshot({"a": source, "b": source})

        assert copy["a"] is copy["b"]
        assert copy["a"] is not source
        assert type(copy["a"]) is type(source)
        assert same(copy["a"].detach(), source.detach())
        assert same(reloaded(copy)["a"].detach(), source.detach())

    def test_sparse_source_changes(self):
        """
        The values of a sparse tensor are copied, not shared.
        """
        source = torch.eye(3).to_sparse()

        copy = snapshot([source])[0]
        source._values().fill_(9)

        assert copy.to_dense().equal(torch.eye(3))

    @pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
    # torch warns that the older of the two layouts may change.
    @pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
    def test_nested(self, layout):
        """
        Nested tensors are copied through their parts.
        """
        source = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)

        copy = snapshot([source])[0]
        source.values().fill_(9)

        assert [part.tolist() for part in copy.unbind()] == [[1, 1], [1, 1, 1]]

    def test_meta(self):
        """
        A tensor without data stays one.
        """
        copy = snapshot([torch.zeros(3, device="meta")])[0]

        assert copy.is_meta
        assert copy.shape == (3,)

    def test_wrapper_subclass(self):
        """
        A subclass that keeps its data elsewhere is copied as it copies itself.
        """

        class Wrapper(torch.Tensor):
            @staticmethod
            def __new__(cls, inner):
                return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

            def __init__(self, inner):
                self.inner = inner

            @classmethod
            def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
                plain = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
                return cls(func(*plain, **(kwargs or {})))

        source = Wrapper(torch.ones(3))

        copy = snapshot([source])[0]
        source.inner.fill_(9)

        assert type(copy) is Wrapper
        assert copy.inner.equal(torch.ones(3))


class TestSharing:
    def test_tied_weights(self):
        """
        Tied weights are tied in the copy and in the file, under state_dict's new tensors too.
        """
        embedding, head = nn.Embedding(100, 50), nn.Linear(50, 100, bias=False)
        head.weight = embedding.weight
        state = {
            "module": {**embedding.state_dict(), "head": head.state_dict()["weight"]},
            "raw": head.weight,
        }

        copy = snapshot(state)

        addresses = {
            copy["module"]["weight"].data_ptr(),
            copy["module"]["head"].data_ptr(),
            copy["raw"].data_ptr(),
        }
        assert len(addresses) == 1
        assert len(saved(copy)) <= len(saved(state)) + 1024
        loaded = reloaded(copy)
        loaded["module"]["head"].detach().zero_()
        assert loaded["module"]["weight"].count_nonzero() == 0

    def test_same_object(self):
        """
        A tensor that stands in two places is one object in the copy.
        """
        tensor = torch.ones(2)

        copy = snapshot([tensor, {"a": tensor}])

        assert copy[0] is copy[1]["a"]

    def test_overlapping_views(self):
        """
        Views that overlap do so in the copy.
        """
        base = torch.arange(100.0)

        left, right = snapshot([base[10:30], base[20:40]])
        left[15] = -1

        assert right[5] == -1
        assert left.untyped_storage().nbytes() == 30 * 4

    def test_small_view(self):
        """
        Ten numbers of a large buffer take little room in the file.
        """
        base = torch.zeros(1_000_000)

        assert len(saved(snapshot([base[:10], torch.zeros(3)]))) < 5_000

    def test_one_storage_as_two_types(self):
        """
        What torch.save refuses, a storage seen as two types, can be saved.
        """
        base = torch.arange(4.0)
        state = [base, base.view(torch.int32)]
        with pytest.raises(RuntimeError, match="different types"):
            saved(state)

        loaded = reloaded(snapshot(state))

        assert loaded[0].equal(base)
        assert loaded[1].equal(base.view(torch.int32))

    def test_range_is_a_storage_of_its_own(self):
        """
        A copied tensor does not bring the whole staging buffer into the file.
        """
        state = {str(n): torch.full((1000,), float(n)) for n in range(10)}

        assert len(saved(snapshot(state))) <= len(saved(state))


class TestContainers:
    def test_rebuilt(self):
        """
        Containers are new ones of the same kinds, other values are taken over.
        """
        tensor = torch.ones(2)
        state = {
            "list": [1, tensor],
            "tuple": (tensor, "a"),
            "set": {1, 2},
            "counter": Counter(a=2),
            "ordered": OrderedDict(b=tensor, a=1),
            "size": torch.Size([1, 2]),
            3: None,
        }

        copy = snapshot(state)
        state["list"].append(2)
        state["set"].add(3)
        state["counter"]["b"] += 1
        state["ordered"]["c"] = 1

        assert list(copy) == ["list", "tuple", "set", "counter", "ordered", "size", 3]
        assert len(copy["list"]) == 2
        assert type(copy["tuple"]) is tuple
        assert copy["set"] == {1, 2}
        assert type(copy["counter"]) is Counter
        assert copy["counter"] == {"a": 2}
        assert type(copy["ordered"]) is OrderedDict
        assert list(copy["ordered"]) == ["b", "a"]
        assert type(copy["size"]) is torch.Size

    def test_metadata_of_a_state_dict(self):
        """
        The versions that a module's state dict carries beside its items survive.
        """
        state = nn.BatchNorm1d(2).state_dict()

        copy = snapshot(state)

        assert copy._metadata == state._metadata
        assert copy._metadata is not state._metadata
        assert reloaded(copy)._metadata == state._metadata

    def test_unknown_container(self):
        """
        A container whose tensors would be left uncopied is refused.
        """

        class Mine(dict):
            pass

        with pytest.raises(TypeError, match=r"Cannot copy a .*Mine: of containers only dict"):
            snapshot([Mine()])

    def test_no_tensors(self):
        """
        A state without tensors is a state.
        """
        assert snapshot({"a": 1}) == {"a": 1}


class TestReuse:
    def test_second_snapshot_takes_the_same_memory(self):
        """
        In the steady state nothing is allocated: same addresses, same tensors, no growth.
        """
        memory = StagingMemory()
        state = {"a": torch.ones(1000), "b": torch.ones(10)}
        first = take_snapshot(state, memory)
        tensors, size = list(first.state.values()), memory.size
        addresses = [tensor.data_ptr() for tensor in tensors]
        first.release()
        state = {name: tensor * 2 for name, tensor in state.items()}

        second = take_snapshot(state, memory)

        assert [tensor.data_ptr() for tensor in second.state.values()] == addresses
        assert all(now is then for now, then in zip(second.state.values(), tensors, strict=True))
        assert second.state["a"].equal(torch.full((1000,), 2.0))
        assert memory.size == size

    def test_changed_structure(self):
        """
        A state of another structure is copied as what it is.
        """
        memory = StagingMemory()
        base = torch.arange(6.0)
        states = [
            [base, base.clone()],
            [base, base],
            [base.reshape(2, 3)],
            [base.double()],
            [base[1:]],
            [base.reshape(2, 3).t(), base.requires_grad_()],
            [torch.arange(100_000)],
            [base],
        ]
        for state in states:
            taken = take_snapshot(state, memory)
            for copy, source in zip(taken.state, state, strict=True):
                assert copy.dtype == source.dtype
                assert copy.equal(source)
                assert copy.stride() == source.stride()
            taken.release()

    def test_held_snapshots_do_not_disturb_each_other(self):
        """
        A snapshot stays as it is while others are taken.
        """
        memory = StagingMemory(2)
        tensor = torch.zeros(1000)
        first = take_snapshot([tensor], memory)
        tensor.fill_(1)
        second = take_snapshot([tensor], memory)

        assert first.state[0].equal(torch.zeros(1000))
        assert second.state[0].equal(torch.ones(1000))

    def test_failure_gives_the_memory_back(self):
        """
        A snapshot that could not be taken does not keep a buffer.
        """

        class Broken(torch.Tensor):
            @classmethod
            def __torch_function__(cls, func, types, args=(), kwargs=None):
                if func is torch.Tensor.detach:
                    raise RuntimeError("broken")
                return super().__torch_function__(func, types, args, kwargs)

        memory = StagingMemory()
        with pytest.raises(RuntimeError, match="broken"):
            take_snapshot([torch.ones(2).as_subclass(Broken)], memory)

        take_snapshot([torch.ones(2)], memory)

    def test_release(self):
        """
        A released snapshot has no state any more; releasing it twice is fine.
        """
        memory = StagingMemory()
        taken = take_snapshot([torch.ones(2)], memory)

        taken.release()
        taken.release()

        assert taken.state is None


class TestSurroundings:
    def test_inference_mode(self):
        """
        Snapshots may be taken of inference tensors and inside of inference mode.
        """
        memory = StagingMemory()
        with torch.inference_mode():
            state = [torch.ones(3), nn.Parameter(torch.ones(2))]
            taken = take_snapshot(state, memory)
        assert not taken.state[0].is_inference()
        taken.release()

        assert take_snapshot(state, memory).state[0].equal(torch.ones(3))

    def test_default_device(self):
        """
        The copy is in host memory whatever the default device is.
        """
        source = torch.ones(3)
        with torch.device("meta"):
            copy = snapshot([source])[0]

        assert copy.device.type == "cpu"
        assert copy.equal(torch.ones(3))

    def test_autograd_sees_nothing(self):
        """
        A copy is no part of the graph, and copying does not disturb a backward pass in flight.
        """
        weight = nn.Parameter(torch.ones(3))
        loss = (weight * weight).sum()

        copy = snapshot([weight, loss])

        loss.backward()
        assert weight.grad.equal(torch.full((3,), 2.0))
        assert copy[1].grad_fn is None

    @pytest.mark.gpu
    def test_cuda(self):
        """
        A snapshot of a CUDA tensor holds what the work queued before it made.
        """
        tensor = torch.zeros(10_000_000, device="cuda")
        tied = [tensor, tensor[5:].view(-1)]
        for value in range(5):
            tensor.fill_(value)
            copy = snapshot(tied)
            tensor.fill_(-1)
            assert copy[0].device.type == "cpu"
            assert copy[0].equal(torch.full((10_000_000,), float(value)))
            assert copy[1].data_ptr() == copy[0].data_ptr() + 20

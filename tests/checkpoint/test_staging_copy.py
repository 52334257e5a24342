from __future__ import annotations

import io
import threading
import warnings
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from trainbus.checkpoint import background_copy, host_copy, snapshot_plan, staging_copy
from trainbus.checkpoint.kinds_kept import KINDS_KEPT
from trainbus.checkpoint.snapshot import Snapshot
from trainbus.checkpoint.snapshot_plan import SMALLEST_WAITING
from trainbus.checkpoint.staging_copy import Stager, take_snapshot
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.errors import SnapshotChangedError

from .allocations import Allocations

WAIT = 30
"""Seconds after which a test that hangs fails."""
LARGE = SMALLEST_WAITING // 4
"""Elements of float32 that are just worth waiting for."""


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


class TestPlaces:
    def test_are_known(self, monkeypatch):
        """
        No tensor is asked a second time where it lies, which would take thousands of calls.
        """
        monkeypatch.setattr(host_copy, "_places_of", None)
        state = plain_tensors()

        copied = snapshot(state)

        assert all(same(copied[name], state[name]) for name in state)


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


@pytest.fixture(name="make")
def _make() -> Iterator[Callable[..., Stager]]:
    """Make stagers, with one buffer each; their threads are ended at the end."""
    made: list[Stager] = []

    def make(buffers: int = 1, **options: Any) -> Stager:
        made.append(Stager(StagingMemory(buffers), **options))
        return made[-1]

    yield make
    for stager in made:
        stager.thread.close()


def owning(*tensors: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return *tensors* as an optimizer's, by address."""
    return {tensor.data_ptr(): tensor for tensor in tensors}


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the values of a tensor of whatever type, bit by bit."""
    dense = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return bytes(dense.view(-1).view(torch.uint8).tolist())


def watched(snapshot: Snapshot) -> list[int]:
    """Return the addresses of the tensors on the snapshot that are not copied yet."""
    return [] if snapshot.copy is None else [one.data_ptr() for one in snapshot.copy._watched.copies]


def waits(snapshot: Snapshot, *names: Any) -> list[bool]:
    """Tell of each of these tensors of the snapshot whether it is yet to be copied."""
    return [snapshot.state[name].data_ptr() in watched(snapshot) for name in names]


def arrive(stager: Stager, snapshot: Snapshot) -> Any:
    """Have the rest copied and return the state."""
    stager.begin(snapshot)
    snapshot.wait()
    return snapshot.state


class TestWhatWaits:
    def test_owned(self, make):
        """
        What an optimizer owns waits; what it does not own is copied at once.
        """
        owned, free = torch.full((LARGE,), 1.0), torch.full((LARGE,), 2.0)
        stager = make()

        taken = stager.take({"owned": owned, "free": free}, owning(owned))

        assert waits(taken, "owned", "free") == [True, False]
        assert taken.state["free"].equal(free)
        assert taken.state["owned"].count_nonzero() == 0
        assert arrive(stager, taken)["owned"].equal(owned)

    def test_everything_else_may_change_before_it_begins(self, make):
        """
        Between the request and the copy, only what waits may not change.
        """
        state = {"owned": torch.ones(LARGE), "view": torch.ones(LARGE)[5:], "small": torch.ones(3)}
        state["sparse"] = torch.eye(3).to_sparse()
        stager = make()

        taken = stager.take(state, owning(state["owned"]))
        state["view"].fill_(9)
        state["small"].fill_(9)
        state["sparse"]._values().fill_(9)

        copy = arrive(stager, taken)
        assert copy["view"].unique().tolist() == [1]
        assert copy["small"].tolist() == [1, 1, 1]
        assert copy["sparse"].to_dense().equal(torch.eye(3))
        assert copy["owned"].equal(torch.ones(LARGE))

    @pytest.mark.parametrize(("elements", "expected"), [(LARGE - 1, False), (LARGE, True)])
    def test_small(self, make, elements, expected):
        """
        A tensor below the smallest size is copied at once.
        """
        tensor = torch.ones(elements)

        taken = make().take({"a": tensor}, owning(tensor))

        assert (taken.copy is not None, taken.waits) == (expected, expected)
        assert taken.state["a"].equal(tensor) is not expected

    @pytest.mark.parametrize("owners", [None, {}, "another"])
    def test_nothing_waits(self, make, owners):
        """
        A snapshot of which nothing waits is complete, and nobody is needed to complete it.
        """
        tensor, another = torch.ones(LARGE), torch.ones(LARGE)
        stager = make()

        taken = stager.take([tensor], owning(another) if owners == "another" else owners)
        stager.begin(taken)

        assert taken.copy is None
        assert not taken.waits
        assert taken.state[0].equal(tensor)
        assert not stager.thread.is_alive()
        taken.wait()

    def test_holds_owners_not_the_state(self, make):
        """
        What waits is read through its owner; what the state had made of it may end at once.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make()
        state = module.state_dict()
        ends = [weakref.ref(tensor) for tensor in state.values()]

        taken = stager.take(state, owning(*module.parameters()))
        del state

        assert taken.waits
        assert [end() for end in ends] == [None, None]
        arrive(stager, taken)
        assert taken.state["weight"].equal(module.weight)

    def test_owned_in_part(self, make):
        """
        A tensor does not wait while another on its storage, in the same range, may change.
        """
        base = torch.arange(2.0 * LARGE)
        left, right, alone = base[:LARGE], base[LARGE:], torch.ones(LARGE)
        stager = make()

        taken = stager.take({"left": left, "right": right, "alone": alone}, owning(left, alone))

        assert waits(taken, "left", "right", "alone") == [False, False, True]
        base.fill_(-1)
        assert taken.state["left"].equal(torch.arange(1.0 * LARGE))
        assert taken.state["right"].equal(torch.arange(1.0 * LARGE, 2.0 * LARGE))

    def test_owned_whole(self, make):
        """
        Parts of one storage that all are owned wait together, as in flat buffers of parameters.
        """
        base = torch.arange(2.0 * LARGE)
        left, right = base[:LARGE], base[LARGE:]
        stager = make()

        taken = stager.take({"left": left, "right": right}, owning(left, right))

        assert waits(taken, "left", "right") == [True, True]
        copy = arrive(stager, taken)
        assert copy["left"].equal(left)
        assert copy["right"].equal(right)
        assert copy["left"].untyped_storage().data_ptr() == copy["right"].untyped_storage().data_ptr()

    @pytest.mark.parametrize("odd", ["shape", "stride", "dtype", "longer"])
    def test_another_tensor_at_the_address(self, make, odd):
        """
        A tensor that begins where an owned one does, and is not like it, is copied at once.
        """
        base = torch.arange(2.0 * LARGE)
        owner = base[:LARGE].view(-1, 64)
        tensor = {
            "shape": owner.view(64, -1),
            "stride": owner.view(64, -1).t(),
            "dtype": owner.view(torch.int32),
            "longer": base.view(-1, 64),
        }[odd]
        stager = make()

        taken = stager.take({"a": tensor}, owning(owner))
        expected = bytes_of(tensor)
        base.fill_(-1)

        assert taken.copy is None
        assert bytes_of(taken.state["a"]) == expected

    def test_detached_alias(self, make):
        """
        What a state dict gives, a new tensor on a parameter's memory, is known as the parameter.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make()

        taken = stager.take(dict(module.state_dict()), owning(*module.parameters()))

        assert waits(taken, "weight", "bias") == [True, False]
        assert arrive(stager, taken)["weight"].equal(module.weight)

    def test_tied(self, make):
        """
        A tensor in two places waits once and stays tied.
        """
        tensor = torch.ones(LARGE)
        stager = make()

        copy = arrive(stager, stager.take([tensor, tensor.detach(), {"a": tensor}], owning(tensor)))

        assert copy[0] is copy[2]["a"]
        assert copy[0].data_ptr() == copy[1].data_ptr()
        assert copy[1].equal(tensor)

    def test_thread_begins_with_the_first_that_waits(self, make):
        """
        No thread is started before something waits.
        """
        tensor = torch.ones(LARGE)
        stager = make()
        stager.take([tensor]).release()
        assert not stager.thread.is_alive()

        arrive(stager, stager.take([tensor], owning(tensor)))

        assert stager.thread.is_alive()


class TestRelease:
    def test_before_the_copy_has_arrived(self, make, monkeypatch):
        """
        Memory that is being written to is given back when that is over, not before.
        """
        tensor = torch.ones(LARGE)
        stager = make()
        taken = stager.take([tensor], owning(tensor))
        begun, go_on, released = threading.Event(), threading.Event(), threading.Event()
        copy_all = background_copy.copy_all

        def copy_later(*args: Any) -> None:
            begun.set()
            assert go_on.wait(WAIT)
            copy_all(*args)

        monkeypatch.setattr(background_copy, "copy_all", copy_later)
        stager.begin(taken)
        assert begun.wait(WAIT)

        def release() -> None:
            taken.release()
            released.set()

        thread = threading.Thread(target=release)
        thread.start()

        assert not released.wait(0.1)
        with pytest.raises(RuntimeError, match="all 1 staging buffers hold one"):
            stager.take([tensor])
        go_on.set()
        assert released.wait(WAIT)
        thread.join(WAIT)
        stager.take([tensor])

    def test_before_the_copy_was_begun(self, make):
        """
        Where an error kept a copy from being begun, its memory is given back, and nobody writes to it.
        """
        tensor = torch.ones(LARGE)
        stager = make()
        taken = stager.take([tensor], owning(tensor))

        taken.release()
        stager.begin(taken)

        with pytest.raises(RuntimeError, match="given up before it was copied"):
            taken.wait()
        assert stager.take([tensor]).state[0].equal(tensor)

    def test_after_a_failure(self, make):
        """
        Memory comes back from a copy that failed.
        """
        tensor = torch.ones(LARGE)
        stager = make()
        taken = stager.take([tensor], owning(tensor))
        tensor.add_(1)
        stager.begin(taken)
        with pytest.raises(SnapshotChangedError, match=r"state\[0\] changed"):
            taken.wait()

        taken.release()

        assert stager.take([tensor]).state[0].equal(tensor)


class TestTripwire:
    def test_place(self, make):
        """
        A change is told with its place in the state, however the parameter is called elsewhere.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make()
        taken = stager.take({"module": module.state_dict(), "n": [1]}, owning(*module.parameters()))
        with torch.no_grad():
            module.weight.mul_(2)
            module.bias.mul_(2)
        stager.begin(taken)

        with pytest.raises(SnapshotChangedError) as caught:
            taken.wait()

        assert caught.value.places == ["state['module']['weight']"]

    def test_checked(self, make):
        """
        A checked snapshot notices what leaves no trace on the tensor.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make(check=True)
        taken = stager.take(dict(module.state_dict()), owning(*module.parameters()))
        module.weight.data.mul_(2)
        stager.begin(taken)

        with pytest.raises(SnapshotChangedError, match=r"state\['weight'\]"):
            taken.wait()

    def test_checked_and_unchanged(self, make):
        """
        A checked snapshot of what nobody changed is like any other; NaN is no change.
        """
        tensor = torch.full((LARGE,), float("nan"))
        tensor[0] = 1
        stager = make(check=True)

        taken = stager.take([tensor], owning(tensor))

        assert bytes_of(arrive(stager, taken)[0]) == bytes_of(tensor)


def large_tensors() -> dict[str, torch.Tensor]:
    """Tensors of every kind that has a storage, with enough bytes to wait."""
    n = 2 * LARGE
    base = torch.arange(n, dtype=torch.float32)
    complex_base = torch.randn(n, dtype=torch.complex64)
    return {
        "whole": torch.randn(n),
        "parameter": nn.Parameter(torch.randn(64, n // 64)),
        "float8": torch.randn(8 * n).to(torch.float8_e4m3fn),
        "complex32": torch.randn(2 * n).half().view(torch.complex32),
        "complex128": torch.randn(n, dtype=torch.complex128),
        "bfloat16": torch.randn(n).bfloat16(),
        "uint16": torch.arange(n, dtype=torch.int32).to(torch.uint16),
        "bool": torch.arange(4 * n) % 3 == 0,
        "transposed": torch.randn(256, n // 256).t(),
        "strided": torch.randn(2 * n)[::2],
        "column": torch.randn(n, 3)[:, 1],
        "expanded": torch.randn(n).expand(3, n),
        "channels last": torch.randn(8, 16, 16, n // 2048).to(memory_format=torch.channels_last),
        "view": base[5:],
        "overlapping": base.as_strided((n // 2 - 1, 4), (2, 1)),
        "conj": complex_base.conj(),
        "neg": torch._neg_view(torch.randn(n)),
        "reshaped conj": complex_base.conj().view(2, -1),
    }


# torch warns of one of its types.
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
class TestKindsThatWait:
    @pytest.mark.parametrize("name", list(large_tensors()))
    def test_equal_in_every_respect(self, make, name):
        """
        What is copied later has the values, type, strides and flags of its source all the same.
        """
        source = large_tensors()[name]
        expected = bytes_of(source)
        stager = make()

        taken = stager.take({"a": source}, owning(source))
        assert taken.waits
        copy = arrive(stager, taken)["a"]
        source.untyped_storage().fill_(0x55)

        assert bytes_of(copy) == expected
        assert (copy.dtype, copy.shape, copy.stride()) == (source.dtype, source.shape, source.stride())
        assert (copy.is_conj(), copy.is_neg()) == (source.is_conj(), source.is_neg())
        assert (type(copy), copy.requires_grad) == (type(source), source.requires_grad)

    @pytest.mark.parametrize("name", [*ODD, "empty", "empty view", "meta", "scalar"])
    def test_never_wait(self, make, name):
        """
        Tensors without a plain storage, or without elements, are complete at once even if owned.
        """
        extra = {
            "empty": torch.zeros(0, 3),
            "empty view": torch.ones(LARGE)[5:5],
            "meta": torch.zeros(LARGE, device="meta"),
            "scalar": torch.tensor(2.0),
        }
        source = odd_tensors().get(name, extra.get(name))
        beside = torch.ones(LARGE)
        owners = owning(beside)
        if name not in ODD:
            owners[source.data_ptr()] = source
        stager = make()

        taken = stager.take({"a": source, "b": beside}, owners)
        copy = taken.state["a"]

        assert len(watched(taken)) == 1
        assert copy.is_meta or same(copy.detach(), source.detach())
        assert arrive(stager, taken)["b"].equal(beside)

    @pytest.mark.parametrize("owned", [("float",), ("float", "int")])
    def test_one_storage_as_two_types(self, make, owned):
        """
        Two types on one storage are copied apart, each when it may be.
        """
        base = torch.arange(1.0 * LARGE)
        state = {"float": base, "int": base.view(torch.int32), "half": base.view(torch.float16)}
        expected = {name: bytes_of(tensor) for name, tensor in state.items()}
        stager = make()

        # Only one of them can be found under the address.
        taken = stager.take(state, owning(*(state[name] for name in owned)))

        assert waits(taken, *state) == [name == owned[-1] for name in state]
        copy = arrive(stager, taken)
        assert {name: bytes_of(tensor) for name, tensor in copy.items()} == expected
        assert reloaded(copy)["int"].equal(state["int"])

    @pytest.mark.parametrize("name", ["float8", "expanded", "transposed", "conj", "column"])
    def test_written_and_loaded(self, make, name):
        """
        What was copied later is written as what it is.
        """
        source = large_tensors()[name]
        stager = make()

        loaded = reloaded(arrive(stager, stager.take({"a": source}, owning(source))))["a"]

        assert bytes_of(loaded) == bytes_of(source)
        assert loaded.stride() == source.stride()


class TestSteadyState:
    def state(self, module: nn.Module) -> dict[str, Any]:
        """Return a state with fresh small tensors, as random states are."""
        return {
            "module": module.state_dict(),
            "rng": torch.get_rng_state(),
            "odd": {"conj": torch.ones(3, dtype=torch.complex64).conj(), "n": 1},
        }

    def test_plan_and_views_are_reused(self, make):
        """
        While nothing but values and addresses changes, snapshots are made of the same tensors.
        """
        module = nn.Sequential(nn.Linear(LARGE // 64, 64), nn.BatchNorm1d(64))
        stager = make()
        seen, plans, kept = [], [], []
        for value in range(4):
            nn.init.constant_(module[0].weight, float(value))
            state = self.state(module)
            kept.append(state)  # so that the next one's small tensors lie elsewhere
            taken = stager.take(state, owning(*module.parameters()))
            copy = arrive(stager, taken)
            assert copy["module"]["0.weight"].equal(module[0].weight)
            assert copy["rng"].equal(state["rng"])
            assert bytes_of(copy["odd"]["conj"]) == bytes_of(state["odd"]["conj"])
            seen.append([*copy["module"].values(), copy["rng"], copy["odd"]["conj"]])
            plans.append(stager._kinds[0].plan)
            taken.release()

        for later in seen[1:]:
            assert all(now is then for now, then in zip(later, seen[0], strict=True))
        assert all(plan is plans[0] for plan in plans)

    def test_states_that_take_turns(self, make):
        """
        A full state and weights alone, saved in turns, each keep their plan, their tensors and their values.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make()
        seen: dict[str, list[Any]] = {"full": [], "weights": []}
        for value in range(3):
            nn.init.constant_(module.weight, float(value))
            for kind, state in (("full", self.state(module)), ("weights", {"module": module.state_dict()})):
                taken = stager.take(state)
                copy = arrive(stager, taken)
                assert copy["module"]["weight"].unique().tolist() == [value]
                assert kind == "weights" or copy["rng"].equal(state["rng"])
                seen[kind].append((stager._kinds[0].plan, copy["module"]["weight"]))
                taken.release()

        for plans_and_tensors in seen.values():
            assert all(one is plans_and_tensors[0][0] for one, _ in plans_and_tensors)
            assert all(one is plans_and_tensors[0][1] for _, one in plans_and_tensors)

    def test_kinds_without_end(self, make, caplog):
        """
        Of states that are each of another kind only the last few are kept, and it is said once.
        """
        stager = make()
        for size in range(1, 20):
            taken = stager.take([torch.full((size,), float(size)) for _ in range(size)])
            assert arrive(stager, taken)[0].tolist() == [size] * size
            taken.release()

        assert len(stager._kinds) == len(taken.buffer.views) == KINDS_KEPT
        assert caplog.text.count("at each of the last 6 saves (6 tensors, 5 before)") == 1

    def test_kinds_in_turns(self, make, caplog):
        """
        A state that changed for a while and then takes turns with others is not spoken of.
        """
        stager = make()
        for size in [1, 2, 3, 4, 5, 5, *range(6, 6 + KINDS_KEPT), *range(6, 6 + KINDS_KEPT)]:
            stager.take([torch.zeros(size)]).release()

        assert "at each of the last" not in caplog.text

    def test_plan_is_reused_for_another_buffer(self, make):
        """
        Two buffers take turns, each with tensors of its own, under one plan.
        """
        module = nn.Linear(LARGE // 64, 64)
        stager = make(buffers=2)
        owners = owning(*module.parameters())

        first = stager.take(self.state(module), owners)
        arrive(stager, first)
        with torch.no_grad():
            module.weight.add_(1)
        second = stager.take(self.state(module), owners)
        arrive(stager, second)

        one, other = first.state["module"]["weight"], second.state["module"]["weight"]
        assert one.data_ptr() != other.data_ptr()
        assert other.equal(module.weight)
        assert torch.allclose(one + 1, other)
        first.release()
        assert stager.take(self.state(module), owners).state["module"]["weight"] is one

    def test_no_fresh_memory(self, make):
        """
        In the steady state a snapshot makes no tensor with memory of its own.
        """
        module = nn.Sequential(nn.Linear(LARGE // 64, 64), nn.BatchNorm1d(64))
        stager = make()
        owners = owning(*module.parameters())
        first = stager.take(self.state(module), owners)
        arrive(stager, first)
        begin = torch.frombuffer(first.buffer.mapping, dtype=torch.uint8).data_ptr()
        places = [range(begin, begin + len(first.buffer.mapping))]
        size = stager._memory.size
        first.release()
        state = self.state(module)

        with Allocations(places) as steady:
            second = stager.take(state, owners)
        arrive(stager, second)

        assert steady.found == []
        assert second.buffer.mapping is first.buffer.mapping
        assert stager._memory.size == size
        with Allocations(places) as probe:
            torch.ones(3).clone()
        assert len(probe.found) == 2

    def test_structure_that_changes(self, make):
        """
        Whatever changes between two saves, each copy has what the state has then.
        """
        module = nn.Linear(LARGE // 64, 64)
        weight, base = module.weight, torch.arange(4.0 * LARGE)
        twin = weight.detach().clone()
        square, waves = torch.randn(128, 128), torch.randn(LARGE, dtype=torch.complex64)
        states: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = [
            ([weight, twin], [weight]),
            ([weight, twin], [weight, twin]),
            ([weight, weight.detach()], [weight]),  # tied
            ([weight, twin], [weight]),  # and not any more
            ([weight, twin, base], [weight, base]),  # a new one
            ([weight, twin, base.view(64, -1)], [weight, base]),
            ([weight, twin, base.view(64, -1)], [weight, base.view(64, -1)]),
            ([weight, twin, base.view(64, -1).t()], [weight, base]),
            ([weight, twin, base.double()], [weight]),
            ([weight, base[: 2 * LARGE], base[LARGE:]], [weight, base]),  # on one storage
            ([weight, base[: 2 * LARGE].clone(), base[LARGE:].clone()], [weight]),
            ([weight.detach().half(), base[:5]], []),
            ([base[:5], weight], [weight]),
            ([square, waves], [waves]),
            ([square.t(), waves], [waves]),  # only a stride
            ([square.t(), waves.conj()], [waves]),  # only a flag
            ([square, torch._neg_view(twin)], [square]),
            ([square, twin], [square]),
            ([square, nn.Parameter(twin)], [square]),
            ([square, nn.Parameter(twin, requires_grad=False)], [square]),
            ([], []),
            ([weight, twin], [weight]),
        ]
        stager = make()
        for number, (state, owned) in enumerate(states):
            with torch.no_grad():
                for tensor in state:
                    tensor.view_as(tensor).add_(1)
            expected = [bytes_of(tensor) for tensor in state]
            taken = stager.take(state, owning(*owned))
            copy = arrive(stager, taken)
            assert [bytes_of(tensor) for tensor in copy] == expected, number
            for mine, source in zip(copy, state, strict=True):
                assert (mine.dtype, mine.shape) == (source.dtype, source.shape), number
                assert mine.stride() == source.stride(), number
                assert (type(mine), mine.requires_grad) == (type(source), source.requires_grad), number
            at = [tensor.data_ptr() for tensor in state]
            assert (len(set(at)) == len(at)) == (len({t.data_ptr() for t in copy}) == len(copy)), number
            taken.release()

    @pytest.mark.parametrize("owned", [True, False])
    def test_freed_between_saves(self, make, owned):
        """
        A tensor whose memory was freed is refused, also where a plan is at hand, and the next is taken.
        """
        tensor, other = torch.ones(LARGE), torch.ones(LARGE)
        stager = make()
        owners = owning(tensor) if owned else None
        taken = stager.take([tensor], owners)
        arrive(stager, taken)
        taken.release()
        tensor.untyped_storage().resize_(4)

        with pytest.raises(ValueError, match="Its memory was freed"):
            stager.take([tensor], owners)

        assert stager.take([other]).state[0].equal(other)


class TestDevicesOfOtherKinds:
    @pytest.fixture(autouse=True)
    def _without_cpu(self, monkeypatch):
        """Let the CPU be a device of which nothing is known."""
        for module in (snapshot_plan, staging_copy):
            monkeypatch.setattr(module, "COPIED_DEVICES", frozenset(("cuda",)))

    @pytest.mark.parametrize("owned", [True, False])
    def test_copied_one_by_one(self, make, caplog, owned):
        """
        Tensors there are copied right and at once, and that it takes longer is said once.
        """
        stager = make()
        tied = nn.Parameter(torch.ones(LARGE))
        state = {"a": tied, "b": [tied], "c": torch.arange(5), "d": torch.zeros(3, device="meta")}
        for value in range(3):
            with torch.no_grad():
                tied.fill_(value)
            taken = stager.take(state, owning(tied) if owned else None)
            with torch.no_grad():
                tied.fill_(-1)
            stager.begin(taken)
            assert taken.copy is None
            assert taken.state["a"] is taken.state["b"][0]
            assert taken.state["a"].unique().tolist() == [value]
            assert type(taken.state["a"]) is nn.Parameter
            assert taken.state["c"].tolist() == [0, 1, 2, 3, 4]
            taken.release()

        stager.take({"other": torch.ones(7)}).release()
        records = [record.getMessage() for record in caplog.records]
        assert records == ["Tensors on 'cpu' are copied one by one: saves take longer there."]


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
            taken = take_snapshot(tied, StagingMemory())
            tensor.fill_(-1)
            taken.wait()
            copy = taken.state
            assert copy[0].device.type == "cpu"
            assert copy[0].equal(torch.full((10_000_000,), float(value)))
            assert copy[1].data_ptr() == copy[0].data_ptr() + 20

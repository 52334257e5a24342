"""Saving and loading sharded checkpoints from a world of one; ``test_sharded_ranks.py`` has the others."""

from __future__ import annotations

import errno
import os
import pickle
import threading
import weakref

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor

import trainbus
from trainbus import CheckpointFolder, Manifest
from trainbus.checkpoint import staging_memory
from trainbus.checkpoint.sharded import ShardedSaver, collect_sharded, restore_sharded
from trainbus.checkpoint.sharded_format import METADATA, read_sharded, seal_folder
from trainbus.checkpoint.sharded_load import load_into
from trainbus.checkpoint.sharded_state import STRUCTURE
from trainbus.checkpoint.sharded_writer import WHOLE, ShardPlanner, StagedState
from trainbus.checkpoint.staging_memory import StagingBuffer, map_pages
from trainbus.errors import CheckpointCorruptError, RankFailedError, StateMismatchError
from trainbus.testing import FaultyDisk

WAIT = 60.0


@pytest.fixture(name="group")
def _group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


@pytest.fixture(name="saver")
def _saver(group):
    saver = ShardedSaver(group)
    yield saver
    saver.close()


def manifest(step=0):
    return Manifest(contents="state", sequence=step, global_step=step)


def model_and_optimizer():
    """Return a small model under FSDP2 after one step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def reseal(path):
    """Write the list and the manifest anew, as a forger would, so that all digests are right."""
    import xxhash

    files = {name: (path / name).read_bytes() for name in read_sharded(path).digests}
    digests = {name: xxhash.xxh3_128(content).hexdigest() for name, content in files.items()}
    _, listed, text = seal_folder(read_sharded(path).manifest, digests, sum(map(len, files.values())))
    (path / "digests.xxh128").write_bytes(listed)
    (path / "manifest.json").write_bytes(text)


class TestSave:
    @pytest.mark.parametrize("other", [None, 3, "x"])
    def test_plain_values_are_the_first_ranks(self, other):
        """Where rank 0 has a tensor, another rank may have a plain value: rank 0's is written."""
        plans = []
        planners = [ShardPlanner(f"with {other}, rank {rank}") for rank in range(2)]
        for rank, (planner, value) in enumerate(zip(planners, (torch.ones(2), other), strict=True)):
            entries = {"extra.best": value, STRUCTURE: ({}, [])}
            planner.set_up_planner({WHOLE: StagedState(entries, {})}, is_coordinator=rank == 0)
            plans.append(planner.create_local_plan())
        final, metadata = planners[0].create_global_plan(plans)

        assert {item.index.fqn for item in final[0].items} == {"extra.best", STRUCTURE}
        assert final[1].items == []
        assert metadata.state_dict_metadata["extra.best"].size == torch.Size([2])

    def test_may_change_once_it_returns(self, saver, tmp_path):
        """What changes after save has returned is not in the checkpoint, be nothing of it written yet."""
        state = {"a": torch.zeros(1000), "b": [torch.zeros(3, dtype=torch.bfloat16)], "n": 1}
        go = threading.Event()

        with FaultyDisk(calls=["create"], before=lambda name, number: go.wait(WAIT)):
            pending = saver.save(tmp_path / "a", state, manifest)
            state["a"].fill_(1)
            state["b"][0].fill_(1)
            assert not pending.done()
            go.set()
            final = pending.result(WAIT)

        loaded = trainbus.load(tmp_path / "a")
        assert not loaded["a"].any() and not loaded["b"][0].any()
        assert trainbus.read_manifest(tmp_path / "a") == final

    def test_many_one_after_the_other(self, saver, tmp_path):
        """Saves come out as they were asked for, also when tensors come, go and change their shape."""
        states = [
            {"a": torch.full((4,), 1.0)},
            {"a": torch.full((4,), 2.0)},
            {"a": torch.full((4,), 2, dtype=torch.int32)},
            {"a": torch.full((4,), 2.5)},
            {"a": torch.full((6,), 3.0), "b": torch.full((2,), 3.0)},
            {"b": torch.full((2,), 4.0)},
            {"a": torch.full((4,), 5, dtype=torch.int8), "c": {"d": 5}},
        ]
        for step, state in enumerate(states):
            assert saver.save(tmp_path / "a", state, lambda step=step: manifest(step)).result(WAIT)
            loaded = trainbus.load(tmp_path / "a")
            assert list(loaded) == list(state)
            assert all(
                loaded[key].dtype == state[key].dtype and torch.equal(loaded[key], state[key])
                for key in state
                if isinstance(state[key], torch.Tensor)
            )

    def test_some_at_once(self, group, tmp_path):
        """With max_pending=2 a save returns while another is unfinished, a third waits; none is mixed up."""
        saver = ShardedSaver(group, max_pending=2)
        go = threading.Event()
        threads = []

        def hold(name, number):
            threads.append(threading.current_thread())
            go.wait(WAIT)

        with FaultyDisk(calls=["create"], before=hold):
            first, second = (
                saver.save(tmp_path / str(step), {"a": torch.full((3,), step)}, manifest) for step in (0, 1)
            )
            assert not first.done() and not second.done()
            threading.Event().wait(0.3)  # in which the second would come, if it did not wait for the first
            assert len(set(threads)) == 1
            go.set()
            third = saver.save(tmp_path / "2", {"a": torch.full((3,), 2)}, manifest)
            assert first.done()
            third.result(WAIT)
        saver.close()

        assert [int(trainbus.load(tmp_path / str(step))["a"][0]) for step in range(3)] == [0, 1, 2]

    def test_is_read_by_plain_torch(self, saver, tmp_path):
        """torch.distributed.checkpoint alone reads it into a model and an optimizer."""
        model, optimizer = model_and_optimizer()
        state = collect_sharded(model, optimizer)
        saver.save(tmp_path / "a", state, manifest).result(WAIT)
        before = {name: value.full_tensor().clone() for name, value in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state["optimizer"]["param_groups"][0]["lr"] = 7.0

        dcp.load(state, checkpoint_id=tmp_path / "a")
        restore_sharded(model, optimizer, state)

        assert all(torch.equal(value.full_tensor(), before[name]) for name, value in model.named_parameters())
        assert optimizer.param_groups[0]["lr"] == 1e-3

    @pytest.mark.parametrize("size", [3, 12 << 20], ids=["at the end", "amid a tensor"])
    def test_failed_disk(self, saver, tmp_path, size):
        """A disk that fails is told with its number, nothing is left, and the next save succeeds."""
        with FaultyDisk(errno.ENOSPC, calls=["write"]):
            pending = saver.save(tmp_path / "a", {"a": torch.ones(size)}, manifest)
            with pytest.raises(
                RankFailedError, match=r"failed on rank 0: \[Errno 28\] No space left"
            ) as info:
                pending.result(WAIT)

        assert (info.value.rank, info.value.errno) == (0, errno.ENOSPC)
        assert os.listdir(tmp_path) == []
        saver.save(tmp_path / "a", {"a": torch.ones(3)}, manifest).result(WAIT)
        assert trainbus.load(tmp_path / "a")["a"].sum() == 3

    def test_name_that_could_not_be_synced(self, saver, tmp_path):
        """Where only the last sync fails, the error says that the new checkpoint is there."""
        with FaultyDisk() as disk:
            real = disk.exchange

            def exchange(folder, one, other):
                disk.fsync_folder = FaultyDisk(errno.EIO, calls=["fsync_folder"]).fsync_folder
                return real(folder, one, other)

            disk.exchange = exchange
            pending = saver.save(tmp_path / "a", {"a": torch.ones(3)}, manifest)
            with pytest.raises(RankFailedError, match="the new checkpoint is there, but a power cut") as info:
                pending.result(WAIT)

        assert info.value.errno == errno.EIO
        assert trainbus.load(tmp_path / "a")["a"].sum() == 3

    def test_failure_of_torch_keeps_nothing(self, saver, tmp_path, monkeypatch):
        """An error of torch's engine comes as one that does not keep alive what the engine had in hand."""
        kept = []

        def break_off(*args, **options):
            in_hand = threading.Event()
            kept.append(weakref.ref(in_hand))
            raise RuntimeError("the connection is gone")

        monkeypatch.setattr(dist, "broadcast_object_list", break_off)
        monkeypatch.setattr(dist, "gather_object", break_off)
        monkeypatch.setattr(dist, "all_gather_object", break_off)
        monkeypatch.setattr(dist, "scatter_object_list", break_off)
        failed = saver.save(tmp_path / "a", {"x": torch.zeros(3)}, manifest)

        with pytest.raises(RankFailedError, match="the connection is gone") as info:
            failed.result(WAIT)
        assert info.value.__cause__ is not None
        assert kept and not any(one() for one in kept)

    def test_state_that_cannot_be_copied(self, saver, tmp_path):
        """What keeps a state from being copied comes out of the future, where all ranks hear of it."""

        class Mine(dict):
            pass

        pending = saver.save(tmp_path / "a", {"a": Mine(b=torch.ones(1))}, manifest)
        with pytest.raises(RankFailedError, match=r"rank 0: TypeError: Cannot copy a .*Mine"):
            pending.result(WAIT)
        assert os.listdir(tmp_path) == []

    def test_sweeps_before_the_first(self, saver, tmp_path):
        """What a dead run has left in the folder is removed with the first save into it."""
        left = tmp_path / ".a.0123456789abcdef.trainbus.tmp.d"
        left.mkdir()
        (left / "__0_0.distcp").write_bytes(b"half")

        saver.save(tmp_path / "a", {"a": torch.ones(3)}, manifest).result(WAIT)
        assert os.listdir(tmp_path) == ["a"]

    def test_prepare(self, saver, tmp_path, monkeypatch):
        """The first save goes into memory that the copying thread has made ahead of it."""
        model, optimizer = model_and_optimizer()
        state = collect_sharded(model, optimizer)
        mapped, touching, touch = [], threading.Event(), StagingBuffer.touch
        monkeypatch.setattr(staging_memory, "map_pages", lambda size: mapped.append(size) or map_pages(size))

        def slowly(buffer, stop):
            touching.set()
            assert threading.current_thread().name == "trainbus-copy" and stop.wait(WAIT)
            touch(buffer, stop)

        monkeypatch.setattr(StagingBuffer, "touch", slowly)
        saver.prepare(state)
        assert touching.wait(WAIT)
        saver.save(tmp_path / "a", state, manifest).result(WAIT)

        assert len(mapped) == 1
        assert torch.equal(trainbus.load(tmp_path / "a")["module"]["0.bias"], model[0].bias.full_tensor())

    def test_makes_no_new_memory(self, saver, tmp_path):
        """In the steady state the snapshot goes into the memory of the save before."""
        state = {"a": torch.ones(1 << 20)}
        sizes = set()
        for step in range(4):
            saver.save(tmp_path / str(step % 2), state, manifest).result(WAIT)
            sizes.add(saver._stager._memory.size)
        assert len(sizes) == 1

    def test_max_pending(self, group):
        """A number of saves below one is refused."""
        with pytest.raises(ValueError, match="max_pending must be at least 1, got 0"):
            ShardedSaver(group, max_pending=0)


class TestLoad:
    def test_whole_state(self, saver, tmp_path):
        """Without a process group or a model, a checkpoint is loaded whole, DTensors as plain tensors."""
        model, optimizer = model_and_optimizer()
        mesh = init_device_mesh("cpu", (1,))
        state = {
            **collect_sharded(model, optimizer),
            "replica": distribute_tensor(torch.arange(4), mesh, [Replicate()]),
            "scalar": torch.tensor(3.5),
            "none": torch.empty(0, 3),
            "complex": torch.tensor([1 + 2j]).conj(),
            "sparse": torch.eye(2).to_sparse(),
        }
        saver.save(tmp_path / "a", state, manifest).result(WAIT)

        loaded = trainbus.load(tmp_path / "a")
        assert all(type(value) is torch.Tensor for value in loaded["module"].values())
        for name, value in model.state_dict().items():
            expected = value.full_tensor() if hasattr(value, "full_tensor") else value
            assert torch.equal(loaded["module"][name], expected)
        assert loaded["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
        assert loaded["replica"].tolist() == [0, 1, 2, 3] and loaded["scalar"].shape == ()
        assert loaded["none"].shape == (0, 3) and loaded["complex"].tolist() == [1 - 2j]
        assert torch.equal(loaded["sparse"].to_dense(), torch.eye(2))

    def test_flipped_bits(self, tmp_path, save_sharded):
        """No bit of a shard can flip unnoticed; without verification the metadata is checked all the same."""
        save_sharded(tmp_path / "a", {"a": torch.ones(300)})
        for name in ("__0_0.distcp", METADATA):
            whole = (tmp_path / "a" / name).read_bytes()
            for at in range(0, len(whole), len(whole) // 20):
                content = bytearray(whole)
                content[at] ^= 1
                (tmp_path / "a" / name).write_bytes(content)
                for verify in {True, name != METADATA}:  # of a shard only if it is asked for
                    with pytest.raises(CheckpointCorruptError, match=f"{name} does not have the digest"):
                        trainbus.load(tmp_path / "a", verify=verify)
            (tmp_path / "a" / name).write_bytes(whole)

    def test_device(self, tmp_path, save_sharded):
        """Tensors go where map_location says; what is no device is refused."""
        save_sharded(tmp_path / "a", {"a": torch.ones(3)})

        assert trainbus.load(tmp_path / "a", map_location="meta")["a"].device.type == "meta"
        with pytest.raises(TypeError, match="so it takes a device, such as 'cpu'"):
            trainbus.load(tmp_path / "a", map_location=lambda storage, location: storage)

    def test_into_tensors(self, saver, group, tmp_path):
        """Tensors of the target are written in place, small ones it has not are made, all is returned."""
        state = {"module": {"a": torch.arange(3.0)}, "rng": torch.arange(5), "lr": 0.1}
        saver.save(tmp_path / "a", state, lambda: manifest(7)).result(WAIT)
        mine = torch.zeros(3)

        loaded, final = load_into(tmp_path / "a", {"module": {"a": mine}}, group=group)
        assert loaded["module"]["a"] is mine and mine.tolist() == [0, 1, 2]
        assert loaded["rng"].tolist() == [0, 1, 2, 3, 4] and loaded["lr"] == 0.1
        assert final.global_step == 7
        only, _ = load_into(tmp_path / "a", {"module": {"a": mine}}, group=group, keys=["lr"])
        assert only == {"lr": 0.1}

    @pytest.mark.parametrize(
        ("target", "reason"),
        [
            ({"module": {"b": torch.zeros(3)}}, r"it has no module\.b, which this run has"),
            ({"module": {"a": torch.zeros(4)}}, r"it has shape \(3,\) there and \(4,\) in this run"),
        ],
    )
    def test_into_what_does_not_fit(self, saver, group, tmp_path, target, reason):
        """A target that does not fit is refused, naming what does not, and stays as it is."""
        saver.save(tmp_path / "a", {"module": {"a": torch.ones(3)}}, manifest).result(WAIT)

        with pytest.raises(StateMismatchError, match=reason):
            load_into(tmp_path / "a", target, group=group)
        assert not any(tensor.any() for tensor in target["module"].values())

    def test_missing(self, group, tmp_path):
        """A folder that is not there is told as such, on all ranks."""
        with pytest.raises(RankFailedError, match="rank 0: FileNotFoundError"):
            load_into(tmp_path / "a", {}, group=group)


class TestHostile:
    """What a folder can do whose digests are right, because who wrote it is no friend."""

    @pytest.fixture(name="path")
    def _path(self, tmp_path, save_sharded):
        save_sharded(tmp_path / "a", {"a": torch.ones(3)})
        return tmp_path / "a"

    @pytest.mark.parametrize("resealed", [False, True])
    def test_metadata_that_runs_code(self, path, tmp_path, resealed):
        """A pickle in the metadata's place is refused and not executed, be its digest right or wrong."""

        class Run:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        (path / METADATA).write_bytes(pickle.dumps(Run()))
        if resealed:
            reseal(path)
            assert trainbus.verify(path)

        reason = "not what trainbus writes .*mkdir" if resealed else "does not have the digest"
        for verify in (True, False):
            with pytest.raises(CheckpointCorruptError, match=reason):
                trainbus.load(path, verify=verify)
        assert not (tmp_path / "executed").exists()

    def test_control(self, path, tmp_path):
        """The same pickle is executed by torch.distributed.checkpoint itself."""

        class Run:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        (path / METADATA).write_bytes(pickle.dumps(Run()))
        with pytest.raises(BaseException):  # noqa: B017
            dcp.load({"a": torch.ones(3)}, checkpoint_id=path, no_dist=False)
        assert (tmp_path / "executed").exists()

    @pytest.mark.parametrize("name", ["../b/secret", "/etc/passwd", "manifest.json"])
    def test_metadata_that_names_other_files(self, path, tmp_path, name):
        """Metadata that sends the reader to a file that is none of the checkpoint's is refused."""
        metadata = pickle.loads((path / METADATA).read_bytes())
        for place in metadata.storage_data.values():
            place.relative_path = name
        (path / METADATA).write_bytes(pickle.dumps(metadata))
        reseal(path)

        with pytest.raises(CheckpointCorruptError, match=r"names .*, which is none of its files"):
            trainbus.load(path)

    @pytest.mark.parametrize(
        "change",
        [
            lambda metadata: metadata.storage_data.clear(),
            lambda metadata: setattr(metadata, "storage_data", 7),
            lambda metadata: [setattr(place, "offset", 1) for place in metadata.storage_data.values()],
            lambda metadata: [setattr(place, "length", 9) for place in metadata.storage_data.values()],
            lambda metadata: metadata.state_dict_metadata.pop("a"),
            lambda metadata: setattr(metadata.state_dict_metadata["a"], "size", torch.Size([4])),
            lambda metadata: setattr(metadata.state_dict_metadata["a"], "chunks", 7),
            lambda metadata: setattr(metadata, "state_dict_metadata", None),
            lambda metadata: [setattr(place, "offset", "x") for place in metadata.storage_data.values()],
            lambda metadata: [setattr(place, "length", None) for place in metadata.storage_data.values()],
            lambda metadata: [setattr(place, "relative_path", 7) for place in metadata.storage_data.values()],
        ],
    )
    def test_metadata_that_makes_no_sense(self, path, change):
        """Metadata that does not fit the files is damage, no crash."""
        metadata = pickle.loads((path / METADATA).read_bytes())
        change(metadata)
        (path / METADATA).write_bytes(pickle.dumps(metadata))
        reseal(path)

        with pytest.raises(CheckpointCorruptError):
            trainbus.load(path)

    def test_value_that_runs_code(self, path, tmp_path):
        """Nothing in a shard is unpickled as code either."""

        class Run:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "executed"),)

        metadata = pickle.loads((path / METADATA).read_bytes())
        torch.save(Run(), path / "__0_0.distcp")
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, (path / "__0_0.distcp").stat().st_size
        (path / METADATA).write_bytes(pickle.dumps(metadata))
        reseal(path)

        with pytest.raises(CheckpointCorruptError, match="structure cannot be read"):
            trainbus.load(path)
        assert not (tmp_path / "executed").exists()


class TestFolder:
    def test_lists_folders_beside_files(self, tmp_path, write, save_sharded):
        """Sharded checkpoints are listed among files in order, and may be the newest and the best."""
        write(tmp_path / "1.pt", {}, sequence=1, logs={"loss": 0.3})
        save_sharded(tmp_path / "2", {"a": torch.ones(3)}, sequence=2, logs={"loss": 0.1})
        write(tmp_path / "3.pt", {}, sequence=3, contents="weights", logs={"loss": 0.2})
        (tmp_path / "logs").mkdir()
        folder = CheckpointFolder(tmp_path)

        assert [os.path.basename(file.path) for file in folder] == ["1.pt", "2", "3.pt"]
        assert [file.is_sharded for file in folder] == [False, True, False]
        assert folder.latest().path == folder.best("loss", "min").path == str(tmp_path / "2")

    def test_damaged_one_is_passed_over(self, tmp_path, save_sharded, caplog):
        """One whose manifest is damaged is passed over with one warning."""
        for step in (1, 2):
            save_sharded(tmp_path / str(step), {"a": torch.ones(3)}, sequence=step)
        (tmp_path / "2" / "manifest.json").unlink()
        folder = CheckpointFolder(tmp_path)

        for _ in range(2):
            assert [os.path.basename(file.path) for file in folder] == ["1"]
        (record,) = [record for record in caplog.records if record.name == "trainbus"]
        assert "without manifest.json" in record.getMessage()

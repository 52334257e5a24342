"""How ``torch.distributed.checkpoint`` writes through our one door to the disk."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from trainbus.checkpoint import collector
from trainbus.checkpoint.commit import durability_of
from trainbus.checkpoint.disk import Disk
from trainbus.checkpoint.manifest import Manifest
from trainbus.checkpoint.sharded_commit import PendingFolder, Written, write_file
from trainbus.checkpoint.sharded_format import METADATA
from trainbus.checkpoint.sharded_state import STRUCTURE
from trainbus.checkpoint.write_behind import WriteBehind
from trainbus.errors import RankFailedError, UnsyncedNameError

__all__ = ["WHOLE", "Failure", "NotStagedError", "Shard", "ShardPlanner", "ShardWriter", "StagedState"]

WHOLE = "trainbus"
"""The only key of the dicts that torch hands from step to step: it does slow things for each key."""


class Shard:
    """
    Stands in what is written for one rank's part of a `DTensor`.

    Attributes:
        tensor: The copy of that part, on the CPU.
        whole: The `DTensor`, which is only asked where in it the part lies.
    """

    def __init__(self, tensor: torch.Tensor, whole: DTensor, items: dict[str, tuple[Any, WriteItem]]) -> None:
        self.tensor = tensor
        self.whole = whole
        self._items = items

    def __create_write_items__(self, name: str, shard: Shard) -> list[WriteItem]:
        """Describe the part to ``torch.distributed.checkpoint``, which looks for this method."""
        # Worked out once: that takes as long as copying a megabyte.
        whole = self.whole
        layout = whole.device_mesh, whole.placements, whole.shape, whole.dtype, whole.requires_grad
        known = self._items.get(name)
        if known is None or known[0] != layout:
            with torch.no_grad():
                (item,) = whole.__create_write_items__(name, whole)
            self._items[name] = known = layout, item
        return [known[1]]


@dataclass
class StagedState:
    """
    What one rank proposes to write: flat, and copied.

    Attributes:
        entries: By name: a `Shard`, a tensor on the CPU, or a plain value.
        paths: By name, the keys from the top.
    """

    entries: dict[str, Any]
    paths: dict[str, tuple[str | int, ...]]


class NotStagedError(Exception):
    """What kept a rank from copying its state, as text, which can be sent to the other ranks."""


@dataclass(frozen=True)
class Failure:
    """Why a rank could not do its part. Can be pickled, whatever the error was."""

    rank: int
    reason: str
    errno: int | None = None
    is_unsynced: bool = False

    @classmethod
    def of(cls, rank: int, error: BaseException) -> Failure:
        """Describe *error*, which *rank* met."""
        if isinstance(error, NotStagedError):
            return cls(rank, str(error))
        if isinstance(error, UnsyncedNameError):
            there = "the new checkpoint is there, but a power cut may bring the old one back"
            return cls(rank, f"{error}; {there}", error.errno, is_unsynced=True)
        if isinstance(error, OSError) and error.errno:
            return cls(rank, str(error), error.errno)
        return cls(rank, f"{type(error).__name__}: {error}")

    def error(self) -> RankFailedError:
        """Return what is raised for it."""
        return RankFailedError(self.rank, self.reason, self.errno, is_unsynced=self.is_unsynced)


@dataclass(frozen=True)
class _Place:
    """Where a rank's files go: the hidden folder's name, and what their names begin with."""

    folder: str
    prefix: str


@dataclass(frozen=True)
class _Files:
    """What a rank has written, sent to the one that commits among the results of torch's writer."""

    written: dict[str, Written]


class ShardPlanner(DefaultSavePlanner):
    """
    Torch's planner, for states that are flat already and plans that mostly stay as they are.

    A rank whose plan is that of the save before sends none, so that from the second save on next to
    nothing is gathered, however many ranks and tensors there are.

    Args:
        cache: Under which key torch keeps the plans; another one begins anew.
    """

    def __init__(self, cache: str) -> None:
        super().__init__(dedup_save_to_lowest_rank=True, enable_plan_caching=True)
        self._cached_plans_key = cache
        self._proposed: SavePlan | None = None

    def set_up_planner(
        self, state_dict: Any, storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Take what the stager returned."""
        staged = state_dict[WHOLE]
        self.state_dict, self.mappings, self.is_coordinator = staged.entries, staged.paths, is_coordinator

    def create_local_plan(self) -> SavePlan:
        """
        Return this rank's plan, or an empty one where it is that of the save before.

        Torch's own comparison passes over dtypes, and some versions keep a plan that came to nothing.
        """
        plan = create_default_local_save_plan(self.state_dict, self.is_coordinator)
        if not self.is_coordinator:
            # Plain values are rank 0's, also where that has a tensor in their place.
            tensors = [item for item in plan.items if item.type is not WriteItemType.BYTE_IO]
            plan = dataclasses.replace(plan, items=tensors)
        self.plan = plan = dataclasses.replace(plan, planner_data=self.mappings)
        if SavePlanner._cached_save_plan.get(self._cached_plans_key) == plan:
            return SavePlan([], usable=False)
        self._proposed = plan
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Do what torch does, with a copy of the metadata, because it keeps the original for next time."""
        plans, metadata = super().create_global_plan(all_plans)
        return plans, copy.copy(metadata)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take over the plan, from the save before perhaps, but with the place of this one."""
        final = super().finish_plan(new_plan)
        if self._proposed is not None:
            SavePlanner._cached_save_plan[self._cached_plans_key] = self._proposed
        return dataclasses.replace(final, storage_data=new_plan.storage_data)

    def lookup_object(self, index: MetadataIndex) -> Any:
        """Return what is to be written for *index*."""
        entry = self.state_dict[index.fqn]
        return entry.tensor if isinstance(entry, Shard) else entry


class ShardWriter(FileSystemWriter):
    """
    Torch's writer of one file a rank, with each file hashed, synced and written past the page cache.

    Made by every rank for one save. Rank 0 of the group makes the hidden folder while it plans, and its
    name travels with the plans; it writes the metadata and commits once all ranks have written. The
    outcome travels with the answer that torch sends to all: `outcome_of`. A disk that fails is an
    outcome, no exception, because torch pickles exceptions with their tracebacks and some cannot be.

    Args:
        path: The checkpoint's folder, absolute, the same on all ranks and on a disk that they share.
        manifest: Called on rank 0 once all have written.
        disk: What writes.
        behind: Lets writes go on while the next bytes are made ready.
        ready: Called before the first byte is taken from the state; raises what kept it from being copied.
        before: Called on rank 0 with the folder that the checkpoint goes to.
    """

    def __init__(
        self,
        path: str,
        manifest: Callable[[], Manifest],
        *,
        disk: Disk,
        behind: WriteBehind,
        ready: Callable[[], None] = lambda: None,
        before: Callable[[str], None] = lambda folder: None,
    ) -> None:
        # No copying ahead: what is written is in host memory already.
        super().__init__(path, sync_files=False, per_thread_copy_ahead=0)
        self.fs = self._door = _OneDoor(disk, behind)
        self.failed_to_stage: Exception | None = None
        self._final_path = path
        self._manifest = manifest
        self._disk = disk
        self._behind = behind
        self._ready = ready
        self._before = before
        self._pending: PendingFolder | None = None
        self._failure: Failure | None = None

    def storage_meta(self) -> StorageMeta:
        """Leave out the path: it is the hidden one, and folders move."""
        return StorageMeta(save_id=self.save_id)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Fail here, where all ranks hear of it, if the state could not be copied."""
        if self.failed_to_stage is not None:
            raise NotStagedError(Failure.of(self.rank or 0, self.failed_to_stage).reason)
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0: make the folder."""
        try:
            self._before(os.path.dirname(self._final_path))
            self._pending = PendingFolder(self._final_path, self._disk)
        except Exception as error:
            self._failure = Failure.of(0, error)
            return [dataclasses.replace(plan, storage_data=self._failure) for plan in plans]
        folder = self._pending.name
        return [
            dataclasses.replace(plan, storage_data=_Place(folder, f"__{rank}_"))
            for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file; none if other ranks write all there is."""
        results: list[Any] = []
        try:
            if isinstance(plan.storage_data, _Place):
                self._ready()
                if plan.items:
                    results = self._write_shards(plan, planner)
        except Exception as error:
            results = [Failure.of(self.rank or 0, error)]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On rank 0: write the metadata and commit, unless a rank failed."""
        failures = [one for of_rank in results for one in of_rank if isinstance(one, Failure)]
        outcome: Manifest | Failure
        try:
            if self._failure is not None or failures:
                outcome = self._failure or failures[0]
            else:
                outcome = self._commit(metadata, results)
        except Exception as error:
            outcome = Failure.of(0, error)
        finally:
            self.close()
        # Sent to all ranks, of which none needs more of it.
        metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data = {}, None, None
        metadata.trainbus_outcome = outcome  # type: ignore[attr-defined]

    def close(self) -> None:
        """Remove what is left of a save that failed. May be called again, on any rank."""
        if self._pending is not None:
            self._pending.close()

    @staticmethod
    def outcome_of(metadata: Metadata) -> Manifest | Failure:
        """Return what a save came to, out of what torch's ``save`` returns on each rank."""
        outcome: Manifest | Failure = metadata.trainbus_outcome  # type: ignore[attr-defined]
        return outcome

    def _write_shards(self, plan: SavePlan, planner: SavePlanner) -> list[Any]:
        # Set on this thread, because torch's options belong to one each. The sums in each tensor's zip
        # take half of the time; nothing compares them, and the digest does their work.
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            parent = os.path.dirname(self._final_path)
            with self._door.inside(parent, plan.storage_data.folder) as written, collector.paused():
                results: list[Any] = super().write_data(plan, planner).value()
        finally:
            torch.serialization.set_crc32_options(before)
        return [*results, _Files(written)]

    def _commit(self, metadata: Metadata, results: list[list[Any]]) -> Manifest:
        assert self._pending is not None
        written: dict[str, Written] = {}
        places: dict[MetadataIndex, Any] = {}
        for one in (one for of_rank in results for one in of_rank):
            if isinstance(one, _Files):
                written.update(one.written)
            else:
                places[one.index] = one.storage_data
        if STRUCTURE not in metadata.state_dict_metadata:
            raise RuntimeError("the plans of the ranks do not fit together: nobody writes the structure")
        complete = Metadata(
            metadata.state_dict_metadata,
            planner_data=metadata.planner_data,
            storage_data=places,
            storage_meta=self.storage_meta(),
            version=CURRENT_DCP_VERSION,
        )
        pending, disk = self._pending, self._disk
        with (
            self._door.inside(pending.parent_path, pending.name) as described,
            self._door.create(METADATA) as stream,
        ):
            pickle.dump(complete, stream, protocol=4)
        durability = durability_of(disk, pending.parent, pending.parent_path)
        manifest = dataclasses.replace(self._manifest(), durability=durability)
        return pending.commit(manifest, {**written, **described}, self._behind)


class _OneDoor(FileSystem):
    """What torch's writer takes for a file system: each file it writes goes through `Disk`."""

    def __init__(self, disk: Disk, behind: WriteBehind) -> None:
        super().__init__()
        self._disk = disk
        self._behind = behind
        self._folder = -1
        self._written: dict[str, Written] = {}

    @contextlib.contextmanager
    def inside(self, parent: str, name: str) -> Iterator[dict[str, Written]]:
        """Have files go to a folder, whose names are synced at the end. Yields what was written, by name."""
        disk = self._disk
        above = disk.open_folder(parent, create=False)
        try:
            try:
                self._folder = disk.enter_folder(above, name)
            except FileNotFoundError as error:
                error.strerror = (
                    "rank 0 has made this folder and it is not here: the checkpoint's folder has to be on a "
                    "file system that all ranks share"
                )
                raise
            try:
                self._written = {}
                yield self._written
                disk.fsync_folder(self._folder)
            finally:
                disk.close(self._folder)
        finally:
            disk.close(above)

    def create(self, name: str) -> Any:
        """Return a context manager that gives a new file in the folder to write into."""
        return write_file(self._disk, self._folder, name, self._behind, self._written)

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Do so for torch; of *path* only the last part counts."""
        assert mode == "wb"
        with self.create(os.path.basename(path)) as stream:
            yield stream

"""Snapshots of a device's tensors: whatever the device does first, they hold what they should."""

from __future__ import annotations

import gc
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest
import torch

from trainbus.checkpoint import device_copy, page_locking, snapshot_plan, staging_copy
from trainbus.checkpoint.snapshot import Snapshot
from trainbus.checkpoint.staging_copy import Stager
from trainbus.checkpoint.staging_memory import StagingMemory
from trainbus.errors import SnapshotChangedError

from .allocations import Allocations
from .simulated_cuda import Event, SimulatedCuda, Stream

PIECE = mmap.PAGESIZE
STEPS = 12
ROOM = {"aside": 1 << 40, "no room": 0}


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Let small tensors be as many pieces as large ones."""
    monkeypatch.setattr(page_locking, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(snapshot_plan, "SMALLEST_WAITING", 64)


class Training:
    """
    A training on a simulated device: each step fills all its tensors with a number, and some are saved.

    Args:
        random: Decides what happens when.
        cuda: The device.
        max_pending: Snapshots that may exist at a time.
        overlap: Whether weights may be copied until the next step.
        **options: For the stager.
    """

    def __init__(
        self, random: Random, cuda: SimulatedCuda, *, max_pending: int = 1, overlap: bool = False, **options
    ) -> None:
        self.random = random
        self.cuda = cuda
        self.stager = Stager(StagingMemory(max_pending), cuda=cuda, **options)
        self.max_pending = max_pending
        sizes = [random.choice((1, 7, 300, PIECE // 4, 3 * PIECE // 4 + 5)) for _ in range(6)]
        self.weights = [torch.zeros(size) for size in sizes]
        self.others = [torch.zeros(size, dtype=torch.float64) for size in sizes[:3]]
        view = torch.zeros(40)[3:21]
        self.others += [view, view[2:9:2]]
        self.owners = {tensor.data_ptr(): tensor for tensor in self.weights} if overlap else None
        self.pending: deque[tuple[Snapshot, int]] = deque()
        self.problems: list[str] = []

    def fill(self, tensors: list[torch.Tensor], number: int) -> None:
        """Give the device kernels that write *number*."""
        for tensor in tensors:
            # As with a real one the counter goes up now, and the values change later.
            torch.autograd.graph.increment_version(tensor)
            self.cuda.launch(lambda tensor=tensor: tensor.data.fill_(number))

    def step(self, number: int) -> None:
        """Train, as an optimizer's step does that a fence comes before."""
        self.fill(self.others, number)
        for snapshot, _ in self.pending:
            if snapshot.waits:
                snapshot.copy.let_change()
        self.fill(self.weights, number)

    def save(self, number: int) -> None:
        """Ask for a snapshot of what the step before has left, when there is room."""
        while len(self.pending) >= self.max_pending:
            self.look()
        state = {"weights": self.weights}
        if self.random.random() < 0.8:
            state["others"] = self.others
        snapshot = self.stager.take(state, self.owners)
        self.stager.begin(snapshot)
        self.pending.append((snapshot, number))

    def look(self) -> None:
        """Wait for the oldest snapshot, as the writer does, and see what it holds."""
        snapshot, number = self.pending.popleft()
        snapshot.wait()
        for kind, tensors in snapshot.state.items():
            for index, tensor in enumerate(tensors):
                held = set(tensor.unique().tolist())
                if held != {number}:
                    self.problems.append(f"{kind}[{index}] holds {held} and should hold {number}")
        snapshot.release()

    def run(self) -> None:
        """Train and save, now and then with a copying thread that has something else to do."""
        for number in range(1, STEPS + 1):
            self.step(number)
            if self.random.random() < 0.7:
                if self.random.random() < 0.3:
                    self.stager.thread.start()
                    self.stager.thread.call(lambda: [None for _ in range(self.random.randrange(3000))])
                self.save(number)
            if self.pending and self.random.random() < 0.3:
                self.look()
        while self.pending:
            self.look()
        self.stager.thread.close()


class TestAnyOrder:
    @pytest.mark.parametrize("locks", [0, 2, 1 << 40], ids=["pageable", "locked in part", "locked"])
    @pytest.mark.parametrize("overlap", [False, True], ids=["auto", "overlap"])
    @pytest.mark.parametrize("room", ROOM)
    @pytest.mark.parametrize("max_pending", [1, 2, 3])
    def test_snapshots_hold_what_the_request_found(self, request, max_pending, room, overlap, locks):
        """
        However the device orders its work, each snapshot holds the values of its request.
        """
        for seed in range(request.config.getoption("--runs") or 12):
            random = Random(seed)
            cuda = SimulatedCuda(random, room=ROOM[room], refuses_locks_after=locks)
            training = Training(random, cuda, max_pending=max_pending, overlap=overlap)
            training.run()

            assert training.problems == [], f"seed {seed}"
            assert cuda.trouble == [], f"seed {seed}"

    @pytest.mark.parametrize("insists", [False, True])
    def test_without_a_copy_on_the_device(self, insists, caplog):
        """
        With device_snapshot=False nothing is allocated there; with True, what is refused is said once.
        """
        cuda = SimulatedCuda(Random(0), room=0)
        training = Training(Random(0), cuda, device_snapshot=insists)
        training.run()

        assert training.problems == []
        assert ("No memory for a copy of the state on cpu" in caplog.text) == insists


class TestWaiting:
    @pytest.mark.parametrize("overlap", [False, True], ids=["auto", "overlap"])
    @pytest.mark.parametrize("room", ROOM)
    def test_host_waits_for_no_device(self, monkeypatch, room, overlap):
        """
        Once the memory is there, neither a save nor the step after it waits for what the device does.
        """
        for seed in range(10):
            cuda = SimulatedCuda(Random(seed), room=ROOM[room])
            training = Training(Random(seed), cuda, overlap=overlap)
            training.random.random = lambda: 0.5
            training.step(1)
            training.save(1)
            training.look()

            def synchronize(event: Event, wait: Callable[[Event], None] = Event.synchronize) -> None:
                assert threading.current_thread() is not threading.main_thread(), "the host waited"
                wait(event)

            with monkeypatch.context() as patch:
                patch.setattr(Stream, "synchronize", lambda _: pytest.fail("the host waited"))
                patch.setattr(Event, "synchronize", synchronize)
                training.step(2)
                training.save(2)
                training.step(3)
            training.look()
            training.stager.thread.close()

            assert training.problems == [], f"seed {seed}"

    @pytest.mark.parametrize("room", ROOM)
    def test_thread_works_for_the_device(self, room):
        """
        Who waits for a device does so as one of its own: elsewhere that takes memory of the first device.
        """
        cuda = SimulatedCuda(Random(0), room=ROOM[room])
        training = Training(Random(0), cuda)
        training.save(0)
        training.look()
        training.stager.thread.close()

        assert "trainbus-copy" in {name for name, _ in cuda.worked_for}

    def test_memory_of_another_stream_is_held(self):
        """
        What is dropped after the request is not given to others until it is copied.
        """
        cuda = SimulatedCuda(Random(0), room=0)
        stager = Stager(StagingMemory(), cuda=cuda)
        tensor = torch.ones(300)
        held = weakref.ref(tensor)
        snapshot = stager.take([tensor])
        del tensor

        assert held() is not None
        stager.begin(snapshot)
        snapshot.wait()
        gc.collect()
        assert held() is None
        stager.thread.close()

    def test_copy_that_fails_half_way(self, monkeypatch):
        """
        Of a copy of which a part was refused, the rest that is under way is waited for.
        """
        for seed in range(10):
            cuda = SimulatedCuda(Random(seed))
            sources, targets = [torch.ones(30), torch.ones(30)], [cuda.memory[:30], cuda.memory[30:60]]

            def copy_one(into, outof, copy=cuda.copy):
                copy(into[:1], outof[:1])
                raise RuntimeError("refused")

            monkeypatch.setattr(cuda, "copy", copy_one)
            staging = device_copy.DeviceStaging(False, cuda)
            fetch = staging.fetch_later(sources[0].device, sources, targets)
            with pytest.raises(RuntimeError, match="refused"):
                fetch.begin()
            fetch.finish()

            assert targets[0].tolist() == [1] * 30

    def test_take_that_fails_waits(self, monkeypatch):
        """
        A buffer that is given back because of an error is one that no device is writing into.
        """
        for seed in range(10):
            cuda = SimulatedCuda(Random(seed), room=0)
            stager = Stager(StagingMemory(), cuda=cuda)
            state = [torch.ones(300)]
            first = stager.take(state)
            stager.begin(first)
            first.release()
            with monkeypatch.context() as patch:
                patch.setattr(staging_copy, "with_tensors", lambda *_: {}["no"])
                with pytest.raises(KeyError):
                    stager.take(state)

            assert not cuda.current_stream(torch.device("cpu")).work
            snapshot = stager.take(state)
            stager.begin(snapshot)
            snapshot.wait()
            stager.thread.close()


class TestChecked:
    def test_not_put_aside(self):
        """
        What a promise has to hold for is tried out also where there is room for a copy on the device.
        """
        cuda = SimulatedCuda(Random(5))
        training = Training(Random(5), cuda, overlap=True, check=True)
        training.step(1)
        cuda.current_stream(torch.device("cpu")).synchronize()
        training.save(1)
        snapshot, _ = training.pending[0]
        assert snapshot.waits

        training.weights[0].data.fill_(9)
        with pytest.raises(SnapshotChangedError, match="weights"):
            snapshot.copy.let_change()
        snapshot.release()
        training.stager.thread.close()

    @pytest.mark.parametrize("options", [{"overlap": True}, {"check": True}, {}], ids=str)
    def test_put_aside(self, options):
        """
        Otherwise room is used, and nothing has to wait or to be promised.
        """
        training = Training(Random(5), SimulatedCuda(Random(5)), **options)
        training.save(0)

        snapshot, _ = training.pending[0]
        assert not snapshot.waits
        assert snapshot.seconds_at_once == 0
        training.look()
        training.stager.thread.close()
        assert training.problems == []


class TestPutAside:
    def test_devices_lie_side_by_side(self):
        """
        The copy of a device whose bytes do not come first in the buffer begins at its own first byte.
        """
        cuda = SimulatedCuda(Random(4))
        tensor = torch.arange(PIECE, dtype=torch.float64)
        plan = snapshot_plan.make_plan([tensor])
        shift = 3 * snapshot_plan.ALIGNMENT
        part, section = plan.ranges[0], plan.sections[0]
        moved = replace(
            plan,
            ranges=(replace(part, position=part.position + shift),),
            sections=(replace(section, start=section.start + shift),),
        )
        target = torch.zeros(section.size, dtype=torch.uint8)
        staging = device_copy.DeviceStaging(cuda=cuda)
        assert staging.has_room(section.device, section.size)

        fetch = staging.put_aside(moved, moved.sections, [tensor], target)
        fetch.begin()
        fetch.finish()

        assert target.view(torch.float64).equal(tensor)

    @pytest.mark.parametrize("room", ROOM)
    def test_no_fresh_memory(self, room):
        """
        In the steady state nothing is allocated, neither on the device nor on the host.
        """
        cuda = SimulatedCuda(Random(2), room=ROOM[room])
        stager = Stager(StagingMemory(), cuda=cuda)
        state = [torch.full((300,), 1.0), torch.full((2 * PIECE,), 2.0), torch.tensor(3.0)]
        places = []
        for number in range(3):
            with Allocations(places) as made:
                snapshot = stager.take(state)
                stager.begin(snapshot)
                snapshot.wait()
            begin = torch.frombuffer(snapshot.buffer.mapping, dtype=torch.uint8).data_ptr()
            places = [
                range(begin, begin + len(snapshot.buffer.mapping)),
                range(cuda.memory.data_ptr(), cuda.memory.data_ptr() + cuda.memory.nbytes),
            ]
            snapshot.release()
            assert number == 0 or made.found == []
        stager.thread.close()

    def test_states_that_take_turns(self, monkeypatch):
        """
        A full state and weights alone, saved in turns, are each cut out of the device's memory once.
        """
        made, places = [], device_copy._places
        monkeypatch.setattr(
            device_copy, "_places", lambda plan, *rest: made.append(plan) or places(plan, *rest)
        )
        cuda = SimulatedCuda(Random(2))
        stager = Stager(StagingMemory(), cuda=cuda)
        weights, others = [torch.zeros(300)], [torch.zeros(7)]
        for number in range(6):
            cuda.launch(lambda number=number: weights[0].fill_(number))
            snapshot = stager.take({"weights": weights, **({} if number % 2 else {"others": others})})
            stager.begin(snapshot)
            snapshot.wait()
            assert snapshot.state["weights"][0].tolist() == [number] * 300
            snapshot.release()
        stager.thread.close()

        assert len(made) == 2

    def test_next_copy_waits_until_the_last_is_begun(self):
        """
        What was put aside is not written over before the copying thread has asked for it.
        """
        cuda = SimulatedCuda(Random(1))
        training = Training(Random(1), cuda, max_pending=2)
        late = training.stager.thread
        late.start()
        jobs: list = []
        late.call, call = jobs.append, late.call  # as if the thread were busy
        training.step(1)
        training.save(1)
        training.stager.thread.call = call
        waits = training.pending[0][0].copy.wait_until_begun
        training.pending[0][0].copy.wait_until_begun = lambda: ([call(job) for job in jobs], waits())

        training.step(2)
        training.save(2)
        while training.pending:
            training.look()

        assert training.problems == []

    def test_memory_given_back_while_it_is_fetched(self):
        """
        What a device gets in the place of a copy that had to go is not written before that is fetched.
        """
        tensor = torch.arange(PIECE, dtype=torch.float64)
        plan = snapshot_plan.make_plan([tensor])
        size = plan.sections[0].size
        for seed in range(20):
            cuda = SimulatedCuda(Random(seed), room=size)
            staging = device_copy.DeviceStaging(True, cuda)
            buffer = StagingMemory().acquire(size)
            page_locking.lock(buffer, tensor.device, cuda)
            target = torch.frombuffer(buffer.mapping, dtype=torch.uint8)
            assert staging.has_room(tensor.device, size)
            fetch = staging.put_aside(plan, plan.sections, [tensor], target)
            fetch.begin()

            assert not staging.has_room(tensor.device, size + 1)
            cuda.launch(lambda memory=cuda.memory: memory.fill_(7))
            fetch.finish()

            assert target.view(torch.float64).equal(tensor), f"seed {seed}"

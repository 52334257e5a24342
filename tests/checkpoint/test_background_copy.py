from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from trainbus.checkpoint import background_copy, host_copy
from trainbus.checkpoint.background_copy import BackgroundCopy, HostMove, SharedMoves, Watched
from trainbus.checkpoint.host_copy import Places
from trainbus.checkpoint.nesting import path_to
from trainbus.errors import SnapshotChangedError

TOO_LONG = 30
A_MOMENT = 0.1  # given to whoever should wait and would not


class Steps:
    """A move that notes what is asked of it, and may be held at the beginning or at the end."""

    def __init__(self, log: list[str], name: str = "move") -> None:
        self.log = log
        self.name = name
        self.reached_begin, self.may_begin = threading.Event(), threading.Event()
        self.reached_finish, self.may_finish = threading.Event(), threading.Event()
        self.may_begin.set()
        self.may_finish.set()

    def begin(self) -> None:
        self.reached_begin.set()
        assert self.may_begin.wait(TOO_LONG)
        self.log.append(f"{self.name} begins")

    def hold_back(self) -> None:
        self.log.append(f"{self.name} holds back")

    def finish(self) -> None:
        self.reached_finish.set()
        assert self.may_finish.wait(TOO_LONG)
        self.log.append(f"{self.name} finishes")


class Breaks(Steps):
    """A move that cannot be made."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([])
        self.error = error

    def begin(self) -> None:
        raise self.error


class BreaksLater(Steps):
    """A move that begins well and does not arrive; held at its end."""

    def __init__(self, error: BaseException) -> None:
        super().__init__([])
        self.may_finish.clear()
        self.error = error

    def finish(self) -> None:
        super().finish()
        raise self.error


class Tears(HostMove):
    """Copies what somebody changed meanwhile and puts back before anyone looks."""

    def begin(self) -> None:
        for source in self.sources:
            source.data.add_(1)
        super().begin()
        for source in self.sources:
            source.data.sub_(1)


def ended_thread() -> threading.Thread:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(TOO_LONG)
    return thread


def copy_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


class TestHostMove:
    def test_over_when_begun(self):
        """
        All tensors are copied, of any dtype, when the move has begun; then nothing is left to do.
        """
        sources = [torch.arange(5.0), torch.arange(3), torch.tensor([True]), torch.ones(2, 2).bfloat16()]
        targets = [torch.zeros_like(source) for source in sources]
        move = HostMove(targets, sources)

        move.begin()
        for source in sources:
            source.zero_()
        move.hold_back()
        move.finish()

        assert [target.tolist() for target in targets] == [
            [0, 1, 2, 3, 4],
            [0, 1, 2],
            [True],
            [[1, 1], [1, 1]],
        ]

    def test_parts(self, monkeypatch):
        """
        It is cut into sixteen, each of as many tensors, unless it is little.
        """
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 3200)
        move = HostMove([torch.zeros(8) for _ in range(100)], [torch.ones(8) for _ in range(100)])

        parts = move.parts()
        for part in parts:
            part.begin()

        assert [len(part.targets) for part in parts] == [7] * 14 + [2]
        assert all(map(torch.equal, move.targets, move.sources))
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 3201)
        assert move.parts() == [move]

    @pytest.mark.skipif(host_copy.copy_past_caches is None, reason="torch copies tensors, not addresses")
    def test_places_are_believed(self, monkeypatch):
        """
        Where it is known where the tensors lie, none of them is asked, in parts either.
        """
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 1)
        monkeypatch.setattr(host_copy, "_places_of", None)
        sources = [torch.full((3,), float(number)) for number in range(40)]
        targets = [torch.zeros(3) for _ in sources]
        addresses = [np.array([one.data_ptr() for one in some], np.uint64) for some in (targets, sources)]
        places = Places(*addresses, np.full(40, 12, np.uint64))

        first, *rest = HostMove(targets, sources, places).parts()
        first.begin()
        assert [target.any().item() for target in targets[1:]] == [True, True] + [False] * 37
        for part in rest:
            part.begin()

        assert all(map(torch.equal, targets, sources))


class TestSharedMoves:
    def moves(self) -> list[HostMove]:
        return [HostMove([torch.zeros(8)], [torch.full((8,), float(number))]) for number in range(1, 4)]

    def test_helper_that_is_interrupted(self, monkeypatch):
        """
        After Ctrl-C on the helping thread, the other one makes what that was amid.
        """
        moves = self.moves()
        shared = SharedMoves(moves)
        original = HostMove.begin

        def interrupted(self: HostMove) -> None:
            monkeypatch.setattr(HostMove, "begin", original)
            raise KeyboardInterrupt

        monkeypatch.setattr(HostMove, "begin", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared.help_out()

        shared.carry_out()

        assert all(torch.equal(move.targets[0], move.sources[0]) for move in moves)

    @pytest.mark.parametrize("inference", [False, True])
    def test_helper_in_any_mode(self, inference):
        """
        The helping thread copies into tensors that require grad, also in inference mode.
        """
        target = nn.Parameter(torch.zeros(8))
        shared = SharedMoves([HostMove([target], [torch.ones(8)])])

        with torch.inference_mode(inference):
            shared.help_out()

        assert target.eq(1).all()

    def test_each_is_made_once(self, monkeypatch):
        """
        What the helping thread has made is not made again.
        """
        begun: list[int] = []
        monkeypatch.setattr(HostMove, "begin", lambda move: begun.append(id(move)))
        moves = self.moves()
        shared = SharedMoves(moves)

        shared.help_out()
        shared.carry_out()

        assert begun == list(map(id, moves))


class TestWatched:
    @pytest.mark.parametrize("checked", [False, True])
    def test_untouched(self, checked):
        """
        A tensor that is read only has not changed; also not if it holds a NaN.
        """
        owner = nn.Parameter(torch.tensor([1.0, float("nan"), -0.0]))
        watched = Watched([owner], [copy_of(owner)], checked=checked)

        (owner * 2).nansum().backward()

        assert not watched.changed()
        assert not watched.torn()

    @pytest.mark.parametrize("checked", [False, True])
    @pytest.mark.parametrize(
        "change",
        [
            lambda owner: owner.add_(1),
            lambda owner: owner.detach().mul_(1),
            lambda owner: owner.view(-1)[2:].zero_(),
            lambda owner: owner.copy_(torch.zeros(4, 4)),
        ],
    )
    def test_changed_in_place(self, change, checked):
        """
        A write is noticed by the tensor's version, through views and without new values as well.
        """
        owner = nn.Parameter(torch.ones(4, 4))
        watched = Watched([owner], [copy_of(owner)], checked=checked)

        with torch.no_grad():
            change(owner)

        assert watched.changed()

    def test_memory_exchanged(self):
        """
        Other memory under the same tensor is noticed, though its version stays.
        """
        owner = nn.Parameter(torch.ones(4))
        watched, version = Watched([owner], [copy_of(owner)]), owner._version

        owner.data = torch.ones(4)

        assert owner._version == version
        assert watched.changed()

    def test_memory_exchanged_is_not_freed(self):
        """
        The memory that a tensor had at the request stays for as long as it may be read.
        """
        memory = np.ones(4, np.float32)
        owner, alive = nn.Parameter(torch.from_numpy(memory)), weakref.ref(memory)
        del memory
        watched = Watched([owner], [copy_of(owner)])

        owner.data = torch.ones(4)

        assert alive() is not None
        del watched
        assert alive() is None

    @pytest.mark.parametrize(
        "change",
        [
            lambda owner: owner.data.mul_(2),
            lambda owner: owner.data[3].neg_(),
            lambda owner: owner.detach().numpy().fill(7),
        ],
    )
    def test_behind_its_back(self, change):
        """
        A write that leaves the version as it is goes unnoticed, unless the values are compared.
        """
        owner = nn.Parameter(torch.tensor([1.0, 2.0, float("nan"), 0.0]))
        unchecked = Watched([owner], [copy_of(owner)])
        checked = Watched([owner], [copy_of(owner)], checked=True)

        change(owner)

        assert not unchecked.changed()
        assert checked.changed()

    @pytest.mark.parametrize(
        "data", [lambda owner: owner.data[:2], lambda owner: owner.data.view(torch.int32)]
    )
    def test_seen_otherwise(self, data):
        """
        The same memory under another shape or dtype is a change to who compares.
        """
        owner = torch.zeros(4)
        checked = Watched([owner], [copy_of(owner)], checked=True)

        owner.data = data(owner)

        assert checked.changed()

    def test_torn(self):
        """
        A copy that differs from the values of the request is torn, wherever the tensor stands by now.
        """
        owner = nn.Parameter(torch.zeros(4))
        torn, whole = (Watched([owner], [copy_of(owner)], checked=True) for _ in range(2))
        torn.copies[0][3] = 1
        owner.data.add_(5)

        assert torn.torn()
        assert not whole.torn()

    def test_not_compared(self):
        """
        Without the values of the request, no copy is known to be torn.
        """
        owner = torch.zeros(4)
        watched = Watched([owner], [torch.ones(4)])

        assert not watched.torn()

    def test_odd_layouts(self):
        """
        Tensors with gaps, transposed, without dimensions or elements are compared by value as well.
        """
        for owner in (torch.ones(4, 4)[:, 1], torch.ones(2, 3).t(), torch.tensor(1.0), torch.zeros(0)):
            watched = Watched([owner], [copy_of(owner)], checked=True)
            assert not watched.changed()
            owner.data.add_(1)
            assert bool(watched.changed()) == (owner.numel() > 0)


class TestRun:
    def test_devices_first(self):
        """
        All moves begin before the first is waited for.
        """
        log: list[str] = []

        BackgroundCopy([Steps(log, "a"), Steps(log, "b")]).run()

        assert log == ["a begins", "b begins", "a finishes", "b finishes"]

    def test_into_parameters(self):
        """
        Copies are written to parameters too, and are no part of a graph.
        """
        source, target = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4))
        copy = BackgroundCopy([HostMove([target], [source])])

        copy.run()
        copy.wait()

        assert target.tolist() == [1, 1, 1, 1]
        assert target.is_leaf

    def test_lets_go(self):
        """
        When all has arrived, what was copied from may be freed.
        """
        owner = nn.Parameter(torch.ones(4))
        target = copy_of(owner)
        copy = BackgroundCopy([HostMove([target], [owner])], Watched([owner], [target]))
        freed = weakref.ref(owner)
        copy.run()

        del owner
        gc.collect()

        assert freed() is None
        copy.let_change()
        copy.wait()


class TestLetChange:
    def test_waits_for_the_copy(self, thread):
        """
        Nobody may change anything until it is copied.
        """
        allowed, early = threading.Event(), []

        class Slow(Steps):
            def begin(self) -> None:
                early.append(allowed.wait(A_MOMENT))

        copy = BackgroundCopy([Slow([]), Slow([])])
        thread.carry_out(copy)

        copy.let_change()
        allowed.set()
        copy.wait()

        assert early == [False, False]

    def test_makes_what_is_left(self, thread, monkeypatch):
        """
        Whoever has to wait copies what the copying thread has not come to.
        """
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 0)
        mine, helped = threading.current_thread(), threading.Event()
        original = HostMove.begin

        def begin(self: HostMove) -> None:
            if threading.current_thread() is mine:
                helped.set()
            else:
                assert helped.wait(TOO_LONG)
            original(self)

        monkeypatch.setattr(HostMove, "begin", begin)
        targets = [nn.Parameter(torch.zeros(8)) for _ in range(9)]
        copy = BackgroundCopy([HostMove(targets, [torch.ones(8) for _ in targets])])
        thread.carry_out(copy)

        copy.let_change()

        assert all(target.eq(1).all() for target in targets)
        copy.wait()

    def test_what_goes_wrong_does_not_disturb_the_step(self, thread, monkeypatch):
        """
        What the training thread cannot copy the copying thread tries again.
        """
        monkeypatch.setattr(background_copy, "_WORTH_SHARING", 0)
        mine, failed = threading.current_thread(), threading.Event()
        original = HostMove.begin

        def begin(self: HostMove) -> None:
            if threading.current_thread() is mine:
                failed.set()
                raise MemoryError
            assert failed.wait(TOO_LONG)
            original(self)

        monkeypatch.setattr(HostMove, "begin", begin)
        targets = [torch.zeros(8) for _ in range(9)]
        copy = BackgroundCopy([HostMove(targets, [torch.ones(8) for _ in targets])])
        thread.carry_out(copy)

        copy.let_change()

        assert all(target.eq(1).all() for target in targets)
        copy.wait()

    def test_makes_nothing_for_a_dead_thread(self):
        """
        In a forked child, which has no copying thread, nothing is written to the parent's memory.
        """
        target = torch.zeros(8)
        copy = BackgroundCopy([HostMove([target], [torch.ones(8)])])
        copy.thread = ended_thread()

        copy.let_change()

        assert target.eq(0).all()

    def test_does_not_wait_for_devices(self, thread):
        """
        What a device has begun to copy holds back that device's work, not the caller.
        """
        log: list[str] = []
        moves = [Steps(log, "a"), Steps(log, "b")]
        moves[0].may_finish.clear()
        copy = BackgroundCopy(moves)
        thread.carry_out(copy)

        copy.let_change()

        assert log == ["a begins", "b begins", "a holds back", "b holds back"]
        assert not copy.is_over
        moves[0].may_finish.set()
        copy.wait()
        assert log[4:] == ["a finishes", "b finishes"]

    def test_arrived_before(self):
        """
        What has arrived holds nothing back, however often that is asked.
        """
        log: list[str] = []
        copy = BackgroundCopy([Steps(log)])
        copy.run()

        copy.let_change()
        copy.let_change()

        assert log == ["move begins", "move finishes"]

    def test_step_that_came_through(self, thread):
        """
        A change after `let_change` fails nothing, though the copy is complete only after it.
        """
        owner = nn.Parameter(torch.ones(4))
        move = Steps([])
        move.may_finish.clear()
        copy = BackgroundCopy([move], Watched([owner], [copy_of(owner)]))
        thread.carry_out(copy)
        copy.let_change()
        with torch.no_grad():
            owner.add_(1)

        move.may_finish.set()
        copy.wait()

        assert not copy.was_changed

    def test_changed_before(self, thread):
        """
        A change before `let_change` fails the copy with the tensor's place, and holds up nobody.
        """
        owners = [nn.Parameter(torch.ones(4)) for _ in range(3)]
        copies = [copy_of(owner) for owner in owners]
        state = {"module": {str(index): one for index, one in enumerate(copies)}}
        watched = Watched(owners, copies)
        move = Steps([])
        move.may_finish.clear()
        copy = BackgroundCopy([move], watched, lambda tensor: path_to(state, tensor))
        thread.carry_out(copy)
        with torch.no_grad():
            owners[0].add_(1)
            owners[2].add_(1)

        copy.let_change()
        move.may_finish.set()

        with pytest.raises(SnapshotChangedError) as caught:
            copy.wait()
        assert caught.value.places == ["state['module']['0']", "state['module']['2']"]
        assert copy.was_changed

    def test_changed_while_it_was_copied(self, thread):
        """
        A change that nobody announced is noticed when the copy is complete.
        """
        owner = nn.Parameter(torch.ones(4))
        move = Steps([])
        move.may_begin.clear()
        copy = BackgroundCopy([move], Watched([owner], [copy_of(owner)]), lambda tensor: "there")
        thread.carry_out(copy)
        assert move.reached_begin.wait(TOO_LONG)
        with torch.no_grad():
            owner.add_(1)
        move.may_begin.set()

        with pytest.raises(SnapshotChangedError, match="there changed between the save and the next"):
            copy.wait()

    def test_changed_when_it_was_complete(self):
        """
        A change after the copy was complete does not concern it.
        """
        owner = nn.Parameter(torch.ones(4))
        copy = BackgroundCopy([], Watched([owner], [copy_of(owner)]))
        copy.run()
        with torch.no_grad():
            owner.add_(1)

        copy.let_change()

        copy.wait()
        assert not copy.was_changed


class TestIsOver:
    def test_until_it_arrived(self, thread):
        """
        A copy is over when its bytes have arrived, not when they only have begun to.
        """
        move = Steps([])
        move.may_finish.clear()
        copy = BackgroundCopy([move])
        assert not copy.is_over
        thread.carry_out(copy)
        assert move.reached_finish.wait(TOO_LONG)
        assert not copy.is_over

        move.may_finish.set()
        copy.wait()

        assert copy.is_over


class TestChecked:
    def make(self, *moves: HostMove, owner: nn.Parameter, target: torch.Tensor) -> BackgroundCopy:
        watched = Watched([owner], [target], checked=True)
        return BackgroundCopy(moves, watched, lambda tensor: "there", checked=True)

    def test_holds_until_the_change(self):
        """
        Tensors are held, to be compared, until somebody is allowed to change them.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        copy = self.make(HostMove([target], [owner]), owner=owner, target=target)
        held = weakref.ref(owner)
        del owner
        copy.run()
        assert held() is not None
        assert not copy.is_over

        copy.let_change()

        assert held() is None
        assert copy.is_over

    @pytest.mark.parametrize("complete", [False, True])
    def test_changed_behind_its_back(self, thread, complete):
        """
        `let_change` raises, at whoever asks first, if the values are not those of the request.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        last = Steps([])
        last.may_finish.clear()
        copy = self.make(HostMove([target], [owner]), last, owner=owner, target=target)
        thread.carry_out(copy)
        assert last.reached_finish.wait(TOO_LONG)
        if complete:
            last.may_finish.set()
            copy.wait()
        owner.data.add_(1)

        with pytest.raises(SnapshotChangedError, match="there changed"):
            copy.let_change()

        copy.let_change()
        last.may_finish.set()
        copy.wait_until_arrived()
        assert copy.was_changed

    def test_change_fails_the_save(self, thread):
        """
        A change that `let_change` raises for before the copy is complete fails the copy as well.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        last = Steps([])
        last.may_finish.clear()
        copy = self.make(HostMove([target], [owner]), last, owner=owner, target=target)
        thread.carry_out(copy)
        assert last.reached_finish.wait(TOO_LONG)
        owner.data.add_(1)
        with pytest.raises(SnapshotChangedError):
            copy.let_change()
        last.may_finish.set()

        with pytest.raises(SnapshotChangedError, match="there changed"):
            copy.wait()

    def test_step_that_came_through(self, thread):
        """
        A change after `let_change` fails nothing.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        last = Steps([])
        last.may_finish.clear()
        copy = self.make(HostMove([target], [owner]), last, owner=owner, target=target)
        thread.carry_out(copy)
        copy.let_change()
        with torch.no_grad():
            owner.add_(1)
        last.may_finish.set()

        copy.wait()

        assert not copy.was_changed
        assert target.tolist() == [1, 1, 1, 1]

    def test_asked_again(self, thread):
        """
        Once it was allowed, a change is no news to who asks next, though the copy is not complete.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        last = Steps([])
        last.may_finish.clear()
        copy = self.make(HostMove([target], [owner]), last, owner=owner, target=target)
        thread.carry_out(copy)
        copy.let_change()
        with torch.no_grad():
            owner.add_(1)

        copy.let_change()

        last.may_finish.set()
        copy.wait()

    def test_torn(self):
        """
        A copy that does not hold the values of the request fails, though the tensor has them again.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        copy = self.make(Tears([target], [owner]), owner=owner, target=target)

        copy.run()

        assert owner.tolist() == [1, 1, 1, 1]
        with pytest.raises(SnapshotChangedError, match="there changed"):
            copy.wait()
        assert copy.was_changed

    def test_torn_and_complete_after_the_change(self, thread):
        """
        A copy that is torn fails also if it is complete only after `let_change`.
        """
        owner, target = nn.Parameter(torch.ones(4)), torch.zeros(4)
        last = Steps([])
        last.may_finish.clear()
        copy = self.make(Tears([target], [owner]), last, owner=owner, target=target)
        thread.carry_out(copy)
        copy.let_change()
        last.may_finish.set()

        with pytest.raises(SnapshotChangedError, match="there changed"):
            copy.wait()

    def test_lets_go_of_what_failed(self):
        """
        A copy that failed holds no tensors: there is nothing more to find out.
        """
        owner = nn.Parameter(torch.ones(4))
        held = weakref.ref(owner)
        copy = self.make(Breaks(OSError("mine")), owner=owner, target=copy_of(owner))
        copy.run()

        del owner
        gc.collect()

        assert held() is None
        copy.let_change()
        assert copy.is_over


class TestFailure:
    @pytest.mark.parametrize("error", [OSError("mine"), MemoryError("mine"), SystemExit("mine")])
    def test_raised_by_wait(self, thread, error):
        """
        What went wrong on the copying thread is raised by each `wait`, and only there.
        """
        later: list[str] = []
        copy = BackgroundCopy([Breaks(error), Steps(later)])
        thread.carry_out(copy)

        copy.let_change()
        copy.wait_until_arrived()

        for _ in range(2):
            with pytest.raises(type(error), match="mine"):
                copy.wait()
        assert later == ["move finishes"]
        assert copy.is_over
        assert not copy.was_changed

    @pytest.mark.parametrize(
        ("ends", "expected"),
        [
            (BackgroundCopy.run, ["first begins", "first finishes"]),
            (lambda copy: copy.withdraw(OSError("mine")), ["first finishes"]),
        ],
        ids=["failed", "withdrawn"],
    )
    def test_no_device_writes_afterwards(self, ends, expected):
        """
        Whoever gets the memory of a copy that came to nothing is not written over by what was under way.
        """
        log: list[str] = []

        ends(BackgroundCopy([Steps(log, "first"), Breaks(OSError("mine"))]))

        assert log == expected

    def test_withdrawal_that_is_interrupted(self):
        """
        After Ctrl-C while a device finishes, nobody waits for the copy.
        """
        copy = BackgroundCopy([BreaksLater(KeyboardInterrupt())])
        copy._moves[0].may_finish.set()

        with pytest.raises(KeyboardInterrupt):
            copy.withdraw(OSError("mine"))

        copy.wait_until_arrived()
        with pytest.raises(OSError, match="mine"):
            copy.wait()

    def test_thread_goes_on(self, thread):
        """
        A copy that fails does not keep the next one from being made.
        """
        thread.carry_out(BackgroundCopy([Breaks(SystemExit())]))
        following = BackgroundCopy([])
        thread.carry_out(following)

        following.wait()

        assert thread.is_alive()

    def test_first_error(self):
        """
        The first thing that went wrong is the one that is told of.
        """
        owner = nn.Parameter(torch.ones(4))
        copy = BackgroundCopy([Breaks(OSError("first"))], Watched([owner], [copy_of(owner)]))
        copy.run()
        with torch.no_grad():
            owner.add_(1)
        copy.let_change()
        copy.withdraw(RuntimeError("third"))

        with pytest.raises(OSError, match="first"):
            copy.wait()

    def test_change_before_an_error(self, thread):
        """
        A change that was found stays the reason, whatever goes wrong afterwards.
        """
        owner = nn.Parameter(torch.ones(4))
        move = BreaksLater(OSError("second"))
        copy = BackgroundCopy([move], Watched([owner], [copy_of(owner)]))
        thread.carry_out(copy)
        assert move.reached_finish.wait(TOO_LONG)
        with torch.no_grad():
            owner.add_(1)
        copy.let_change()
        move.may_finish.set()

        with pytest.raises(SnapshotChangedError):
            copy.wait()

    def test_nobody_waits_for_a_dead_thread(self):
        """
        Where the copying thread is gone, everyone goes on and `wait` says why there is no copy.
        """
        copy = BackgroundCopy([Steps([])])
        copy.thread = ended_thread()

        copy.let_change()
        copy.wait_until_arrived()

        with pytest.raises(RuntimeError, match="the thread that copies snapshots has died"):
            copy.wait()
        assert copy.is_over

    def test_arrived_and_thread_ended(self, thread):
        """
        A copy that was made is good, whatever became of the thread since.
        """
        copy = BackgroundCopy([])
        thread.carry_out(copy)
        copy.wait()
        copy.thread = ended_thread()

        copy.let_change()
        copy.wait()

    def test_withdrawn_is_never_made(self):
        """
        Who withdraws a copy may use its memory: a thread that comes to it later leaves that alone.
        """
        source, target = torch.ones(4), torch.zeros(4)
        copy = BackgroundCopy([HostMove([target], [source])])
        copy.withdraw(OSError("mine"))

        copy.run()

        assert target.tolist() == [0, 0, 0, 0]
        assert copy.is_over

    def test_withdrawn_too_late(self, thread):
        """
        A copy that is being made is made to its end, and held until then.
        """
        steps = Steps([])
        steps.may_finish.clear()
        copy = BackgroundCopy([steps])
        thread.carry_out(copy)
        assert steps.reached_finish.wait(TOO_LONG)

        copy.withdraw(OSError("mine"))

        assert not copy.is_over
        steps.may_finish.set()
        copy.wait()

    @pytest.mark.parametrize("ends", [lambda copy: copy.run(), lambda copy: copy.withdraw(OSError("mine"))])
    def test_names_are_let_go(self, ends):
        """
        Once it is over, it does not hold what names the tensors, which holds the whole snapshot.
        """

        class Names:
            def __call__(self, tensor: torch.Tensor) -> str:
                return "place"

        names = Names()
        held = weakref.ref(names)
        copy = BackgroundCopy([], None, names)
        del names

        ends(copy)

        assert held() is None

    @pytest.mark.parametrize("checked", [False, True])
    def test_withdrawn(self, checked):
        """
        A copy that is withdrawn holds nobody and no tensor, and `wait` raises the reason.
        """
        owner = nn.Parameter(torch.ones(4))
        held = weakref.ref(owner)
        target = copy_of(owner)
        copy = BackgroundCopy(
            [HostMove([target], [owner])], Watched([owner], [target], checked=checked), checked=checked
        )
        copy.withdraw(OSError("mine"))
        del owner
        gc.collect()

        copy.let_change()
        copy.wait_until_arrived()

        with pytest.raises(OSError, match="mine"):
            copy.wait()
        assert held() is None
        assert copy.is_over

"""What only a GPU can tell: order of streams, graphs, page-locking, and that the host is not waited for."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import trainbus
from trainbus import Handler
from trainbus.checkpoint import page_locking
from trainbus.checkpoint.cuda import Cuda

pytestmark = pytest.mark.gpu

LONG = 50_000_000  # cycles that a kernel keeps the device busy
WAYS = {
    "aside": {"device_snapshot": True},
    "at once": {"device_snapshot": False},
    "overlap": {"device_snapshot": False, "snapshot": "overlap"},
}


class Net(nn.Module):
    """Several kinds of layers, with buffers that change in the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(512, 1024), nn.BatchNorm1d(1024), nn.ReLU(), nn.Dropout(0.1), nn.Linear(1024, 512)
        )

    def forward(self, x):
        return self.layers(x).square().mean()


@pytest.fixture(params=WAYS)
def way(request):
    """Each way from a device to the host."""
    return WAYS[request.param]


def trained(optimizer_of=torch.optim.AdamW, **options):
    """Return a module on the device, and its optimizer."""
    torch.manual_seed(0)
    module = Net().cuda()
    return module, optimizer_of(module.parameters(), lr=1e-3, **options)


def step(module, optimizer, scaler=None):
    """Train on a batch that is made on the device."""
    loss = module(torch.randn(64, 512, device="cuda"))
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


def on_host(module, optimizer):
    """Return what a save must hold, copied by a host that waits for everything."""
    torch.cuda.synchronize()
    state = {"module": module.state_dict(), "optimizer": optimizer.state_dict()}
    return copy.deepcopy(torch.utils._pytree.tree_map_only(torch.Tensor, lambda one: one.cpu(), state))


def assert_equal(path, expected):
    """The file holds the very bits of *expected*."""
    state = trainbus.load(path)
    for part, whole in expected.items():
        mine, spec = torch.utils._pytree.tree_flatten(state[part])
        theirs, expected_spec = torch.utils._pytree.tree_flatten(whole)
        assert spec == expected_spec
        for one, other in zip(mine, theirs, strict=True):
            assert torch.equal(one, other) if isinstance(other, torch.Tensor) else one == other


class TestOrder:
    @pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}, {"capturable": True}])
    def test_long_work_before_and_changes_right_after(self, tmp_path, way, options):
        """
        A file holds what the device's work before the request makes, and nothing of what comes after.
        """
        module, optimizer = trained(**options)
        expected = {}
        with Handler(module, optimizer, max_pending=2, **way) as handler:

            def save(global_step):
                expected[global_step] = on_host(module, optimizer)
                torch.cuda._sleep(LONG)
                handler.save_async(tmp_path / f"{global_step}.pt")

            handler.on("train_batch_end", save, every=2)
            for _ in handler.steps(12, range(12)):
                step(module, optimizer)

        for number, state in expected.items():
            assert_equal(tmp_path / f"{number}.pt", state)

    def test_stream_of_the_users_own(self, tmp_path, way):
        """
        A training on another stream than the default one is saved as that stream leaves it.
        """
        module, optimizer = trained()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()), Handler(module, optimizer, **way) as handler:
            for _ in handler.steps(3, range(3)):
                step(module, optimizer)
            torch.cuda._sleep(LONG)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(3)
            handler.save_async(tmp_path / "a.pt")
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(-1)

        weights = trainbus.load(tmp_path / "a.pt")["module"]
        assert all(weights[name].unique().tolist() == [3] for name, _ in module.named_parameters())


class TestHost:
    @pytest.mark.parametrize("scales", [False, True], ids=["", "scaler"])
    def test_nothing_waits_for_the_device(self, tmp_path, way, scales, without_waiting):
        """
        Once the memory is there, asking for a save and the step after it never wait for the device.
        """
        module, optimizer = trained(fused=True)
        scaler = torch.amp.GradScaler("cuda") if scales else None
        with Handler(module, optimizer, scaler=scaler, max_pending=2, **way) as handler:
            for _ in range(3):
                step(module, optimizer, scaler)
                handler.save_async(tmp_path / "a.pt")
                handler.flush()
            with without_waiting():
                handler.save_async(tmp_path / "b.pt")
                step(module, optimizer, scaler)
            handler.flush()


class TestGraphs:
    def test_capture_and_replay(self, tmp_path, way):
        """
        A step that is captured with the fence in place can be replayed and saved.
        """
        module, optimizer = trained(capturable=True)
        static = torch.randn(64, 512, device="cuda")

        def whole_step():
            module(static).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

        with Handler(module, optimizer, **way) as handler:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    whole_step()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                whole_step()
            expected = {}

            def save(global_step):
                expected[global_step] = on_host(module, optimizer)
                handler.save_async(tmp_path / f"{global_step}.pt")

            handler.on("train_batch_end", save, every=2)
            for _ in handler.steps(8, range(8)):
                graph.replay()

        for number, state in expected.items():
            assert_equal(tmp_path / f"{number}.pt", state)


class TestScaler:
    def test_skipped_step(self, tmp_path, way):
        """
        A step that the scaler skips leaves the fence closed for the next one, and its scale is in the file.
        """
        module, optimizer = trained()
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        with Handler(module, optimizer, scaler=scaler, **way) as handler:
            handler.on("train_batch_end", lambda: handler.save_async(tmp_path / "a.pt"))
            for number in handler.steps(6, range(6)):
                if number == 3:
                    for parameter in module.parameters():
                        parameter.grad = torch.full_like(parameter, torch.inf)
                    scaler.scale(torch.zeros((), device="cuda"))
                    scaler.step(optimizer)
                    scaler.update()
                    optimizer.zero_grad()
                else:
                    step(module, optimizer, scaler)

        assert float(trainbus.load(tmp_path / "a.pt")["scaler"]["scale"]) == 2.0**9


class TestPageLocking:
    def test_buffer_is_locked_under_load(self, tmp_path, monkeypatch):
        """
        While training and saves go on, all of the buffer is page-locked, piece by piece.
        """
        monkeypatch.setattr(page_locking, "PIECE_BYTES", 1 << 20)
        module, optimizer = trained()
        with Handler(module, optimizer) as handler:
            for _ in range(10):
                step(module, optimizer)
                handler.save_async(tmp_path / "a.pt")
            handler.flush()
            buffer = handler._saver._memory._free[0]
            tensor = torch.frombuffer(buffer.mapping, dtype=torch.uint8)
            assert tensor[:4096].is_pinned() and tensor[-4096:].is_pinned()

    def test_refused_half_way(self, tmp_path, monkeypatch, caplog, way):
        """
        Memory of which a part cannot be locked is used as it is, and every file is right.
        """
        monkeypatch.setattr(page_locking, "PIECE_BYTES", 1 << 20)
        real, locked = Cuda.lock_pages, []

        def lock_two(self, address, size, device):
            locked.append(address)
            return real(self, address, size, device) if len(locked) <= 2 else "refused"

        monkeypatch.setattr(Cuda, "lock_pages", lock_two)
        module, optimizer = trained()
        with Handler(module, optimizer, **way) as handler:
            for number in range(4):
                step(module, optimizer)
                expected = on_host(module, optimizer)
                handler.save_async(tmp_path / f"{number}.pt")
                handler.flush()
                assert_equal(tmp_path / f"{number}.pt", expected)
        assert "Cannot page-lock" in caplog.text

    def test_real_refusal_harms_no_later_kernel(self, tmp_path):
        """
        After a refusal by the driver itself, the thread's next work on the device is not blamed for it.
        """
        cuda, device = Cuda(), torch.device("cuda", 0)
        memory = torch.zeros(1 << 20, dtype=torch.uint8)
        address = memory.data_ptr() // 4096 * 4096 + 4096
        assert cuda.lock_pages(address, 8192, device) is None
        assert cuda.lock_pages(address, 8192, device) is not None

        assert torch.ones(3, device=device).sum().item() == 3
        cuda.unlock_pages(address)

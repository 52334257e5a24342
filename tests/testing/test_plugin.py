"""The fixtures belong together: one handler, its bus, and a record of it."""

from __future__ import annotations

from trainbus.testing import emit_run

pytest_plugins = ["trainbus.testing.plugin"]


class TestFixtures:
    def test_together(self, bus, fake_handler, recorder):
        """
        The recorder records the bus of the handler.
        """
        fake_handler.save_async("a.pt")
        emit_run(bus, epochs=1, batches=1)

        assert bus.handler is fake_handler
        assert recorder.names[:2] == ["checkpoint_saved", "train_begin"]

    def test_fresh(self, fake_handler, recorder):
        """
        Each test has its own.
        """
        assert (fake_handler.saves, recorder.events) == ([], [])

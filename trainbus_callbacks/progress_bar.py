"""ProgressBar: one tqdm bar for each epoch, with the newest metrics and the saves in flight."""

from __future__ import annotations

import contextlib
import functools
import importlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from trainbus.callback import Callback
from trainbus.console import console_lines
from trainbus.errors import MissingExtraError
from trainbus_callbacks.scalars import floats_of

__all__ = ["ProgressBar"]


class ProgressBar(Callback):
    """
    Show how far each epoch is, on rank 0.

    How many batches there are is asked of ``handler.total_batches``; where that is None, the first
    epoch tells.
    Metrics are read at most once in *seconds_between_reads*, since reading one may wait for the GPU.
    While it runs, what trainbus logs is printed above the bar, unless logging is configured.

    Args:
        seconds_between_reads: Seconds from one reading of the metrics to the next.
        clock: Returns seconds; replaced in tests.
        **tqdm_options: For ``tqdm.auto.tqdm``, e.g. ``leave=False`` or ``file=...``.

    Raises:
        MissingExtraError: If tqdm is not installed.
    """

    priority = 50

    def __init__(
        self,
        *,
        seconds_between_reads: float = 0.5,
        clock: Callable[[], float] = time.monotonic,
        **tqdm_options: Any,
    ) -> None:
        self._tqdm = _import_tqdm()
        self._seconds = seconds_between_reads
        self._clock = clock
        self._options = {"dynamic_ncols": True, **tqdm_options}
        self._bar: Any = None
        self._batches: int | None = None  # in an epoch, as the last one had it
        self._total_epochs: int | None = None
        self._read_at = -float("inf")
        self._console = contextlib.ExitStack()

    def on_train_begin(self, handler: Any, total_epochs: int | None = None) -> None:
        """Print log records above the bar from here on."""
        self._close()
        self._total_epochs = total_epochs
        if _shows(handler):
            write = functools.partial(self._tqdm.write, file=self._options.get("file"))
            self._console.enter_context(console_lines(write))

    def on_train_batch_begin(self, handler: Any, epoch: int, batch: int) -> None:
        """Open the epoch's bar, in a continued epoch at the batch where it continues."""
        if self._bar is None and _shows(handler):
            total = "" if self._total_epochs is None else f"/{self._total_epochs}"
            batches = getattr(handler, "total_batches", None) or self._batches
            options = {"desc": f"epoch {epoch + 1}{total}", "total": batches, **self._options}
            self._bar = self._tqdm(initial=batch, **options)

    def on_train_batch_end(self, handler: Any, batch: int, logs: Mapping[str, Any]) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        self._bar.update(batch + 1 - self._bar.n)
        now = self._clock()
        if now - self._read_at >= self._seconds:
            self._read_at = now
            self._show(handler, logs)

    def on_epoch_end(self, handler: Any, logs: Mapping[str, Any]) -> None:
        """Show the epoch's metrics and close its bar."""
        if self._bar is not None:
            self._batches = self._bar.n
            self._show(handler, logs)
            self._close_bar()

    def on_exception(self) -> None:
        """Leave the terminal as it was."""
        self._close()

    def on_train_end(self) -> None:
        """Leave the terminal as it was."""
        self._close()

    def _show(self, handler: Any, logs: Mapping[str, Any]) -> None:
        shown = {name: f"{value:.4g}" for name, value in floats_of(logs)[0].items()}
        saving = getattr(handler, "saves_in_flight", 0)
        if saving:
            shown["saving"] = str(saving)
        self._bar.set_postfix(shown, refresh=False)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _close(self) -> None:
        self._close_bar()
        self._console.close()


def _shows(handler: Any) -> bool:
    return handler is None or bool(handler.rank == 0)


def _import_tqdm() -> Any:
    try:
        return importlib.import_module("tqdm.auto").tqdm
    except ImportError as error:
        raise MissingExtraError(
            'ProgressBar needs tqdm, which is not installed. Run: pip install "trainbus[cli]"'
        ) from error

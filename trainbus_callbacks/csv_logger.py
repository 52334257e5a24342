"""CSVLogger: a row of metrics for each epoch, in a file that any program opens."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from typing import Any

from trainbus.callback import Callback
from trainbus_callbacks.scalars import floats_of

__all__ = ["CSVLogger"]

_COUNTERS = ("epoch", "global_step")


class CSVLogger(Callback):
    """
    Write ``epoch`` (1-based), ``global_step`` and all metrics of each epoch to a CSV file, on rank 0.

    Each row is in the file when the event is over. A metric that appears later gets a column; the file
    is rewritten then, through a temporary one that is synced, so that it is whole at each moment; after a
    power cut the last rows may be missing. A resumed run drops the rows behind the point where it
    continues, so no epoch stands twice; a new run that finds a file sets it aside as ``<name>.1``,
    ``<name>.2``, ...

    Args:
        path: The file, of the working directory at this moment if it is relative; missing folders are made,
            ``~`` is expanded.

    Raises:
        ValueError: While training, if the file of the run that is resumed is no such table.
    """

    priority = 40  # after those that add metrics

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.path.abspath(os.path.expanduser(os.fspath(path)))
        self._columns: list[str] = []

    def on_train_begin(self, handler: Any, resumed: bool) -> None:
        """Look at what is there."""
        self._columns = []
        if handler.rank != 0:
            return
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        if not os.path.exists(self.path) or os.path.getsize(self.path) == 0:  # as a power cut may leave it
            return
        if not resumed:
            os.rename(self.path, self._free_name())
            return
        columns, rows = self._read()
        # By epochs: a checkpoint of an epoch's last batch has the steps of its row, and comes before it.
        self._rewrite(columns, [row for row in rows if self._epoch(row) <= handler.epoch])

    def on_epoch_end(self, handler: Any, epoch: int, global_step: int, logs: Mapping[str, Any]) -> None:
        """Add a row. Waits for the devices that compute the metrics."""
        if handler.rank != 0:
            return
        metrics = {name: value for name, value in floats_of(logs)[0].items() if name not in _COUNTERS}
        row = {"epoch": epoch + 1, "global_step": global_step, **metrics}
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._read()[1] if self._columns else []
            self._rewrite([*self._columns, *new], [*rows, row])
            return
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        with open(self.path, newline="", encoding="utf-8") as file:
            # Behind the last end of a line stands what a power cut has left of a row.
            whole = file.read().rpartition("\n")[0]
        reader = csv.DictReader(io.StringIO(whole, newline=""))
        columns = list(reader.fieldnames or [])
        if columns[:2] != list(_COUNTERS):
            raise ValueError(
                f"Cannot go on with {self.path!r}: its first columns are {columns[:2]!r} and should be "
                f"{list(_COUNTERS)!r}. Move the file away, or give CSVLogger another path."
            )
        return columns, list(reader)

    def _epoch(self, row: Mapping[str, Any]) -> int:
        try:
            return int(row["epoch"])
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Cannot go on with {self.path!r}: the epoch of a row is {row['epoch']!r} and "
                "should be an int. Mend the row or move the file away."
            ) from error

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        temporary = f"{self.path}.tmp"
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())  # or a power cut might leave the name with nothing in it
        os.replace(temporary, self.path)
        self._columns = columns

    def _free_name(self) -> str:
        number = 1
        while os.path.exists(f"{self.path}.{number}"):
            number += 1
        return f"{self.path}.{number}"

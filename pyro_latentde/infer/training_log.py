# SPDX-License-Identifier: Apache-2.0
"""The course of a training run: one line of a CSV file per step, and TensorBoard where it is installed."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["COLUMNS", "TrainingLog"]

COLUMNS = (
    "step",
    "seconds",
    "elbo",
    "reconstruction",
    "kl",
    "heldout_elbo",
    "learning_rate",
    "kl_weight",
    "grad_norm",
    "skipped",
)
_SECONDS_BETWEEN_FLUSHES = 2.0
_STEPS_BETWEEN_EVENTS = 20


class TrainingLog:
    """Writes rows of :data:`COLUMNS`; ELBO and its parts in nats per data set. Numbers that are not there are empty.

    Args:
        path: a ``.csv`` file, or a folder for ``training.csv``; None writes nothing.
        first_step: rows of this and later steps, from a run that was cut off, are removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with TrainingLog(folder) as log:
        ...         log.write(step=0, elbo=-3.5, skipped=0)
        ...     print((Path(folder) / "training.csv").read_text().splitlines()[1])
        0,,-3.5,,,,,,,0
    """

    def __init__(self, path: str | Path | None, first_step: int = 0) -> None:
        self._path = None if path is None else Path(path)
        self._first = first_step
        self._events: Any = None

    def __enter__(self) -> TrainingLog:
        if self._path is None:
            return self
        if self._path.suffix != ".csv":
            self._path = self._path / "training.csv"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = self._earlier_rows()
        self._file = self._path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerows([COLUMNS, *kept])
        self._next_flush = time.monotonic()
        self._events = _event_writer(self._path.parent)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def write(self, **row: float) -> None:
        """Add the row of a step."""
        if self._path is None:
            return
        self._writer.writerow([_text(row.get(name, math.nan)) for name in COLUMNS])
        if time.monotonic() >= self._next_flush:
            self._file.flush()
            self._next_flush = time.monotonic() + _SECONDS_BETWEEN_FLUSHES
        if self._events is not None and (row["step"] % _STEPS_BETWEEN_EVENTS == 0 or "heldout_elbo" in row):
            for name, value in row.items():
                if name != "step" and math.isfinite(value):
                    self._events.add_scalar(name, value, row["step"])

    def _earlier_rows(self) -> list[list[str]]:
        if not self._first or not self._path.exists():
            return []
        with self._path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[1:]
        # The last line of a killed process may be cut off.
        return [row for row in rows if len(row) == len(COLUMNS) and int(row[0]) < self._first]


def _text(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    return f"{value:.10g}" if math.isfinite(value) else ""


def _event_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder))

# SPDX-License-Identifier: Apache-2.0
"""A warning of every gradient is one warning of a run."""

import logging
from collections import Counter
from contextlib import ContextDecorator
from textwrap import shorten
from types import TracebackType

__all__ = ["WarnOnce"]

_WIDTH = 70  # of the first message, where it is told how many more there were


class WarnOnce(ContextDecorator):
    """Context manager and decorator: of warnings that differ in their numbers only, the first comes through.

    At the end it is told how many more there were.

    Example:
        >>> @WarnOnce()
        ... def run():
        ...     for row in range(100):
        ...         logging.getLogger("pyro_latentde").warning("row %d failed", row)
    """

    def __init__(self) -> None:
        self._log = logging.getLogger("pyro_latentde")

    def _recreate_cm(self) -> "WarnOnce":
        return WarnOnce()  # counts of its own for each call of a decorated function

    def __enter__(self) -> "WarnOnce":
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._log.addFilter(self._is_first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._log.removeFilter(self._is_first)
        for message, count in self._counts.items():
            if count > 1:
                self._log.warning("%d more warnings like %r", count - 1, shorten(self._first[message], _WIDTH))

    def _is_first(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        message = str(record.msg)
        self._counts[message] += 1
        self._first.setdefault(message, record.getMessage())
        return self._counts[message] == 1

# SPDX-License-Identifier: Apache-2.0
"""Tell whether a long run is alive: a bar on a terminal, a plain line every half minute elsewhere."""

import os
import sys
import time
from types import TracebackType

from tqdm import tqdm

__all__ = ["Progress"]

_SECONDS_BETWEEN_LINES = 30.0
_SECONDS_BETWEEN_REFRESHES = 0.2


class Progress:
    """Progress of ``total`` equal pieces of work on standard error.

    Args:
        total: number of pieces.
        label: what is being done.
        enabled: False for silence; also silent when the environment variable ``CI`` is set.

    Example:
        >>> with Progress(10, "counting", enabled=False) as progress:
        ...     progress.update(10, {"found": 3})
    """

    def __init__(self, total: int, label: str, enabled: bool = True) -> None:
        self.total, self.label = total, label
        self._on = enabled and not os.environ.get("CI")
        self._bar: tqdm | None = None
        self._start = self._next = time.monotonic()

    def __enter__(self) -> "Progress":
        self._start = time.monotonic()
        if self._on and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, desc=self.label, dynamic_ncols=True)
            self._next = self._start
        else:
            self._next = self._start + _SECONDS_BETWEEN_LINES
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def due(self) -> bool:
        """Whether it is time to call ``update``: cheap enough for a hot loop."""
        return self._on and time.monotonic() >= self._next

    def update(self, done: int, facts: dict[str, object]) -> None:
        """Show that ``done`` pieces of all are finished, with a few facts."""
        if not self._on:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix({name: str(value) for name, value in facts.items()}, refresh=False)
            self._bar.update(done - self._bar.n)
            self._next = now + _SECONDS_BETWEEN_REFRESHES
            return
        elapsed = now - self._start
        left = elapsed * (self.total - done) / max(done, 1)
        shown = ", ".join(f"{name} {value}" for name, value in facts.items())
        print(
            f"{self.label}: {100 * done / max(self.total, 1):.0f} % after {elapsed:.0f} s, "
            f"about {left:.0f} s left, {shown}",
            file=sys.stderr,
            flush=True,
        )
        self._next = now + _SECONDS_BETWEEN_LINES

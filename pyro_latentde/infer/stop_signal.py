# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C and SIGTERM as a wish to stop, so that what was drawn is not lost."""

import signal
import threading
from types import FrameType, TracebackType

__all__ = ["StopSignal"]


class StopSignal:
    """Context manager that turns the first SIGINT or SIGTERM into ``stop.wanted = True``.

    A second Ctrl-C interrupts at once. Outside the main thread, where Python delivers no signals, it does
    nothing. The former handlers come back at the end.

    Example:
        >>> with StopSignal() as stop:
        ...     stop.wanted
        False
    """

    def __init__(self) -> None:
        self.wanted = False
        self._former: dict[int, object] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._former.items():
            # None: a handler not installed from Python, which cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True

# SPDX-License-Identifier: Apache-2.0
"""How much memory the steps of a solve may take until its gradient is asked for."""

import math
import os
import re
import threading
import warnings
from contextlib import suppress
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from pyro_latentde.errors import SolveError

__all__ = ["Allowance", "budget_bytes", "free_memory", "readable", "tell_once"]

_UNITS = {"B": 1, **{f"{k}B": 1000**n for n, k in enumerate("KMGT", 1)}}
_UNITS.update({f"{k}IB": 1024**n for n, k in enumerate("KMGT", 1)})
_FORM = re.compile(r"\s*([0-9.]+)\s*([KMGT]?I?B)\s*", re.IGNORECASE)

_LOCK = threading.Lock()  # one for all: making one takes longer than holding it
SMALL = 64_000_000  # bytes that are taken without asking how much is free


def budget_bytes(budget: Any) -> int | None:
    """``memory_budget=`` in bytes.

    Args:
        budget: A whole number of bytes, or a text like ``"2 GB"``, ``"500 MB"``, ``"1.5 GiB"``; None stays None.

    Raises:
        SolveError: For anything else.

    Example:
        >>> from pyro_latentde.solve.memory import budget_bytes
        >>> budget_bytes("1.5 GB"), budget_bytes("1 KiB"), budget_bytes(4096)
        (1500000000, 1024, 4096)
    """
    if budget is None:
        return None
    size = None
    if isinstance(budget, Integral) and not isinstance(budget, bool):
        size = int(budget)
    elif isinstance(budget, str) and (found := _FORM.fullmatch(budget)):
        with suppress(ValueError):
            size = int(float(found[1]) * _UNITS[found[2].upper()])
    if size is None or size < 1:
        raise SolveError(
            f'memory_budget = {budget!r}; expected a number of bytes, a text like "2 GB" or "500 MB", or None for what '
            "the machine has free."
        )
    return size


def readable(size: float) -> str:
    """A number of bytes for people.

    Example:
        >>> from pyro_latentde.solve.memory import readable
        >>> readable(1.44e9), readable(512), readable(2.5e13)
        ('1.4 GB', '512 B', '25 TB')
    """
    power = min(4, max(0, int(math.log10(max(size, 1)) // 3)))
    number = size / 1000**power
    return (
        f"{number:.0f} {'_KMGT'[power] if power else ''}B"
        if number >= 10 or not power
        else (f"{number:.1f} {'_KMGT'[power]}B")
    )


def free_memory(device: torch.device | str = "cpu") -> int | None:
    """Bytes that may still be allocated on a device, None where nothing tells."""
    device = torch.device(device)
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    known = [x for x in (_machine_free(), *_group_free()) if x is not None]
    return min(known, default=None)


def _machine_free() -> int | None:
    with suppress(OSError, ValueError, IndexError):
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    return None


def _group_free() -> list[int]:
    """What containers leave: their limits are below those of the machine. Files that can be forgotten are free."""
    found = []
    for folder, limit, used, files in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file "),
    ):
        with suppress(OSError, ValueError, IndexError):  # "max" is no number: no limit
            most, taken = (int(Path(folder, name).read_text()) for name in (limit, used))
            forgotten = int(Path(folder, "memory.stat").read_text().split(files)[1].split()[0])
            found.append(max(0, most - taken + forgotten))
    return found


class Allowance:
    """Bytes for the steps of one solve, taken piece by piece by several threads.

    Args:
        budget: What may be taken; None: half of what is free by the time ``SMALL`` bytes are taken.
        device: Where.
    """

    __slots__ = ("automatic", "device", "limit", "used")

    def __init__(self, budget: int | None, device: torch.device | str = "cpu") -> None:
        self.limit, self.automatic, self.device = SMALL if budget is None else budget, budget is None, device
        self.used = 0

    def left(self) -> int:
        return max(0, self.limit - self.used)

    def take(self, size: int) -> bool:
        """Whether so much is left; then it is taken."""
        with _LOCK:
            if self.used + size > self.limit and self.automatic:
                self._ask()
            if self.used + size > self.limit:
                return False
            self.used += size
            return True

    def give_back(self, size: int) -> None:
        with _LOCK:
            self.used -= size

    def _ask(self) -> None:
        free = free_memory(self.device)
        self.limit = 1 << 62 if free is None else max(SMALL, free // 2)
        self.automatic = False


_told: set[str] = set()


def tell_once(kind: str, text: str) -> None:
    """A warning, once for each kind in a process."""
    if kind not in _told:
        _told.add(kind)
        warnings.warn(text, UserWarning, stacklevel=2)


def _fresh_lock() -> None:
    global _LOCK
    _LOCK = threading.Lock()


if hasattr(os, "register_at_fork"):  # a child must not inherit a lock that another thread held
    os.register_at_fork(after_in_child=_fresh_lock)

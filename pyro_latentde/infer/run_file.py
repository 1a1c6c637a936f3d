# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a sampler: written now and then, read when the same call is made again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyro_latentde.errors import CheckpointError
from pyro_latentde.infer.checkpoint import compare, describe, fingerprint, read, write

__all__ = ["RunFile", "describe_run"]

_FORM = "pyro_latentde sampler 1"
_ADVICE = "Give the checkpoint of this run, or another path; the file was left as it is."


def describe_run(sampler: str, model: Callable, args: tuple, kwargs: Mapping[str, Any], **settings: Any) -> dict:
    """What a checkpoint must agree on, name -> text."""
    import pyro
    import torch

    from pyro_latentde import __version__

    facts = {"sampler": sampler, "model": model, "version": __version__, "pyro": pyro.__version__}
    facts |= {"torch": str(torch.__version__), **settings}
    return {name: value if isinstance(value, str) else describe(value) for name, value in facts.items()} | {
        "arguments": fingerprint(args, dict(kwargs))
    }


class RunFile:
    """A run on disk.

    Args:
        path: of the file, made if there is none; None keeps nothing.
        minutes: least time between two writings.
        about: of the run, see `describe_run`.

    Raises:
        CheckpointError: the file is damaged, of another format, or of another run. It is left alone.
    """

    def __init__(self, path: str | Path | None, minutes: float, about: Mapping[str, str]) -> None:
        if not minutes >= 0:
            raise CheckpointError(f"checkpoint_minutes: expected a number that is not negative, got {minutes!r}")
        self.path, self._seconds, self._about = None if path is None else Path(path), 60.0 * minutes, dict(about)
        self._next = time.monotonic() + self._seconds
        self.saved: dict[str, Any] | None = None
        if self.path is not None and self.path.exists():
            content = read(self.path, _FORM)
            compare(self.path, content["about"], self._about, _ADVICE)
            self.saved = content["state"]

    @property
    def kept(self) -> bool:
        """Whether anything is written at all."""
        return self.path is not None

    def due(self) -> bool:
        """Whether it is time to write."""
        return self.kept and time.monotonic() >= self._next

    def write(self, state: Mapping[str, Any]) -> None:
        """Write the state of the run, tensors and plain types; the old file stands until the new one is complete."""
        if self.kept:
            write(self.path, {"format": _FORM, "about": self._about, "state": dict(state)})
            self._next = time.monotonic() + self._seconds

    def check_length(self, drawn: int, num_samples: int) -> None:
        """Refuse to go on with fewer draws than there are.

        Raises:
            CheckpointError: with both numbers.
        """
        if drawn > num_samples:
            raise CheckpointError(
                f"{self.path}: holds {drawn} draws of each chain, and num_samples={num_samples} are asked for. Ask for "
                "as many or more; more go on from there. The file was left as it is."
            )

# SPDX-License-Identifier: Apache-2.0
"""What a training run was asked for, checked, and as text by which it is recognised."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pyro.infer import ELBO

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError
from pyro_latentde.infer.checkpoint import describe

__all__ = ["Options"]

# Not part of what a run computes, or recognised by other means.
_NOT_COMPARED = {"checkpoint", "checkpoint_every", "log", "progress", "start_at", "accelerator", "strategy", "devices"}


@dataclass(frozen=True)
class Options:
    """The keywords of :func:`.svi.fit_svi`, where they are explained."""

    num_steps: int
    seed: int
    optimizer: Any
    learning_rate: float | Callable[[int], float]
    decay: float
    scheduler: Callable | None
    clip: float | str | None
    num_particles: int
    vectorize_particles: bool
    elbo: ELBO | None
    kl_weight: float | Callable[[int], float]
    max_skips: int
    start_at: Any
    batch_size: int | None
    window: int | Callable[[int], int] | None
    heldout: Series | None
    eval_every: int
    keep: str
    patience: int | None
    precision: str
    accelerator: str | None
    devices: Any
    strategy: str
    num_nodes: int
    checkpoint: str | Path | None
    checkpoint_every: float
    log: str | Path | None
    progress: bool

    @classmethod
    def pick(cls, given: Mapping[str, Any], args: tuple) -> Options:
        """Options among these names and values, checked against the model's arguments.

        Raises:
            ValueError: a value out of its range.
            DataError: an option for series where the first argument is none.
        """
        options = cls(**{f.name: given[f.name] for f in fields(cls)})
        of_series = {"batch_size": options.batch_size, "window": options.window, "heldout": options.heldout}
        wanted = [name for name, value in of_series.items() if value is not None]
        if wanted and not (args and isinstance(args[0], Series)):
            got = type(args[0]).__name__ if args else "no argument"
            raise DataError(
                f"{wanted[0]}: needs a Series as the first argument of model and guide, got {got}: "
                "wrap the data, lde.Series.from_tensors(times, values)."
            )
        options._check()
        if options.heldout is not None and options.heldout.num_values != args[0].num_values:
            ours, theirs = args[0].num_values, options.heldout.num_values
            raise DataError(f"heldout: {theirs} values at each time, but the series that are trained on have {ours}")
        return options

    def _check(self) -> None:
        for name in ("num_steps", "max_skips", "num_particles", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if self.keep not in ("best", "last"):
            raise ValueError(f"keep: expected 'best' or 'last', got {self.keep!r}")
        if self.patience is not None and (self.heldout is None or self.patience < 1):
            raise ValueError(
                f"patience: got {self.patience}; it counts evaluations of heldout= that bring nothing better"
            )
        if self.heldout is not None and not isinstance(self.heldout, Series):
            raise DataError(f"heldout: expected a Series, got {type(self.heldout).__name__}")
        for name in ("kl_weight", "learning_rate"):
            value = getattr(self, name)
            if not callable(value) and not (isinstance(value, numbers.Real) and value >= 0):
                raise ValueError(f"{name}: expected a number that is not negative, or a schedule; got {value!r}")

    def rate(self, step: int) -> dict[str, float]:
        """How the learning rate of a step is set: by a factor, absolutely, or by a scheduler of torch's."""
        if self.scheduler is not None:
            return {}
        if callable(self.learning_rate):
            return {"rate": float(self.learning_rate(step))}
        # Full rate for the first half, to get there; then an exponential fall, against the noise.
        return {"factor": self.decay ** max(0.0, 2.0 * step / max(1, self.num_steps) - 1.0)}

    def weight(self, step: int) -> float:
        """The KL's weight at a step."""
        return float(self.kl_weight(step)) if callable(self.kl_weight) else float(self.kl_weight)

    def described(self) -> dict[str, str]:
        """Name -> text of everything that the result depends on."""
        return {f.name: describe(getattr(self, f.name)) for f in fields(self) if f.name not in _NOT_COMPARED}

# SPDX-License-Identifier: Apache-2.0
"""A training run as data: which series, which model and guide, how long, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import Fit
from pyro_latentde.models.systems.simulation import Simulation

__all__ = ["Config", "Recipe", "Split", "Truth"]


@dataclass(frozen=True)
class Config:
    """The numbers of a run.

    Args:
        train: number of series to learn from.
        heldout: number of series by which the best parameters are chosen.
        test: number of series on which metrics are measured, seen by nothing else.
        steps: number of updates.
        batch_size: series in a minibatch.
        window: training window, a number of times or a schedule of them; None for whole series.
        learning_rate: a number or a schedule.
        sleep: number of updates of the guide on series that the model draws, after those of the ELBO; see
            :func:`.infer.npe`.
        polish: number of further updates of both by the ELBO, after which the guide learns from drawn series again: the
            model, too, is better trained with an accurate guide.
        dreams: number of series that are drawn for that.
        refine: number of updates of the guide on what is observed of the test series, see :func:`.infer.refine`; the
            metrics of the posterior after it are given beside those of the amortized one.
        options: further keywords of ``infer.fit_svi``.
    """

    train: int
    heldout: int
    test: int
    steps: int
    batch_size: int
    window: Any = None
    learning_rate: Any = 1e-3
    sleep: int = 0
    polish: int = 0
    dreams: int = 16_000
    refine: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_series(self) -> int:
        """How many series a run needs."""
        return self.train + self.heldout + self.test

    def changed(self, **numbers: int) -> Config:
        """With some numbers others; schedules are stretched to another number of steps.

        Raises:
            LatentDEError: a number that is none of ``train``, ``heldout``, ``test``, ``steps``, ``batch_size``,
                ``sleep``, ``polish``, ``dreams`` and ``refine``, or that is not positive; the stages after the first,
                ``sleep``, ``polish`` and ``refine``, may be 0.

        Example:
            >>> from pyro_latentde.infer.schedules import cosine
            >>> config = Config(10, 2, 2, 1000, 5, learning_rate=cosine(1.0, 0.0, 1000)).changed(steps=100)
            >>> round(config.learning_rate(50), 2)
            0.5
        """
        stages = ("sleep", "polish", "refine")
        known = ("train", "heldout", "test", "steps", "batch_size", "dreams", *stages)
        for name, number in numbers.items():
            if name not in known or number < (name not in stages):
                raise LatentDEError(f"{name} = {number}: a configuration has positive numbers {', '.join(known)}")
        config = replace(self, **numbers)
        if config.steps == self.steps:
            return config
        factor = self.steps / config.steps
        stretched = {name: _stretch(getattr(self, name), factor) for name in ("window", "learning_rate")}
        options = {
            name: _stretch(value, factor) if name == "kl_weight" else value for name, value in self.options.items()
        }
        return replace(config, **stretched, options=options)


@dataclass(frozen=True)
class _Stretched:
    """A schedule in other steps."""

    schedule: Callable[[float], Any]
    factor: float

    def __call__(self, step: int) -> Any:
        return self.schedule(step * self.factor)


def _stretch(value: Any, factor: float) -> Any:
    return _Stretched(value, factor) if callable(value) else value


@dataclass(frozen=True)
class Truth:
    """What the simulator knows of the test series.

    Args:
        parameters: name -> (N,).
        clean: values without noise, (N, T, D); None where the values themselves are what is to be predicted.
    """

    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    clean: Tensor | None = None


@dataclass(frozen=True)
class Split:
    """Series of a run.

    Args:
        train: series to learn from.
        heldout: series by which the best parameters are chosen.
        test: series for the metrics.
        truth: what is known about the test series.
    """

    train: Series
    heldout: Series
    test: Series
    truth: Truth = field(default_factory=Truth)

    @classmethod
    def of(cls, drawn: Simulation, config: Config, observables: Callable[[Tensor], Tensor] | None = None) -> Split:
        """The first series of a simulation to learn from, the next held out, the last for the test.

        Args:
            drawn: simulation of ``config.num_series`` series.
            config: numbers of series.
            observables: states (N, T, S) -> values without noise (N, T, D), which a forecast is to meet; None where
                the observed values are.
        """
        a, b = config.train, config.train + config.heldout
        truth = {name: value[b:] for name, value in drawn.truth.items()}
        clean = None if observables is None else observables(drawn.z[b:]).to(drawn.series.values)
        return cls(drawn.series[:a], drawn.series[a:b], drawn.series[b:], Truth(truth, clean))


@dataclass(frozen=True)
class Recipe:
    """One pair of model and system.

    Args:
        title: one line.
        quick: numbers that end in minutes on two cores.
        full: numbers of the published experiment, or near them.
        data: (config, seed) -> Split.
        pair: (split) -> module with ``model`` and ``guide``.
        observed: how many times of a test series the guide sees; the others are forecast.
        unit: unit of the values, for axes.
        range: name of a parameter -> its prior range, by which its error is judged.
        force: for hybrid models, states (M, S) -> what is missing from the known field, (M, K).
        floors: name -> (split, observed) -> what a simple method forecasts at the later times, (N, T - observed, D).
        measure: (fit, split, out) -> metrics of data that are no values at times, in place of the usual ones and of
            the usual figures.
    """

    title: str
    quick: Config
    full: Config
    data: Callable[[Config, int], Split]
    pair: Callable[[Split], nn.Module]
    observed: int
    unit: str = ""
    range: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    force: Callable[[Tensor], Tensor] | None = None
    floors: Mapping[str, Callable[[Split, int], Tensor]] = field(default_factory=dict)
    measure: Callable[[Fit, Split, Path], Mapping[str, float]] | None = None

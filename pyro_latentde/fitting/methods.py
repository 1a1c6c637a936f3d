# SPDX-License-Identifier: Apache-2.0
"""The methods of a fit, by name: a function of :mod:`pyro_latentde.infer`, and the options that it takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro.infer.autoguide import AutoLowRankMultivariateNormal, AutoMultivariateNormal

from pyro_latentde import infer
from pyro_latentde.data import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.posterior import Posterior

__all__ = ["METHODS", "Method", "find_method"]

_DENSE_UP_TO = 100  # unknowns; beyond, a guide's full covariance has more numbers than the data tell of


@dataclass(frozen=True)
class Method:
    """One way from a model and data to draws.

    Args:
        function: name of the function in :mod:`pyro_latentde.infer`.
        options: those of the command line that it takes; what is not given is the function's own default.
        run: ``run(function, model, series, **options)`` gives the posterior.
        checkpoint: name of its checkpoint in the folder of the run: a file, or a folder.
    """

    function: str
    options: tuple[str, ...]
    run: Callable[..., Posterior]
    checkpoint: str

    def fit(
        self, model: Callable, series: Series, out: Path, options: Mapping[str, Any], *, seed: int, progress: bool
    ) -> Posterior:
        """Draw from the posterior; a checkpoint in the folder is gone on from, if the function can.

        Args:
            model: ``model(series)``.
            series: the data.
            out: folder of the run.
            options: those that were given, by name.
            seed: the one seed.
            progress: show the bar.

        Returns:
            The posterior.
        """
        function = getattr(infer, self.function)
        extra = {"checkpoint": out / self.checkpoint} if self.resumes else {}
        return self.run(function, model, series, out, **options, **extra, seed=seed, progress=progress)

    @property
    def resumes(self) -> bool:
        """Whether an interrupted run goes on from its checkpoint."""
        return "checkpoint" in inspect.signature(getattr(infer, self.function)).parameters


def _sample(function: Callable, model: Callable, series: Series, out: Path, **options: Any) -> Posterior:
    return function(model, series, **options)


def _fit_guide(
    function: Callable, model: Callable, series: Series, out: Path, *, num_samples: int = 4000, **options: Any
) -> Posterior:
    """A multivariate normal guide in the unconstrained coordinates, of low rank where they are many."""
    dense = LogJoint(model, (series,), {}).dim <= _DENSE_UP_TO
    guide = AutoMultivariateNormal if dense else AutoLowRankMultivariateNormal
    fit = function(model, guide, series, log=out / "training.csv", **options)
    return fit.posterior(num_samples, seed=options["seed"])


METHODS = {
    "nuts": Method("nuts", ("num_samples", "num_warmup", "num_chains"), _sample, "checkpoint.pt"),
    "ensemble-hmc": Method("ensemble_hmc", ("num_samples", "num_warmup", "num_chains"), _sample, "checkpoint.pt"),
    "svi": Method("fit_svi", ("num_samples", "num_steps"), _fit_guide, "checkpoint"),
}


def find_method(name: str, options: Mapping[str, Any]) -> Method:
    """The method of that name.

    Args:
        name: one of :data:`METHODS`.
        options: those that were given; each must be one that the method takes.

    Returns:
        Method.

    Raises:
        LatentDEError: there is no such method, or it does not take an option.

    Example:
        >>> find_method("svi", {"num_steps": 500}).function
        'fit_svi'
    """
    if name not in METHODS or not hasattr(infer, METHODS[name].function):
        there = [known for known, method in METHODS.items() if hasattr(infer, method.function)]
        raise LatentDEError(f"there is no method {name!r}; there are: {', '.join(there)}")
    method = METHODS[name]
    unknown = [f"--{option.replace('_', '-')}" for option in options if option not in method.options]
    if unknown:
        known = [f"--{option.replace('_', '-')}" for option in method.options]
        raise LatentDEError(f"{name} does not take {', '.join(unknown)}; it takes {', '.join(known)}")
    return method

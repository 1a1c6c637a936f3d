# SPDX-License-Identifier: Apache-2.0
"""A fitted guide: draws, evidence, and its weights in a file."""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn

from pyro_latentde.data.series import Series
from pyro_latentde.infer.svi_evidence import log_mean_exp, log_weights
from pyro_latentde.infer.svi_modules import evaluating
from pyro_latentde.infer.svi_weights import load_weights, save_weights
from pyro_latentde.posterior import Posterior, inspect_model
from pyro_latentde.posterior.model_sites import seeded
from pyro_latentde.posterior.pyro_import import draw_latents, from_guide

__all__ = ["Fit", "quiet"]


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fitted guide.

    Args:
        losses: negative ELBO of each step, ``(num_steps,)``, NaN where the update was skipped.
        n_skipped: number of skipped updates.
        guide: the fitted guide.
        model: the model.
        args: their arguments.
        kwargs: their keyword arguments.
        elapsed: seconds.
        attrs: plain facts about the run.
        params: state of Pyro's parameter store for this fit; other fits and ``pyro.clear_param_store`` do not
            touch it.
        weights: the trained parameters by name, unconstrained.
    """

    losses: Tensor
    n_skipped: int
    guide: Callable
    model: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    elapsed: float
    attrs: Mapping[str, Any]
    params: dict[str, Any] = field(default_factory=lambda: {"params": {}, "constraints": {}})
    weights: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Fit({len(self.losses)} steps, {self.n_skipped} skipped, {self.elapsed:.1f} s)"

    def posterior(self, num_samples: int = 1000, seed: int = 0, memory: str | int = "1GB") -> Posterior:
        """Independent draws from the guide as a :class:`.Posterior` of one chain.

        Args:
            num_samples: number of draws.
            seed: seed of the draws.
            memory: memory budget, such as ``"1GB"``.

        Returns:
            The posterior, with ``attrs["inference"] = "svi"``.
        """
        with evaluating(self.model, self.guide):
            posterior = from_guide(
                self._guide(),
                self._model(),
                self.args,
                self.kwargs,
                num_samples=num_samples,
                seed=seed,
                memory=memory,
            )
        attrs = {**self.attrs, "draw_seed": seed, "final_loss": _last_losses(self.losses)}
        return replace(posterior, attrs=attrs)

    def elbo(self, num_particles: int = 100, seed: int = 0) -> float:
        """Estimate of the evidence lower bound in nats, a mean over ``num_particles`` draws of the guide."""
        with seeded(seed), evaluating(self.model, self.guide), pyro.validation_enabled(False), quiet():
            loss = Trace_ELBO(num_particles=num_particles).loss
            return -float(loss(self._model(), self._guide(), *self.args, **self.kwargs))

    def log_evidence(
        self,
        series: Series,
        num_particles: int = 100,
        *,
        seed: int = 0,
        given: Mapping[str, Tensor] | None = None,
        plate: str = "series",
        rows_at_once: int = 1024,
    ) -> Tensor:
        r"""Importance-weighted bound on the log-evidence of each series,

        .. math:: \log \frac{1}{K} \sum_{k=1}^{K} \frac{p(y_n, z_{kn})}{q(z_{kn} \mid y_n)}, \qquad z_{kn} \sim q,

        which rises on average with K, to the log-evidence itself. Series must be independent of each other: unknowns
        that all of them share need a value, and the evidence is then conditional on it.

        Args:
            series: N series, seen in training or not.
            num_particles: K, draws of the guide for each series.
            seed: seed of the draws.
            given: values of the sites outside the plate of the series.
            plate: name of that plate.
            rows_at_once: rows of one run of the model; particles are rows too. Bounds the memory.

        Returns:
            (N,), in nats.

        Raises:
            LatentDEError: a site outside the plate has no value in `given`.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        with seeded(seed), evaluating(self.model, self.guide), pyro.validation_enabled(False), quiet():
            weights = log_weights(
                self._model(),
                self._guide(),
                series,
                self.args[1:],
                self.kwargs,
                num_particles=num_particles,
                given=given or {},
                plate=plate,
                rows_at_once=rows_at_once,
            )
        return log_mean_exp(weights)

    def save(self, path: str | Path) -> Path:
        """Write the weights for use, without the optimiser: parameters, buffers and plain facts, no pickled code.

        Args:
            path: the file, usually ``*.pt``.

        Returns:
            The path.
        """
        return save_weights(Path(path), self.model, self.guide, self.weights, self.attrs)

    @classmethod
    def load(cls, path: str | Path, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Fit:
        """Read weights into a model and a guide that are made like those that were saved.

        Args:
            path: file of :meth:`save`.
            model: the model; a module gets its weights in place.
            guide: likewise.
            *args: arguments of model and guide. They may be left out for modules whose parameters all exist; methods
                that look at the training data then have none.
            **kwargs: their keyword arguments.

        Returns:
            A fit without losses.

        Raises:
            CheckpointError: damaged, of another kind, or names or shapes of the weights are others.
        """
        with quiet():
            state, weights, attrs = load_weights(Path(path), model, guide, args, kwargs)
        return cls(torch.zeros(0, dtype=torch.float64), 0, guide, model, args, kwargs, 0.0, attrs, state, weights)

    def sample_start(self, num_chains: int, seed: int = 0) -> dict[str, Tensor]:
        """Starting points for chains: site -> ``(num_chains, *site shape)`` in the constrained space."""
        sites = inspect_model(self._model(), *self.args, **self.kwargs)
        return draw_latents(self._guide(), sites, self.args, self.kwargs, num_samples=num_chains, seed=seed)

    def _guide(self) -> Callable:
        return _with_params(self.guide, self.params)

    def _model(self) -> Callable:
        """The model with its fitted parameters, or the model itself if it has none."""
        model = _with_params(self.model, self.params)
        if isinstance(self.model, nn.Module) and any(True for _ in self.model.parameters()):
            return model
        if not self.params["params"]:
            return self.model
        with seeded(0), torch.no_grad(), pyro.validation_enabled(False):
            found = poutine.trace(model, param_only=True).get_trace(*self.args, **self.kwargs)
        return model if any(name in self.params["params"] for name in found.nodes) else self.model


def _with_params(fn: Callable, state: dict[str, Any]) -> Callable:
    """The function run with its own parameters in Pyro's store, whatever else is in it."""
    if not state["params"] and not isinstance(fn, nn.Module):
        return fn

    @functools.wraps(fn, updated=())
    def with_params(*args: Any, **kwargs: Any) -> Any:
        # A copy of the dictionaries: the run must not add to what was fitted.
        with pyro.get_param_store().scope({name: dict(value) for name, value in state.items()}):
            return fn(*args, **kwargs)

    return with_params


def _last_losses(losses: Tensor) -> float:
    good = losses[~losses.isnan()]
    return float(good[-max(1, len(good) // 10) :].mean()) if len(good) else math.nan


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Pyro warns of each non-finite loss; here they are counted instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        yield

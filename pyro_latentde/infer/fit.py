# SPDX-License-Identifier: Apache-2.0
"""A fitted guide: draws, evidence, and its weights in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.infer.forecast import Forecast, draw_encoding, draw_forecast, draw_prior
from pyro_latentde.infer.handover import hand_over, held_values
from pyro_latentde.infer.pair import Pair
from pyro_latentde.infer.parameters import constant, fitted, with_params
from pyro_latentde.infer.pareto import pareto_shape
from pyro_latentde.infer.svi_evidence import log_mean_exp, log_weights
from pyro_latentde.infer.svi_modules import evaluating, quiet, reading
from pyro_latentde.infer.svi_weights import load_weights, save_weights
from pyro_latentde.posterior import Posterior, inspect_model
from pyro_latentde.posterior.model_sites import seeded
from pyro_latentde.posterior.pyro_import import draw_latents, from_guide

__all__ = ["Fit"]


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
        with evaluating(self.model, self.guide), reading(self.guide, *self.args[:1]):
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
        # what the guide has learned is the posterior of the fit's solver, whatever is set around this call
        return replace(posterior, sites=posterior.sites.solved_with(attrs.get("solver", {})), attrs=attrs)

    def elbo(self, num_particles: int = 100, seed: int = 0) -> float:
        """Estimate of the evidence lower bound in nats, a mean over ``num_particles`` draws of the guide."""
        with seeded(seed), self._ready(*self.args[:1]):
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
            (N,), in nats. A draw whose solve failed has weight zero; NaN for a series all of whose draws failed.

        Raises:
            LatentDEError: a site outside the plate has no value in `given`.

        References:
            Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
        """
        options = {"seed": seed, "given": given, "plate": plate, "rows_at_once": rows_at_once}
        return log_mean_exp(self._log_weights(series, num_particles, hold=False, **options))

    def inference_gap(self, series: Series, num_samples: int = 1000, **options: Any) -> Tensor:
        r"""How far the guide's ELBO of each series is below its log-evidence, in nats,

        .. math:: \log p(y_n) - \mathrm{ELBO}_n = \mathrm{KL}\left[ q(z \mid y_n) \,\|\, p(z \mid y_n) \right]
                  \approx \log \frac{1}{K} \sum_k w_{kn} - \frac{1}{K} \sum_k \log w_{kn}.

        It is the sum of the approximation gap (no member of the guide's family is the posterior) and the amortization
        gap (the encoder does not find the best member for this series), which it does not tell apart. The estimate is
        too low on average, and far too low where :meth:`pareto_k` is above .7: the best weights have not been drawn.

        Args:
            series: N series, seen in training or not.
            num_samples: K, draws of the guide for each series.
            options: as for :meth:`pareto_k`.

        Returns:
            (N,), at least 0; infinite where the solve of a draw failed.

        References:
            Cremer, Li and Duvenaud, "Inference suboptimality in variational autoencoders", ICML 2018.
        """
        weights = self._log_weights(series, num_samples, **options)
        return log_mean_exp(weights) - weights.mean(0)

    def pareto_k(self, series: Series, num_samples: int = 1000, **options: Any) -> Tensor:
        r"""How well the guide serves as a proposal for the posterior of each series: the shape k of the tail of its
        importance weights :math:`p(y_n, z) / q(z \mid y_n)`.

        Below .5 the weights have a finite variance. Up to :math:`\min(1 - 1/\log_{10} K, .7)` the guide can be mended
        by weighting its draws; above, it has missed a part of the posterior: use :meth:`nuts`. A small k is no
        proof: draws of the guide tell nothing of modes that it never visits.

        Args:
            series: N series, seen in training or not.
            num_samples: K, draws of the guide for each series, at least 25.
            options: ``given``, ``plate`` and ``seed`` as for :meth:`nuts`, ``rows_at_once`` as for
                :meth:`log_evidence`.

        Returns:
            (N,) in float64; see :func:`.pareto_shape` for 0 and infinity.

        References:
            Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance sampling", JMLR 25 (2024).
            Yao, Vehtari, Simpson and Gelman, "Yes, but did it work?: evaluating variational inference", ICML 2018.
        """
        return pareto_shape(self._log_weights(series, num_samples, **options))

    def nuts(
        self,
        series: Series,
        *,
        num_samples: int = 1000,
        num_warmup: int = 300,
        num_chains: int = 4,
        seed: int = 0,
        given: Mapping[str, Any] | None = None,
        plate: str = "series",
        **options: Any,
    ) -> Posterior:
        """The posterior of the latent sites of one series, or of a few, by NUTS; what the model has learned is held.

        Chains start at draws of the guide, and their metric at its covariance in unconstrained coordinates, which is
        why they need little warm-up. The model is a copy with constant parameters. For sites that all series share,
        ``infer.nuts(model, series, start=fit)`` samples everything together.

        Args:
            series: N series, seen in training or not, whole ones; their posteriors are independent of each other.
            num_samples: draws of each chain.
            num_warmup: iterations before.
            num_chains: number of chains.
            seed: the one seed.
            given: values of sites outside the plate of the series, such as sampled weights; those left out are held
                at the guide's median. ``attrs["held"]`` of the result tells which is which.
            plate: name of that plate.
            options: of :func:`.nuts`.

        Returns:
            Posterior with samples (chain, draw, N, ...) of the sites in the plate.

        Raises:
            LatentDEError: more coordinates than one run takes, or sites that do not fit.
        """
        pair = replace(self._pair(), model=constant(self.model, self.params))
        with self._ready(series):
            begin = hand_over(pair, series, given=given or {}, plate=plate, seed=seed)
        return begin.sample(num_samples=num_samples, num_warmup=num_warmup, num_chains=num_chains, seed=seed, **options)

    def encode(self, series: Series, num_samples: int = 100, *, seed: int = 0) -> dict[str, Tensor]:
        """Draws of what the guide says about series, seen in training or not.

        Args:
            series: N series.
            num_samples: S, number of draws.
            seed: seed of the draws.

        Returns:
            Name -> (S, N, ...) of the latent sites, and of what the model computes of them under a name; sites that
            all series share are (S, ...). Results are where the series are, whatever device the model is on. The model
            is called as in :meth:`forecast`.
        """
        with self._ready(series):
            return draw_encoding(self._pair(), series, num_samples, seed)

    def reconstruct(self, series: Series, num_samples: int = 20, **options: Any) -> Forecast:
        """What the model makes of series at their own times; options as in :meth:`forecast`."""
        return self.forecast(series, series.times, num_samples, **options)

    def forecast(
        self,
        series: Series,
        horizon: int | Tensor,
        num_samples: int = 20,
        *,
        do: Mapping[str, Any] | None = None,
        noise: bool = True,
        seed: int = 0,
        memory: str | int = "1GB",
    ) -> Forecast:
        """Trajectories and observations at other times, given series.

        The model is called as ``model(series, *args, times=times, **kwargs)``, with the further arguments of the fit;
        with ``times`` it solves and observes there, and scores nothing.

        Args:
            series: N series that the guide reads.
            horizon: how many more times at the last gap of each series; or times, inside or after, (T',) or (N, T').
            num_samples: S, number of draws.
            do: name of a site -> value that it is set to, whatever the guide says, such as ``{"length": 1.5}``.
            noise: draw observations too, not their expected values only.
            seed: seed of the draws.
            memory: bound on the size of the result.

        Returns:
            The draws, with scores against what came true; where the series are, whatever device the model is on. What
            failed is told by a warning, see :class:`.Forecast`.

        Raises:
            LatentDEError: more than the memory; a model that takes no ``times``, or is without one ``lde.observe``
                site; an intervention on a site that is not there.
            DataError: a number of times after series of one time.
        """
        options = {"num_samples": num_samples, "noise": noise, "do": do, "seed": seed, "memory": memory}
        with self._ready(series):
            return draw_forecast(self._pair(), series, horizon, **options)

    def sample(
        self,
        times: Any,
        num_series: int = 1,
        *,
        noise: bool = True,
        seed: int = 0,
        memory: str | int = "1GB",
        plate: str = "series",
    ) -> Forecast:
        """New series from the fitted model, of which nothing is observed.

        What each series has for itself is drawn from the prior; what all share, such as sampled weights, once from the
        guide, at the data it was fitted to. The model is called as in :meth:`forecast`.

        Args:
            times: (T,), times of each series.
            num_series: N.
            noise: draw observations too, not their expected values only.
            seed: seed of the draws.
            memory: bound on the size of the result.
            plate: name of the plate of series.

        Returns:
            One draw of each series: ``means`` (1, N, T, D); ``latents`` has the sites that all share.

        Raises:
            LatentDEError: sites that all series share, and a fit that was loaded without its data.
        """
        times = torch.as_tensor(times)
        series = Series.at_times(times.to(next(iter(self.weights.values()), times)).expand(num_series, -1))
        with self._ready():
            data = self.args[0] if self.args else None
            return draw_prior(self._pair(), series, data, plate=plate, noise=noise, seed=seed, memory=memory)

    def _log_weights(
        self,
        series: Series,
        num_particles: int,
        hold: bool = True,
        *,
        seed: int = 0,
        given: Mapping[str, Any] | None = None,
        plate: str = "series",
        rows_at_once: int = 1024,
    ) -> Tensor:
        """Log-weights (K, N); with ``hold``, sites outside the plate that are not given are held as for NUTS."""
        pair, options = self._pair(), {"given": given or {}, "plate": plate}
        with seeded(seed), self._ready(series):
            if hold:
                options["given"] = held_values(pair, series, seed=seed, **options)
            return log_weights(pair, series, num_particles=num_particles, rows_at_once=rows_at_once, **options)

    def _pair(self) -> Pair:
        return Pair(self._model(), self._guide(), self.args[1:], self.kwargs, self._device)

    @property
    def _device(self) -> torch.device | None:
        """Where the weights are, if there are some."""
        return next((weight.device for weight in self.weights.values()), None)

    @contextmanager
    def _ready(self, series: Any = None) -> Iterator[None]:
        """For use: no gradients, no dropout; what the guide draws inside is for these series."""
        series = series.to(device=self._device) if isinstance(series, Series) else None
        with evaluating(self.model, self.guide), pyro.validation_enabled(False), quiet(), reading(self.guide, series):
            yield

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
        return with_params(self.guide, self.params)

    def _model(self) -> Callable:
        return fitted(self.model, self.params, self.args, self.kwargs)


def _last_losses(losses: Tensor) -> float:
    good = losses[~losses.isnan()]
    return float(good[-max(1, len(good) // 10) :].mean()) if len(good) else math.nan

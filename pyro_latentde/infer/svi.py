# SPDX-License-Identifier: Apache-2.0
"""Stochastic variational inference: fit a guide to a model, and draw from it."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import ELBO, Trace_ELBO
from torch import Tensor

from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.svi_start import check_shapes, place_guide
from pyro_latentde.infer.svi_steps import Clip, Stepper, make_optimizer
from pyro_latentde.posterior import Posterior, inspect_model
from pyro_latentde.posterior.model_sites import seeded
from pyro_latentde.posterior.pyro_import import draw_latents, from_guide

__all__ = ["Fit", "fit_svi"]


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
        posterior = from_guide(
            _with_params(self.guide, self.params),
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
        with seeded(seed), torch.no_grad(), pyro.validation_enabled(False), _quiet():
            loss = Trace_ELBO(num_particles=num_particles).loss
            guide = _with_params(self.guide, self.params)
            return -float(loss(self._model(), guide, *self.args, **self.kwargs))

    def sample_start(self, num_chains: int, seed: int = 0) -> dict[str, Tensor]:
        """Starting points for chains: site -> ``(num_chains, *site shape)`` in the constrained space."""
        sites = inspect_model(self._model(), *self.args, **self.kwargs)
        guide = _with_params(self.guide, self.params)
        return draw_latents(guide, sites, self.args, self.kwargs, num_samples=num_chains, seed=seed)

    def _model(self) -> Callable:
        """The model with its fitted parameters, or the model itself if it has none."""
        model = _with_params(self.model, self.params)
        with seeded(0), torch.no_grad(), pyro.validation_enabled(False):
            found = poutine.trace(model, param_only=True).get_trace(*self.args, **self.kwargs)
        return model if any(name in self.params["params"] for name in found.nodes) else self.model


def fit_svi(
    model: Callable,
    guide: Any,
    *args: Any,
    num_steps: int = 2000,
    seed: int = 0,
    optimizer: Any = "adam",
    learning_rate: float = 0.03,
    decay: float = 0.01,
    clip: float | str | None = "auto",
    num_particles: int = 1,
    vectorize_particles: bool = False,
    elbo: ELBO | None = None,
    max_skips: int = 20,
    start_at: Any = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> Fit:
    r"""Fit a guide by maximising the evidence lower bound

    .. math:: \mathrm{ELBO}(\phi) = E_{q_\phi(\theta)}[\log p(y, \theta) - \log q_\phi(\theta)].

    Shapes are checked once. Then a step whose loss or gradient is not finite, as after a failed solve,
    leaves the parameters and the optimiser as they are and is counted.

    Args:
        model: Pyro model.
        guide: an AutoGuide, a PyroModule or a function, or a class of AutoGuide, which is made for the model.
        *args: arguments of the model and the guide, data included.
        num_steps: number of updates.
        seed: seed of everything random.
        optimizer: name, class or factory of a torch optimiser, or one of ``pyro.optim``.
        learning_rate: its rate at the start, for names and classes.
        decay: in the second half the rate falls exponentially to this fraction of itself.
        clip: bound on the gradient's norm; "auto" is ten times the median of the last hundred; None is none.
        num_particles: draws of the guide for each step.
        vectorize_particles: all particles in one run of the model, by a batch dimension on the left, which
            the model must allow. Eight particles then cost little more than one where solves are batched, and
            guides with correlations need them.
        elbo: Pyro's loss, instead of ``Trace_ELBO``; brings its own particles.
        max_skips: so many skipped updates one after another end the run.
        start_at: where an AutoGuide that was given no start of its own begins: ``"auto"`` is the best of some
            climbs from prior draws, since posteriors of differential equations have worthless modes beside
            the good one; a dictionary of site values; or None, for what Pyro does.
        progress: show a bar.
        **kwargs: keyword arguments of the model and the guide.

    Returns:
        The fit. Ctrl-C returns the fit so far, with ``attrs["interrupted"]``.

    Raises:
        InitError: no step at all was finite.
        LatentDEError: ``max_skips`` in a row; the parameters are put back to where they were last finite,
            and the fit so far is the error's attribute ``fit``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("data", len(y)):
        ...         pyro.sample("y", dist.Normal(mu, 1.0), obs=y)
        >>> fit = fit_svi(model, AutoNormal, torch.ones(9), num_steps=500, progress=False)
        >>> round(fit.posterior(1000)["mu"].mean().item(), 1)  # exactly 9 / (9 + 1)
        0.9
    """
    start, losses = time.perf_counter(), []
    attrs: dict[str, Any] = {"inference": "svi", "seed": seed, "num_steps": num_steps}
    state: dict[str, Any] = {"params": {}, "constraints": {}}
    with seeded(seed), pyro.get_param_store().scope(state), _quiet():
        sites = inspect_model(model, *args, **kwargs)
        if elbo is None:
            nesting = max((-plate.dim for site in sites.values() for plate in site.plates), default=0)
            # The particles are a plate of their own, to the left of all others.
            vectorize = vectorize_particles and num_particles > 1
            elbo = Trace_ELBO(num_particles, nesting + vectorize, vectorize_particles=vectorize)
        guide = place_guide(guide, model, args, kwargs, seed, start_at)
        with pyro.validation_enabled(False):
            check_shapes(elbo, model, guide, args, kwargs)
            make = make_optimizer(optimizer, learning_rate)
            stepper = Stepper(elbo, model, guide, args, kwargs, make, Clip(clip))
            trouble = _run(stepper, losses, num_steps, decay, max_skips, progress, attrs)
    result = torch.tensor(losses, dtype=torch.float64)
    skipped = int(result.isnan().sum())
    elapsed = time.perf_counter() - start
    attrs.update(n_skipped=skipped, sampling_time=elapsed)
    fit = Fit(result, skipped, guide, model, args, kwargs, elapsed, attrs, state)
    if trouble is not None:
        trouble.fit = fit
        raise trouble
    return fit


def _run(
    stepper: Stepper,
    losses: list[float],
    num_steps: int,
    decay: float,
    max_skips: int,
    progress: bool,
    attrs: dict[str, Any],
) -> LatentDEError | None:
    """The loop; what went wrong, if it had to stop."""
    recent: deque[bool] = deque(maxlen=50)
    in_a_row, smooth = 0, math.nan
    with StopSignal() as stop, Progress(num_steps, "SVI", progress) as bar:
        for step in range(num_steps):
            loss, norm = stepper.loss_and_gradient()
            good = math.isfinite(loss) and math.isfinite(norm)
            recent.append(not good)
            losses.append(loss if good else math.nan)
            if good:
                stepper.update(norm, _rate(step, num_steps, decay))
                in_a_row = 0
                smooth = loss if math.isnan(smooth) else 0.95 * smooth + 0.05 * loss
            else:
                in_a_row += 1
                if in_a_row == max_skips:
                    return _trouble(stepper, losses, recent, max_skips)
            if bar.due() or (progress and step + 1 == num_steps):
                bar.update(step + 1, {"loss": f"{smooth:.4g}", "skipped": sum(math.isnan(x) for x in losses)})
            if stop.wanted:
                attrs["interrupted"] = step + 1
                break
    return None


def _rate(step: int, num_steps: int, decay: float) -> float:
    """Full learning rate for the first half, to get there; then an exponential fall, against the noise."""
    return decay ** max(0.0, 2.0 * step / max(1, num_steps) - 1.0)


def _trouble(stepper: Stepper, losses: list[float], recent: deque[bool], max_skips: int) -> LatentDEError:
    cause, step = stepper.culprit(), len(losses) - 1
    stepper.restore()
    if len(losses) == max_skips:
        return InitError(
            f"none of the first {max_skips} steps had a finite loss and gradient: {cause}. "
            "Try: an AutoGuide with init_loc_fn=init_to_median or init_to_value(...), a smaller init_scale, "
            "or priors that keep out the values for which the model fails."
        )
    last = max(i for i, loss in enumerate(losses) if not math.isnan(loss))
    return LatentDEError(
        f"step {step}: {cause}. Skipped ({sum(recent)} of last {len(recent)}). "
        f"Stopping: {max_skips} skips in a row; restored step {last}. "
        "Try: a smaller learning_rate, clip=1.0, or more particles; missing data belong in a mask."
    )


def _with_params(fn: Callable, state: dict[str, Any]) -> Callable:
    """The function run with its own parameters in Pyro's store, whatever else is in it."""
    if not state["params"]:
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
def _quiet() -> Iterator[None]:
    """Pyro warns of each non-finite loss; here they are counted instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Encountered")
        yield

# SPDX-License-Identifier: Apache-2.0
"""Posterior draws of a Pyro model by stochastic-gradient MCMC: `sgld`, `psgld` and `sghmc`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.sgmcmc_driver import RunSettings, diagonal_metric, draw
from pyro_latentde.infer.sgmcmc_kernels import Hamiltonian, Langevin, PreconditionedLangevin
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["psgld", "sghmc", "sgld"]


def sgld(
    model: Callable,
    *args: Any,
    step_size: float | None = None,
    schedule: str | Callable[[int], float] = "constant",
    metric: Any = None,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    batch_size: int | None = None,
    thinning: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    start: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Draw from the posterior of a Pyro model by stochastic-gradient Langevin dynamics

    .. math:: u' = u + \frac{\epsilon}{2} G \hat{\nabla \ell}(u) + \sqrt{\epsilon T G} \, \xi

    in unconstrained coordinates u, with the gradient of all data or of a minibatch of series in each step. It is for
    models too large for ``infer.nuts``. There is no acceptance step: the law of the draws is off by
    :math:`O(\epsilon)`. So it is by the noise of the minibatches, which is measured at the end: it widens a coordinate
    by up to ``attrs["minibatch_heat"]`` of its variance (less where chains move little in an epoch, in which errors of
    minibatches cancel), and a warning says so from a tenth on.

    All chains advance together in one batched log-joint, with the same minibatch and noise of their own: each chain is
    the one that it would be alone. A step to a place where a solve fails, or the density is no number, is undone and
    counted, and the chain goes on. Ctrl-C and SIGTERM return what was drawn so far.

    Args:
        model: Pyro model with continuous latent sites.
        *args: its arguments; for minibatches a `Series` first, whose likelihood is in ``lde.series_plate``.
        step_size: epsilon, in squared units of the unconstrained coordinates (times 1 / `metric`): well below the
            posterior variances. At four times the smallest it is unstable.
        schedule: ``"constant"``, ``"polynomial"``, ``"cyclical"``, or a function of the step (0, 1, ..., warm-up
            included) that replaces `step_size`; see ``sgmcmc_schedules``. With falling steps draws are kept at equal
            increments of the sum of the step sizes, so that plain averages are the weighted ones.
        metric: G, variances ``(d,)`` of the unconstrained coordinates known from elsewhere; by default 1.
        num_samples: draws of each chain that are kept.
        num_warmup: steps before.
        num_chains: number of chains.
        batch_size: series in a minibatch; None is all data at each step.
        thinning: steps for each draw that is kept.
        temperature: T; the draws are from the density to the power 1 / T, in unconstrained coordinates.
        seed: the one seed; chain ``i`` is given the same random numbers whatever `num_chains` is.
        start: as of ``infer.nuts``.
        checkpoint: file that is written now and then, and gone on from when it exists: bit for bit on the same
            machine with as many threads. With the constant schedule, more ``num_samples`` than it holds draw the rest;
            where steps fall, each depends on how many there are, and only the same run goes on.
        checkpoint_minutes: least time between two writings.
        progress: show a bar on terminals, a line every half minute elsewhere.
        **kwargs: keyword arguments of the model.

    Returns:
        ``Posterior`` with samples ``(chain, draw, *site shape)`` and the statistics ``lp`` (of the unconstrained
        coordinates; with minibatches an estimate from one of them, and ``attrs["lp_is_estimate"]`` says so),
        ``step_size``, and, since the draw before, ``n_steps`` (gradients), ``diverging`` (a step was undone),
        ``ode_failed`` (failed solves) and ``ode_steps`` (solver steps), each ``(chain, draw)``. ``attrs["metric"]`` is
        G where it is not 1.

    Raises:
        ShapeError, DataError, LatentDEError: the model or the settings cannot be used, and why.
        InitError: no start with a finite log-density and gradient.
        LatentDEError: interrupted before the first draw.
        CheckpointError: the checkpoint is of another run, or damaged; it is left alone.

    References:
        Welling & Teh (2011), Bayesian learning via stochastic gradient Langevin dynamics, ICML.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model(series):
        ...     rate = pyro.sample("rate", dist.Normal(torch.tensor(0.0).double(), 1.0))
        ...     with lde.series_plate(series):
        ...         lde.observe("obs", dist.Normal(rate * series.times[..., None], 1.0), series)
        >>> series = lde.Series.from_tensors(torch.arange(4.0), torch.ones(6, 4, 1))
        >>> posterior = sgld(model, series, step_size=1e-3, batch_size=3, num_samples=50, num_warmup=50, progress=False)
        >>> posterior
        Posterior(sgld, 4 chains x 50 draws: rate)
    """
    settings = RunSettings(
        "sgld", step_size, schedule, num_samples, num_warmup, num_chains, batch_size, thinning, temperature, seed,
        start, checkpoint, checkpoint_minutes, progress,
    )  # fmt: skip
    return draw(settings, lambda dim: Langevin(temperature, diagonal_metric(metric, dim)), model, args, kwargs)


def psgld(
    model: Callable,
    *args: Any,
    step_size: float | None = None,
    schedule: str | Callable[[int], float] = "constant",
    decay: float = 0.99,
    regularization: float = 1e-5,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    batch_size: int | None = None,
    thinning: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    start: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Draw from the posterior of a Pyro model by Langevin dynamics in the metric of RMSprop

    .. math:: u' = u + \frac{\epsilon}{2} G \hat{\nabla \ell}(u) + \sqrt{\epsilon T G} \, \xi, \quad
        G = 1 / (\lambda + \sqrt V)

    with V a running mean of the squared gradients. Warm-up learns G, without the drift of a changing metric; then it
    is held, so that the draws are those of `sgld` with ``metric=G``. All else is as in `sgld`.

    Args:
        model: as of `sgld`.
        *args: as of `sgld`.
        step_size: epsilon, in units of the unconstrained coordinates: near the posterior G is at most about their
            posterior sd, so well below the sd.
        decay: weight of the past in V, in (0, 1).
        regularization: lambda, in units of the gradient.
        num_warmup: steps before, at least one.
        num_chains: number of chains; they learn one metric together.
        schedule: as of `sgld`.
        num_samples: as of `sgld`.
        batch_size: as of `sgld`.
        thinning: as of `sgld`.
        temperature: as of `sgld`.
        seed: as of `sgld`.
        start: as of `sgld`.
        checkpoint: as of `sgld`.
        checkpoint_minutes: as of `sgld`.
        progress: as of `sgld`.
        **kwargs: as of `sgld`.

    Returns:
        ``Posterior`` as of `sgld`.

    Raises:
        LatentDEError: no warm-up, and all that `sgld` raises.

    References:
        Li et al. (2016), Preconditioned stochastic gradient Langevin dynamics for deep neural networks, AAAI.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(torch.zeros(2), torch.tensor([0.1, 10.0])).to_event(1))
        >>> psgld(model, step_size=0.02, num_samples=50, num_warmup=50, progress=False)["x"].shape
        torch.Size([4, 50, 2])
    """
    settings = RunSettings(
        "psgld", step_size, schedule, num_samples, num_warmup, num_chains, batch_size, thinning, temperature, seed,
        start, checkpoint, checkpoint_minutes, progress,
    )  # fmt: skip
    if num_warmup < 1:
        raise LatentDEError("psgld: the metric is learned in warm-up; num_warmup must be at least 1.")
    kernel = PreconditionedLangevin(temperature, decay, regularization)
    return draw(settings, lambda dim: kernel, model, args, kwargs)


def sghmc(
    model: Callable,
    *args: Any,
    step_size: float | None = None,
    schedule: str | Callable[[int], float] = "constant",
    metric: Any = None,
    friction: float = 0.1,
    gradient_variance: Any = 0.0,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    batch_size: int | None = None,
    thinning: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
    start: Any = None,
    checkpoint: str | Path | None = None,
    checkpoint_minutes: float = 5.0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Draw from the posterior of a Pyro model by stochastic-gradient Hamiltonian Monte Carlo with friction

    .. math:: du = G^{1/2} r \, dt, \qquad
        dr = G^{1/2} \hat{\nabla \ell}(u) \, dt - \gamma r \, dt + \sqrt{2 (\gamma T - \hat B)} \, dW

    in time steps :math:`h = \sqrt\epsilon`, of which each takes the part :math:`\alpha = 1 - e^{-\gamma h}` of the
    momenta. Momenta carry a chain through noisy gradients, so it needs fewer steps than `sgld`. The step is
    symmetric (BAOAB): the law of the draws is off by :math:`O(h^2) = O(\epsilon)`, and with all data not at all on a
    Gaussian. All else is as in `sgld`.

    Args:
        model: as of `sgld`.
        *args: as of `sgld`.
        step_size: epsilon = h^2, in the same units as that of `sgld`.
        metric: G, the inverse of the masses, as of `sgld`.
        friction: alpha, in (0, 1]; at 1 nothing is left of the momenta.
        gradient_variance: variance of the minibatch gradient, ``(d,)`` or one number, from which the estimate B of its
            noise is made that friction's noise leaves out; 0 leaves out nothing. Right where minibatches differ from
            step to step independently; ours cancel within an epoch, so it cools where chains move little in one.
        schedule: as of `sgld`.
        num_samples: as of `sgld`.
        num_warmup: as of `sgld`.
        num_chains: as of `sgld`.
        batch_size: as of `sgld`.
        thinning: as of `sgld`.
        temperature: as of `sgld`.
        seed: as of `sgld`.
        start: as of `sgld`.
        checkpoint: as of `sgld`.
        checkpoint_minutes: as of `sgld`.
        progress: as of `sgld`.
        **kwargs: as of `sgld`.

    Returns:
        ``Posterior`` as of `sgld`.

    Raises:
        LatentDEError: minibatches bring more noise than friction takes out, and all that `sgld` raises.

    References:
        Chen, Fox & Guestrin (2014), Stochastic gradient Hamiltonian Monte Carlo, ICML.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        >>> sghmc(model, step_size=0.1, num_samples=50, num_warmup=50, progress=False)["x"].shape
        torch.Size([4, 50, 2])
    """
    settings = RunSettings(
        "sghmc", step_size, schedule, num_samples, num_warmup, num_chains, batch_size, thinning, temperature, seed,
        start, checkpoint, checkpoint_minutes, progress,
    )  # fmt: skip

    variance = torch.as_tensor(gradient_variance, dtype=torch.float64).detach().cpu().numpy()

    def make_kernel(dim: int) -> Hamiltonian:
        if variance.shape not in ((), (dim,)):
            raise ShapeError(f"gradient_variance: expected one number or ({dim},), got shape {variance.shape}.")
        return Hamiltonian(temperature, diagonal_metric(metric, dim), friction, variance)

    return draw(settings, make_kernel, model, args, kwargs)

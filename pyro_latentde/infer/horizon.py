# SPDX-License-Identifier: Apache-2.0
"""Posterior draws by particles that see one observation after the other, until they see them all."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.errors import DataError, InitError, LatentDEError
from pyro_latentde.infer.adaptation import Metric
from pyro_latentde.infer.batched_log_joint import BatchedLogJoint
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings
from pyro_latentde.infer.ensemble_kernel import Density
from pyro_latentde.infer.ensemble_run import advance, check_settings, density_of, facts_of, summarise, to_posterior
from pyro_latentde.infer.growth import grow, is_part
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import DENSE_UP_TO
from pyro_latentde.infer.particles import White, bridge, move, without_data
from pyro_latentde.infer.progress import Progress
from pyro_latentde.infer.run_file import RunFile
from pyro_latentde.infer.start_failures import explain_failure
from pyro_latentde.infer.stop_signal import StopSignal
from pyro_latentde.infer.warn_once import WarnOnce
from pyro_latentde.posterior.model_sites import inspect_model
from pyro_latentde.posterior.posterior import Posterior
from pyro_latentde.posterior.pyro_import import draw_latents

__all__ = ["default_horizons", "lengthen", "until"]

MOVES_AT_START = 4  # times as many as later, of particles that come from another form of the model
ROUNDS = 20  # of draws from the prior, until enough of them can be solved


@WarnOnce()
def lengthen(
    model: Callable,
    series: Series,
    *args: Any,
    horizons: Sequence[float] | Tensor | None = None,
    start: Mapping[str, Tensor] | None = None,
    num_particles: int = 256,
    num_moves: int = 5,
    num_samples: int = 200,
    num_warmup: int = 200,
    num_chains: int = 64,
    seed: int = 0,
    target_accept: float = 0.9,
    max_num_steps: int = 1000,
    dense_mass: bool | None = None,
    log_joint_engine: str = "auto",
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    r"""Draw from the posterior of a dynamical system by lengthening its horizon: one observation after the other.

    .. math:: p(\theta) \to p(\theta \mid y_{t \le h_1}) \to p(\theta \mid y_{t \le h_2}) \to \dots \to p(\theta \mid y)

    The longer the series of an oscillating or chaotic system, the more modes its posterior has, and the narrower they
    are: no sampler finds the right one from afar. The first few observations still leave one broad mode, or a few
    that particles drawn from the prior all reach. Each further horizon reweights the particles by what its
    observations say of them, resamples them, and moves them by Hamiltonian trajectories; where one observation says
    more than half of the particles can bear, it is given to them in parts, as a power of its likelihood. So modes lose
    their particles as soon as the data speak against them. At the full horizon ensemble HMC starts from the particles,
    in coordinates in which they are white.

    Latent sites may grow with the horizon, as the starts of `models.Shooting` do, or a noise at each time: what a
    longer series has in addition is drawn from the prior, given what the particle has already.

    Chaos sets a limit. A start whose paths part by e^5 lies on a sheet ten thousand times wider than thick, but bent
    little; from about e^7 on the sheet is bent by many times its thickness and no trajectory follows it. Divergences
    and R-hat tell. Beyond that take segments, `models.Shooting`, and go on from a ``start``: `models.systems.lorenz`
    shows how.

    Args:
        model: Pyro model, ``model(series, *args, **kwargs)``, whose latent sites are the same for a shorter series, or
            shorter.
        series: the observations.
        *args: further arguments of the model.
        horizons: times h_1 < h_2 < ..., in the unit of the series; the full one is added. By default each time at
            which something was observed.
        start: draws (N, *site shape) of the latent sites of the series up to the first horizon, from a fit of that much
            in whatever form: they are the particles, moved a while before they go on. By default the prior's.
        num_particles: number of particles; more find more of the modes.
        num_moves: trajectories of each particle after a resampling.
        num_samples: draws of each chain that are kept, at the full horizon.
        num_warmup: iterations before.
        num_chains: number of chains, at least 4.
        seed: the one seed.
        target_accept: mean acceptance probability aimed at, in (0, 1); above the usual 0.8, for what is narrow here is
            often bent.
        max_num_steps: most leapfrog steps of a trajectory.
        dense_mass: covariances (True) or variances (False) of the particles; None: covariances up to 64 coordinates.
        log_joint_engine: ``"auto"``, ``"eager"``, ``"traced"`` or ``"compiled"``; see ``batched_log_joint``.
        progress: show a bar on terminals, a line every half minute elsewhere.
        **kwargs: keyword arguments of the model.

    Returns:
        ``Posterior`` as of `ensemble_hmc`. In its ``attrs``, ``"steps"`` lists each reweighting, a dictionary of
        ``horizon``, ``temperature`` (share of its observations in the density, in (0, 1]), ``effective`` (sample size),
        ``log_ratio`` and ``accept``; ``"log_evidence"`` is their sum, an estimate of log p(y), or NaN
        with a ``start``.

    Raises:
        DataError: a series without values, or horizons that do not increase, or not within the observed times.
        InitError: too few draws of the prior can be solved up to the first horizon.
        LatentDEError: the latent sites of a shorter series are no part of those of the whole, or supports depend on
            values; no particle can explain the next observation.

    References:
        Chopin (2002), A sequential particle filter method for static models, Biometrika 89.
        Del Moral, Doucet, Jasra (2006), Sequential Monte Carlo samplers, JRSS B 68.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> import pyro_latentde as lde
        >>> series = lde.Series.from_tensors([0.0, 1.0, 2.0], [1.1, 1.9, 3.2])
        >>> def model(series):
        ...     slope = pyro.sample("slope", dist.Normal(torch.tensor(0.0).double(), 3.0))
        ...     lde.observe("obs", lambda z: dist.Normal(z, 0.2), series, 1 + slope * series.times[..., None])
        >>> few = {"num_particles": 64, "num_moves": 3, "num_chains": 16, "num_samples": 30, "num_warmup": 30}
        >>> posterior = lengthen(model, series, progress=False, **few)
        >>> posterior.samples["slope"].shape, [step["horizon"] for step in posterior.attrs["steps"]][-1]
        (torch.Size([16, 30]), 2.0)
    """
    check_settings(num_samples, num_warmup, num_chains, target_accept, max_num_steps)
    _check_sizes(num_particles, num_moves)
    if start is not None and horizons is None:
        raise LatentDEError("lengthen: start needs horizons; the first of them is how far the data of start went.")
    times = default_horizons(series) if horizons is None else _checked(horizons, series)
    began = time.perf_counter()
    dim = LogJoint(model, (series, *args), kwargs).dim
    dense = dim <= DENSE_UP_TO if dense_mass is None else dense_mass
    settings = EnsembleSettings(num_warmup, num_samples, target_accept, dense, max_num_steps, seed)
    run = _Lengthening(model, series, args, kwargs, settings, log_joint_engine)
    with Progress(len(times) + 1, "lengthen", progress) as bar:
        if start is None:
            u = run.begin(times[0], num_particles)
        else:
            u, times = run.begin_at(times[0], start, num_particles, num_moves), times[1:]
        for i, horizon in enumerate(times):
            u = run.extend(horizon, u, num_moves)
            told = {} if math.isnan(run.log_evidence) else {"log-evidence": f"{run.log_evidence:.5g}"}
            bar.update(i + 1, {"horizon": f"{horizon:.4g}", **told})
    return run.finish(u, num_chains, progress, began)


def default_horizons(series: Series) -> list[float]:
    """Times at which something was observed in any of the series, increasing.

    Raises:
        DataError: the series have no observations.

    Example:
        >>> default_horizons(Series.from_tensors([0.0, 1.0, 3.0], [2.0, float("nan"), 4.0]))
        [0.0, 3.0]
    """
    if not isinstance(series, Series) or series.values is None or not bool(series.mask.any()):
        raise DataError(
            f"lengthen: expected a Series with observations as the first argument of the model, got {series!r}.\n"
            "Try: Series.from_tensors(times, values); for a model without a series, infer.ensemble_hmc."
        )
    return series.times[series.mask.any(-1)].unique(sorted=True).tolist()


def until(series: Series, horizon: float, seen: float | None = None) -> Series:
    """The series up to a time: later times are cut off, or not observed where another series still has earlier ones.

    Args:
        series: (N, T) times.
        horizon: a time, not before the first of all.
        seen: nothing is observed after this time; by default the horizon.

    Returns:
        Series of as many times as the longest of them needs, at least one.

    Example:
        >>> until(Series.from_tensors([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]], torch.ones(2, 3)), 1.0).mask[..., 0].tolist()
        [[True, True], [True, False]]
    """
    length = max(1, int((series.times <= horizon).sum(1).max()))
    cut = series.window(0, length)
    mask = cut.mask & (cut.times <= (horizon if seen is None else seen)).unsqueeze(-1)
    return Series(**{**_fields(cut), "mask": mask})


class _Lengthening:
    """The run: particles are passed in and out, what they have seen is kept."""

    def __init__(
        self, model: Callable, series: Series, args: tuple, kwargs: dict, settings: EnsembleSettings, engine: str
    ) -> None:
        self.model, self.series, self.args, self.kwargs = model, series, args, kwargs
        self.settings, self.engine = settings, engine
        self.whole = LogJoint(model, (series, *args), kwargs)
        if not self.whole.has_fixed_supports:
            raise LatentDEError("lengthen: the support of a latent site depends on other sites; use infer.nuts.")
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.steps: list[dict[str, float]] = []
        self.log_evidence = 0.0
        # of the last horizon: what the particles have as their density, and where it is defined
        self.density: Density | None = None
        self.joint: LogJoint = self.whole
        self.horizon = -math.inf

    def begin(self, horizon: float, num_particles: int) -> Tensor:
        """Draws of the prior (N, d) that can be solved up to the first horizon."""
        joint = self._joint(self.model, until(self.series, horizon))
        first = self._joint(without_data(self.model), until(self.series, horizon))
        sites = inspect_model(joint.model, *joint.args, **joint.kwargs)
        found: list[Tensor] = []
        for i in range(ROUNDS):
            drawn = draw_latents(
                joint.model, sites, joint.args, joint.kwargs, num_samples=num_particles, seed=self._seed(), memory="1GB"
            )
            u = joint.unconstrain(drawn)
            if i == 0:
                density = density_of(BatchedLogJoint(first, _rows(u), self.engine))
            good = density(u)[0].isfinite()
            found.append(u[good])
            if sum(map(len, found)) >= num_particles:
                self.density, self.joint, self.horizon = density, joint, -math.inf
                return torch.cat(found)[:num_particles].double()
        raise InitError(explain_failure(first, u[~good][:200], 0))

    def begin_at(self, horizon: float, start: Mapping[str, Tensor], num_particles: int, num_moves: int) -> Tensor:
        """Particles (N, d) from draws of the posterior of the series up to the first horizon."""
        joint = self._joint(self.model, until(self.series, horizon))
        missing = [site.name for site in joint.sites if site.name not in start]
        if missing:
            raise LatentDEError(f"lengthen: start has no draws of the latent sites {missing}, got {sorted(start)}.")
        draws = {site.name: torch.as_tensor(start[site.name]) for site in joint.sites}
        wrong = {
            site.name: f"{tuple(draws[site.name].shape)} for (N, {', '.join(map(str, site.shape))})"
            for site in joint.sites
            if tuple(draws[site.name].shape[1:]) != tuple(site.shape)
        }
        if wrong:
            raise LatentDEError(
                f"lengthen: draws of start have other shapes than the sites up to {horizon:.6g}: {wrong}.\n"
                "Try: as the first of horizons the last time that the data of start had."
            )
        u = joint.unconstrain(draws).double()
        u = u[torch.randperm(len(u), generator=self.generator)[torch.arange(num_particles) % len(u)]]
        self.density = density_of(BatchedLogJoint(joint, _rows(u), self.engine))
        self.joint, self.horizon = joint, horizon
        good = self.density(u)[0].isfinite()
        if not bool(good.any()):
            raise InitError(explain_failure(joint, u[:200], 0))
        u = u[good][torch.arange(num_particles) % int(good.sum())]
        self.log_evidence = math.nan
        return move(self.density, u, MOVES_AT_START * num_moves, self.settings, self.generator)[0]

    def extend(self, horizon: float, u: Tensor, num_moves: int) -> Tensor:
        """Carry the particles on to a horizon."""
        joint, old = self._joint(self.model, until(self.series, horizon)), self.density
        if joint.dim != u.shape[-1]:
            u = grow(self.joint, joint, u, self._seed())
            unseen = self._joint(self.model, until(self.series, horizon, seen=self.horizon))
            old = density_of(BatchedLogJoint(unseen, _rows(u), self.engine))
        new = density_of(BatchedLogJoint(joint, _rows(u), self.engine))
        try:
            u, steps = bridge(old, new, u, num_moves, self.settings, self.generator)
        except LatentDEError as error:
            raise LatentDEError(
                f"lengthen: at horizon {horizon:.6g}, {error}.\nTry: more num_particles, more horizons before this "
                "one, or a wider distribution of the observations."
            ) from error
        self.density, self.joint, self.horizon = new, joint, horizon
        for step in steps:
            self.log_evidence += step.log_ratio
            self.steps.append({"horizon": horizon, **vars(step)})
        return u

    def finish(self, u: Tensor, num_chains: int, progress: bool, began: float) -> Posterior:
        """Chains from the particles of the full horizon."""
        rows = u[torch.randperm(len(u), generator=self.generator)[torch.arange(num_chains) % len(u)]]
        white = White(u, self.settings.dense_mass)
        batched = BatchedLogJoint(self.whole, _rows(rows), self.engine)
        unit = Metric.identity(u.shape[-1], self.settings.dense_mass)
        density, informed = white.density(density_of(batched)), white.has_covariances
        # particles in many coordinates are few, and copies of each other: the chains learn better scales early on
        chains = EnsembleChains(density, white.whiten(rows)[None], self.settings, unit, informed=informed)
        iterations = self.settings.num_warmup + self.settings.num_samples
        with Progress(iterations, "lengthen: full horizon", progress) as bar, StopSignal() as stop:
            advance(chains, bar, stop, dict, RunFile(None, 0.0, {}))
        if not chains.num_drawn:
            raise LatentDEError("lengthen: interrupted during the last warm-up: there is no draw to return.")
        chains.draws = white.back(chains.draws)
        facts = facts_of(chains, self.settings, batched.engine, time.perf_counter() - began)
        facts |= {"inference": "lengthen", "num_particles": len(u), "steps": self.steps}
        facts["log_evidence"] = self.log_evidence
        sites = inspect_model(self.model, self.series, *self.args, **self.kwargs)
        posterior = to_posterior(self.whole, sites, chains, facts)
        summarise(posterior, chains)
        return posterior

    def _joint(self, model: Callable, series: Series) -> LogJoint:
        joint = LogJoint(model, (series, *self.args), self.kwargs)
        here, there = ({s.name: tuple(s.shape) for s in j.sites} for j in (joint, self.whole))
        if not all(name in there and is_part(shape, there[name]) for name, shape in here.items()):
            raise LatentDEError(
                f"lengthen: with {series.times.shape[1]} times the model has the latent sites {here}, with all of them "
                f"{there}.\nA site may appear, or grow in one dimension, as more is seen, and nothing else; use "
                "infer.ensemble_hmc."
            )
        return joint

    def _seed(self) -> int:
        return int(torch.randint(2**31, (), generator=self.generator))


def _rows(u: Tensor) -> Any:
    return u.detach().to("cpu", torch.float64).numpy()


def _fields(series: Series) -> dict[str, Any]:
    return {name: value for name, value in vars(series).items() if name != "complete"}


def _checked(horizons: Sequence[float] | Tensor, series: Series) -> list[float]:
    """Given horizons, and the full one."""
    observed = default_horizons(series)
    given = torch.as_tensor(horizons, dtype=torch.float64).flatten()
    times = given.tolist()
    if not times or not bool(given.isfinite().all()) or bool((given.diff() <= 0).any()):
        raise DataError(f"lengthen: horizons must be increasing, finite times, at least one; got {times}.")
    if times[0] < observed[0] or times[-1] > observed[-1]:
        raise DataError(
            f"lengthen: horizons must lie within the observed times, from {observed[0]:.6g} to {observed[-1]:.6g}; "
            f"got {times[0]:.6g} to {times[-1]:.6g}. Before the first there is nothing to learn from."
        )
    return times if times[-1] == observed[-1] else [*times, observed[-1]]


def _check_sizes(num_particles: int, num_moves: int) -> None:
    for name, value, least in (("num_particles", num_particles, 16), ("num_moves", num_moves, 1)):
        if not isinstance(value, int) or value < least:
            raise LatentDEError(f"lengthen: {name} must be an integer of at least {least}, got {value!r}.")

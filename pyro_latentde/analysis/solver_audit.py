# SPDX-License-Identifier: Apache-2.0
"""Does the solver's error show in the posterior? Its draws are solved again, more finely."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.pareto import FEWEST, pareto_shape
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.model_sites import Site
from pyro_latentde.posterior.runner import run_draws
from pyro_latentde.sites.settings import solver
from pyro_latentde.solve.methods.catalog import get_method
from pyro_latentde.solve.settings import TOLERANCES

__all__ = ["SolverReport", "solver_check"]

# Importance sampling is good below the first shape, and worthless above the second (Vehtari et al. 2024).
GOOD_SHAPE, WORST_SHAPE = 0.5, 0.7
# Weights that leave less than this share of the draws are no correction.
LEAST_SHARE = 0.1
# Log-weights within this of their mean move nothing that a reader would see, whatever the shape of their tail.
NEGLIGIBLE = 0.1
_TIGHTER = 1e-3
_MORE_STEPS = 100_000
_UNSET = {"step_size": None, "engine": None, "gradient": None}
# A mean that the solver's error moves by so many sds is as far off as that of a hundred independent draws.
MOST_SHIFT = 0.1
# These keep the whole log-density they sampled from; others keep none, or that of a part of the data.
_KEEP_DENSITY = ("nuts", "ensemble_hmc")


@dataclass(frozen=True, repr=False)
class SolverReport:
    """What :func:`solver_check` found; ``print`` it.

    Args:
        table: a row for each way to solve again: ``max_change`` and ``sd_change`` of the log-density, ``pareto_k`` and
            ``ess`` of the importance weights (finer over sampled), ``max_shift`` of a mean in posterior sds, and
            ``failed`` solves.
        means: a row for each scalar: ``mean`` and ``sd`` of the draws, ``reweighted`` mean, ``shift`` in sds; by the
            other method at the tighter tolerance.
        changes: (setting, draw) change of the log-density.
        used: the settings the draws were made with, in words.
        suggested: settings that would be fine enough, ``{}`` where those used are.
    """

    table: pd.DataFrame
    means: pd.DataFrame
    changes: np.ndarray
    used: str
    suggested: dict[str, Any]

    @property
    def pareto_k(self) -> float:
        """Shape of the weights' tail, the worst of all settings."""
        return float(self.table["pareto_k"].max())

    @property
    def reliable(self) -> bool:
        """Whether the posterior may be used as it is."""
        return not self.suggested

    def __str__(self) -> str:
        k = f"Pareto k = {self.pareto_k:.2g}"
        if self.reliable:
            verdict = f"{k}: inference is insensitive to the solver's tolerance."
        elif self._correctable():
            shift = self.means["shift"].abs()
            moved = f"moves the mean of {shift.idxmax()!r} by {shift.max():.2g} sd"
            verdict = f"{k}: the solver's error {moved}; reweighting corrects for it. Better: {self._rerun()}."
        else:
            verdict = f"{k}: the solver's error changes the posterior; {self._rerun()}."
        lines = [verdict, f"{self.changes.shape[1]} draws of {self.used}, solved again:"]
        lines += ["  " + row for row in self.table.to_string(float_format=lambda x: f"{x:.3g}").splitlines()]
        moved = self.means.loc[self.means["shift"].abs().sort_values(ascending=False).index].head(5)
        lines.append("Means reweighted to the finest solve, the largest shifts:")
        lines += ["  " + row for row in moved.to_string(float_format=lambda x: f"{x:.4g}").splitlines()]
        return "\n".join(lines)

    __repr__ = __str__

    def _correctable(self) -> bool:
        """Whether the weights are good enough to go on with."""
        few = self.table["ess"].min() < LEAST_SHARE * self.changes.shape[1]
        return bool(self.pareto_k < WORST_SHAPE and not few and self.table["failed"].sum() == 0)

    def _rerun(self) -> str:
        given = ", ".join(f"{key}={value!r}" for key, value in self.suggested.items())
        return f"rerun inside `with lde.solver({given})`"


def solver_check(
    posterior: Posterior,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    method: str | None = None,
    num_draws: int = 200,
    seed: int = 0,
    memory: str | int = "1GB",
) -> SolverReport:
    r"""Solve draws of a posterior again at a tighter tolerance and with another method, and weigh them

    .. math:: w_s \propto p_\text{fine}(\theta_s, y) / p_\text{sampled}(\theta_s, y).

    Where the weights are nearly equal, or their tail is thin (Pareto k below .5), a finer solver would have
    given the same posterior.

    Args:
        posterior: draws with their model. The density they were sampled from is ``stats["lp"]`` where it is kept, else
            the model's at the method, tolerances and steps noted at its sites, also those set by ``lde.solver(...)``
            around the sampler.
        rtol: tighter relative tolerance; by default a thousandth of the one used, or what the dtype resolves.
        atol: tighter absolute tolerance in units of the states; likewise.
        method: another method; by default ``"dopri8"``, or ``"tsit5"`` for draws made with that.
        num_draws: draws that are solved again, chosen at random.
        seed: of that choice.
        memory: budget of one batch of model runs, such as ``"1GB"``.

    Returns:
        The report; print it.

    Raises:
        LatentDEError: no model, no ``lde.ode`` site, or less than 25 draws.

    References:
        Timonen et al., "An importance sampling approach for reliable and efficient inference in Bayesian ordinary
        differential equation models", Stat 12 (2023).
        Vehtari et al., "Pareto smoothed importance sampling", JMLR 25 (2024).

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model(y=None):
        ...     k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.5))
        ...     z = lde.ode("z", lambda t, y, k: -k * y, torch.ones(1).double(), torch.linspace(0, 1, 3), k)
        ...     pyro.sample("y", dist.Normal(z[1:], 0.1).to_event(2), obs=y)
        >>> posterior = lde.infer.prior(model, torch.tensor([[0.6], [0.4]]).double(), num_samples=100)
        >>> solver_check(posterior).reliable
        True
    """
    sites = _ode_sites(posterior)
    chosen = _choose(posterior, num_draws, seed)
    tight = {site.name: _tighter(site, rtol, atol) for site in sites}
    other = {site.name: {**tight[site.name], "method": method or _other(site)} for site in sites}
    with _solving(other):
        joint = LogJoint(posterior.model, posterior.args, posterior.kwargs)
    u = joint.unconstrain(chosen.draws())

    def density(settings: Mapping[str, Mapping[str, Any]]) -> np.ndarray:
        with _solving(settings):
            lp = run_draws(lambda row: {"lp": -joint.potential(row["u"])}, {"u": u}, memory=memory)["lp"]
        return lp.double().cpu().numpy()

    recorded = {site.name: _recorded(site) for site in sites}
    kept = posterior.attrs.get("inference") in _KEEP_DENSITY and "lp" in chosen.stats
    sampled = chosen.stats["lp"].flatten().double().cpu().numpy() if kept else density(recorded)
    fine = [density(way) for way in (tight, other)]
    changes = _difference(np.stack(fine), sampled)
    rows = [_row(change, chosen)[0] for change in changes]
    table = pd.DataFrame(rows, index=[_words(sites[0], way) for way in (tight, other)])
    good = all(_fine_enough(row, change) for row, change in zip(rows, changes, strict=True))
    suggested = {} if good else _suggest(sites, recorded, tight, density, fine[0], chosen)
    return SolverReport(table, _row(changes[-1], chosen)[1], changes, _words(sites[0], recorded), suggested)


def _ode_sites(posterior: Posterior) -> list[Site]:
    if posterior.model is None or posterior.sites is None:
        raise LatentDEError(
            "solver_check solves the model again, and this posterior has none.\n"
            "Try: Posterior.load(path, model=..., args=...) or posterior.with_model(model, *args)."
        )
    if not posterior.sites.ode:
        raise LatentDEError(f"solver_check: the model has no lde.ode site; its sites are {list(posterior.sites)}.")
    return [posterior.sites[name] for name in posterior.sites.ode]


def _choose(posterior: Posterior, num: int, seed: int) -> Posterior:
    """Some draws, at random, as one chain."""
    total = posterior.num_chains * posterior.num_draws
    if min(total, num) < FEWEST:
        raise LatentDEError(f"solver_check needs at least {FEWEST} draws, got {min(total, num)}; 200 are worth more.")
    index = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:num].sort().values

    def pick(value: Tensor) -> Tensor:
        return value.flatten(0, 1)[index.to(value.device)][None]

    return replace(
        posterior,
        samples={name: pick(value) for name, value in posterior.samples.items()},
        stats={name: pick(value) for name, value in posterior.stats.items()},
    )


@contextmanager
def _solving(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Solver settings by site; of what is set at the site or around the check, only limits hold."""
    with ExitStack() as stack:
        for name, given in settings.items():
            stack.enter_context(solver(sites=[name], **{**_UNSET, **given}))
        yield


def _recorded(site: Site) -> dict[str, Any]:
    """What the draws were made with. torchdiffeq takes the same steps for all rows; our engines agree."""
    keys = (
        "method",
        "rtol",
        "atol",
        "step_size",
        *(["engine"] if site.settings.get("engine") == "torchdiffeq" else []),
    )
    return {key: site.settings[key] for key in keys if site.settings.get(key) is not None}


def _tighter(site: Site, rtol: float | None, atol: float | None) -> dict[str, Any]:
    dtype = torch.float64 if site.times is None else site.times.dtype
    usual = dict(zip(("rtol", "atol"), TOLERANCES[dtype], strict=True)) | _recorded(site)
    method = usual.get("method", "tsit5")
    return {
        "method": method if get_method(method).adaptive else "tsit5",
        "rtol": max(_TIGHTER * usual["rtol"], 10 * torch.finfo(dtype).eps) if rtol is None else rtol,
        "atol": _TIGHTER * usual["atol"] if atol is None else atol,
        "max_steps": _MORE_STEPS,
    }


def _other(site: Site) -> str:
    return "tsit5" if site.settings.get("method") == "dopri8" else "dopri8"


def _words(site: Site, way: Mapping[str, Mapping[str, Any]]) -> str:
    given = way[site.name]
    shown = ("step_size",) if given.get("step_size") is not None else ("rtol", "atol")
    return ", ".join([given.get("method", "tsit5"), *(f"{key}={given[key]:.3g}" for key in shown if key in given)])


def _difference(fine: np.ndarray, sampled: np.ndarray) -> np.ndarray:
    """Change of the log-density; NaN where the draw has none itself, -inf where only the finer solve fails."""
    return np.where(np.isfinite(sampled), fine - np.where(np.isfinite(sampled), sampled, 0.0), np.nan)


def _row(change: np.ndarray, chosen: Posterior) -> tuple[dict[str, float], pd.DataFrame]:
    """Summary of the changes of one setting, and the means they lead to."""
    finite = np.isfinite(change)
    if not finite.any():
        raise LatentDEError(
            "no draw has a finite log-density when it is solved again: are model and data the right ones?"
        )
    weights = np.where(finite, np.exp(np.where(finite, change - change[finite].max(), 0.0)), 0.0)
    weights /= weights.sum()
    scalars = {name: values[0] for name, values in scalar_draws(chosen).items()}
    means = pd.DataFrame(
        {"mean": x.mean(), "sd": x.std(ddof=1), "reweighted": float(weights @ x)} for x in scalars.values()
    ).set_index(pd.Index(list(scalars), name="name"))
    means["shift"] = (means["reweighted"] - means["mean"]) / means["sd"].where(means["sd"] > 0, np.inf)
    row = {
        "max_change": float(np.abs(change[finite]).max()),
        "sd_change": float(change[finite].std()),
        "pareto_k": float(pareto_shape(torch.from_numpy(change)[:, None])),
        "ess": float(1 / (weights**2).sum()),
        "max_shift": float(means["shift"].abs().max()),
        "failed": int((~finite).sum()),
    }
    return row, means


def _fine_enough(row: Mapping[str, float], change: np.ndarray) -> bool:
    """Whether the weights are nearly equal, or tame and of no consequence."""
    if row["failed"]:
        return False
    spread = np.abs(change - change.mean()).max()
    return bool(spread < NEGLIGIBLE or (row["pareto_k"] < GOOD_SHAPE and row["max_shift"] < MOST_SHIFT))


def _suggest(
    sites: list[Site],
    recorded: Mapping[str, Mapping[str, Any]],
    tight: Mapping[str, Mapping[str, Any]],
    density: Callable[[Mapping[str, Mapping[str, Any]]], np.ndarray],
    finest: np.ndarray,
    chosen: Posterior,
) -> dict[str, Any]:
    """The loosest tolerance, in steps of ten, whose densities the finest solve confirms."""
    first, used = tight[sites[0].name], recorded[sites[0].name]
    start = used.get("rtol", first["rtol"] / _TIGHTER)
    for decade in range(max(0, math.floor(math.log10(start / first["rtol"]) + 1e-9)) + 1):
        scale = 10.0**-decade
        given = {
            "method": first["method"],
            "rtol": start * scale,
            "atol": first["atol"] * start * scale / first["rtol"],
        }
        way = {name: {**settings, **given} for name, settings in tight.items()}
        change = _difference(finest, density(way))
        if np.isfinite(change).any() and _fine_enough(_row(change, chosen)[0], change):
            break
    else:
        given = {key: first[key] for key in ("method", "rtol", "atol")}
    steps = {} if used.get("step_size") is None else {"step_size": None}
    return {key: float(f"{x:.1g}") if isinstance(x, float) else x for key, x in given.items()} | steps

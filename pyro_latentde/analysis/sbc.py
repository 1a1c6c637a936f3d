# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration: does inference recover what the prior drew, as often as it claims to?"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np
import pandas as pd
import torch

from pyro_latentde.analysis.rank_tests import rank_p_value
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.nuts_run import split_rhat
from pyro_latentde.infer.replications import METHODS, Replications, Truths, simulate_truths
from pyro_latentde.infer.warn_once import WarnOnce
from pyro_latentde.sites.settings import solver as solver_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Calibration", "calibration"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
DISAGREE = 1.1  # R-hat beyond which a fit is counted as not finished

_log = logging.getLogger("pyro_latentde")


@dataclass(frozen=True)
class Calibration:
    r"""Ranks of the truths among the draws of their posteriors.

    .. math:: r_i = \#\{s : \theta_i^{(s)} < \theta_i^*\}, \quad \theta^* \sim p(\theta),\ y \sim p(y | \theta^*),\
        \theta^{(s)} \sim p(\theta | y)

    is uniform on 0, ..., L for every scalar, if model and sampler are right.

    Args:
        ranks: one row for each replication, one column for each scalar.
        num_ranks: L, draws that each truth is compared with.
        table: index scalar; p_value of uniformity, bias (mean rank, .5 is right), spread (sd of the rank over that of
            a uniform; above 1: posteriors are too narrow), coverage of central intervals.
        num_failed: draws of the prior that could not be simulated.
        num_unfinished: fits with R-hat above 1.1.
        facts: how it was made.
    """

    ranks: pd.DataFrame
    num_ranks: int
    table: pd.DataFrame
    num_failed: int
    num_unfinished: int
    facts: Mapping[str, Any]

    @property
    def p_value(self) -> float:
        """Of all scalars together: the smallest, times their number (Bonferroni)."""
        return min(1.0, float(self.table["p_value"].min()) * len(self.table))

    def passed(self, level: float = 0.01) -> bool:
        """Whether uniform ranks are not rejected; a right sampler is in at most this share of runs."""
        return self.p_value >= level

    def __str__(self) -> str:
        verdict = "no sign of miscalibration" if self.passed() else "MISCALIBRATED"
        worst = self.table["p_value"].idxmin()
        lines = [
            f"{len(self.ranks)} replications, {self.num_ranks} draws each, by {self.facts['method']}: {verdict}; "
            f"p = {self.p_value:.3g} over {len(self.table)} scalars (least for {worst}).",
            self.table.round(3).to_string(),
        ]
        if not self.passed():
            lines.append(_meaning(worst, self.table.loc[worst]))
        if self.num_failed:
            lines.append(f"{self.num_failed} draws of the prior could not be simulated, and were replaced.")
        if self.num_unfinished:
            lines.append(f"{self.num_unfinished} fits ended with R-hat above {DISAGREE}: warm up or draw longer.")
        return "\n".join(lines)

    def plot(self) -> Figure:
        """Histograms of the ranks with 99 % bands, and the difference of their distribution from a uniform one."""
        from pyro_latentde.analysis.calibration_plots import plot_ranks

        return plot_ranks(self.ranks, self.num_ranks)


@WarnOnce()
def calibration(
    model: Callable,
    *args: Any,
    num_replications: int = 256,
    method: str | Callable = "ensemble_hmc",
    num_chains: int = 8,
    num_warmup: int = 100,
    num_samples: int = 50,
    num_ranks: int = 63,
    batch: int = 32,
    num_jobs: int = 1,
    seed: int = 0,
    solver: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> Calibration:
    """Simulation-based calibration of a model and a sampler.

    Parameters are drawn from the prior, data are simulated, and each data set is fitted: all chains of a batch of data
    sets advance in one batched log-joint. Starts never look at the truth. Batches are shared out over processes by
    joblib; inside ``joblib.parallel_config(backend=...)`` these can be those of a cluster.

    Args:
        model: Pyro model; what it observes says which sites are data, and their shape and gaps.
        *args: its arguments.
        num_replications: R, data sets.
        method: ``"ensemble_hmc"``, ``"nuts"``, or a function ``(batch, num_warmup, num_samples, seed) -> Fits``, see
            ``infer.replications``.
        num_chains: chains of each data set.
        num_warmup: iterations that tune.
        num_samples: draws of each chain.
        num_ranks: L, draws that a truth is compared with, evenly taken from all chains.
        batch: data sets fitted at once.
        num_jobs: processes; -1 is all cores.
        seed: of everything random.
        solver: keywords of :func:`~pyro_latentde.solver` for the fits alone, such as ``{"rtol": 1e-3}``: is a cheaper
            solve good enough for data that come from the model as it is?
        **kwargs: keyword arguments of the model.

    Returns:
        Calibration.

    Raises:
        LatentDEError: fewer than 2 replications, more ranks than draws, an unknown method, a model without data, or a
            prior that can hardly be simulated.

    References:
        Talts, Betancourt, Simpson, Vehtari, Gelman (2018), Validating Bayesian inference algorithms with
        simulation-based calibration, arXiv:1804.06788.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(torch.tensor(0.0), 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> found = calibration(model, torch.tensor(0.0), num_replications=32, num_warmup=40, num_samples=20)
        >>> found.ranks.shape, found.passed()
        ((32, 1), True)
    """
    _check(num_replications, method, num_chains, num_samples, num_ranks)
    with solver_settings(**(solver or {})):
        pass  # a setting that there is not is told before the simulation
    joint = LogJoint(model, args, kwargs)
    truths = simulate_truths(joint, num_replications, seed)
    jobs = num_jobs if num_jobs > 0 else joblib.cpu_count()
    size = min(batch, -(-num_replications // jobs))
    first = list(range(0, num_replications, size))
    options = (method, num_chains, num_warmup, num_samples, num_ranks, size, seed, dict(solver or {}))
    if jobs == 1:
        parts = [_fit(joint, truths, first, options)]
    else:
        shares = [share.tolist() for share in np.array_split(first, jobs) if len(share)]
        run, dtype = joblib.delayed(_fit_elsewhere), torch.get_default_dtype()
        work = [run(model, args, kwargs, truths, share, options, dtype) for share in shares]
        parts = joblib.Parallel(n_jobs=num_jobs)(work)
    ranks = pd.DataFrame(np.concatenate([ranks for ranks, _ in parts]), columns=_names(joint))
    unfinished = sum(number for _, number in parts)
    facts = {"method": getattr(method, "__name__", method), "seed": seed, "num_chains": num_chains}
    facts |= {"num_warmup": num_warmup, "num_samples": num_samples, "solver": dict(solver or {})}
    return Calibration(ranks, num_ranks, _table(ranks, num_ranks), truths.num_failed, unfinished, facts)


def _fit_elsewhere(
    model: Callable,
    args: tuple,
    kwargs: Mapping[str, Any],
    truths: Truths,
    first: list[int],
    options: tuple,
    dtype: torch.dtype,
) -> tuple[np.ndarray, int]:
    torch.set_num_threads(1)  # the processes share the cores
    torch.set_default_dtype(dtype)
    return _fit(LogJoint(model, args, kwargs), truths, first, options)


def _fit(joint: LogJoint, truths: Truths, first: list[int], options: tuple) -> tuple[np.ndarray, int]:
    """Ranks (R, scalars) of the batches that begin at these replications, and how many fits were not finished."""
    method, num_chains, num_warmup, num_samples, num_ranks, size, seed, solver = options
    fit = METHODS[method] if isinstance(method, str) else method
    ranks, unfinished = [], 0
    with solver_settings(**solver):
        batch = Replications(joint, size, num_chains, truths[first[0] : first[0] + size])
        for start in first:
            there = truths[start : start + size]
            n = batch.give(there)
            u = fit(batch, num_warmup, num_samples, seed + 1 + start).u[:n]
            unfinished += sum(bool(split_rhat(one.numpy()).max() > DISAGREE) for one in u)
            picked = torch.linspace(0, u.shape[1] * u.shape[2] - 1, num_ranks).round().long()
            draws = _flat(joint, u.flatten(1, 2)[:, picked])
            ranks.append((draws < _flat(joint, there.u)[:, None]).sum(1).numpy())
            _log.info("calibration: %d of %d replications", start + n, len(truths))
    return np.concatenate(ranks), unfinished


def _flat(joint: LogJoint, u: torch.Tensor) -> torch.Tensor:
    """All scalars of the latent sites, (*batch, scalars)."""
    with torch.no_grad():
        values = joint.constrain(u.to(joint.device, joint.dtype))
    parts = [
        values[site.name].flatten(u.dim() - 1) if site.shape else values[site.name][..., None] for site in joint.sites
    ]
    return torch.cat([part.double().cpu() for part in parts], dim=-1)


def _names(joint: LogJoint) -> list[str]:
    names = []
    for site in joint.sites:
        index = [""] if not site.shape else [f"[{', '.join(map(str, i))}]" for i in np.ndindex(*site.shape)]
        names += [site.name + i for i in index]
    return names


def _table(ranks: pd.DataFrame, num_ranks: int) -> pd.DataFrame:
    rows = {}
    for name, column in ranks.items():
        middle = (column.to_numpy() + 0.5) / (num_ranks + 1)
        row = {
            "p_value": rank_p_value(column.to_numpy(), num_ranks),
            "bias": middle.mean(),
            "spread": np.sqrt(np.mean((middle - 0.5) ** 2) * 12.0),
        }
        row |= {f"coverage{100 * level:.0f}": float(np.mean(np.abs(middle - 0.5) < level / 2)) for level in LEVELS}
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _meaning(name: str, row: pd.Series) -> str:
    shift = 12.0 * (row["bias"] - 0.5) ** 2  # its part of the squared spread about the middle
    if shift < abs(row["spread"] ** 2 - 1.0 - shift):
        if row["spread"] > 1.0:
            return f"{name}: truths lie too often in the tails; posteriors are too narrow, or chains are not finished."
        return f"{name}: truths lie too often in the middle; posteriors are too wide."
    side = "above" if row["bias"] > 0.5 else "below"
    return f"{name}: truths lie too often {side} the draws; the posterior is shifted."


def _check(num_replications: int, method: Any, num_chains: int, num_samples: int, num_ranks: int) -> None:
    if num_replications < 2:
        raise LatentDEError(f"calibration: num_replications must be at least 2, got {num_replications}")
    if not callable(method) and method not in METHODS:
        raise LatentDEError(f"calibration: method must be one of {sorted(METHODS)} or a function, got {method!r}")
    if not 1 <= num_ranks <= num_chains * num_samples:
        raise LatentDEError(
            f"calibration: num_ranks={num_ranks} draws are compared with each truth, and a fit has num_chains x "
            f"num_samples = {num_chains * num_samples}"
        )

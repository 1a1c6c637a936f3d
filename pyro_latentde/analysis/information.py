# SPDX-License-Identifier: Apache-2.0
"""Are the parameters identifiable? What the data can say of them, before or after a fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions.transforms import (
    ComposeTransform,
    ExpTransform,
    IndependentTransform,
    SigmoidTransform,
    identity_transform,
)

from pyro_latentde.analysis.drawing import BLUE, GREY, INK, VERMILION, new_figure
from pyro_latentde.analysis.fisher import Law, fisher_information, laws_at
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.log_joint import LatentSite, LogJoint
from pyro_latentde.infer.prior_draws import prior
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.model_sites import kind_of, seeded
from pyro_latentde.posterior.runner import trace_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Identifiability", "identifiability"]

# Below the first eigenvalue the prior says more than the data; below the second only rounding is left of the data.
PRIOR_SAYS_MORE, NOTHING = 1.0, 1e-10
_ROUNDING = 1e-13
# Parts of a direction below this share of its largest are not worth a word.
_WORTH_NAMING = 0.1
# A covariance of more coordinates than this would need too many draws: then the prior's correlations are left out.
_MOST_CORRELATED, _DRAWS_PER_COORDINATE = 200, 20
_LINES = 6


@dataclass(frozen=True, repr=False)
class Identifiability:
    """What :func:`identifiability` found; ``print`` it.

    Coordinates are those of unconstrained space: ``log k`` of a positive site ``k``.

    Args:
        table: a row for each coordinate: ``value`` at the point, ``prior_sd``, ``data_sd`` (Cramer and Rao's bound,
            from the data alone), ``both_sd`` (data and prior), ``contraction`` = 1 - both_sd^2 / prior_sd^2, and
            ``posterior_sd`` and ``posterior_contraction`` where a posterior was given.
        directions: a row for each eigenvector of the information in units of prior sds, worst known first:
            ``gain`` (eigenvalue: 1 where data and prior say as much), ``data_sd`` and ``prior_sd`` along it, and the
            direction itself, in which the largest part is 1.
        information: ``(d, d)``, the Fisher information.
        extra: a row for each candidate measurement, best first: ``d_gain``, nats of information about all
            coordinates together, and ``a_gain``, the share of the mean variance (in prior variances) that it
            removes. None if none were given.
    """

    table: pd.DataFrame
    directions: pd.DataFrame
    information: np.ndarray
    extra: pd.DataFrame | None = None

    @property
    def sloppy(self) -> pd.DataFrame:
        """The directions of which the prior says more than the data."""
        return self.directions[self.directions["gain"] < PRIOR_SAYS_MORE]

    def __str__(self) -> str:
        size, weak = len(self.table), len(self.sloppy)
        gains = self.directions["gain"]
        lines = [
            f"Fisher information about {size} coordinates: the data say more than the prior in {size - weak} "
            f"direction(s), less in {weak}. Eigenvalues (in units of the prior): "
            f"{', '.join(f'{gain:.2g}' for gain in gains[::-1][:8])}{', ...' if size > 8 else ''}."
        ]
        lines += [f"  {self._sentence(row)}" for _, row in self.sloppy.head(_LINES).iterrows()]
        lines += self.table.to_string(float_format=lambda x: f"{x:.3g}").splitlines()
        if self.extra is not None:
            lines.append("Best further measurements:")
            lines += self.extra.head(_LINES).to_string(index=False, float_format=lambda x: f"{x:.3g}").splitlines()
        return "\n".join(lines)

    __repr__ = __str__

    def _sentence(self, row: pd.Series) -> str:
        parts = row[self.table.index]
        parts = parts[parts.abs() >= _WORTH_NAMING].sort_values(key=lambda x: -x.abs().round(6), kind="stable")
        named = [f"{name} {'up' if part > 0 else 'down'} {abs(part):.2f}" for name, part in parts.items()][:_LINES]
        effect = "does not change" if np.isinf(row["data_sd"]) else "hardly changes"
        moves = named[0] if len(named) == 1 else f"{named[0]} with {', '.join(named[1:])}"
        return f"{moves} {effect} the data: sd along it {row['data_sd']:.2g}, prior {row['prior_sd']:.2g}."

    def plot(self) -> Figure:
        """Two panels: the spectrum (orange: the prior says more), and sds by prior, data and both together."""
        figure, axes = new_figure(1, 2, width=9.0, height=max(2.4, 0.28 * len(self.table) + 1.2))
        left, right = axes[0]
        gains = self.directions["gain"].to_numpy()[::-1]
        floor = max(NOTHING, gains.max() * 1e-12)
        rank = np.arange(1, len(gains) + 1)
        colours = [BLUE if gain >= PRIOR_SAYS_MORE else VERMILION for gain in gains]
        left.vlines(rank, floor, gains.clip(floor), color=colours, lw=1.5)
        left.scatter(rank, gains.clip(floor), color=colours, s=25, zorder=3)
        left.axhline(PRIOR_SAYS_MORE, color=INK, lw=0.8, ls="--")
        left.set(yscale="log", xlabel="direction, best known first", ylabel="information (prior = 1)")
        left.xaxis.get_major_locator().set_params(integer=True)
        rows = np.arange(len(self.table))
        kinds = {"prior_sd": (GREY, "prior"), "both_sd": (BLUE, "data and prior"), "posterior_sd": (INK, "posterior")}
        shown = [kind for kind in kinds if kind in self.table]
        for i, kind in enumerate(shown):
            relative = self.table[kind] / self.table["prior_sd"]
            height = 0.8 / len(shown)
            right.barh(
                rows + (i - (len(shown) - 1) / 2) * height, relative, height, color=kinds[kind][0], label=kinds[kind][1]
            )
        right.set_yticks(rows, self.table.index, fontsize=8)
        right.invert_yaxis()
        right.set_xlabel("sd, in units of the prior's")
        figure.legend(*right.get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False, fontsize=8)
        return figure


def identifiability(
    model: Callable,
    at: Mapping[str, Any] | Posterior,
    *args: Any,
    extra: tuple | None = None,
    observed: Sequence[str] = (),
    num_draws: int = 1000,
    seed: int = 0,
    **kwargs: Any,
) -> Identifiability:
    r"""Fisher information of the data about the unconstrained coordinates u, from the solver's sensitivities

    .. math:: I = \sum_\text{sites} J^\top H J, \qquad J = \partial \eta / \partial u, \qquad
        H = \nabla^2_\eta \, \mathrm{KL}(p_{\eta_0} \,\|\, p_\eta),

    with the parameters :math:`\eta` of the distributions of the data. Its eigenvectors, in units of prior sds, are
    what the data determine and what they do not. The values of the data play no part, only where they were taken.

    Args:
        model: Pyro model.
        at: the point: a value for each latent site, or a posterior, whose median (in unconstrained space) it is.
        *args: arguments of the model, data included; those of the posterior if there are none here.
        extra: arguments of the model with candidate measurements, such as ``(denser_times, None)``: each of them is
            judged by what it would add, also those of sites that the first call does not have.
        observed: sites that are going to be measured, where there are no data yet: plan with ``(times, None)``.
        num_draws: draws of the prior, for its sds; also of data where torch does not know a divergence.
        seed: of those draws.
        **kwargs: keyword arguments of the model.

    Returns:
        The result: print it, ``plot()`` it, or look at its tables.

    Raises:
        LatentDEError: no observed site, or latent sites whose supports depend on others.
        SolveError: a solve fails at the point.

    References:
        Gutenkunst et al., "Universally sloppy parameter sensitivities in systems biology models", PLoS Comput. Biol. 3
        (2007).

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model(y):  # only the product of a and b can be known
        ...     a = pyro.sample("a", dist.LogNormal(torch.zeros(()).double(), 1.0))
        ...     b = pyro.sample("b", dist.LogNormal(torch.zeros(()).double(), 1.0))
        ...     z = lde.ode("z", lambda t, y, k: -k * y, torch.ones(1).double(), torch.linspace(0, 1, 3), a * b)
        ...     pyro.sample("y", dist.Normal(z, 0.1).to_event(2), obs=y)
        >>> result = identifiability(model, {"a": 1.0, "b": 2.0}, torch.zeros(3, 1).double())
        >>> print(str(result).splitlines()[1].strip())
        log a up 1.00 with log b down 1.00 does not change the data: sd along it inf, prior 0.71.
    """
    given = at if isinstance(at, Posterior) else None
    if given is not None and not args and not kwargs:
        args, kwargs = given.args, dict(given.kwargs)
    unplanned, model = model, _with_planned(model, at, observed, args, kwargs)
    joint = LogJoint(model, args, kwargs)
    measured = _observed(joint)
    enough = num_draws if joint.dim > _MOST_CORRELATED else max(num_draws, _DRAWS_PER_COORDINATE * joint.dim)
    before = prior(model, *args, num_samples=enough, seed=seed, **kwargs)
    drawn = _unconstrained(joint, before).numpy()
    points = None if given is None else _unconstrained(joint, given)
    u = joint.unconstrain(at) if points is None else points.median(0).values.to(joint.dtype)

    options = {"num_noise": num_draws, "seed": seed}
    laws = laws_at(model, joint.constrain, u, measured, args, kwargs)
    information = sum(fisher_information(law, joint.dim, **options) for law in laws.values()).numpy()
    covariance = np.diag(drawn.var(0, ddof=1)) if joint.dim > _MOST_CORRELATED else np.atleast_2d(np.cov(drawn.T))
    both = np.linalg.solve(np.eye(joint.dim) + covariance @ information, covariance)
    names = [name for site in joint.sites for name in _coordinates(site, before)]
    directions = _directions(information, covariance, names)
    table = _table(u.double().numpy(), information, covariance, both, names)
    if points is not None:
        table["posterior_sd"] = points.std(0).numpy()
        table["posterior_contraction"] = 1 - (table["posterior_sd"] / table["prior_sd"]) ** 2
    if extra is None:
        return Identifiability(table, directions, information)
    with seeded(seed):
        candidates = trace_model(unplanned, joint.constrain(u), tuple(extra), kwargs)
    sites = [name for name in candidates.nodes if _is_measured(candidates, name, joint)]
    laws = laws_at(unplanned, joint.constrain, u, sites, tuple(extra), kwargs)
    return Identifiability(table, directions, information, _gains(laws, both, np.diag(covariance), options))


def _with_planned(
    model: Callable, at: Mapping[str, Any] | Posterior, observed: Sequence[str], args: tuple, kwargs: Mapping[str, Any]
) -> Callable:
    """The model with simulated data at these sites: where they are taken counts, not what they are."""
    if not observed:
        return model
    point = {name: value[0] for name, value in at.draws().items()} if isinstance(at, Posterior) else at
    with seeded(0):
        nodes = trace_model(model, {name: torch.as_tensor(value) for name, value in point.items()}, args, kwargs).nodes
    known = [name for name, node in nodes.items() if kind_of(node) in ("latent", "observed") and name not in point]
    unknown = [name for name in observed if name not in known]
    if unknown:
        raise LatentDEError(
            f"identifiability: observed = {unknown} are no sites of the model; expected some of {known}."
        )
    return poutine.condition(model, data={name: nodes[name]["value"] for name in observed})


def _is_measured(trace: poutine.Trace, name: str, joint: LogJoint) -> bool:
    """A sampled site that is no latent site of the model: one whose data were given, or would be drawn."""
    node, latent = trace.nodes[name], {site.name for site in joint.sites}
    return node["type"] == "sample" and name not in latent and kind_of(node) in ("observed", "latent")


def _observed(joint: LogJoint) -> list[str]:
    if not joint.has_fixed_supports:
        raise LatentDEError(
            "identifiability needs supports that do not depend on other sites.\n"
            "Try: sample such a site on (0, 1) and stretch it in the model."
        )
    trace = joint.sample_trace(seed=0)
    names = [name for name in trace.observation_nodes if kind_of(trace.nodes[name]) == "observed"]
    if not names:
        raise LatentDEError("the model has no observed site, so there is no data to be informed by: pass data to it.")
    return names


def _unconstrained(joint: LogJoint, posterior: Posterior) -> Tensor:
    """Coordinates ``(S, d)`` of the draws, float64; draws on the edge of a support are left out."""
    u = joint.unconstrain(posterior.draws()).detach().to("cpu", torch.float64)
    return u[torch.isfinite(u).all(-1)]


def _coordinates(site: LatentSite, before: Posterior) -> list[str]:
    """Names of the coordinates of a site: ``log k``, ``logit p[0]``, ``log z0[hare]``."""
    outer = site.transform
    while isinstance(outer, IndependentTransform):
        outer = outer.base_transform
    parts = outer.parts if isinstance(outer, ComposeTransform) else [outer]
    kinds = [type(part) for part in parts]
    same = not parts or parts == [identity_transform]
    prefix = "" if same else "log " if ExpTransform in kinds else "logit " if SigmoidTransform in kinds else "free "
    if site.flat_shape == site.shape:  # a coordinate for each scalar
        return [prefix + name for name in scalar_draws(before, [site.name])]
    return [f"{prefix}{site.name}[{', '.join(map(str, at))}]" for at in np.ndindex(*site.flat_shape)]


def _spectrum(information: np.ndarray, sd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues, smallest first, and eigenvectors of the information in units of prior sds; rounding is zero."""
    values, vectors = np.linalg.eigh(information * sd * sd[:, None])
    return np.where(values < max(NOTHING, _ROUNDING * values[-1]), 0.0, values), vectors


def _directions(information: np.ndarray, covariance: np.ndarray, names: list[str]) -> pd.DataFrame:
    sd = np.sqrt(np.diag(covariance))
    gains, vectors = _spectrum(information, sd)
    precision = np.linalg.pinv(covariance, hermitian=True)
    rows = []
    for gain, vector in zip(gains, (vectors * sd[:, None]).T, strict=True):
        # the first of those that are largest up to rounding leads
        lead = vector[np.flatnonzero(np.abs(vector) > (1 - 1e-6) * np.abs(vector).max())[0]]
        along = vector / lead
        data_sd = np.abs(lead) / np.sqrt(gain) if gain > 0 else np.inf
        rows.append({"gain": gain, "data_sd": data_sd, "prior_sd": (along @ precision @ along) ** -0.5})
        rows[-1] |= dict(zip(names, along, strict=True))
    return pd.DataFrame(rows)


def _table(
    u: np.ndarray, information: np.ndarray, covariance: np.ndarray, both: np.ndarray, names: list[str]
) -> pd.DataFrame:
    sd = np.sqrt(np.diag(covariance))
    gains, vectors = _spectrum(information, sd)
    with np.errstate(divide="ignore", invalid="ignore"):
        # a coordinate with no part in a direction is not touched by it, however little is known along it
        parts = np.where(vectors**2 > _ROUNDING, vectors**2 / gains, 0.0)
    return pd.DataFrame(
        {
            "value": u,
            "prior_sd": sd,
            "data_sd": sd * np.sqrt(parts.sum(1)),
            "both_sd": np.sqrt(np.diag(both)),
            "contraction": 1 - np.diag(both) / sd**2,
        },
        index=pd.Index(names, name="coordinate"),
    )


def _gains(laws: Mapping[str, Law], both: np.ndarray, prior: np.ndarray, options: Mapping[str, int]) -> pd.DataFrame:
    """What each candidate adds to data and prior; observations of one site at one time are one candidate."""
    rows = []
    before = np.diag(both) / prior
    for name, law in laws.items():
        each = fisher_information(law, len(both), each=True, **options).numpy()
        times = None if law.times is None else law.times.cpu().double().numpy()
        dims = [i for i, size in enumerate(law.weight.shape) if times is not None and size == len(times)]
        if dims:
            each = np.moveaxis(each, dims[-1], 0)
            each = each.reshape(len(times), -1, *each.shape[-2:]).sum(1)
        each = each.reshape(-1, *each.shape[-2:])
        labels = times if dims else np.arange(len(each))
        for label, information in zip(labels, each, strict=True):
            update = np.eye(len(both)) + both @ information
            after = np.diag(np.linalg.solve(update, both)) / prior
            gain = 0.5 * np.linalg.slogdet(update)[1]
            at = {"time" if dims else "number": label}
            rows.append({"site": name, **at, "d_gain": gain, "a_gain": 1 - after.sum() / before.sum()})
    return pd.DataFrame(rows).sort_values("d_gain", ascending=False, ignore_index=True)

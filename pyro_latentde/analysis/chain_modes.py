# SPDX-License-Identifier: Apache-2.0
"""Do the chains agree, and if not, which of them are in which mode?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata

from pyro_latentde.analysis.drawing import BLUE, GREY, VERMILION, new_figure
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ChainReport", "chain_report"]

# Chains whose largest R-hat is below these agree, and nearly agree (Vehtari et al. 2021; Gelman et al. 2013).
ALIKE, NEARLY_ALIKE = 1.01, 1.1
# Means of chains in different modes are farther apart than this, in sds of the wider: one that visits both is wide.
_WIDTHS = 2.0
# Means of chains differ by noise too: by more than so many of its sds only once in a million, were it normal.
_SDS = 5.0
_MEDIAN_OF_SQUARE = 0.455  # of a standard normal
# Between modes whose log-densities differ by more than this, their widths decide nothing.
_HOPELESS = 10.0
_MOST_SHOWN = 8
_COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", GREY)


@dataclass(frozen=True, repr=False)
class ChainReport:
    """What :func:`chain_report` found; ``print`` it.

    Args:
        table: a row for each mode, that of the highest log-density first: its ``chains``, ``share`` of them, mean
            ``lp`` where the posterior has it, and for each scalar ``mean`` and ``sd``.
        modes: chains of each mode, in the order of the table.
        r_hat: scalar -> rank-normalised split R-hat of all chains.
        worst: the scalar that tells the modes apart best.
        draws: scalar -> ``(chain, draw)``.
    """

    table: pd.DataFrame
    modes: tuple[tuple[int, ...], ...]
    r_hat: pd.Series
    worst: str
    draws: dict[str, np.ndarray]

    def __str__(self) -> str:
        count = sum(map(len, self.modes))
        worst = f"R-hat {self.r_hat[self.worst]:.3f} for {self.worst!r}"
        if len(self.modes) == 1:
            if self.r_hat[self.worst] < ALIKE:
                return f"The {count} chains agree: largest {worst}."
            if self.r_hat[self.worst] < NEARLY_ALIKE:
                return f"The {count} chains nearly agree: largest {worst}; below {ALIKE} is good. Draw longer."
            return f"{worst}, but the {count} chains are not in separate modes: they mix slowly. Draw longer."
        groups = [f"{_numbered(mode)}{self._density(i)}" for i, mode in enumerate(self.modes)]
        lines = [f"{worst}: chains {' and '.join(groups)} are in different modes."]
        shown = [name for name, _ in self._separation()[:_MOST_SHOWN]]
        for i, mode in enumerate(self.modes):
            values = ", ".join(
                f"{name} {self.table.loc[i, (name, 'mean')]:.4g} ± {self.table.loc[i, (name, 'sd')]:.2g}"
                for name in shown
            )
            lines.append(f"  mode {i} (chains {_numbered(mode)}): {values}")
        return "\n".join([*lines, self._advice()])

    __repr__ = __str__

    def plot(self) -> Figure:
        """Traces of the scalars that tell the modes apart, one colour for each mode."""
        names = [name for name, _ in self._separation()[:4]]
        figure, axes = new_figure(len(names), 1, width=7.0, height=1.5, sharex=True)
        for ax, name in zip(axes[:, 0], names, strict=True):
            for i, mode in enumerate(self.modes):
                for chain in mode:
                    ax.plot(self.draws[name][chain], color=_COLOURS[min(i, len(_COLOURS) - 1)], lw=0.6, alpha=0.8)
            ax.set_ylabel(name)
        axes[-1, 0].set_xlabel("draw")
        axes[-1, 0].locator_params(axis="x", integer=True)
        for i, mode in enumerate(self.modes):
            axes[0, 0].plot([], [], color=_COLOURS[min(i, len(_COLOURS) - 1)], label=f"chains {_numbered(mode)}")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        return figure

    def _density(self, mode: int) -> str:
        if ("lp", "mean") not in self.table:
            return ""
        lp = self.table.loc[mode, ("lp", "mean")]
        return f" (lp {lp:,.0f})" if abs(lp) >= 100 else f" (lp {lp:.3g})"

    def _separation(self) -> list[tuple[str, float]]:
        """Scalars by how far the modes' means lie apart in sds, farthest first; all alike with one mode."""
        names = [name for name in self.draws if name != "lp"] or list(self.draws)
        far = {}
        for name in names:
            means, sds = self.table[(name, "mean")], self.table[(name, "sd")]
            far[name] = float(np.ptp(means) / max(np.sqrt((sds**2).mean()), 1e-300))
        return sorted(far.items(), key=lambda item: -item[1])

    def _advice(self) -> str:
        text = "Do not pool them: how many chains are in a mode says where they started, not how likely it is. "
        if ("lp", "mean") in self.table:
            lp = self.table[("lp", "mean")]
            low = [i for i in range(1, len(lp)) if lp[0] - lp[i] > _HOPELESS]
            if len(low) == len(lp) - 1:
                others = ", ".join(f"mode {i} is lower by {lp[0] - lp[i]:,.0f} nats" for i in low)
                chains = list(self.modes[0])
                return (
                    f"{text}{others[0].upper()}{others[1:]}, so its chains are most likely stuck: go on with "
                    f"posterior.select(chains={chains}), and start the next run there."
                )
        return (
            f"{text}Weigh the modes by stacking: arviz.compare({{mode: posterior.select(chains=list(mode)).to_arviz() "
            "for mode in report.modes}), whose weights are those of predictions; or sharpen the prior if one of them "
            "makes no sense."
        )


def chain_report(posterior: Posterior, names: Sequence[str] | None = None) -> ChainReport:
    r"""Group the chains of a posterior by mode.

    Two chains are in different modes if their means of some scalar (or of the log-density) differ by more than two
    sds of the wider one, and by more than five times what the halves of single chains let expect of noise. A chain
    that goes from one mode to another joins them.

    Args:
        posterior: draws of at least two chains.
        names: latent sites to look at; all by default.

    Returns:
        The report: print it, ``plot()`` it, or look at its ``modes``.

    Raises:
        LatentDEError: less than two chains, or less than eight draws of each.

    References:
        Gelman et al., Bayesian Data Analysis, 3rd ed. (2013), section 11.4.
        Vehtari et al., "Rank-normalization, folding, and localization: an improved R-hat", Bayesian Analysis 16 (2021).
        Yao, Vehtari and Gelman, "Stacking for non-mixing Bayesian computations", JMLR 23 (2022).

    Example:
        >>> import torch
        >>> noise = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
        >>> at = torch.tensor([0.0, 9.0, 0.0, 9.0])[:, None]
        >>> chain_report(Posterior(samples={"omega": at + noise})).modes
        ((0, 2), (1, 3))
    """
    if posterior.num_chains < 2 or posterior.num_draws < 8:
        raise LatentDEError(
            "chain_report compares chains: it needs at least 2 of them with 8 draws each, got "
            f"{posterior.num_chains} with {posterior.num_draws}."
        )
    draws = scalar_draws(posterior, names)
    compared = dict(draws)
    if "lp" in posterior.stats:
        compared.setdefault("lp", posterior.stats["lp"].double().cpu().numpy())
    x = np.stack(list(compared.values()), -1)
    modes = _components(_apart(x))
    if "lp" in compared:
        modes.sort(key=lambda mode: -np.nan_to_num(compared["lp"][mode], nan=-np.inf, neginf=-np.inf).mean())
    r_hat = pd.Series(_rank_r_hat(np.stack(list(draws.values()), -1)), index=list(draws), name="r_hat")
    rows = []
    for mode in modes:
        row = {("chains", ""): _numbered(mode), ("share", ""): len(mode) / posterior.num_chains}
        for name, values in compared.items():
            row |= {(name, "mean"): values[mode].mean(), (name, "sd"): values[mode].std(ddof=1)}
        rows.append(row)
    table = pd.DataFrame(rows)
    table.columns = pd.MultiIndex.from_tuples(table.columns)
    table.index.name = "mode"
    worst = str(r_hat.fillna(0.0).idxmax())
    return ChainReport(table, tuple(tuple(mode) for mode in modes), r_hat, worst, compared)


def _rank_r_hat(x: np.ndarray) -> np.ndarray:
    """Rank-normalised split R-hat of draws ``(chain, draw, d)``, of the places and of the spreads, ``(d,)``."""
    folded = np.abs(x - np.median(x, (0, 1)))
    return np.maximum(*(_split_r_hat(_normal_scores(values)) for values in (x, folded)))


def _normal_scores(x: np.ndarray) -> np.ndarray:
    flat = x.reshape(-1, x.shape[-1])
    return norm.ppf((rankdata(flat, axis=0) - 0.375) / (len(flat) + 0.25)).reshape(x.shape)


def _split_r_hat(x: np.ndarray) -> np.ndarray:
    """Split R-hat of draws ``(chain, draw, d)``, ``(d,)``; where nothing moves, 1 or infinity."""
    means, variances, half = _halves(x)
    within, between = variances.mean((0, 1)), means.reshape(-1, means.shape[-1]).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(between > 0, np.sqrt((half - 1) / half + between / within), 1.0)


def _apart(x: np.ndarray) -> np.ndarray:
    """Which pairs of chains are in different modes, ``(C, C)`` bool."""
    means, variances, half = _halves(x)
    # Medians over chains: one that drifts, or several that jump, must not hide the modes of the others. Over all
    # scalars together too, since few chains tell little by one of them.
    spread = np.maximum(np.median(variances, (0, 1)), np.finfo(float).tiny)
    drift = (means[:, 0] - means[:, 1]) ** 2 / (2 * _MEDIAN_OF_SQUARE * spread)
    noise = spread * np.maximum(np.maximum(np.median(drift, 0), np.median(drift)), 1 / half)
    centre = means.mean(1)
    width = x.var(1, ddof=1)
    apart = np.zeros((len(x), len(x)), bool)
    for i in range(len(x)):
        least = np.maximum(_SDS**2 * noise, _WIDTHS**2 * np.maximum(width[i], width))
        apart[i] = ((centre - centre[i]) ** 2 > least).any(-1)
    return apart


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Means and variances of both halves of each chain, ``(C, 2, d)``, and the draws in a half."""
    half = x.shape[1] // 2
    halves = np.stack([x[:, :half], x[:, -half:]], 1)
    return halves.mean(2), halves.var(2, ddof=1), half


def _components(apart: np.ndarray) -> list[list[int]]:
    """Connected components of the chains that are not apart, largest first."""
    left, found = set(range(len(apart))), []
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = set(np.flatnonzero((~apart[sorted(new)]).any(0)).tolist()) - group
        found.append(sorted(group))
        left -= group
    return sorted(found, key=lambda group: (-len(group), group))


def _numbered(mode: Sequence[int]) -> str:
    shown = ", ".join(map(str, list(mode)[:_MOST_SHOWN]))
    return f"{shown}, ... ({len(mode)} of them)" if len(mode) > _MOST_SHOWN else shown

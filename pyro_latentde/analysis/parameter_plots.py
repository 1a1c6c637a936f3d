# SPDX-License-Identifier: Apache-2.0
"""Figures of parameters: prior against posterior, and pairs, in plain matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_latentde.analysis.drawing import BLUE, GREY, VERMILION, Units, add_legend, new_figure, with_unit
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_pair", "plot_prior_posterior"]

_MAX_SCALARS = 12


def plot_prior_posterior(
    prior: Posterior, posterior: Posterior, names: Sequence[str] | None = None, *, units: Units = None
) -> Figure:
    """Histograms of each scalar parameter before (grey) and after (blue) the data.

    Args:
        prior: result of ``infer.prior``.
        posterior: the posterior.
        names: latent sites; by default all that both have.
        units: unit of each site, by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: more than twelve scalars, or none in common.
    """
    shared = [name for name in names or posterior.samples if name in prior.samples]
    after = _scalars(posterior, shared)
    before = _scalars(prior, shared)  # in the same order; names may differ, where only one of them knows its series
    columns = min(3, len(after))
    figure, axes = new_figure(math.ceil(len(after) / columns), columns, width=2.5 * columns, height=2.0)
    for ax in axes.ravel()[len(after) :]:
        ax.remove()
    for ax, (name, values), drawn in zip(axes.ravel(), after.items(), before.values(), strict=False):
        low, high = np.quantile(drawn, [0.01, 0.99])
        low, high = min(low, values.min()), max(high, values.max())
        inside = drawn[(drawn >= low) & (drawn <= high)]
        weight = np.full(len(inside), 1 / (len(drawn) * (high - low) / 40))
        ax.hist(inside, np.linspace(low, high, 41), weights=weight, color=GREY, alpha=0.55, label="prior")
        ax.hist(values, _bins(values), density=True, color=BLUE, alpha=0.75, label="posterior")
        ax.set_xlabel(with_unit(name, units, 0, key=name.split("[")[0]))
        ax.set_yticks([])
        ax.spines["left"].set_visible(False)
    add_legend(figure, axes.ravel()[0])
    return figure


def plot_pair(posterior: Posterior, names: Sequence[str] | None = None, *, units: Units = None) -> Figure:
    """Every scalar against every other, histograms on the diagonal, divergent draws as orange crosses.

    Args:
        posterior: the draws; at most 2000 of them are drawn as points, and all divergent ones.
        names: latent sites; all by default.
        units: unit of each site, by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: more than twelve scalars.
    """
    scalars = _scalars(posterior, list(names or posterior.samples))
    # The unit gets a line of its own: side by side, labels of narrow panels would run into each other.
    labels = [with_unit(name, units, 0, key=name.split("[")[0], between="\n") for name in scalars]
    size = len(scalars)
    values = np.stack(list(scalars.values()))
    diverging = posterior.stats.get("diverging")
    bad = np.zeros(values.shape[1], bool) if diverging is None else diverging.flatten().cpu().bool().numpy()
    shown = np.flatnonzero(~bad)
    shown = shown[:: max(1, len(shown) // 2000)]
    figure, axes = new_figure(size, size, width=1.3 * size + 0.6, height=1.3)
    for i in range(size):
        for j in range(size):
            ax = axes[i, j]
            if j > i:
                ax.remove()
                continue
            if i == j:
                ax.hist(values[i], _bins(values[i]), color=BLUE, alpha=0.75)
                ax.set_yticks([])
            else:
                ax.plot(
                    values[j, shown],
                    values[i, shown],
                    ".",
                    color=BLUE,
                    ms=2,
                    alpha=0.25,
                    mew=0,
                    rasterized=True,
                )
                ax.plot(values[j, bad], values[i, bad], "x", color=VERMILION, ms=4, mew=1.1, zorder=3)
            _sparse_ticks(ax, bottom=i == size - 1, left=j == 0 and i > 0)
            if i == size - 1:
                ax.set_xlabel(labels[j], fontsize=9)
            if j == 0 and i > 0:
                ax.set_ylabel(labels[i], fontsize=9)
    figure.align_labels()
    if bad.any():
        figure.text(0.99, 0.99, f"× {int(bad.sum())} divergent draws", color=VERMILION, ha="right", va="top")
    return figure


def _sparse_ticks(ax: Axes, bottom: bool, left: bool) -> None:
    ax.locator_params(axis="x", nbins=3)
    if ax.get_yticks().size:
        ax.locator_params(axis="y", nbins=3)
    ax.tick_params(labelbottom=bottom, labelleft=left, labelsize=7)


def _scalars(posterior: Posterior, names: Sequence[str]) -> dict[str, np.ndarray]:
    drawn = scalar_draws(posterior, names) if names else {}
    scalars = {name: values.flatten() for name, values in drawn.items()}
    if not 1 <= len(scalars) <= _MAX_SCALARS:
        raise LatentDEError(
            f"can draw 1 to {_MAX_SCALARS} scalars, got {len(scalars)}; choose names= out of {list(names)}"
        )
    return scalars


def _bins(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    return np.linspace(low, high if high > low else low + 1.0, 31)

# SPDX-License-Identifier: Apache-2.0
"""Figures of chains: draws in the order in which they were made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from pyro_latentde.analysis.drawing import BLUE, GREY, INK, VERMILION, Units, new_figure, with_unit
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_trace"]

_MAX_SCALARS = 12
# Okabe and Ito's, one for each chain; more lines on top of each other show nothing.
_COLOURS = (BLUE, VERMILION, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY, INK)
_MAX_CHAINS = len(_COLOURS)
_MAX_POINTS = 1000


def plot_trace(posterior: Posterior, names: Sequence[str] | None = None, *, units: Units = None) -> Figure:
    """Draw after draw of each scalar, a line for each chain; of many chains, the highest, the lowest and some between.

    Args:
        posterior: the draws of a sampler.
        names: latent sites; all by default.
        units: unit of each site, by name, or one for all.

    Returns:
        The figure.

    Raises:
        LatentDEError: more than twelve scalars.

    Example:
        >>> import torch
        >>> figure = plot_trace(Posterior(samples={"k": torch.randn(4, 100)}))
        >>> [len(ax.lines) for ax in figure.axes]
        [4]
    """
    scalars = scalar_draws(posterior, names)
    if len(scalars) > _MAX_SCALARS:
        raise LatentDEError(f"can draw at most {_MAX_SCALARS} scalars, got {len(scalars)}; choose names=")
    columns = min(2, len(scalars))
    figure, axes = new_figure(math.ceil(len(scalars) / columns), columns, width=4.0 * columns, height=1.4, sharex=True)
    for ax in axes.ravel()[len(scalars) :]:
        ax.remove()
    for ax, (name, values) in zip(axes.ravel(), scalars.items(), strict=False):
        shown = _some_chains(values)
        every = max(1, shown.shape[1] // _MAX_POINTS)
        for colour, chain in zip(_COLOURS, shown, strict=False):
            ax.plot(np.arange(0, chain.size, every), chain[::every], lw=0.5, color=colour, alpha=0.7)
        ax.set_ylabel(with_unit(name, units, 0, key=name.split("[")[0]), fontsize=9)
        ax.margins(x=0.01)
    for ax in axes.ravel()[max(0, len(scalars) - columns) : len(scalars)]:
        ax.set_xlabel("draw", fontsize=9)
        ax.locator_params(axis="x", integer=True)
        ax.tick_params(labelbottom=True)
    if posterior.num_chains > _MAX_CHAINS:
        text = f"{_MAX_CHAINS} of {posterior.num_chains} chains, from the lowest mean to the highest"
        figure.suptitle(text, fontsize=8)
    return figure


def _some_chains(values: np.ndarray) -> np.ndarray:
    """At most eight of the chains (chain, draw), evenly spaced in the order of their means."""
    if len(values) <= _MAX_CHAINS:
        return values
    order = np.argsort(values.mean(1))
    return values[order[np.linspace(0, len(values) - 1, _MAX_CHAINS).round().astype(int)]]

# SPDX-License-Identifier: Apache-2.0
"""Pictures of ranks that should be uniform."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from pyro_latentde.analysis.drawing import BLUE, GREY, new_figure
from pyro_latentde.analysis.rank_tests import uniform_band

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_ranks"]

MOST_BINS = 16


def plot_ranks(ranks: pd.DataFrame, num_ranks: int) -> Figure:
    """Histograms of ranks with 99 % bands above, distribution function minus the uniform one below.

    Args:
        ranks: one row for each replication, one column for each scalar.
        num_ranks: L; ranks are 0, ..., L.

    Returns:
        The figure, two rows for each four scalars.
    """
    from scipy.stats import binom  # slow to import

    bins = max(k for k in range(1, MOST_BINS + 1) if (num_ranks + 1) % k == 0)
    columns = min(4, ranks.shape[1])
    blocks = -(-ranks.shape[1] // columns)
    figure, axes = new_figure(2 * blocks, columns, width=2.6 * columns, height=1.8)
    low, high = binom.interval(0.99, len(ranks), 1 / bins)
    band = uniform_band(len(ranks), num_ranks)
    x = np.arange(1, num_ranks + 2) / (num_ranks + 1)
    for i, (name, column) in enumerate(ranks.items()):
        above, below = axes[2 * (i // columns), i % columns], axes[2 * (i // columns) + 1, i % columns]
        above.axhspan(low, high, color=GREY, alpha=0.3, lw=0)
        above.hist(column, bins=bins, range=(-0.5, num_ranks + 0.5), color=BLUE, alpha=0.8)
        above.set(xlabel="rank", xlim=(-0.5, num_ranks + 0.5))
        above.set_title(name, fontsize=9)
        share = np.cumsum(np.bincount(column, minlength=num_ranks + 1)) / len(ranks) - x
        below.fill_between(x, *band, color=GREY, alpha=0.3, lw=0)
        below.plot(x, share, color=BLUE)
        below.set(xlabel="rank / L", xlim=(0, 1))
        if i % columns == 0:
            above.set_ylabel("replications")
            below.set_ylabel("ECDF - uniform")
    for i in range(ranks.shape[1], columns * blocks):
        for row in (0, 1):
            axes[2 * (i // columns) + row, i % columns].set_visible(False)
    return figure

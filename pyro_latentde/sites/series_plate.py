# SPDX-License-Identifier: Apache-2.0
"""The plate of a batch of series, with the scale that makes a minibatch of windows stand for the whole data set."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyro
from torch import Tensor

from pyro_latentde.data.series import Series

__all__ = ["series_plate"]


@contextmanager
def series_plate(series: Series, name: str = "series", dim: int = -1) -> Iterator[Tensor]:
    r"""Plate over the rows of a `Series`, in models and in guides.

    .. math:: \log p = \frac{N}{B} \frac{T}{W} \sum_{b=1}^{B} \log p_b

    for B of N series (`Series.batch`) and random windows of W of their T times (``Series.window(..., sample=True)``):
    an unbiased estimate of the sum over all series, and over the windows each of them holds, one beside the other. Each
    window counts as a series, with local sites of its own. Sites outside the plate are not scaled: they exist once.

    Args:
        series: B series; whole data sets have N = B and T = W, and so have plain cuts of them.
        name: name of the plate.
        dim: batch dimension of the rows, negative.

    Yields:
        (B,) positions of the rows in the data set.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> series = lde.Series.from_tensors(torch.arange(4.0), torch.zeros(10, 4, 1))
        >>> def model(series):
        ...     with lde.series_plate(series) as rows:
        ...         return rows, pyro.sample("z0", dist.Normal(0.0, 1.0))
        >>> trace = pyro.poutine.trace(model).get_trace(series.batch([3, 7]).window(0, 2, sample=True))
        >>> trace.nodes["_RETURN"]["value"][0], trace.nodes["z0"]["scale"]
        (tensor([3, 7]), 10.0)
    """
    size = len(series) if series.population is None else series.population
    windows = nullcontext() if series.time_weight == 1 else pyro.poutine.scale(scale=series.time_weight)
    with windows, pyro.plate(name, size, subsample=series.index, dim=dim) as rows:
        yield rows

# SPDX-License-Identifier: Apache-2.0
"""The scalars of draws, by name: what tables and reports have a row or a column for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.arviz_export import element_names, make_groups, series_labels

__all__ = ["scalar_draws"]


def scalar_draws(posterior: Posterior, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Draws of each scalar, named as in :meth:`.Posterior.summary`: ``{"z0[hare]": (chain, draw), "CL[Ann]": ...}``.

    Args:
        posterior: the draws.
        names: latent sites; all by default.
    """
    chosen = posterior if names is None else posterior.select(names)
    groups = make_groups(chosen, ["posterior"], coords=series_labels(chosen))
    scalars: dict[str, np.ndarray] = {}
    for name, array in groups.data["posterior"].items():
        flat = np.moveaxis(array.reshape(*array.shape[:2], -1).astype(float), -1, 0)
        scalars |= dict(zip(element_names(name, array.shape[2:], groups), flat, strict=True))
    return scalars

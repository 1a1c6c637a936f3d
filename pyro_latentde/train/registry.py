# SPDX-License-Identifier: Apache-2.0
"""All recipes by name."""

from __future__ import annotations

from pyro_latentde.errors import LatentDEError
from pyro_latentde.train import cardiovascular, double_pendulum, events, pendulum, series, stuart_landau
from pyro_latentde.train.recipe import Recipe

__all__ = ["RECIPES", "find_recipe"]

RECIPES: dict[str, Recipe] = {
    **pendulum.RECIPES,
    **double_pendulum.RECIPES,
    **cardiovascular.RECIPES,
    **stuart_landau.RECIPES,
    **series.RECIPES,
    **events.RECIPES,
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        LatentDEError: there is none; those that there are.

    Example:
        >>> find_recipe("goku-pendulum").title
        'GOKU-net on pendulum videos: the field is known, the length is not'
    """
    if name not in RECIPES:
        raise LatentDEError(f"there is no recipe {name!r}; there are: {', '.join(RECIPES)}")
    return RECIPES[name]

# SPDX-License-Identifier: Apache-2.0
"""Trainings of the zoo's pairs on its systems: ``pyro-latentde train``."""

from pyro_latentde.train import cardiovascular, double_pendulum, pendulum, series, stuart_landau
from pyro_latentde.train.recipe import Config, Recipe, Split, Truth
from pyro_latentde.train.run import run_recipe

__all__ = ["RECIPES", "Config", "Recipe", "Split", "Truth", "run_recipe"]

RECIPES: dict[str, Recipe] = {
    **pendulum.RECIPES,
    **double_pendulum.RECIPES,
    **cardiovascular.RECIPES,
    **stuart_landau.RECIPES,
    **series.RECIPES,
}

# SPDX-License-Identifier: Apache-2.0
"""Trainings of the zoo's pairs on its systems: ``pyro-latentde train``."""

from pyro_latentde.train.recipe import Config, Recipe, Split, Truth
from pyro_latentde.train.registry import RECIPES, find_recipe
from pyro_latentde.train.run import run_recipe
from pyro_latentde.train.saved import default_folder, load_run, train

__all__ = [
    "RECIPES",
    "Config",
    "Recipe",
    "Split",
    "Truth",
    "default_folder",
    "find_recipe",
    "load_run",
    "run_recipe",
    "train",
]

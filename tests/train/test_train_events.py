# SPDX-License-Identifier: Apache-2.0
"""The rate of a Poisson process from its events: a short training, and the recipe from end to end."""

import json

import pytest
import torch

from pyro_latentde.train import RECIPES, events, load_run, train

RECIPE = RECIPES["latent-ode-events"]


def test_the_error_is_a_part_of_the_variance():
    true = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    assert events._error(torch.tensor([[1.0, 3.0], [5.0, 6.0]]), true) == 0.5
    assert events._error(true.mean(1, keepdim=True).expand(2, 2), true) == 1.0


def test_a_short_training_recovers_the_intensity(tmp_path):
    """A seventh of the quick configuration's updates; without learning the error is about one."""
    numbers = {"steps": 130, "train": 200, "heldout": 10, "test": 20}
    metrics = train("latent-ode-events", out=tmp_path, overrides=numbers, progress=False, say=lambda line: None)
    assert metrics == json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert metrics["intensity_error"] < 0.3 and metrics["intensity_error_mean_rate"] > 0.9
    assert metrics["skipped"] == 0
    assert {"intensity.png", "training.png"} <= {path.name for path in tmp_path.iterdir()}
    fit, split, recipe = load_run(tmp_path)
    again = recipe.measure(fit, split, tmp_path)
    assert again["intensity_error"] == pytest.approx(metrics["intensity_error"], rel=1e-6)

# SPDX-License-Identifier: Apache-2.0
"""The hopper: what it says without its packages, what it asks of MuJoCo, and the robot itself where it is installed."""

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from pyro_latentde.models.systems import hopper

INSTALLED = all(importlib.util.find_spec(name) for name in ("mujoco", "dm_control"))


def test_missing_packages_are_named(monkeypatch):
    found = {"mujoco": object(), "dm_control": None}
    monkeypatch.setattr(hopper, "find_spec", found.get)
    with pytest.raises(ImportError, match=r"needs dm-control: .* pip install --no-deps dm-control"):
        hopper.simulate(2)
    monkeypatch.setattr(hopper, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'needs mujoco and dm-control: .*pip install "mujoco<4"'):
        hopper.simulate(2)


@pytest.fixture
def free_fall(monkeypatch, tmp_path):
    """A MuJoCo in which every coordinate moves at its constant speed."""
    module = ModuleType("mujoco")
    module.files = []
    module.MjModel = SimpleNamespace(from_xml_path=lambda path: module.files.append(path))
    module.MjData = lambda robot: SimpleNamespace(qpos=np.ones(7), qvel=np.ones(7))
    module.mj_resetData = lambda robot, data: None

    def step(robot, data):
        data.qpos += 0.005 * data.qvel

    module.mj_step = step
    monkeypatch.setitem(sys.modules, "mujoco", module)
    suite = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(hopper, "find_spec", {"mujoco": object(), "dm_control": suite}.get)
    return module


def test_series_start_with_the_first_state_and_are_scaled(free_fall, tmp_path):
    series, z, truth = hopper.simulate(300, seed=1, num_times=6)
    assert free_fall.files == [str(tmp_path / "suite" / "hopper.xml")]
    assert z.shape == (300, 6, 14) and truth == {} and series.names == hopper.STATES
    torch.testing.assert_close(z[:, 5, :7], z[:, 0, :7] + 0.025 * z[:, 0, 7:])
    torch.testing.assert_close(series.times[0], 0.005 * torch.arange(6.0))
    for part, low, high in ((z[:, 0, :2], 0, 0.5), (z[:, 0, 2:7], -2, 2), (z[:, 0, 7:], -5, 5)):
        assert low <= part.min() < low + 0.02 * (high - low) and high - 0.02 * (high - low) < part.max() <= high
    expected = (z - z.flatten(0, 1).min(0).values) / z.flatten(0, 1).max(0).values
    torch.testing.assert_close(series.values.double(), expected, atol=1e-5, rtol=1e-5)
    raw = hopper.simulate(10, seed=1, num_times=6, scaled=False)
    torch.testing.assert_close(raw.series.values.double(), z[:10], atol=1e-6, rtol=1e-6)


def test_sizes_are_checked_first():
    with pytest.raises(ValueError, match="n: expected at least 1"):
        hopper.simulate(0)


if INSTALLED:  # a test, not a skip, where the packages are

    def test_ridge_floor_of_the_robot():
        """Frames 66-199 from frames 0-65 by ridge regression: published 1.79e-2 with 8,000 series, more with fewer."""
        x = hopper.simulate(1000).series.values.double()
        past = torch.cat([x[:, :66].flatten(1), torch.ones(1000, 1)], dim=1)
        known, wanted = past[:800], x[:800, 66:].flatten(1)
        weights = torch.linalg.solve(known.T @ known + 10 * torch.eye(known.shape[1]), known.T @ wanted)
        error = (past[800:] @ weights - x[800:, 66:].flatten(1)).square().mean().item()
        assert 1.5e-2 < error < 2.6e-2

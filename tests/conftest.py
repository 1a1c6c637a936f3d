# SPDX-License-Identifier: Apache-2.0
"""Every test starts from the same state: seeded, validated, one thread, no windows."""

import os
import sys

os.environ.setdefault("MPLBACKEND", "Agg")
if "--run-gpu" not in sys.argv and "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit it
    os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # read when Numba is first imported

import pyro
import pytest
import torch

import pyro_latentde as lde

torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    lde.set_num_threads(1)  # the processes share the cores


def pytest_addoption(parser):
    parser.addoption("--run-gpu", action="store_true", help="also run the tests that need a CUDA device")


def pytest_collection_modifyitems(config, items):
    """Deselect (not skip) GPU tests unless asked for: a skipped test would look like a missing one.

    The files at the top run notebooks and commands and take longest: first, so that no process is alone with one at
    the end.
    """
    items.sort(key=lambda item: len(item.path.parts))
    if config.getoption("--run-gpu"):
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if item not in set(gpu)]


@pytest.fixture(autouse=True)
def clean_state():
    """Clear what Pyro and torch keep globally, before and after each test."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
    pyro.enable_validation(True)

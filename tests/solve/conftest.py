# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled by these tests live in a folder of the test session, not in the user's cache."""

import os

import pytest

from pyro_latentde.solve.fused.kernel_cache import cache_folder


@pytest.fixture(scope="session", autouse=True)
def kernel_folder(tmp_path_factory):
    """An empty kernel cache, shared by all tests of the session."""
    folder = tmp_path_factory.mktemp("kernels")
    before = os.environ.get("PYRO_LATENTDE_CACHE")
    os.environ["PYRO_LATENTDE_CACHE"] = str(folder)
    cache_folder.cache_clear()
    yield folder
    if before is None:
        del os.environ["PYRO_LATENTDE_CACHE"]
    else:
        os.environ["PYRO_LATENTDE_CACHE"] = before
    cache_folder.cache_clear()

# SPDX-License-Identifier: Apache-2.0
"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import pkgutil

import pytest

import pyro_latentde
import pyro_latentde.models


def examples():
    for package in (pyro_latentde, pyro_latentde.models):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if found.name.rsplit(".", 1)[-1] == "__main__":
                continue
            module = importlib.import_module(found.name)
            for test in doctest.DocTestFinder(exclude_empty=True).find(module):
                if test.examples:
                    yield test.name, test


@pytest.mark.parametrize("test", [pytest.param(test, id=name) for name, test in dict(examples()).items()])
def test_example(test):
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(test, out=report.append)
    assert runner.failures == 0, "".join(report)

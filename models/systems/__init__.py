# SPDX-License-Identifier: Apache-2.0
"""Systems of differential equations, one per file: equations, priors, a simulator and a Pyro model."""

from pyro_latentde.models.systems import linear, lotka_volterra

__all__ = ["linear", "lotka_volterra"]

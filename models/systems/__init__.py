# SPDX-License-Identifier: Apache-2.0
"""Systems of differential equations, one per file: equations, priors, a simulator and, for some, a Pyro model."""

from pyro_latentde.models.systems import (
    bursts,
    cardiovascular,
    double_pendulum_pixels,
    hopper,
    linear,
    lotka_volterra,
    pendulum_pixels,
    periodic,
    spirals,
    stuart_landau,
)

__all__ = [
    "bursts",
    "cardiovascular",
    "double_pendulum_pixels",
    "hopper",
    "linear",
    "lotka_volterra",
    "pendulum_pixels",
    "periodic",
    "spirals",
    "stuart_landau",
]

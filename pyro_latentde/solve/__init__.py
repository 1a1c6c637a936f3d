# SPDX-License-Identifier: Apache-2.0
"""Layer 1: solving ordinary differential equations, torch only."""

from pyro_latentde.solve.integrate import odesolve
from pyro_latentde.solve.solution import Solution, Status

__all__ = ["Solution", "Status", "odesolve"]

# SPDX-License-Identifier: Apache-2.0
"""Distributions that Pyro does not have."""

from pyro_latentde.distributions.joint import Joint
from pyro_latentde.distributions.poisson_process import GridPoissonProcess, PoissonProcess
from pyro_latentde.distributions.truncated_normal import TruncatedNormal

__all__ = ["GridPoissonProcess", "Joint", "PoissonProcess", "TruncatedNormal"]

# SPDX-License-Identifier: Apache-2.0
"""Distributions that Pyro does not have."""

from pyro_latentde.distributions.truncated_normal import TruncatedNormal

__all__ = ["TruncatedNormal"]

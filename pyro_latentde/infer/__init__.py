# SPDX-License-Identifier: Apache-2.0
"""Inference: draws from the posterior of a Pyro model."""

from pyro_latentde.infer.nuts_run import nuts

__all__ = ["nuts"]

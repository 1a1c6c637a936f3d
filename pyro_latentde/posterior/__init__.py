# SPDX-License-Identifier: Apache-2.0
"""The posterior and what can be done with it: export to ArviZ, prediction, storage."""

from pyro_latentde.posterior.model_sites import ModelSites, Plate, Site, inspect_model
from pyro_latentde.posterior.posterior import Posterior

__all__ = ["ModelSites", "Plate", "Posterior", "Site", "inspect_model"]

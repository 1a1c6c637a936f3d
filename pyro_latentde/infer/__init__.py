# SPDX-License-Identifier: Apache-2.0
"""Inference: draws from the posterior of a Pyro model."""

from pyro_latentde.infer import schedules
from pyro_latentde.infer.ensemble_run import ensemble_hmc
from pyro_latentde.infer.fit import Fit
from pyro_latentde.infer.horizon import lengthen
from pyro_latentde.infer.neural_posterior import npe
from pyro_latentde.infer.nuts_run import nuts
from pyro_latentde.infer.prior_draws import prior
from pyro_latentde.infer.refinement import refine
from pyro_latentde.infer.sgmcmc_run import psgld, sghmc, sgld
from pyro_latentde.infer.sleep import Sleep
from pyro_latentde.infer.svi import fit_svi

__all__ = [
    "Fit",
    "Sleep",
    "ensemble_hmc",
    "fit_svi",
    "lengthen",
    "npe",
    "nuts",
    "prior",
    "psgld",
    "refine",
    "schedules",
    "sghmc",
    "sgld",
]

# SPDX-License-Identifier: Apache-2.0
"""Looking at results: figures and films."""

from pyro_latentde.analysis.film import animation, film_strip
from pyro_latentde.analysis.latent_plots import forecast_bands, latent_trajectories, recovery
from pyro_latentde.analysis.parameter_plots import plot_pair, plot_prior_posterior
from pyro_latentde.analysis.plots import plot_phase, plot_trajectories
from pyro_latentde.analysis.training_plots import training_curves

__all__ = [
    "animation",
    "film_strip",
    "forecast_bands",
    "latent_trajectories",
    "plot_pair",
    "plot_phase",
    "plot_prior_posterior",
    "plot_trajectories",
    "recovery",
    "training_curves",
]

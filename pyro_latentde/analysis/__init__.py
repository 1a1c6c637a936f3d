# SPDX-License-Identifier: Apache-2.0
"""Looking at results: figures."""

from pyro_latentde.analysis.parameter_plots import plot_pair, plot_prior_posterior
from pyro_latentde.analysis.plots import plot_phase, plot_trajectories

__all__ = ["plot_pair", "plot_phase", "plot_prior_posterior", "plot_trajectories"]

# SPDX-License-Identifier: Apache-2.0
"""Looking at results: figures and films, and whether to believe them."""

from pyro_latentde.analysis.chain_modes import ChainReport, chain_report
from pyro_latentde.analysis.film import animation, film_strip
from pyro_latentde.analysis.information import Identifiability, identifiability
from pyro_latentde.analysis.latent_plots import forecast_bands, latent_trajectories, recovery
from pyro_latentde.analysis.parameter_plots import plot_pair, plot_prior_posterior
from pyro_latentde.analysis.plots import plot_phase, plot_trajectories
from pyro_latentde.analysis.sbc import Calibration, calibration
from pyro_latentde.analysis.solver_audit import SolverReport, solver_check
from pyro_latentde.analysis.stress import StressReport, stress_test
from pyro_latentde.analysis.trace_plots import plot_trace
from pyro_latentde.analysis.training_plots import training_curves

__all__ = [
    "Calibration",
    "ChainReport",
    "Identifiability",
    "SolverReport",
    "StressReport",
    "animation",
    "calibration",
    "chain_report",
    "film_strip",
    "forecast_bands",
    "identifiability",
    "latent_trajectories",
    "plot_pair",
    "plot_phase",
    "plot_prior_posterior",
    "plot_trace",
    "plot_trajectories",
    "recovery",
    "solver_check",
    "stress_test",
    "training_curves",
]

# SPDX-License-Identifier: Apache-2.0
"""Inference in latent differential-equation models, in Pyro."""

from pyro_latentde import analysis, errors, infer, models, train
from pyro_latentde.control import clear_cache, set_num_threads
from pyro_latentde.data.series import Series
from pyro_latentde.posterior.posterior import Posterior
from pyro_latentde.sites.dde_site import dde
from pyro_latentde.sites.events_site import events
from pyro_latentde.sites.observe_site import observe
from pyro_latentde.sites.ode_site import ode
from pyro_latentde.sites.population_site import population
from pyro_latentde.sites.series_plate import series_plate
from pyro_latentde.sites.settings import solver
from pyro_latentde.sites.steady_state_site import steady_state
from pyro_latentde.solve.delays.integrate import ddesolve
from pyro_latentde.solve.events.event import Event
from pyro_latentde.solve.integrate import odesolve
from pyro_latentde.solve.solution import Solution, Status
from pyro_latentde.solve.steady.solve import SteadyState, steady_state_solve
from pyro_latentde.solve.stops.dose import Dose
from pyro_latentde.solve.stops.inputs import Input

__all__ = [
    "Dose",
    "Event",
    "Input",
    "Posterior",
    "Series",
    "Solution",
    "Status",
    "SteadyState",
    "analysis",
    "clear_cache",
    "dde",
    "ddesolve",
    "errors",
    "events",
    "infer",
    "models",
    "observe",
    "ode",
    "odesolve",
    "population",
    "series_plate",
    "set_num_threads",
    "solver",
    "steady_state",
    "steady_state_solve",
    "train",
]

__version__ = "0.1.0"

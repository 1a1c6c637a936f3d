# SPDX-License-Identifier: Apache-2.0
"""From a table to a posterior and its report: what the command line does, as functions."""

from pyro_latentde.fitting.methods import METHODS
from pyro_latentde.fitting.run import fit_table, report_again
from pyro_latentde.fitting.system import find_system

__all__ = ["METHODS", "find_system", "fit_table", "report_again"]

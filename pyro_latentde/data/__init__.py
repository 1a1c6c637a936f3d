# SPDX-License-Identifier: Apache-2.0
"""Observed series, and data sets that come with the package."""

from pyro_latentde.data.builtin import load_boarding_school, load_lynx_hare
from pyro_latentde.data.event_times import EventTimes
from pyro_latentde.data.series import Series

__all__ = ["EventTimes", "Series", "load_boarding_school", "load_lynx_hare"]

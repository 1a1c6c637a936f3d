# SPDX-License-Identifier: Apache-2.0
"""Data sets that come with the package."""

from importlib import resources
from typing import Any

from pyro_latentde.data.series import Series

__all__ = ["load_boarding_school", "load_lynx_hare"]


def load_boarding_school() -> Series:
    """Boys in bed with influenza, at a boarding school of 763 boys in England, January and February 1978.

    Returns:
        One series: times (1, 14), days 1 to 14, of which the first is 22 January; values (1, 14, 1), the number of
        boys in bed on each; complete, float64.

    References:
        Communicable Disease Surveillance Centre (1978). Influenza in a boarding school. British Medical Journal,
        4 March, page 587.

    Example:
        >>> from pyro_latentde.data import load_boarding_school
        >>> load_boarding_school()
        Series(1 series, 14 times, 1 values (in_bed), 14 observed, 0 missing)
    """
    return _read("boarding_school.csv", time="day", values=["in_bed"])


def load_lynx_hare() -> Series:
    """Pelts of snowshoe hare and Canada lynx bought by the Hudson's Bay Company, 1900 to 1920.

    Returns:
        One series: times (1, 21) in years, values (1, 21, 2): hare and lynx in thousands of pelts;
        complete, float64.

    References:
        Howard, P. (2009). Modeling basics. Data after Odum, E. P. (1953), Fundamentals of Ecology.
        posteriordb, `hudson_lynx_hare`.

    Example:
        >>> from pyro_latentde.data import load_lynx_hare
        >>> load_lynx_hare()
        Series(1 series, 21 times, 2 values (hare, lynx), 42 observed, 0 missing)
    """
    return _read("hudson_lynx_hare.csv", time="year", values=["hare", "lynx"])


def _read(name: str, **columns: Any) -> Series:
    with resources.as_file(resources.files("pyro_latentde.data") / name) as file:
        return Series.from_csv(file, **columns)

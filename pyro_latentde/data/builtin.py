# SPDX-License-Identifier: Apache-2.0
"""Data sets that come with the package."""

from importlib import resources

from pyro_latentde.data.series import Series

__all__ = ["load_lynx_hare"]


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
    path = resources.files("pyro_latentde.data") / "hudson_lynx_hare.csv"
    with resources.as_file(path) as file:
        return Series.from_csv(file, time="year", values=["hare", "lynx"])

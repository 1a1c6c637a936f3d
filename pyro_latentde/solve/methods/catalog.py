# SPDX-License-Identifier: Apache-2.0
"""The numerical methods by name."""

from dataclasses import replace

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.choices import not_among
from pyro_latentde.solve.methods.explicit import EXPLICIT
from pyro_latentde.solve.methods.implicit import IMPLICIT
from pyro_latentde.solve.methods.record import Method
from pyro_latentde.solve.methods.symplectic import SYMPLECTIC as _SYMPLECTIC

__all__ = ["METHODS", "SYMPLECTIC", "Method", "get_method"]

_TSIT5, _KVAERNO5 = EXPLICIT[0], IMPLICIT[0]
_AUTO = replace(_TSIT5, name="auto", kind="switching", stiff=_KVAERNO5)

#: Methods for every field, and those for separable Hamiltonians.
METHODS: dict[str, Method] = {method.name: method for method in (*EXPLICIT, *IMPLICIT, _AUTO)}
SYMPLECTIC: dict[str, Method] = {method.name: method for method in _SYMPLECTIC}


def get_method(name: str) -> Method:
    """The method called ``name``.

    Args:
        name: A key of ``METHODS`` or ``SYMPLECTIC``.

    Returns:
        Its record.

    Raises:
        SolveError: If no method has that name; the message lists the names and the closest one.

    Example:
        >>> from pyro_latentde.solve.methods.catalog import get_method
        >>> get_method("dopri8").order
        8
    """
    known = METHODS.get(name) or SYMPLECTIC.get(name)
    if known is not None:
        return known
    raise SolveError(not_among("method", name, (*METHODS, *SYMPLECTIC)))

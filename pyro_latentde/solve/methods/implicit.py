# SPDX-License-Identifier: Apache-2.0
"""Implicit Runge-Kutta methods (ESDIRK), for stiff equations."""

import math

from pyro_latentde.solve.methods import esdirk_tables
from pyro_latentde.solve.methods.record import Method, Row

__all__ = ["IMPLICIT"]


def _esdirk(
    name: str,
    order: int,
    a: tuple[Row, ...],
    interpolant: tuple[Row, ...],
    reference: str,
    *,
    embedded: Row,
    filtered: bool = False,
) -> Method:
    b = a[-1]
    return Method(
        name=name,
        order=order,
        kind="implicit",
        c=tuple(math.fsum(row) for row in a[:-1]) + (1.0,),
        a=a,
        b=b,
        errors=(tuple(x - y for x, y in zip(b, (*embedded, *[0.0] * (len(b) - len(embedded))), strict=True)),),
        error_order=order,
        fsal=True,
        dense_c=(),
        dense_a=(),
        interpolant=interpolant,
        reference=reference,
        filtered=filtered,
    )


_KVAERNO3 = _esdirk(
    "kvaerno3",
    3,
    esdirk_tables.KVAERNO3,
    esdirk_tables.hermite(esdirk_tables.KVAERNO3[-1]),
    "Kvaerno, BIT 44 (2004) 489",
    embedded=esdirk_tables.KVAERNO3[-2],
)

_KVAERNO5 = _esdirk(
    "kvaerno5",
    5,
    esdirk_tables.KVAERNO5,
    esdirk_tables.KVAERNO5_INTERPOLANT,
    "Kvaerno, BIT 44 (2004) 489",
    embedded=esdirk_tables.KVAERNO5[-2],
)

_TRBDF2 = _esdirk(
    "trbdf2",
    2,
    esdirk_tables.TRBDF2,
    esdirk_tables.hermite(esdirk_tables.TRBDF2[-1]),
    "Hosea, Shampine, Appl. Numer. Math. 20 (1996) 21",
    embedded=esdirk_tables.TRBDF2_EMBEDDED,
    filtered=True,
)

IMPLICIT = (_KVAERNO5, _KVAERNO3, _TRBDF2)

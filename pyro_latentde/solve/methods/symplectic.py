# SPDX-License-Identifier: Apache-2.0
"""Symplectic methods for separable Hamiltonians: compositions of kicks and drifts, the same read backwards."""

from pyro_latentde.solve.methods.record import Method, Row

__all__ = ["SYMPLECTIC"]


def _composition(name: str, order: int, kicks: Row, drifts: Row, reference: str) -> Method:
    return Method(
        name=name,
        order=order,
        kind="symplectic",
        c=(0.0, 1.0),
        a=((), ()),
        b=(),
        errors=(),
        error_order=None,
        fsal=True,
        dense_c=(),
        dense_a=(),
        interpolant=(),
        reference=reference,
        kicks=kicks,
        drifts=drifts,
    )


_LEAPFROG = _composition(
    "leapfrog",
    2,
    kicks=(1 / 2, 1 / 2),
    drifts=(1.0,),
    reference="Verlet, Phys. Rev. 159 (1967) 98; Hairer, Lubich, Wanner, Acta Numerica 12 (2003) 399",
)

_KICKS = (0.0792036964311957, 0.353172906049774, -0.0420650803577195)
_DRIFTS = (0.209515106613362, -0.143851773179818)
_MIDDLE = 1 / 2 - sum(_DRIFTS)
_BLANES_MOAN4 = _composition(
    "blanes_moan4",
    4,
    kicks=(*_KICKS, 1 - 2 * sum(_KICKS), *_KICKS[::-1]),
    drifts=(*_DRIFTS, _MIDDLE, _MIDDLE, *_DRIFTS[::-1]),
    reference="Blanes, Moan, J. Comput. Appl. Math. 142 (2002) 313, S6",
)

SYMPLECTIC = (_LEAPFROG, _BLANES_MOAN4)

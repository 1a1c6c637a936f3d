# SPDX-License-Identifier: Apache-2.0
"""Explicit Runge-Kutta methods."""

from pyro_latentde.solve.methods import dop853_table
from pyro_latentde.solve.methods.record import Method, Row

__all__ = ["EXPLICIT"]


def _explicit(
    name: str,
    order: int,
    a: tuple[Row, ...],
    b: Row,
    c: Row,
    interpolant: tuple[Row, ...],
    reference: str,
    *,
    errors: tuple[Row, ...] = (),
    error_order: int | None = None,
    fsal: bool = False,
    dense_c: Row = (),
    dense_a: tuple[Row, ...] = (),
) -> Method:
    return Method(
        name=name,
        order=order,
        kind="explicit",
        c=c,
        a=a,
        b=b,
        errors=errors,
        error_order=error_order,
        fsal=fsal,
        dense_c=dense_c,
        dense_a=dense_a,
        interpolant=interpolant,
        reference=reference,
    )


_EULER = _explicit(
    "euler",
    1,
    a=((),),
    b=(1.0,),
    c=(0.0,),
    interpolant=((1.0,),),
    reference="Euler, Institutiones calculi integralis, 1768",
)

_MIDPOINT = _explicit(
    "midpoint",
    2,
    a=((), (1 / 2,)),
    b=(0.0, 1.0),
    c=(0.0, 1 / 2),
    interpolant=((1.0, -1.0), (0.0, 1.0)),
    reference="Runge, Math. Ann. 46 (1895) 167",
)

# The Euler step inside Heun's method is its error estimate.
_HEUN = _explicit(
    "heun",
    2,
    a=((), (1.0,)),
    b=(1 / 2, 1 / 2),
    c=(0.0, 1.0),
    interpolant=((1.0, -1 / 2), (0.0, 1 / 2)),
    errors=((-1 / 2, 1 / 2),),
    error_order=2,
    reference="Heun, Z. Math. Phys. 45 (1900) 23",
)

_RK4 = _explicit(
    "rk4",
    4,
    a=((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
    b=(1 / 6, 1 / 3, 1 / 3, 1 / 6),
    c=(0.0, 1 / 2, 1 / 2, 1.0),
    interpolant=((1.0, -3 / 2, 2 / 3), (0.0, 1.0, -2 / 3), (0.0, 1.0, -2 / 3), (0.0, -1 / 2, 2 / 3)),
    reference="Kutta, Z. Math. Phys. 46 (1901) 435; dense output: Hairer, Norsett, Wanner I, II.6",
)

# The interpolant is the cubic through both ends with the right slopes (Hermite), written in the stages.
_BOSH3 = _explicit(
    "bosh3",
    3,
    a=((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
    b=(2 / 9, 1 / 3, 4 / 9, 0.0),
    c=(0.0, 1 / 2, 3 / 4, 1.0),
    interpolant=((1.0, -4 / 3, 5 / 9), (0.0, 1.0, -2 / 3), (0.0, 4 / 3, -8 / 9), (0.0, -1.0, 1.0)),
    errors=((2 / 9 - 7 / 24, 1 / 3 - 1 / 4, 4 / 9 - 1 / 3, -1 / 8),),
    error_order=3,
    fsal=True,
    reference="Bogacki, Shampine, Appl. Math. Lett. 2 (1989) 321",
)

_DOPRI5_B = (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)
_DOPRI5 = _explicit(
    "dopri5",
    5,
    a=(
        (),
        (1 / 5,),
        (3 / 40, 9 / 40),
        (44 / 45, -56 / 15, 32 / 9),
        (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
        (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        _DOPRI5_B,
    ),
    b=(*_DOPRI5_B, 0.0),
    c=(0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
    interpolant=(
        (1.0, -8048581381 / 2820520608, 8663915743 / 2820520608, -12715105075 / 11282082432),
        (0.0, 0.0, 0.0, 0.0),
        (0.0, 131558114200 / 32700410799, -68118460800 / 10900136933, 87487479700 / 32700410799),
        (0.0, -1754552775 / 470086768, 14199869525 / 1410260304, -10690763975 / 1880347072),
        (0.0, 127303824393 / 49829197408, -318862633887 / 49829197408, 701980252875 / 199316789632),
        (0.0, -282668133 / 205662961, 2019193451 / 616988883, -1453857185 / 822651844),
        (0.0, 40617522 / 29380423, -110615467 / 29380423, 69997945 / 29380423),
    ),
    errors=((71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40),),
    error_order=5,
    fsal=True,
    reference="Dormand, Prince, J. Comput. Appl. Math. 6 (1980) 19; Shampine, Math. Comp. 46 (1986) 135",
)

_TSIT5_B = (
    0.09646076681806523,
    0.01,
    0.4798896504144996,
    1.379008574103742,
    -3.290069515436081,
    2.324710524099774,
)
_TSIT5 = _explicit(
    "tsit5",
    5,
    a=(
        (),
        (0.161,),
        (-0.008480655492356989, 0.335480655492357),
        (2.8971530571054935, -6.359448489975075, 4.3622954328695815),
        (5.325864828439257, -11.748883564062828, 7.4955393428898365, -0.09249506636175525),
        (5.86145544294642, -12.92096931784711, 8.159367898576159, -0.071584973281401, -0.028269050394068383),
        _TSIT5_B,
    ),
    b=(*_TSIT5_B, 0.0),
    c=(0.0, 0.161, 0.327, 0.9, 0.9800255409045097, 1.0, 1.0),
    interpolant=(
        (1.0, -2.763706197274826, 2.9132554618219126, -1.0530884977290216),
        (0.0, 0.1317, -0.2234, 0.1017),
        (0.0, 3.9302962368947516, -5.941033872131505, 2.490627285651253),
        (0.0, -12.411077166933676, 30.33818863028232, -16.548102889244902),
        (0.0, 37.50931341651104, -88.1789048947664, 47.37952196281928),
        (0.0, -27.896526289197286, 65.09189467479366, -34.87065786149661),
        (0.0, 1.5, -4.0, 2.5),
    ),
    errors=(
        (
            -0.00178001105222577714,
            -0.0008164344596567469,
            0.007880878010261995,
            -0.1447110071732629,
            0.5823571654525552,
            -0.45808210592918697,
            1 / 66,
        ),
    ),
    error_order=5,
    fsal=True,
    reference="Tsitouras, Comput. Math. Appl. 62 (2011) 770",
)

_DOPRI8 = _explicit(
    "dopri8",
    8,
    a=dop853_table.A,
    b=dop853_table.B,
    c=dop853_table.C,
    interpolant=dop853_table.INTERPOLANT,
    errors=(dop853_table.E5, dop853_table.E3),
    error_order=8,
    fsal=True,
    dense_c=dop853_table.DENSE_C,
    dense_a=dop853_table.DENSE_A,
    reference="Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.10 (DOP853)",
)

EXPLICIT = (_TSIT5, _DOPRI5, _DOPRI8, _BOSH3, _RK4, _HEUN, _MIDPOINT, _EULER)

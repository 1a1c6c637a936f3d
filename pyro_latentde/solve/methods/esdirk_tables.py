# SPDX-License-Identifier: Apache-2.0
"""Coefficients of the ESDIRK methods: explicit first stage, then the same diagonal entry in all stages.

Row i of A holds the weights of stages 0..i in stage i, its own last; b is the last row (stiffly accurate), so that the
last stage is the slope at the end of the step. Rows of an interpolant are the coefficients of theta, theta^2, ... of
one stage: those of kvaerno5 are the least ones by norm that satisfy the conditions of order 4 for every theta and give
the step's ends and slopes; the others are the cubic through both ends with the slopes there (Hermite).

References:
    Kvaerno, Singly diagonally implicit Runge-Kutta methods with an explicit first stage, BIT 44 (2004) 489.
    Hosea, Shampine, Analysis and implementation of TR-BDF2, Appl. Numer. Math. 20 (1996) 21.
"""

import math

__all__ = ["KVAERNO3", "KVAERNO5", "KVAERNO5_INTERPOLANT", "TRBDF2", "TRBDF2_EMBEDDED", "hermite"]

Row = tuple[float, ...]


def hermite(b: Row) -> tuple[Row, ...]:
    """The cubic through both ends of the step with the slopes there, which are the first and the last stage."""
    first, last = (1.0, -2.0, 1.0), (0.0, -1.0, 1.0)
    rows = []
    for i, weight in enumerate(b):
        own = first if i == 0 else last if i == len(b) - 1 else (0.0, 0.0, 0.0)
        rows.append((own[0], own[1] + 3.0 * weight, own[2] - 2.0 * weight))
    return tuple(rows)


def _kvaerno3() -> tuple[Row, ...]:
    g = 0.43586652150845899942  # root of g^3 - 3 g^2 + 3/2 g - 1/6
    return (
        (),
        (g, g),
        ((-4 * g**2 + 6 * g - 1) / (4 * g), (1 - 2 * g) / (4 * g), g),
        ((6 * g - 1) / (12 * g), -1 / ((24 * g - 12) * g), (-6 * g**2 + 6 * g - 1) / (6 * g - 3), g),
    )


KVAERNO3 = _kvaerno3()

KVAERNO5: tuple[Row, ...] = (
    (),
    (0.26, 0.26),
    (0.13, 0.8403332099679081, 0.26),
    (0.22371961478320504, 0.476755323197997, -0.06470895363112615, 0.26),
    (0.16648564323248322, 0.1045001884159172, 0.03631482272098715, -0.13090704451073998, 0.26),
    (0.13855640231268224, 0.0, -0.04245337201752043, 0.02446657898003141, 0.6194303907248068, 0.26),
    (
        0.13659751177640292,
        0.0,
        -0.05496908796538376,
        -0.04118626728321046,
        0.629933048990164,
        0.06962479448202728,
        0.26,
    ),
)

KVAERNO5_INTERPOLANT: tuple[Row, ...] = (
    (1.0, -2.072037588795685, 1.6904652246969831, -0.48183012412489523),
    (0.0, 0.0, 0.0, 0.0),
    (0.0, 0.8427243190616528, -1.9053249899848435, 1.0076315829578069),
    (0.0, -0.666585713642222, 1.1684263581516023, -0.5430269117925909),
    (0.0, 3.256928814399382, -3.994125432838113, 1.367129667428895),
    (0.0, -0.6050255205697066, 1.4885502190675217, -0.8138999040157878),
    (0.0, -0.7560043104533863, 1.5520086209067765, -0.5360043104533903),
)

_D, _W = 1.0 - math.sqrt(2.0) / 2.0, math.sqrt(2.0) / 4.0
TRBDF2: tuple[Row, ...] = ((), (_D, _D), (_W, _W, _D))
TRBDF2_EMBEDDED: Row = ((1.0 - _W) / 3.0, (3.0 * _W + 1.0) / 3.0, _D / 3.0)

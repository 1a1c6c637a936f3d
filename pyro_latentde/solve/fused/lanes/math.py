# SPDX-License-Identifier: Apache-2.0
"""Exponentials, logarithms and the error function for vectors, as kernel source: LLVM has them for one number only.

The argument is reduced to a short interval, a polynomial does the rest in double precision, and the result is put
together from the bits of the exponent. Errors are a few units in the last place; infinity and NaN keep their meaning.

References:
    Tang, "Table-driven implementation of the exponential function", ACM Trans. Math. Softw. 15 (1989) 144 (reduction).
    Sun Microsystems, FDLIBM 5.3, 1993 (logarithm and error function: their coefficients).
"""

import math

__all__ = ["lane_math"]

_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def _polynomial(coefficients: list[float], x: str) -> str:
    source = repr(coefficients[-1])
    for c in coefficients[-2::-1]:
        source = f"({c!r} + {x} * {source})"
    return source


# (exp(r) - 1 - r) / r**2 for |r| <= log(2) / 2, to 1e-17: even and odd terms apart, which can be computed together
_TAYLOR = [1.0 / math.factorial(n) for n in range(2, 14)]
_REDUCED = f"""    n = np.rint(x * {1.0 / math.log(2.0)!r})
    r = (x - n * {_LN2_HIGH!r}) - n * {_LN2_LOW!r}
    z = r * r
    q = r + z * ({_polynomial(_TAYLOR[::2], "z")} + r * {_polynomial(_TAYLOR[1::2], "z")})"""

_EXP = f"""
def lanes_exp(x: Lanes) -> Lanes:
    x = Lanes(-746.0) if x < -746.0 else x
    x = Lanes(710.0) if x > 710.0 else x
{_REDUCED}
    half = np.floor(0.5 * n)
    return (1.0 + q) * power_of_two(half) * power_of_two(n - half)
"""

_EXPM1 = f"""
def lanes_expm1(x: Lanes) -> Lanes:
    given = x
    x = Lanes(-40.0) if x < -40.0 else x
    x = Lanes(710.0) if x > 710.0 else x
{_REDUCED}
    half = power_of_two(n - 1.0)
    total = 2.0 * (half * q + (half - 0.5))
    return given if n == 0.0 and q == 0.0 else total
"""

_TANH = """
def lanes_tanh(x: Lanes) -> Lanes:
    size = abs(x)
    e = lanes_expm1(2.0 * (Lanes(20.0) if size > 20.0 else size))
    value = e / (e + 2.0)
    return -value if x < 0.0 else value
"""

_LOG_SERIES = [
    6.666666666666735130e-01,
    3.999999999940941908e-01,
    2.857142874366239149e-01,
    2.222219843214978396e-01,
    1.818357216161805012e-01,
    1.531383769920937332e-01,
    1.479819860511658591e-01,
]

# of x > 0, subnormal numbers scaled; m lies between sqrt(1/2) and sqrt(2)
_LOG = f"""
def lanes_log(x: Lanes) -> Lanes:
    tiny = x < 2.2250738585072014e-308
    y = x * 18014398509481984.0 if tiny else x
    y = y if 0.0 < y < np.inf else Lanes(1.0)
    e = exponent(y)
    half = np.floor(0.5 * e)
    m = y * power_of_two(-half) * power_of_two(half - e)
    large = m > 1.4142135623730951
    m = 0.5 * m if large else m
    e = e + (1.0 if large else 0.0) - (54.0 if tiny else 0.0)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    square = 0.5 * f * f
    tail = s * (square + z * {_polynomial(_LOG_SERIES, "z")}) + e * {_LN2_LOW!r}
    value = e * {_LN2_HIGH!r} - ((square - tail) - f)
    outside = Lanes(-np.inf) if x == 0.0 else x if x == np.inf else Lanes(np.nan)
    return value if 0.0 < x < np.inf else outside
"""

_LOG1P = """
def lanes_log1p(x: Lanes) -> Lanes:
    u = 1.0 + x
    lost = x - (u - 1.0) if x < 1.0 else 1.0 - (u - x)
    value = lanes_log(u) + (lost / u if 0.0 < u < np.inf else 0.0)
    return x if abs(x) < 1e-300 else value
"""

_ERF_SMALL = (
    [
        1.28379167095512558561e-01,
        -3.25042107247001499370e-01,
        -2.84817495755985104766e-02,
        -5.77027029648944159157e-03,
        -2.37630166566501626084e-05,
    ],
    [
        1.0,
        3.97917223959155352819e-01,
        6.50222499887672944485e-02,
        5.08130628187576562776e-03,
        1.32494738004321644526e-04,
        -3.96022827877536812320e-06,
    ],
)
_ERF_NEAR_ONE = (
    [
        -2.36211856075265944077e-03,
        4.14856118683748331666e-01,
        -3.72207876035701323847e-01,
        3.18346619901161753674e-01,
        -1.10894694282396677476e-01,
        3.54783043256182359371e-02,
        -2.16637559486879084300e-03,
    ],
    [
        1.0,
        1.06420880400844228286e-01,
        5.40397917702171048937e-01,
        7.18286544141962662868e-02,
        1.26171219808761642112e-01,
        1.36370839120290507362e-02,
        1.19844998467991074170e-02,
    ],
)
_ERF_MIDDLE = (
    [
        -9.86494403484714822705e-03,
        -6.93858572707181764372e-01,
        -1.05586262253232909814e01,
        -6.23753324503260060396e01,
        -1.62396669462573470355e02,
        -1.84605092906711035994e02,
        -8.12874355063065934246e01,
        -9.81432934416914548592e00,
    ],
    [
        1.0,
        1.96512716674392571292e01,
        1.37657754143519042600e02,
        4.34565877475229228821e02,
        6.45387271733267880336e02,
        4.29008140027567833386e02,
        1.08635005541779435134e02,
        6.57024977031928170135e00,
        -6.04244152148580987438e-02,
    ],
)
_ERF_FAR = (
    [
        -9.86494292470009928597e-03,
        -7.99283237680523006574e-01,
        -1.77579549177547519889e01,
        -1.60636384855821916062e02,
        -6.37566443368389627722e02,
        -1.02509513161107724954e03,
        -4.83519191608651397019e02,
    ],
    [
        1.0,
        3.03380607434824582924e01,
        3.25792512996573918826e02,
        1.53672958608443695994e03,
        3.19985821950859553908e03,
        2.55305040643316442583e03,
        4.74528541206955367215e02,
        -2.24409524465858183362e01,
    ],
)


def _ratio(of: tuple[list[float], list[float]], x: str) -> str:
    return f"{_polynomial(of[0], x)} / {_polynomial(of[1], x)}"


_ERF = f"""
def lanes_erf(x: Lanes) -> Lanes:
    size = abs(x)
    z = x * x
    value = size + size * ({_ratio(_ERF_SMALL, "z")})
    if any(size >= 0.84375):
        s = size - 1.0
        near = 8.45062911510467529297e-01 + {_ratio(_ERF_NEAR_ONE, "s")}
        value = near if size >= 0.84375 else value
    if any(size >= 1.25):
        a = 6.0 if size > 6.0 else size if size > 1.25 else 1.25
        u = 1.0 / (a * a)
        ratio = {_ratio(_ERF_MIDDLE, "u")} if a < {1.0 / 0.35!r} else {_ratio(_ERF_FAR, "u")}
        far = 1.0 - lanes_exp(-a * a - 0.5625 + ratio) / a
        value = far if size >= 1.25 else value
    return -value if x < 0.0 else value
"""

_FUNCTIONS = {
    "exp": _EXP,
    "expm1": _EXPM1,
    "tanh": _TANH,
    "log": _LOG,
    "log1p": _LOG1P,
    "erf": _ERF,
}


def lane_math() -> str:
    """Source of ``lanes_exp`` and its siblings, which take the place of ``math.exp`` where there are lanes."""
    return "".join(_FUNCTIONS.values())

# SPDX-License-Identifier: Apache-2.0
r"""Blood pressure under haemorrhage and septic shock: a cardiovascular system with four hidden regimes.

.. math::
    f = s (f_{max} - f_{min}) + f_{min}, \qquad R = s (R_{max} - R_{min}) + R_{min} - R_{mod}

    \dot V_a = SV\, f - \frac{P_a - P_v}{R}, \qquad \dot V_v = I_{ext} - \dot V_a, \qquad
    \dot P_a = \frac{\dot V_a}{C_a}, \qquad \dot P_v = \frac{\dot V_v}{C_v}

    \dot s = \frac{1}{\tau} \Bigl(1 - \frac{1}{1 + e^{-k (P_a - P_{set})}} - s\Bigr), \qquad
    \dot{SV} = 100\, \sigma\, I_{ext}

==========  ==================================================  ===========  ==========================
symbol      meaning                                             unit         range
==========  ==================================================  ===========  ==========================
P_a, P_v    arterial and venous pressure                        mmHg         at -50 s U(75, 85), U(3, 7)
s           baroreflex activity                                 1            at -50 s U(0.15, 0.25)
SV          stroke volume                                       ml           at -50 s U(90, 100)
I_ext       blood given or lost, of each series                 ml / s       0, or -2 (haemorrhage)
R_mod       loss of resistance, of each series                  mmHg s / ml  0, or 0.5 (septic shock)
f           heart rate, between f_min and f_max                 1 / s        2/3, 3
R           resistance, between R_min and R_max                 mmHg s / ml  0.5335, 2.134
C_a, C_v    compliance of arteries and veins                    ml / mmHg    4, 111
k, P_set    width and set point of the baroreflex               1 / mmHg     0.1838, 70 mmHg
tau         its time constant                                   s            20
sigma       fall of the stroke volume per blood lost            1            1e-4
==========  ==================================================  ===========  ==========================

The state is scaled: pa = P_a / 100, pv = P_v / 10, s and sv = SV / 100. What is observed, once a second from 0 to
399 s, is (pa, pv, f) with normal errors of sd 0.05. The 50 s before are not observed, so that the start has left its
box: `priors` has normal distributions of the same mean and sd there, and uniform ones of I_ext and R_mod that reach a
quarter beyond the two values that occur.

References:
    Zenker, S., Rubin, J. and Clermont, G. (2007). From inverse problems in mathematical physiology to quantitative
    differential diagnoses. PLoS Comput. Biol. 3.
    Linial, O. et al. (2021). Generative ODE modeling with known unknowns. arXiv:2003.10775 (the experiment).
"""

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.simulation import Simulation, draw_priors, even_times, random_stream, solve_exactly

__all__ = ["OBSERVED", "PARAMETERS", "REGIMES", "STATES", "observables", "priors", "simulate", "vector_field"]

STATES = ("pa", "pv", "s", "sv")
OBSERVED = ("pa", "pv", "heart_rate")
REGIMES = {"i_ext": (0.0, -2.0), "r_tpr_mod": (0.0, 0.5)}  # the values that occur, of equal probability
PARAMETERS = {"i_ext": (-2.5, 0.5), "r_tpr_mod": (-0.125, 0.625)}
HEART_RATE, RESISTANCE = (2.0 / 3.0, 3.0), (0.5335, 2.134)  # least and most
ARTERIES, VEINS = 4.0, 111.0  # compliances
WIDTH, SET_POINT, TAU = 0.1838, 70.0, 20.0
STROKE_LOSS = 1e-4
BURN_IN = 50  # steps that are not observed
FIRST = {"low": (0.75, 0.3, 0.15, 0.9), "high": (0.85, 0.7, 0.25, 1.0)}  # the state before them
START = {"mean": (0.768, 0.467, 0.231, 0.945), "sd": (0.025, 0.124, 0.079, 0.029)}  # the state after them


def vector_field(t: Tensor, y: Tensor, p: Mapping[str, Tensor]) -> Tensor:
    """dy/dt.

    Args:
        t: time (s), scalar; the equations do not depend on it.
        y: (4,), pa (100 mmHg), pv (10 mmHg), s and sv (100 ml).
        p: i_ext (ml/s) and r_tpr_mod (mmHg s/ml), scalars.

    Returns:
        (4,), the same units per second.
    """
    arterial, venous, s, stroke = 100.0 * y[0], 10.0 * y[1], y[2], 100.0 * y[3]
    resistance = s * (RESISTANCE[1] - RESISTANCE[0]) + RESISTANCE[0] - p["r_tpr_mod"]
    inflow = stroke * _heart_rate(s) - (arterial - venous) / resistance
    reflex = 1.0 - torch.sigmoid(WIDTH * (arterial - SET_POINT))
    return torch.stack(
        [
            inflow / (100.0 * ARTERIES),
            (p["i_ext"] - inflow) / (10.0 * VEINS),
            (reflex - s) / TAU,
            p["i_ext"] * STROKE_LOSS,
        ]
    )


def _heart_rate(s: Tensor) -> Tensor:
    return s * (HEART_RATE[1] - HEART_RATE[0]) + HEART_RATE[0]


def observables(z: Tensor) -> Tensor:
    """What is measured, (..., 3): pa (100 mmHg), pv (10 mmHg) and heart rate (1/s), of the states z (..., 4)."""
    return torch.stack([z[..., 0], z[..., 1], _heart_rate(z[..., 2])], dim=-1)


def priors() -> dict[str, Any]:
    """Priors of an inference: "z0" (4,) at the first observation, "theta" with i_ext and r_tpr_mod."""
    return {
        "z0": dist.Normal(torch.tensor(START["mean"]), torch.tensor(START["sd"])).to_event(1),
        "theta": {name: dist.Uniform(low, high) for name, (low, high) in PARAMETERS.items()},
    }


def simulate(n: int, seed: int = 0, *, num_times: int = 400, step: float = 1.0, noise: float = 0.05) -> Simulation:
    """Measurements of n patients, each in one of the four regimes.

    Args:
        n: number of series.
        seed: of starts, regimes and noise; n series are the first n of more.
        num_times: measurements of each series.
        step: time between them (s).
        noise: standard error of the measurements.

    Returns:
        Simulation: series (n, num_times, 3), z (n, num_times, 4), truth i_ext and r_tpr_mod, each (n,).

    Raises:
        ValueError: no series, fewer than two times, a step that is not positive, or negative noise.

    Example:
        >>> from pyro_latentde.models.systems import cardiovascular
        >>> series, z, truth = cardiovascular.simulate(3, num_times=20)
        >>> series
        Series(3 series, up to 20 times, 3 values (pa, pv, heart_rate), 180 observed, 0 missing)
    """
    if not noise >= 0:
        raise ValueError(f"noise: expected a standard error of at least 0, got {noise}")
    times = even_times(n, num_times, step)
    low, high = torch.tensor(FIRST["low"]), torch.tensor(FIRST["high"])
    coins = {name: dist.Uniform(0.0, 1.0) for name in REGIMES}
    first, truth = draw_priors({"z0": dist.Uniform(low, high).to_event(1), "theta": coins}, n, seed)
    for name, (healthy, ill) in REGIMES.items():
        truth[name] = torch.where(truth[name] < 0.5, healthy, ill).double()
    before = torch.arange(-BURN_IN, 0, dtype=torch.float64)
    z = solve_exactly(vector_field, first, torch.cat([before, times]), truth)[:, BURN_IN:]
    values = observables(z)
    error = noise * torch.from_numpy(random_stream(seed, 1).standard_normal(values.shape))
    return Simulation(Series.from_tensors(times, values + error, names=OBSERVED, dtype=torch.float32), z, truth)

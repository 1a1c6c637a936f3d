# SPDX-License-Identifier: Apache-2.0
"""The Lorenz system by a lengthening horizon, three seeds: ``python benchmarks/lorenz_horizon.py [last time]``.

Twenty observations. Up to 5 units of time the path is one solve; for more, the first six observations are, and what
follows is solved in segments, four from one observation to the next, whose starts may jump by a sd of .1.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.models import Shooting  # noqa: E402
from pyro_latentde.models.systems import lorenz  # noqa: E402

SITES = ("sigma", "rho", "beta", "noise")
NUM_TIMES, FIRST, ONE_SOLVE = 20, 6, 5.0
SHOOTING = Shooting(1, 0.1, parts=4)


def one_solve(series: lde.Series, seed: int) -> lde.Posterior:
    """The deterministic model."""
    return lde.infer.lengthen(lorenz.model, series, num_warmup=100, num_samples=100, seed=seed, progress=False)


def segments(series: lde.Series, seed: int) -> lde.Posterior:
    """Segments, from what one solve found of the first observations."""
    times = series.times[0]
    few = {"num_particles": 192, "num_chains": 32, "num_warmup": 60, "num_samples": 20, "progress": False}
    draws = lde.infer.lengthen(lorenz.model, series.window(0, FIRST), seed=seed, **few).draws()
    rates = {name: draws[name] for name in lorenz.PARAMETERS}
    exact = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-10}
    draws["shots"] = SHOOTING.starts(lorenz.vector_field, draws["z0"], times[:FIRST], rates, **exact)
    options = {"shooting": SHOOTING, "num_chains": 48, "seed": seed, "progress": False}
    particles = {"start": draws, "horizons": times[FIRST - 1 :], "num_particles": 48, "num_moves": 3}
    found = lde.infer.lengthen(lorenz.model, series, num_warmup=5, num_samples=2, **particles, **options)
    return lde.infer.ensemble_hmc(lorenz.model, series, start=found, num_warmup=120, num_samples=80, **options)


def main(last: float = 5.0, seeds: int = 3) -> None:
    """Print, per seed, means and standard deviations, the truth's distance in them, R-hat and seconds."""
    right = 0
    for seed in range(int(seeds)):
        sim = lorenz.simulate(torch.linspace(0.0, last, NUM_TIMES, dtype=torch.float64), seed=seed)
        start = time.perf_counter()
        posterior = (one_solve if last <= ONE_SOLVE else segments)(sim.series, seed)
        seconds = time.perf_counter() - start
        values = {name: posterior[name] for name in SITES}
        told = {name: (float(value.mean()), float(value.std())) for name, value in values.items()}
        far = max(abs(mean - float(sim.truth[name])) / sd for name, (mean, sd) in told.items())
        r_hat = posterior.summary()["r_hat"].max()
        good = r_hat < 1.05 and far < 4
        right += good
        shown = ", ".join(f"{name} {mean:.4g} ({sd:.2g})" for name, (mean, sd) in told.items())
        print(
            f"seed {seed}: {shown}; truth within {far:.1f} sd, R-hat {r_hat:.3f}, {seconds:.0f} s, "
            f"{'right' if good else 'WRONG'}",
            flush=True,
        )
    print(f"{right} of {int(seeds)} right")


if __name__ == "__main__":
    main(*(float(arg) for arg in sys.argv[1:]))

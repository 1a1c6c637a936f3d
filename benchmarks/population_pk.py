# SPDX-License-Identifier: Apache-2.0
"""Population pharmacokinetics, 20 values of each: ``python benchmarks/population_pk.py [people] [draws] [seed]``.

One call of `ensemble_hmc`, 4 chains, solved by the adaptive solver: seconds from the call, largest R-hat and least bulk
effective sample size over all unknowns, four for each person and eight of the population.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.models.systems import pk_population  # noqa: E402

__all__ = ["main"]


def main(people: int = 500, draws: int = 2000, seed: int = 12) -> None:
    """Print one line."""
    series = pk_population.simulate(num_series=people, seed=seed).series
    start = time.perf_counter()
    posterior = lde.infer.ensemble_hmc(
        pk_population.model, series, num_chains=4, num_warmup=200, num_samples=draws, seed=seed, progress=False
    )
    seconds, table = time.perf_counter() - start, posterior.summary()
    print(
        f"{people} people, {len(table)} unknowns: {seconds:.0f} s, R-hat at most {table['r_hat'].max():.4f}, "
        f"ESS at least {table['ess_bulk'].min():.0f}, {int(posterior.stats['diverging'].sum())} divergences "
        f"(load average {os.getloadavg()[0]:.1f})"
    )


if __name__ == "__main__":
    main(*(int(arg) for arg in sys.argv[1:]))

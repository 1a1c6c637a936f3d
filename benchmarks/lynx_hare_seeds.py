# SPDX-License-Identifier: Apache-2.0
"""Ten seeds of the lynx-hare posterior against posteriordb's reference: ``python benchmarks/lynx_hare_seeds.py``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.data import load_lynx_hare  # noqa: E402
from pyro_latentde.models.systems import lotka_volterra  # noqa: E402

MEANS = np.array([0.54686, 0.027747, 0.80010, 0.024086, 34.035, 5.936, 0.24806, 0.25102])
SDS = np.array([0.06305, 0.004155, 0.08937, 0.003528, 2.917, 0.531, 0.0433, 0.0436])


def main(seeds: int = 10) -> None:
    """Print, per seed, the largest deviations and whether the run is right."""
    right = 0
    for seed in range(seeds):
        posterior = lde.infer.nuts(lotka_volterra.model, load_lynx_hare(), seed=seed, progress=False)
        draws = np.concatenate([x.reshape(4000, -1).numpy() for x in posterior.samples.values()], axis=1)
        shift = np.abs((draws.mean(0) - MEANS) / SDS).max()
        spread = np.abs(draws.std(0, ddof=1) / SDS - 1).max()
        table = posterior.summary()
        divergences = int(posterior.stats["diverging"].sum())
        good = shift < 0.1 and spread < 0.08 and table["r_hat"].max() < 1.01 and divergences == 0
        right += good
        print(
            f"seed {seed}: mean {shift:.3f} sd, sd {100 * spread:.1f} %, R-hat {table['r_hat'].max():.4f}, divergences "
            f"{divergences}, ESS {table['ess_bulk'].min():.0f}, {posterior.attrs['sampling_time']:.1f} s, "
            f"{'right' if good else 'WRONG'}",
            flush=True,
        )
    print(f"{right} of {seeds} right")


if __name__ == "__main__":
    main()

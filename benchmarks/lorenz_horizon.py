# SPDX-License-Identifier: Apache-2.0
"""Three seeds of the Lorenz system by a lengthening horizon: ``python benchmarks/lorenz_horizon.py [last time]``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.models.systems import lorenz  # noqa: E402

SITES = ("sigma", "rho", "beta", "noise")
NUM_TIMES = 20


def main(last: float = 5.0, seeds: int = 3) -> None:
    """Print, per seed, means and standard deviations, the truth's distance in them, R-hat and seconds."""
    torch.set_num_threads(1)
    right = 0
    for seed in range(seeds):
        sim = lorenz.simulate(torch.linspace(0.0, last, NUM_TIMES, dtype=torch.float64), seed=seed)
        posterior = lde.infer.lengthen(
            lorenz.model, sim.series, num_warmup=100, num_samples=100, seed=seed, progress=False
        )
        values = {name: posterior[name] for name in SITES}
        told = {name: (float(value.mean()), float(value.std())) for name, value in values.items()}
        far = max(abs(mean - float(sim.truth[name])) / sd for name, (mean, sd) in told.items())
        r_hat = posterior.summary()["r_hat"].max()
        good = r_hat < 1.05 and far < 4
        right += good
        shown = ", ".join(f"{name} {mean:.4g} ({sd:.2g})" for name, (mean, sd) in told.items())
        print(
            f"seed {seed}: {shown}; truth within {far:.1f} sd, R-hat {r_hat:.3f}, "
            f"log-evidence {posterior.attrs['log_evidence']:.1f}, {posterior.attrs['sampling_time']:.0f} s, "
            f"{'right' if good else 'WRONG'}",
            flush=True,
        )
    print(f"{right} of {seeds} right")


if __name__ == "__main__":
    main(*(float(arg) for arg in sys.argv[1:]))

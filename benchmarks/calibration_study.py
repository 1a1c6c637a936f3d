# SPDX-License-Identifier: Apache-2.0
"""Simulation-based calibration at full size: ``python benchmarks/calibration_study.py MODEL METHOD [replications]``.

MODEL is ``lotka_volterra`` (four rates, ten times two counts) or ``outbreaks`` (three outbreaks of one disease, whose
rates come from a population: eleven scalars). METHOD is a right sampler, ``ensemble_hmc`` or ``nuts``, or one that the
test has to reject: ``momenta_doubled``, ``coarse_sgld``.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.analysis import calibration  # noqa: E402
from pyro_latentde.infer.ensemble_chains import EnsembleChains, EnsembleSettings  # noqa: E402
from pyro_latentde.infer.replications import MOST_STEPS, Fits, Replications  # noqa: E402
from pyro_latentde.infer.sgmcmc_kernels import Langevin  # noqa: E402
from pyro_latentde.models.systems import lotka_volterra, sir_population  # noqa: E402

__all__ = ["coarse_sgld", "main", "momenta_doubled"]

LEVEL = 1e-3  # false alarms of the verdict on one study
# not small against the posterior's variances in unconstrained coordinates, about .001 and .003
COARSE_STEPS = {"lotka_volterra": 1e-3, "outbreaks": 4e-3}
SETTINGS = {
    "nuts": {"num_chains": 3, "num_warmup": 200, "num_samples": 120},
    "momenta_doubled": {"num_chains": 8, "num_warmup": 150, "num_samples": 50},
    "coarse_sgld": {"num_chains": 8, "num_warmup": 500, "num_samples": 250},
}
USUAL = {"num_chains": 12, "num_warmup": 250, "num_samples": 100}


def momenta_doubled(batch: Replications, num_warmup: int, num_samples: int, seed: int) -> Fits:
    """Ensemble HMC whose momenta are twice too large."""
    settings = EnsembleSettings(num_warmup, num_samples, max_num_steps=MOST_STEPS, seed=seed)
    chains = EnsembleChains(batch.density, batch.starts(seed), settings)
    random = chains._random
    chains._random = lambda: (2.0 * random()[0], random()[1])
    while not chains.finished:
        chains.iterate()
    return Fits(chains.draws.permute(1, 2, 0, 3), 0, 0)


def coarse_sgld(batch: Replications, num_warmup: int, num_samples: int, seed: int, *, step_size: float = 0.1) -> Fits:
    """SGLD on all data with a step that is not small against the posterior's variance."""
    kernel, rng, draws = Langevin(), np.random.default_rng(seed), []
    u = batch.starts(seed).flatten(0, 1)
    never, grad = np.zeros(len(u), bool), batch.density(u)[1]
    for i in range(num_warmup + num_samples):
        proposed = torch.from_numpy(
            kernel.move(u.numpy(), grad.numpy(), step_size, rng.standard_normal(u.shape), never)
        )
        lp, there, _, _ = batch.density(proposed)
        good = lp.isfinite()[:, None]
        u, grad = torch.where(good, proposed, u), torch.where(good, there, grad)
        if i >= num_warmup:
            draws.append(u.unflatten(0, (batch.num_groups, batch.num_chains)))
    return Fits(torch.stack(draws, dim=2), 0, 0)


def _counts(data: torch.Tensor) -> None:
    """Lotka-Volterra as in sbibm: four rates, two counts at ten times, errors of a tenth."""
    medians = {"alpha": -0.125, "beta": -3.0, "gamma": -0.125, "delta": -3.0}
    p = {name: pyro.sample(name, dist.LogNormal(data.new_tensor(at), 0.5)) for name, at in medians.items()}
    times = torch.linspace(0.0, 18.9, 10, dtype=data.dtype)
    z = lde.ode("z", lotka_volterra.vector_field, data.new_tensor([30.0, 1.0]), times, p, max_steps=1000)
    pyro.sample("obs", dist.LogNormal(z.clamp(min=1e-7).log(), 0.1).to_event(2), obs=data)


def _task(name: str) -> tuple[Callable, object]:
    if name == "lotka_volterra":
        return _counts, torch.ones(10, 2, dtype=torch.float64)
    if name == "outbreaks":
        return sir_population.model, sir_population.simulate(num_series=3, seed=0).series
    raise SystemExit(f"{name}: expected lotka_volterra or outbreaks")


def main(model: str, method: str, num_replications: str = "256") -> None:
    """Print the verdict, p-values and coverages, and draw the ranks into demo_output/."""
    function, data = _task(model)
    wrong = {"momenta_doubled": momenta_doubled, "coarse_sgld": partial(coarse_sgld, step_size=COARSE_STEPS[model])}
    settings = {"num_replications": int(num_replications), "batch": 64, "seed": 1, **SETTINGS.get(method, USUAL)}
    start = time.perf_counter()
    found = calibration(function, data, method=wrong.get(method, method), **settings)
    verdict = "passed" if found.passed(LEVEL) else "rejected"
    print(f"{model}, {method}: {verdict} at level {LEVEL}, {time.perf_counter() - start:.0f} s\n{found}")
    folder = Path("demo_output")
    folder.mkdir(exist_ok=True)
    found.plot().savefig(folder / f"ranks_{model}_{method}.png", dpi=100)


if __name__ == "__main__":
    main(*sys.argv[1:])

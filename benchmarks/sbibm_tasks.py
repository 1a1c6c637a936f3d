# SPDX-License-Identifier: Apache-2.0
"""Two tasks of the benchmark sbibm against its reference posteriors: ``python benchmarks/sbibm_tasks.py FOLDER``.

FOLDER is the unpacked wheel of sbibm 1.1.0 (``pip download sbibm==1.1.0 --no-deps``), which brings observations and
10,000 reference draws for each. Right is: means within .1 sd, standard deviations within 8 %, and a classifier that
tells our draws from theirs no better than by chance (C2ST; "floor" is that of one half of theirs against the other).

References:
    Lueckmann, Boelts, Greenberg, Goncalves, Macke (2021), Benchmarking simulation-based inference, AISTATS.
"""

import argparse
import bz2
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

import pyro_latentde as lde  # noqa: E402
from pyro_latentde.data import Series  # noqa: E402
from pyro_latentde.models.systems import lotka_volterra as predators  # noqa: E402
from pyro_latentde.models.systems import sir as epidemic  # noqa: E402

__all__ = ["TASKS", "c2st", "main"]

SAMPLERS = {"nuts": {"num_samples": 2500}, "ensemble_hmc": {"num_samples": 200}}
POPULATION, TESTED = 1e6, 1000
FOLDS, EPOCHS, BATCH = 5, 30, 200  # of the classifiers


def lotka_volterra(series: Series) -> Tensor:
    """Prey, then predator, each with a relative error of .1, from a known start."""
    times = series.times[0]
    prior = {"alpha": -0.125, "beta": -3.0, "gamma": -0.125, "delta": -3.0}
    p = {name: pyro.sample(name, dist.LogNormal(times.new_tensor(loc), 0.5)) for name, loc in prior.items()}
    z = lde.ode("z", predators.vector_field, times.new_tensor([30.0, 1.0]), times, p, t0=0.0)
    return lde.observe("obs", lambda z: dist.LogNormal(z.log(), 0.1), series, z, positive=True)


def sir(series: Series) -> Tensor:
    """How many of 1000 tested people are infected.

    ``positive`` keeps the share above 1e-13: long before and after the outbreak it is below the solver's error.
    """
    times = series.times[0]
    p = {
        "beta": pyro.sample("beta", dist.LogNormal(times.new_tensor(0.4).log(), 0.5)),
        "gamma": pyro.sample("gamma", dist.LogNormal(times.new_tensor(0.125).log(), 0.2)),
    }
    z = lde.ode("z", epidemic.vector_field, times.new_tensor([POPULATION - 1, 1.0, 0.0]), times, p, t0=0.0)
    tested = lambda z: dist.Binomial(TESTED, z[..., 1:2] / POPULATION)  # noqa: E731
    return lde.observe("obs", tested, series, z, positive=True)


TASKS: Mapping[str, tuple[Callable, int, float]] = {  # model, observed values, days between observations
    "lotka_volterra": (lotka_volterra, 2, 2.1),
    "sir": (sir, 1, 17.0),
}


def _read(folder: Path, task: str, number: int) -> tuple[Series, np.ndarray]:
    """The observation, and the reference draws (10000, d)."""
    place = folder / "sbibm" / "tasks" / task / "files" / f"num_observation_{number}"
    _, values, gap = TASKS[task]
    row = np.loadtxt(place / "observation.csv", delimiter=",", skiprows=1)
    table = torch.from_numpy(row.reshape(values, -1).T.copy())
    with bz2.open(place / "reference_posterior_samples.csv.bz2", "rt") as file:
        reference = np.loadtxt(file, delimiter=",", skiprows=1)
    return Series.from_tensors(gap * torch.arange(float(len(table)), dtype=torch.float64), table), reference


def _scores(x: Tensor, target: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Loss of all folds together, and which points are told right; x (folds, n, d)."""
    for k in range(0, len(weights), 2):
        x = torch.baddbmm(weights[k + 1], x if k == 0 else x.relu(), weights[k])
    score = x.squeeze(-1)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(score, target, reduction="none").mean(1).sum()
    return loss, (score > 0) == (target > 0.5)


def c2st(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """Accuracy of networks d - 10 d - 10 d - 1 that tell draws ``a`` from ``b`` (n, d), each on the fifth left out."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(np.concatenate([(y - b.mean(0)) / b.std(0) for y in (a, b)])).float()
    target = torch.cat([torch.ones(len(a)), torch.zeros(len(b))])
    order = torch.randperm(len(x) - len(x) % FOLDS, generator=generator).reshape(FOLDS, -1)
    train = torch.stack([torch.cat([order[j] for j in range(FOLDS) if j != k]) for k in range(FOLDS)])
    sizes = [x.shape[1], 10 * x.shape[1], 10 * x.shape[1], 1]
    weights = []
    for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
        weights += [(2 / fan_in) ** 0.5 * torch.randn(FOLDS, fan_in, fan_out, generator=generator)]
        weights += [torch.zeros(FOLDS, 1, fan_out)]
    optimizer = torch.optim.Adam([w.requires_grad_() for w in weights], lr=1e-3)
    for _ in range(EPOCHS):
        for rows in train[:, torch.randperm(train.shape[1], generator=generator)].split(BATCH, dim=1):
            loss, _ = _scores(x[rows], target[rows], weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(_scores(x[order], target[order], weights)[1].double().mean())


def _compare(task: str, number: int, sampler: str, series: Series, reference: np.ndarray) -> bool:
    """Print one row of the table; whether means and standard deviations are right."""
    start = time.perf_counter()
    sample = getattr(lde.infer, sampler)
    posterior = sample(TASKS[task][0], series, seed=number, progress=False, **SAMPLERS[sampler])
    seconds = time.perf_counter() - start
    draws = np.stack([x.numpy().ravel() for x in posterior.samples.values()], axis=1)
    draws = draws[np.random.default_rng(number).permutation(len(draws))[: len(reference)]]
    sd = reference.std(0, ddof=1)
    shift = np.abs((draws.mean(0) - reference.mean(0)) / sd).max()
    spread = np.abs(draws.std(0, ddof=1) / sd - 1).max()
    table = posterior.summary()
    print(
        f"{task:15s} {number}  {sampler:13s}{shift:9.3f}{100 * spread:8.1f}{c2st(draws, reference):8.3f}"
        f"{table['r_hat'].max():8.4f}{int(posterior.stats['diverging'].sum()):6d}{table['ess_bulk'].min():8.0f}"
        f"{seconds:9.1f}{os.getloadavg()[0]:7.1f}",
        flush=True,
    )
    return bool(shift < 0.1 and spread < 0.08)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--observations", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    told = parser.parse_args()
    logging.getLogger("pyro_latentde").setLevel(logging.ERROR)  # divergences have a column
    print("task          obs  sampler      mean, sd    sd %    C2ST   R-hat  div.     ESS  seconds   load")
    right = []
    for task in told.tasks:
        for number in told.observations:
            series, reference = _read(told.folder, task, number)
            print(f"{task:15s} {number}  floor {c2st(reference[::2], reference[1::2]):32.3f}", flush=True)
            right += [_compare(task, number, sampler, series, reference) for sampler in SAMPLERS]
    print(f"means and standard deviations: {sum(right)} of {len(right)} right")


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""The demo: the parameters of predator and prey from twenty-one years of fur trade, in one folder of results."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pyro_latentde.analysis import plot_pair, plot_phase, plot_prior_posterior, plot_trajectories
from pyro_latentde.data import Series, load_lynx_hare
from pyro_latentde.fitting.metrics import collect_metrics, in_one_line
from pyro_latentde.infer import nuts, prior
from pyro_latentde.models.systems import lotka_volterra
from pyro_latentde.posterior import Posterior

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["REFERENCE", "format_table", "run_demo"]

# Mean and sd of 10 x 1000 Stan draws: posteriordb, `hudson_lynx_hare-lotka_volterra`.
REFERENCE = {
    "alpha": (0.54686, 0.06305),
    "beta": (0.027747, 0.004155),
    "gamma": (0.80010, 0.08937),
    "delta": (0.024086, 0.003528),
    "z0[hare]": (34.035, 2.917),
    "z0[lynx]": (5.936, 0.531),
    "sigma[hare]": (0.24806, 0.0433),
    "sigma[lynx]": (0.25102, 0.0436),
}
PELTS = "thousands of pelts"
UNITS = {
    "alpha": "1/year",
    "beta": "1/year/thousand",
    "gamma": "1/year",
    "delta": "1/year/thousand",
    "z0": "thousands",
    "sigma": "relative",
}
FORECAST_YEARS = 10
FIGURES = ("predictive.png", "phase.png", "pair.png", "prior_posterior.png")


def run_demo(
    out: str | Path = "demo_output",
    *,
    num_samples: int = 1000,
    num_warmup: int = 1000,
    num_chains: int = 4,
    seed: int = 0,
    progress: bool = True,
    say: Callable[[str], Any] = print,
) -> dict[str, Any]:
    """Fit the lynx-hare data by NUTS and write ``posterior.nc``, ``metrics.json`` and four figures.

    Args:
        out: the folder, made if need be; files of an earlier run are replaced.
        num_samples: draws of each chain that are kept, at least 4.
        num_warmup: iterations before.
        num_chains: number of chains.
        seed: the one seed.
        progress: show the sampler's bar.
        say: is given each line of text.

    Returns:
        What ``metrics.json`` holds.
    """
    began = time.perf_counter()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    series = load_lynx_hare()
    say("Snowshoe hare and Canada lynx, 1900 to 1920: pelts of the Hudson's Bay Company")
    say(f"NUTS, {num_chains} chains x ({num_warmup} + {num_samples}) iterations ...")
    posterior = nuts(
        lotka_volterra.model,
        series,
        num_samples=num_samples,
        num_warmup=num_warmup,
        num_chains=num_chains,
        seed=seed,
        progress=progress,
    )
    sampled = time.perf_counter() - began
    table = posterior.summary()
    say("")
    say(format_table(table))
    say("")
    before = prior(lotka_volterra.model, series, num_samples=2000, seed=seed)
    posterior.to_arviz(prior=before, seed=seed).to_netcdf(str(out / "posterior.nc"))
    _write_figures(posterior, before, series, out, seed)
    metrics = _metrics(posterior, table, seed)
    metrics |= {"sampling_seconds": sampled, "seconds": time.perf_counter() - began}
    (out / "metrics.json").write_text(json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    say(in_one_line(metrics))
    say(f"{out}/: posterior.nc, metrics.json, {', '.join(FIGURES)}")
    return metrics


def format_table(table: pd.DataFrame) -> str:
    """The table of the run beside the reference posterior.

    Args:
        table: result of :meth:`.Posterior.summary`, indexed by ``name[coordinate]``.

    Returns:
        Text with a line for each scalar.
    """
    lines = [
        f"{'':13}{'this run':^35}{'reference':>17}",
        f"{'parameter':13}{'mean':>9}{'sd':>10}{'R-hat':>8}{'ESS':>8}{'mean':>13}{'sd':>10}",
    ]
    for name, row in table.iterrows():
        mean, sd = REFERENCE[name]
        lines.append(
            f"{name:13}{row['mean']:9.4g}{row['sd']:10.3g}{row['r_hat']:8.3f}{row['ess_bulk']:8.0f}"
            f"{mean:13.4g}{sd:10.3g}"
        )
    return "\n".join(lines)


def _metrics(posterior: Posterior, table: pd.DataFrame, seed: int) -> dict[str, Any]:
    reference = {
        "mean": {name: mean for name, (mean, _) in REFERENCE.items()},
        "sd": {name: sd for name, (_, sd) in REFERENCE.items()},
    }
    return {**collect_metrics(posterior, table), "reference": reference, "seed": seed}


def _write_figures(posterior: Posterior, before: Posterior, series: Series, out: Path, seed: int) -> None:
    first, last = float(series.times.min()), float(series.times.max())
    times = torch.arange(first, last + FORECAST_YEARS + 0.125, 0.125, dtype=torch.float64)
    predictive = posterior.predict(times, seed=seed)
    figures = (
        plot_trajectories(predictive, series, units=PELTS, time_label="year"),
        plot_phase(posterior, series, units=PELTS),
        plot_pair(posterior, units=UNITS),
        plot_prior_posterior(before, posterior, units=UNITS),
    )
    for name, figure in zip(FIGURES, figures, strict=True):
        figure.savefig(out / name, dpi=150)

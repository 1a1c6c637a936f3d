# SPDX-License-Identifier: Apache-2.0
"""Summary, figures and page of a run, into its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyro_latentde.data import Series
from pyro_latentde.fitting.figures import draw_figures
from pyro_latentde.fitting.html import render_report
from pyro_latentde.fitting.metrics import in_one_line, warnings_of
from pyro_latentde.fitting.system import System
from pyro_latentde.fitting.table import describe_series
from pyro_latentde.fitting.verdicts import CHECK_FILES, Verdict
from pyro_latentde.posterior import Posterior

__all__ = ["REPORT_FILES", "data_text", "write_report"]

REPORT_FILES = ("summary.csv", "report.html", "prior_posterior.png", "pair.png", "trace.png", "training.png")
REPORT_FILES += CHECK_FILES

_NUMBERS = {
    "rhat_max": "R-hat, greatest",
    "ess_min": "effective draws, least",
    "ess_tail_min": "effective draws for tails, least",
    "divergences": "divergences",
    "ode_failed": "failed solves",
    "max_tree_depth_reached": "trajectories cut",
    "num_chains": "chains",
    "num_samples": "draws of each",
    "num_warmup": "warm-up iterations",
    "num_gradients": "gradients",
    "num_steps": "updates",
    "skipped_steps": "skipped updates",
    "final_loss": "negative ELBO at the end (nat)",
    "sampling_seconds": "seconds of inference",
    "seconds": "seconds until the report",
}
# Facts of a posterior that are numbers of the run already, or are said elsewhere.
_TOLD = {"inference", "seed", "num_chains", "num_samples", "num_warmup", "num_gradients", "sampling_time", "n_skipped"}
_TOLD |= {"num_steps", "final_loss", "interrupted", "draw_seed", "versions"}


def write_report(
    out: Path,
    system: System,
    posterior: Posterior,
    prior: Posterior,
    series: Series,
    facts: Mapping[str, Any],
    metrics: Mapping[str, Any],
    verdicts: Sequence[Verdict] = (),
) -> Path:
    """Write ``summary.csv``, the figures and ``report.html``.

    Args:
        out: folder of the run.
        system: its model made the posterior.
        posterior: the draws.
        prior: draws from the prior.
        series: the data.
        facts: ``run.json``.
        metrics: ``metrics.json``.
        verdicts: of :func:`.judge`.

    Returns:
        Path of the page.
    """
    table = posterior.summary()
    table.to_csv(out / "summary.csv")
    pictures = draw_figures(posterior, prior, series, out, seed=facts["seed"], time=facts["columns"]["time"])
    name = Path(facts["system"]).stem
    page = render_report(
        title=f"{name} fitted to {facts['data']}",
        subtitle=system.title,
        verdict=f"{facts['method']}: {in_one_line(metrics)}.",
        warnings=warnings_of(metrics, facts["method"]),
        verdicts=verdicts,
        summary=table,
        numbers={text: metrics.get(key) for key, text in _NUMBERS.items()},
        settings=_settings(posterior, facts),
        data_text=data_text(series, facts),
        data_table=describe_series(series),
        pictures=pictures,
        folder=out,
    )
    path = out / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _settings(posterior: Posterior, facts: Mapping[str, Any]) -> dict[str, Any]:
    settings = {"system": facts["system"], "method": facts["method"], "seed": facts["seed"]}
    settings |= {name: value for name, value in facts["options"].items()}
    settings |= {name: value for name, value in posterior.attrs.items() if name not in _TOLD and _is_plain(value)}
    for site in posterior.sites.ode if posterior.sites else ():
        used = {key: value for key, value in posterior.sites[site].settings.items() if value is not None}
        settings |= {f"solver of {site}: {key}": value for key, value in used.items()}
    versions = posterior.attrs.get("versions") or {}
    return settings | {f"version of {name}": text for name, text in versions.items()}


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and len(str(value)) < 100


def data_text(series: Series, facts: Mapping[str, Any]) -> str:
    """What the data are, in a sentence."""
    columns = facts["columns"]
    n, gaps = len(series), int((series.mask.any(-1, keepdim=True) & ~series.mask).sum())
    text = f"{facts['data']}: {n} series" if n > 1 else f"{facts['data']}: one series"
    text += f" of {', '.join(columns['values'])} over {columns['time']}, {series.n_observed} values"
    return f"{text}, {gaps} missing." if gaps else f"{text}, none missing."

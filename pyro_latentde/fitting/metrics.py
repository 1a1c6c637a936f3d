# SPDX-License-Identifier: Apache-2.0
"""Plain numbers of a run, and what they mean in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_latentde.posterior import Posterior

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["collect_metrics", "in_one_line", "plain", "warnings_of"]

# Vehtari, Gelman, Simpson, Carpenter and Buerkner (2021), Rank-normalization, folding, and localization: an improved
# R-hat, Bayesian Analysis 16.
RHAT_GOOD, RHAT_BAD = 1.01, 1.05
ESS_ENOUGH = 400


def collect_metrics(posterior: Posterior, table: pd.DataFrame) -> dict[str, Any]:
    """Numbers for a JSON file.

    Args:
        posterior: the draws.
        table: its :meth:`.Posterior.summary`.

    Returns:
        ``rhat_max``, ``ess_min`` and ``ess_tail_min`` (None where draws are independent or chains single),
        ``divergences`` and ``ode_failed``, the sizes of the run, and ``mean``, ``sd``, ``rhat`` and ``ess`` by scalar.
    """

    def column(name: str) -> dict[str, float | None]:
        return {site: plain(value) for site, value in table[name].items()} if name in table else {}

    def extreme(name: str, largest: bool = False) -> float | None:
        return plain(table[name].max() if largest else table[name].min()) if name in table else None

    def count(name: str) -> int | None:
        return int(posterior.stats[name].sum()) if name in posterior.stats else None

    attrs = posterior.attrs
    return {
        "rhat_max": extreme("r_hat", largest=True),
        "ess_min": extreme("ess_bulk"),
        "ess_tail_min": extreme("ess_tail"),
        "divergences": count("diverging"),
        "ode_failed": count("ode_failed"),
        "max_tree_depth_reached": count("reached_max_tree_depth"),
        "mean": column("mean"),
        "sd": column("sd"),
        "rhat": column("r_hat"),
        "ess": column("ess_bulk"),
        "num_chains": posterior.num_chains,
        "num_samples": posterior.num_draws,
        "num_warmup": attrs.get("num_warmup"),
        "num_gradients": attrs.get("num_gradients"),
        "num_steps": attrs.get("num_steps"),
        "skipped_steps": attrs.get("n_skipped"),
        "final_loss": None if attrs.get("final_loss") is None else plain(attrs["final_loss"]),
        "interrupted": bool(attrs.get("interrupted", False)),
    }


def plain(value: float) -> float | None:
    """JSON has no NaN: R-hat of a single chain is null."""
    return float(value) if math.isfinite(value) else None


def in_one_line(metrics: Mapping[str, Any]) -> str:
    """R-hat, effective sample size, divergences and failed solves, seconds; what a run does not have is left out."""
    parts = []
    if metrics["rhat_max"] is not None:
        parts.append(f"R-hat at most {metrics['rhat_max']:.3f}")
    if metrics["ess_min"] is not None:
        parts.append(f"ESS at least {metrics['ess_min']:.0f}")
    text = ", ".join(parts)
    if metrics["divergences"] is not None:
        text += f"; after warm-up {metrics['divergences']} divergences"
    if metrics["ode_failed"] is not None:
        text += f" and {metrics['ode_failed']} failed solves"
    if metrics.get("final_loss") is not None:
        text += f"{metrics['num_steps']} steps, loss {metrics['final_loss']:.2f} at the end"
    return f"{text}; {metrics['seconds']:.0f} s in all, {metrics['sampling_seconds']:.0f} s of them sampling"


def warnings_of(metrics: Mapping[str, Any], method: str) -> list[str]:
    """What a reader should know before believing the numbers, and what to try; none where all is well.

    Args:
        metrics: of :func:`collect_metrics`.
        method: name of the method.

    Example:
        >>> fine = {"rhat_max": 1.0, "ess_min": 900.0, "ess_tail_min": 800.0, "num_chains": 4, "interrupted": False}
        >>> counts = {"divergences": 0, "ode_failed": 0, "max_tree_depth_reached": 0, "num_samples": 500}
        >>> warnings_of(fine | counts, "nuts")
        []
        >>> [text.split(":")[0] for text in warnings_of(fine | counts | {"rhat_max": 1.3}, "nuts")]
        ['The chains do not agree (R-hat 1.300)']
    """
    found = []
    if metrics["interrupted"]:
        found.append("The run was interrupted: these are the draws made until then. Go on with --resume.")
    if method == "svi":
        return found + _of_a_guide(metrics)
    found += _of_chains(metrics)
    if metrics["divergences"]:
        total = metrics["num_chains"] * metrics["num_samples"]
        share = metrics["divergences"] / total
        found.append(
            f"{metrics['divergences']} of {total} draws diverged ({share:.1%}): the sampler could not follow the "
            "posterior everywhere, and the part left out may matter. Look where the orange crosses of the pair plot "
            "gather; try priors in better units, a log scale for positive unknowns, or target_accept=0.95 from Python."
        )
    if metrics["ode_failed"]:
        found.append(
            f"{metrics['ode_failed']} solves failed on the way: there the equations could not be solved, and the "
            "sampler turned back. If they are many, see whether the priors allow impossible values, or choose a "
            "method for stiff equations in the model."
        )
    if metrics.get("max_tree_depth_reached"):
        found.append(
            f"{metrics['max_tree_depth_reached']} trajectories were cut at their greatest length: draws are valid, but "
            "move slowly. Some unknowns are strongly correlated, or of very different size: see the pair plot."
        )
    return found


def _of_chains(metrics: Mapping[str, Any]) -> list[str]:
    found, rhat, ess = [], metrics["rhat_max"], metrics["ess_min"]
    if metrics["num_chains"] == 1:
        found.append("There is one chain only, which cannot be compared with others. Run at least four.")
    elif rhat is None:
        found.append("R-hat is not defined: the draws are too few, or some do not move at all. Draw more.")
    elif rhat > RHAT_BAD:
        found.append(
            f"The chains do not agree (R-hat {rhat:.3f}): do not use these numbers. Draw longer, with more warm-up; if "
            "the trace plot shows chains on different levels, there are several explanations of the data, and a "
            "narrower prior or more data must tell them apart."
        )
    elif rhat > RHAT_GOOD:
        found.append(f"The chains nearly agree (R-hat {rhat:.3f}, good is below {RHAT_GOOD}): draw longer to be sure.")
    tail = metrics["ess_tail_min"]
    least = min((n for n in (ess, tail) if n is not None), default=None)
    if least is not None and least < ESS_ENOUGH:
        found.append(
            f"The draws are worth {least:.0f} independent ones where they are worth least; below {ESS_ENOUGH} the "
            "means, and the ends of intervals even more, are rough. Raise --num-samples."
        )
    return found


def _of_a_guide(metrics: Mapping[str, Any]) -> list[str]:
    found = [
        "These draws are from a normal approximation (SVI), not from the posterior itself: intervals may be too narrow "
        "and bent shapes are missed. Compare with --method nuts before a conclusion depends on them."
    ]
    if metrics["skipped_steps"]:
        found.append(
            f"{metrics['skipped_steps']} of {metrics['num_steps']} updates were skipped, since the loss or its "
            "gradient was not finite: some draws gave equations that cannot be solved."
        )
    return found

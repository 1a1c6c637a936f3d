# SPDX-License-Identifier: Apache-2.0
"""Explain why no start was found: causes with counts, and where in parameter space they lie."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.regions import best_region
from pyro_latentde.solve.solution import Status

__all__ = ["explain_failure"]


def explain_failure(joint: LogJoint, tried: Tensor, chain: int) -> str:
    """The message of an ``InitError``.

    Args:
        joint: the log-joint.
        tried: ``(n, d)`` candidates, none of which has a finite log-density and gradient.
        chain: number of the chain.

    Returns:
        Several sentences: how many tries, how often which cause, where, what to try.
    """
    causes = [_cause(joint, u) for u in tried]
    counts = Counter(causes).most_common()
    listed = ", ".join(f"{number} {cause}" for cause, number in counts)
    lines = [f"No valid start for chain {chain} in {len(tried)} tries: {listed}."]
    main = counts[0][0]
    where = _where(joint, tried, np.array([cause == main for cause in causes]), main)
    if where:
        lines.append(where)
    advice = "start={...} with values you believe in, start=fit from infer.fit_svi, or tighter priors"
    if main.startswith("ODE"):
        advice += "; for ODE failures also a larger max_steps in lde.solver(...), and analysis.stress_test(model)"
    elif "at 'obs" in main or "log_prob" in main:
        advice += "; look at the data and at the distribution of the site named above"
    return "\n".join([*lines, f"Try: {advice}."])


def _cause(joint: LogJoint, u: Tensor) -> str:
    by_site, statuses = joint.site_log_probs(u)
    bad = [code for code in statuses if code != 0]
    if bad:
        return f"ODE {Status(bad[0]).name.lower()}"
    for name, value in by_site.items():
        if not np.isfinite(value):
            return f"non-finite log_prob at {name!r}"
    return "non-finite gradient"


def _where(joint: LogJoint, tried: Tensor, hit: np.ndarray, cause: str) -> str:
    """Where the tries lay if all failed alike, else the bound that best tells the main cause from the rest, if any."""
    with torch.no_grad():
        values = joint.constrain(tried)
    columns = {}
    for name, value in values.items():
        flat = value.reshape(len(tried), -1).to("cpu", torch.float64).numpy()
        for i in range(flat.shape[1]):
            columns[name if flat.shape[1] == 1 else f"{name}[{i}]"] = flat[:, i]
    if hit.all():
        some = list(columns.items())[:8]
        spans = [f"{name} {column.min():.3g} .. {column.max():.3g}" for name, column in some]
        return "All tries failed alike; they covered " + ", ".join(spans) + "."
    region = best_region(columns, hit, against=~hit)
    if region is None:
        return ""
    return (
        f"{100 * region.hits:.3g} % of {cause!r} lie at {region.expression} {region.relation} {region.threshold:.3g}."
    )

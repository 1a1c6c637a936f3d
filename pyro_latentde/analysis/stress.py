# SPDX-License-Identifier: Apache-2.0
"""Try a model out on its prior before it is fitted: which solves fail, why, and where."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from pyro_latentde.analysis.drawing import BLUE, INK, VERMILION, new_figure
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.analysis.stiffness import jacobians_watched, stiffness_of
from pyro_latentde.infer.prior_draws import prior
from pyro_latentde.infer.regions import Region, best_region
from pyro_latentde.posterior.model_sites import kind_of
from pyro_latentde.posterior.runner import Draw, run_draws, trace_model
from pyro_latentde.sites.ode_record import solve_record
from pyro_latentde.solve.solution import Status

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["StressReport", "stress_test"]

# Explicit methods are stable up to a step of about 3 / (fastest decay); steps near it are the stability's.
STABILITY_LIMIT = 2.0
_LINES = 5


@dataclass(frozen=True, repr=False)
class StressReport:
    """What :func:`stress_test` found; ``print`` it.

    Args:
        table: one row for each draw: its parameters, ``cause`` (``"ok"``, or why it failed), ``steps`` of its solves,
            ``stiffness`` (ratio of the real parts of the eigenvalues of the field's Jacobian) and ``step_times_decay``
            (mean step times fastest decay; above 2 an explicit method is held up by stability, not accuracy).
        parameters: names of the parameter columns.
        causes: cause -> number of draws, most frequent first, without ``"ok"``.
        regions: cause -> the bound that best tells its draws from those that worked, where there is one.
        fixed_steps: whether the model chose the steps, not the tolerances.
    """

    table: pd.DataFrame
    parameters: tuple[str, ...]
    causes: dict[str, int]
    regions: dict[str, Region]
    fixed_steps: bool = False

    @property
    def failed(self) -> int:
        """Number of draws that failed."""
        return sum(self.causes.values())

    @property
    def bounds(self) -> dict[str, str]:
        """Suggested prior bounds, those that would keep out a cause: cause -> ``"k < 2.1"``."""
        return {cause: region.complement for cause, region in self.regions.items()}

    def slowest(self, count: int = _LINES) -> pd.DataFrame:
        """The draws with most solver steps, and their parameters."""
        return self.table.nlargest(count, "steps")

    def __str__(self) -> str:
        lines = [f"Stress test: {self.failed} of {len(self.table)} prior draws failed."]
        for cause, count in self.causes.items():
            region = self.regions.get(cause)
            lines.append(f"  {count} x {cause}" + (f": {region}" if region else ""))
        if self.regions:
            lines.append(f"Suggested prior bounds: {', '.join(self.bounds.values())}.")
        return "\n".join([*lines, *self._steps(), *self._stiffness()])

    __repr__ = __str__

    def _steps(self) -> list[str]:
        steps = self.table["steps"]
        if not steps.max() > 0:
            return ["No lde.ode site was solved."]
        lines = [
            f"Solver steps of a draw: median {steps.median():.0f}, 99 % {steps.quantile(0.99):.0f}, "
            f"max {steps.max():.0f}."
        ]
        if steps.max() > 3 * max(1.0, steps.median()):
            lines.append("Slowest draws:")
            shown = self.slowest(3)[["steps", *self.parameters[:6], "cause"]]
            lines += ["  " + row for row in shown.to_string(float_format=lambda x: f"{x:.4g}").splitlines()]
        return lines

    def _stiffness(self) -> list[str]:
        ratio, limited = self.table["stiffness"].dropna(), self.table["step_times_decay"].dropna()
        if ratio.empty:
            return []
        text = f"Stiffness ratio: median {ratio.median():.3g}, 99 % {ratio.quantile(0.99):.3g}. "
        share = float((limited > STABILITY_LIMIT).mean())
        if self.fixed_steps:
            return [text + f"The fixed steps are longer than stability allows in {100 * share:.0f} % of the draws."]
        if share < 0.01:
            return [text + "Explicit methods fit: accuracy sets the steps."]
        return [
            f"{text}In {100 * share:.0f} % of the draws stability sets the steps, not accuracy: the system is stiff "
            'there, and an explicit method takes many steps. Try: method="auto" or "kvaerno5", tighter priors on the '
            "fast rates, or an equation in which the fast states are at equilibrium."
        ]

    def plot(self) -> Figure:
        """Two panels: draws in the two parameters in which failures (orange) differ most, and the solver steps."""
        from matplotlib.ticker import LogFormatter  # slow to import, as in new_figure

        failed = (self.table["cause"] != "ok").to_numpy()
        named = [name for region in self.regions.values() for name in region.names]
        names = list(dict.fromkeys([*named, *self.parameters]))[:2]
        figure, axes = new_figure(1, 2, width=8.0, height=3.2)
        left, right = axes[0]
        x = self.table[names[0]].to_numpy()
        y = self.table[names[1]].to_numpy() if len(names) > 1 else np.arange(len(x))
        left.plot(x[~failed], y[~failed], ".", color=BLUE, ms=3, mew=0, alpha=0.4, label="solved")
        left.plot(x[failed], y[failed], "x", color=VERMILION, ms=4, mew=1, label="failed")
        left.set(xlabel=names[0], ylabel=names[1] if len(names) > 1 else "draw")
        for axis, values in (("x", x), ("y", y)):
            if (values > 0).all() and np.ptp(np.log(values)) > math.log(20):
                left.set(**{f"{axis}scale": "log"})
        left.legend(frameon=False, fontsize=8)
        steps = self.table["steps"].clip(lower=1)
        bins = np.geomspace(steps.min(), steps.max() + 1, 40)
        right.hist([steps[~failed], steps[failed]], bins, stacked=True, color=[BLUE, VERMILION])
        right.axvline(steps.median(), color=INK, lw=1)
        right.set(xscale="log", xlabel="solver steps of a draw (line: median)", ylabel="draws")
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
        return figure


def stress_test(
    model: Callable, *args: Any, num_draws: int = 1000, seed: int = 0, memory: str | int = "1GB", **kwargs: Any
) -> StressReport:
    """Run a model at draws from its prior, and tell which fail, why, where, and how stiff the equations are.

    A draw fails when a solve does (its :class:`.Status`), when the log-likelihood of the data is not finite, or when
    the model raises. For each frequent cause, the one-sided bound on a parameter, or on a product or ratio of two,
    that best tells its draws from those that worked is looked for; it is a suggestion for the prior.

    Args:
        model: Pyro model.
        *args: its arguments, data included.
        num_draws: draws from the prior.
        seed: of the draws.
        memory: budget of one batch of model runs, such as ``"1GB"``.
        **kwargs: keyword arguments of the model.

    Returns:
        The report: print it, or look at its ``table`` (one row for each draw), ``causes``, ``regions`` and ``bounds``.

    Raises:
        LatentDEError: the model has no latent site.

    Example:
        >>> import pyro, pyro.distributions as dist, pyro_latentde as lde
        >>> def model():
        ...     k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 1.0))
        ...     return lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), torch.linspace(0, 0.5, 3), k)
        >>> report = stress_test(model)  # y = 1 / (1 - k t) is infinite at t = 1 / k
        >>> report.bounds
        {"ODE step size underflow at 'z'": 'k < 2'}
    """
    drawn = prior(model, *args, num_samples=num_draws, seed=seed, memory=memory, **kwargs)
    columns = {name: values[0] for name, values in scalar_draws(drawn).items()}
    found = run_draws(_look_at(model, args, kwargs), drawn.draws(), seed=seed, memory=memory, skip_errors=True)
    cause = _causes(found, num_draws)
    steps = sum((v.reshape(num_draws, -1).sum(-1) for k, v in found.items() if k.startswith("steps:")), torch.zeros(()))
    ratio, limited = _worst_stiffness(found, num_draws)
    outcome = {
        "cause": cause,
        "steps": steps.expand(num_draws).numpy(),
        "stiffness": ratio,
        "step_times_decay": limited,
    }
    table = pd.DataFrame({**columns, **outcome})
    counts = {name: int(count) for name, count in table["cause"].value_counts().items() if name != "ok"}
    worked = (table["cause"] == "ok").to_numpy()
    regions = {name: best_region(columns, (table["cause"] == name).to_numpy(), against=worked) for name in counts}
    regions = {name: region for name, region in regions.items() if region is not None}
    fixed = any(bool(value.any()) for key, value in found.items() if key.startswith("fixed:"))
    return StressReport(table, tuple(columns), counts, regions, fixed)


def _look_at(model: Callable, args: tuple, kwargs: dict[str, Any]) -> Callable[[Draw], dict[str, Tensor]]:
    """Run one draw: statuses, steps, Jacobians and log-likelihoods, by ``kind:site``."""

    def one(draw: Draw) -> dict[str, Tensor]:
        found = {"ran": torch.ones(())}
        with pyro.validation_enabled(False), jacobians_watched() as watched:
            trace = trace_model(model, draw, args, kwargs)
            trace.compute_log_prob()
        for name, node in trace.nodes.items():
            record = solve_record(node) if node["type"] == "sample" else None
            if record is not None and record.get("status") is not None:
                found[f"status:{name}"], found[f"steps:{name}"] = record["status"], record["n_steps"]
            elif kind_of(node) in ("observed", "factor"):
                found[f"lp:{name}"] = node["log_prob_sum"].detach()
        for name, parts in watched.items():
            found |= {f"{kind}:{name}": value.detach() for kind, value in parts.items()}
        return found

    return one


def _causes(found: dict[str, Tensor], num: int) -> np.ndarray:
    """Why each draw failed, the first reason of several; ``"ok"`` otherwise."""
    cause = np.full(num, "ok", dtype=object)
    for key, value in reversed(found.items()):  # so that the first site of the model has the last word
        kind, _, name = key.partition(":")
        flat = value.reshape(num, -1)
        if kind == "lp":
            cause[~torch.isfinite(flat).all(-1).numpy()] = f"non-finite log-likelihood at {name!r}"
        elif kind == "status":
            for row in flat.any(-1).nonzero().flatten().tolist():
                code = int(flat[row][flat[row] != 0][0])
                cause[row] = f"ODE {Status(code).sentence} at {name!r}"
    cause[~torch.isfinite(found["ran"]).numpy()] = "the model raised an error"
    return cause


def _worst_stiffness(found: dict[str, Tensor], num: int) -> tuple[np.ndarray, np.ndarray]:
    """Of all solves of a draw: the largest stiffness ratio, and the largest mean step times decay."""
    ratios, limited = [np.full((num, 1), np.nan)], [np.full((num, 1), np.nan)]
    for key, jacobian in found.items():
        kind, _, name = key.partition(":")
        if kind == "jacobian":
            ratio, decay = stiffness_of(jacobian)
            ratios.append(ratio.reshape(num, -1))
            limited.append((decay * found[f"mean_step:{name}"].cpu().double().numpy()).reshape(num, -1))
    return tuple(np.fmax.reduce(np.concatenate(x, 1), axis=1) for x in (ratios, limited))

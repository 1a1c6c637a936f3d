# SPDX-License-Identifier: Apache-2.0
"""Can a run be believed? The package's own checks of its prior, its chains and its solver, a sentence each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyro_latentde.analysis import chain_report, solver_check, stress_test
from pyro_latentde.data import Series
from pyro_latentde.errors import LatentDEError
from pyro_latentde.fitting.figures import Picture, draw_picture
from pyro_latentde.fitting.metrics import RHAT_BAD
from pyro_latentde.posterior import Posterior
from pyro_latentde.posterior.posterior import INDEPENDENT

__all__ = ["CHECK_FILES", "Verdict", "judge"]

CHECK_FILES = ("stress_test.png", "chain_modes.png")

# A prior that fails more often than this allows values that nobody means.
_MOST_FAILED = 0.01
# Runs of the model: a gradient is worth three, a prior draw two (its Jacobian), a posterior draw that is solved again
# thirty (two finer solves, and those that look for settings which are fine enough).
_PRIOR_DRAWS, _POSTERIOR_DRAWS = (200, 500), (100, 200)
_GRADIENTS_EACH, _GRADIENTS_EACH_AGAIN = 4, 30


@dataclass(frozen=True)
class Verdict:
    """What one check found.

    Args:
        about: ``"prior"``, ``"chains"`` or ``"solver"``.
        sentence: with the numbers; or why there are none.
        passed: None where the check could not be made.
        printed: the whole report.
        picture: its figure, where there is something to see.
    """

    about: str
    sentence: str
    passed: bool | None
    printed: str = ""
    picture: Picture | None = None

    def __str__(self) -> str:
        return f"{self.about}: {self.sentence}"


def judge(posterior: Posterior, series: Series, metrics: Mapping[str, Any], out: Path, *, seed: int) -> list[Verdict]:
    """Run :func:`.stress_test`, :func:`.chain_report` and :func:`.solver_check`.

    They look at so many draws that they take no more than about a third of the time of the fit, or some seconds. What
    goes wrong in one of them is told in its place.

    Args:
        posterior: with its model.
        series: the data.
        metrics: of :func:`.collect_metrics`; its R-hat is told, so that a page has one.
        out: folder of the figures.
        seed: of the draws of the prior, and of the choice of those of the posterior.

    Returns:
        Three verdicts.
    """
    for_prior, for_solver = _numbers_of_draws(posterior)
    ways: dict[str, Callable[[], Verdict]] = {
        "prior": lambda: _of_prior(posterior, series, out, for_prior, seed),
        "chains": lambda: _of_chains(posterior, metrics["rhat"], out),
        "solver": lambda: _of_solver(posterior, for_solver, seed),
    }
    for file in CHECK_FILES:
        (out / file).unlink(missing_ok=True)
    return [_attempt(about, way) for about, way in ways.items()]


def _numbers_of_draws(posterior: Posterior) -> tuple[int, int]:
    """Draws of the prior, and of the posterior, by the gradients that the fit took; always the same for one fit."""
    gradients = int(posterior.attrs.get("num_gradients") or posterior.attrs.get("num_steps") or 0)

    def within(number: int, limits: tuple[int, int]) -> int:
        return max(limits[0], min(limits[1], number))

    return (
        within(gradients // _GRADIENTS_EACH, _PRIOR_DRAWS),
        within(gradients // _GRADIENTS_EACH_AGAIN, _POSTERIOR_DRAWS),
    )


def _attempt(about: str, way: Callable[[], Verdict]) -> Verdict:
    try:
        return way()
    except Exception as error:  # of any kind: the model is the user's, and the posterior is worth more than a check
        text = str(error) if isinstance(error, LatentDEError) else f"{type(error).__name__}: {error}"
        first, _, more = text.strip().partition("\n")
        return Verdict(about, f"not checked. {first}", None, text if more else "")


def _of_prior(posterior: Posterior, series: Series, out: Path, num_draws: int, seed: int) -> Verdict:
    report = stress_test(posterior.model, series, num_draws=num_draws, seed=seed)
    steps, total = report.table["steps"], len(report.table)
    if not report.failed:
        sentence = f"all {total} draws of the prior can be solved and give the data a density"
        sentence += (
            f", in {steps.median():.0f} solver steps (median), {steps.max():.0f} at most." if steps.any() else "."
        )
        return Verdict("prior", sentence, True, str(report))
    cause, count = next(iter(report.causes.items()))
    sentence = f"{report.failed} of {total} draws of the prior fail ({report.failed / total:.1%}), "
    sentence += f"{'all' if count == report.failed else count} by {cause}; the fit leaves such values out. "
    region = report.regions.get(cause)
    if region is not None:
        where = f"{region.expression} {region.relation} {region.threshold:.3g}"
        sentence += f"{region.hits:.0%} of them lie at {where}, which the prior might leave out, too."
    else:
        sentence += "No bound on one or two parameters tells them from the others."
    picture = draw_picture(
        CHECK_FILES[0],
        "Draws of the prior",
        "Left: draws that were solved, and those that failed (orange crosses). Right: how many solver steps they took.",
        report.plot,
        out,
    )
    return Verdict("prior", sentence, report.failed / total < _MOST_FAILED, str(report), picture)


def _of_chains(posterior: Posterior, rhat: Mapping[str, float | None], out: Path) -> Verdict:
    if posterior.attrs.get("inference") in INDEPENDENT:
        return Verdict("chains", "not checked. The draws are independent of each other: there are no chains.", None)
    report = chain_report(posterior)
    known = {name: value for name, value in rhat.items() if value is not None} or dict(report.r_hat)
    worst = max(known, key=known.get)
    count, largest = posterior.num_chains, f"{known[worst]:.3f} for {worst}"
    if len(report.modes) == 1:
        passed = known[worst] <= RHAT_BAD
        sentence = f"all {count} chains are in one mode"
        sentence += (
            f" (R-hat at most {largest})." if passed else f", but do not agree yet: R-hat {largest}. Draw longer."
        )
        return Verdict("chains", sentence, passed, str(report))
    sizes = " + ".join(str(len(mode)) for mode in report.modes)
    sentence = f"the {count} chains are in {len(report.modes)} modes ({sizes}; R-hat {largest}): do not pool them."
    text = "The unknowns that tell the modes apart, draw after draw; a colour for each mode."
    picture = draw_picture(CHECK_FILES[1], "Modes of the chains", text, report.plot, out)
    return Verdict("chains", sentence, False, str(report), picture)


def _of_solver(posterior: Posterior, num_draws: int, seed: int) -> Verdict:
    report = solver_check(posterior, num_draws=num_draws, seed=seed)
    table, shift = report.table, report.means["shift"].abs()
    again = f"solved again more finely, {report.changes.shape[1]} draws"
    if report.reliable:
        sentence = f"its error does not matter: {again} change by {_small(table['max_change'].max())} nat at most in "
        sentence += f"their log-density, and the means by {_small(table['max_shift'].max())} sd."
        return Verdict("solver", sentence, True, str(report))
    failed = int(table["failed"].max())
    given = ", ".join(f"{key}={value!r}" for key, value in report.suggested.items() if value is not None)
    given += " and no step_size" if "step_size" in report.suggested else ""
    sentence = f"its error matters: {again} move the mean of {shift.idxmax()} by {shift.max():.2g} sd "
    sentence += f"(Pareto k {report.pareto_k:.2g}{f', {failed} of them fail' if failed else ''}). "
    return Verdict("solver", f"{sentence}Fit again with {given} in the model's lde.ode.", False, str(report))


def _small(value: float) -> str:
    return f"{value:.1g}" if value > 1e-6 else "less than 1e-06"

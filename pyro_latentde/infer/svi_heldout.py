# SPDX-License-Identifier: Apache-2.0
"""Held-out series while training: their ELBO, the best parameters, and when to stop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_latentde.data.series import Series
from pyro_latentde.infer.failed_draws import FAILURES
from pyro_latentde.infer.svi_modules import evaluating, fixed_tensors
from pyro_latentde.infer.svi_steps import Stepper
from pyro_latentde.posterior.model_sites import seeded

__all__ = ["HeldOut"]


class HeldOut:
    """ELBO of series that are not trained on, at the KL's full weight and always with the same random numbers.

    Args:
        series: the held-out series.
        stepper: model, guide and their parameters.
        modules: model and guide as the user gave them.
        seed: of every evaluation; the random stream of the training goes on undisturbed.
        batch_size: series at once; None is all.
        patience: evaluations without a better one that end the run; None never does.
        trained: the series that are trained on. What is in the plate of the held-out series weighs as much as their
            observed values do, so that both ELBOs fit into one picture, and sites outside the plate count once in both.
    """

    def __init__(
        self,
        series: Series,
        stepper: Stepper,
        modules: tuple,
        seed: int,
        batch_size: int | None,
        patience: int | None,
        trained: Series,
    ) -> None:
        self.series = series._with(time_weight=series.time_weight * _size(trained) / _size(series))
        self.stepper, self.modules = stepper, modules
        self.seed, self.patience = seed, patience
        self.chunk = min(batch_size or len(series), len(series))
        self.steps: list[int] = []
        self.elbos: list[float] = []
        self.best: dict[str, Tensor] = {}
        self.best_step, self.best_elbo = -1, -math.inf

    def evaluate(self, step: int) -> float:
        """ELBO in nats per training set, NaN where the model fails; it is kept, and the best parameters."""
        elbo = self._elbo()
        self.steps.append(step)
        self.elbos.append(elbo)
        if math.isfinite(elbo) and elbo > self.best_elbo:
            self.best_elbo, self.best_step = elbo, step
            self.best = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        return elbo

    @property
    def exhausted(self) -> bool:
        """Whether as many finite evaluations as `patience` have brought nothing better."""
        finite = [step for step, elbo in zip(self.steps, self.elbos, strict=True) if math.isfinite(elbo)]
        return self.patience is not None and sum(step > self.best_step for step in finite) >= self.patience

    def warn_if_useless(self) -> None:
        """Tell that no evaluation was finite: the best parameters are not known then."""
        if self.elbos and not any(map(math.isfinite, self.elbos)):
            warnings.warn(
                f"heldout: none of {len(self.elbos)} evaluations of the ELBO was finite, so the last parameters are "
                "kept and patience= had no effect: the model fails for some of these series, or at draws for them",
                stacklevel=2,
            )

    def restore_best(self) -> None:
        """Put the best parameters back."""
        with torch.no_grad():
            tensors = self._tensors()
            for name, value in self.best.items():
                tensors[name].copy_(value)

    def state(self) -> dict[str, Any]:
        """What `load` needs, as tensors and plain types."""
        return {"steps": self.steps, "elbos": self.elbos, "best": self.best, "best_step": self.best_step}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.steps, self.elbos = list(state["steps"]), list(state["elbos"])
        self.best, self.best_step = dict(state["best"]), state["best_step"]
        self.best_elbo = self.elbos[self.steps.index(self.best_step)] if self.best else -math.inf

    def _elbo(self) -> float:
        stepper, devices = self.stepper, self.stepper.devices
        n, total = len(self.series), torch.zeros((), dtype=torch.float64)
        weight, stepper.kl_weight.weight = stepper.kl_weight.weight, 1.0
        try:
            with evaluating(*self.modules), seeded(self.seed), devices.autocast():
                for number in range(devices.rank, -(-n // self.chunk), devices.world):
                    rows = torch.arange(number * self.chunk, min((number + 1) * self.chunk, n))
                    torch.manual_seed(self.seed + number)  # the same numbers, whichever device takes the chunk
                    total -= self._loss(self.series if len(rows) == n else self.series.batch(rows)) * len(rows) / n
        finally:
            stepper.kl_weight.weight = weight
        total = total.to(next(iter(stepper.params.values())).device) if devices.world > 1 else total
        return float(devices.average(total)) * devices.world

    def _loss(self, chunk: Series) -> float:
        stepper = self.stepper
        try:
            loss = stepper.parts.elbo.loss(stepper.model, stepper.guide, chunk, *stepper.args[1:], **stepper.kwargs)
        except FAILURES:
            return math.nan
        return float(loss)

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.stepper.params, **fixed_tensors(*self.modules)}


def _size(series: Series) -> float:
    """Observed values (without values: times) that the series stand for; windows stand for the rest of their series."""
    return float(series.mask.sum()) * series.time_weight

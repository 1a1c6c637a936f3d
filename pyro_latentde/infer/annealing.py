# SPDX-License-Identifier: Apache-2.0
"""The two parts of an ELBO: the weight that annealing gives the KL, and what each part is worth."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

from pyro import poutine
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

__all__ = ["KLWeight", "PartsOfELBO", "is_prior"]

_LEAST = 1e-6  # in place of zero, so that the KL can still be read off the loss


def is_prior(site: dict[str, Any]) -> bool:
    """Whether a sample site counts to the KL: it is not observed, or marked ``infer={"prior": True}``."""
    if site["type"] != "sample" or site_is_subsample(site):
        return False
    return not site["is_observed"] or bool(site["infer"].get("prior"))


class KLWeight(Messenger):
    r"""Multiply the log-density of every prior and guide site by a weight,

    .. math:: E_q[\log p(y \mid z)] - w \, \mathrm{KL}(q(z) \,\|\, p(z)).

    Sites are those that are not observed, and observed ones or factors marked ``infer={"prior": True}``, such as
    a continuity condition. Model and guide each run under it.

    Args:
        weight: w; zero counts as 1e-6.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.0))
        >>> nodes = poutine.trace(KLWeight(0.25)(model)).get_trace().nodes
        >>> nodes["z"]["scale"], nodes["y"]["scale"]
        (0.25, 1.0)
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self._weight = weight

    @property
    def weight(self) -> float:
        """The weight, at least 1e-6."""
        return max(self._weight, _LEAST)

    @weight.setter
    def weight(self, weight: float) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"kl_weight: expected a number that is not negative, got {weight}")
        self._weight = weight

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if self._weight != 1.0 and is_prior(msg):
            msg["scale"] = msg["scale"] * self.weight


class PartsOfELBO:
    """Watch the traces of an ELBO, and split its losses into reconstruction and KL.

    Args:
        elbo: Pyro's loss. It stays as it is; use the attribute ``elbo`` instead.
    """

    def __init__(self, elbo: ELBO) -> None:
        self.elbo = copy.copy(elbo)
        self._inner = type(elbo)._get_traces.__get__(self.elbo)
        self.elbo._get_traces = self._watch
        self._found: list[float] = []

    def split(self, loss: float, weight: float) -> tuple[float, float]:
        """Reconstruction and unweighted KL, in nats, of the last run, whose loss had the KL at this weight."""
        found, self._found = self._found, []
        reconstruction = sum(found) / max(1, self.elbo.num_particles) if found else math.nan
        return reconstruction, (reconstruction + loss) / weight

    def _watch(self, *arguments: Any) -> Iterator[tuple[poutine.Trace, poutine.Trace]]:
        self._found = []
        for traces in self._inner(*arguments):
            yield traces  # when it comes back here the ELBO has computed all log-densities
            scored = [_value(site) for site in traces[0].nodes.values() if _is_data(site)]
            self._found.append(sum(scored) if scored else math.nan)


def _is_data(site: dict[str, Any]) -> bool:
    return (
        site["type"] == "sample"
        and site["is_observed"]
        and not site["infer"].get("_deterministic")
        and not is_prior(site)
    )


def _value(site: dict[str, Any]) -> float:
    total = site.get("log_prob_sum", math.nan)
    return total.item() if isinstance(total, Tensor) else float(total)

# SPDX-License-Identifier: Apache-2.0
"""Fisher information of a model's observations, from sensitivities and the curvature of a divergence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, kl_divergence
from torch.distributions.transforms import Transform

from pyro_latentde.errors import SolveError
from pyro_latentde.posterior.model_sites import observed_mask, seeded
from pyro_latentde.posterior.runner import trace_model

__all__ = ["Law", "fisher_information", "laws_at"]

_WRAPPERS = (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
_MOST_NUMBERS = 20_000_000


@dataclass(frozen=True)
class Law:
    """How the distribution of one observed site depends on the coordinates, to first order.

    Args:
        fn: the distribution at the point, without wrappers; its batch is independent observations.
        tensors: those of its parameters that depend on the coordinates.
        jacobians: of them, ``(*parameter, d)``.
        weight: mask times scale of each observation, ``(*batch,)``.
        times: of the observations ``(T,)``, where the model tells.
    """

    fn: Distribution
    tensors: tuple[Tensor, ...]
    jacobians: tuple[Tensor, ...]
    weight: Tensor
    times: Tensor | None

    def here(self) -> Distribution:
        """A fresh copy at the point: distributions remember what they once computed, ``logits`` of ``probs``."""
        return _with_tensors(self.fn, {})

    def moved(self, delta: Tensor) -> Distribution:
        """The distribution after the coordinates move by ``delta`` ``(d,)``."""
        new = [x + j @ delta for x, j in zip(self.tensors, self.jacobians, strict=True)]
        return _with_tensors(self.fn, {id(x): y for x, y in zip(self.tensors, new, strict=True)})


def fisher_information(law: Law, dim: int, *, each: bool = False, num_noise: int = 1000, seed: int = 0) -> Tensor:
    r"""Fisher information of one site about the coordinates

    .. math:: I = J^\top H J, \qquad H = \nabla^2_\eta \, \mathrm{KL}(p_{\eta_0} \,\|\, p_\eta) \big|_{\eta_0},

    with the sensitivities J of the distribution's parameters; exact where torch knows the divergence. Elsewhere
    (negative binomial, Student) it is the mean outer product of scores at simulated data.

    Args:
        law: the site.
        dim: number of coordinates d.
        each: one matrix for each observation, ``(*batch, d, d)``, instead of their sum.
        num_noise: simulated data sets, where they are needed; the error is about 1 / sqrt(their number).
        seed: of those.

    Returns:
        ``(d, d)`` float64, or ``(*batch, d, d)``.
    """
    if not law.tensors:
        return torch.zeros((*(law.weight.shape if each else ()), dim, dim), dtype=torch.float64)
    zero = torch.zeros(dim, dtype=law.jacobians[0].dtype, device=law.jacobians[0].device)

    def divergence(delta: Tensor) -> Tensor:
        kl = kl_divergence(law.here(), law.moved(delta)) * law.weight
        return kl if each else kl.sum()

    try:
        found = torch.func.jacfwd(torch.func.jacfwd(divergence))(zero)
    except (NotImplementedError, RuntimeError):  # not registered, or it looks at values, which transforms hide
        found = _by_simulation(law, zero, each, num_noise, seed)
    return found.detach().to("cpu", torch.float64)


def _by_simulation(law: Law, zero: Tensor, each: bool, num: int, seed: int) -> Tensor:
    """Mean of score times score: observations are independent, so products between two of them vanish."""
    size = max(1, min(num, _MOST_NUMBERS // max(1, law.weight.numel() * len(zero))))
    parts, subscripts = [], "s...i,s...j->...ij" if each else "s...i,s...j->ij"
    with seeded(seed), torch.no_grad():
        for start in range(0, num, size):
            values = law.here().sample((min(size, num - start),))
            scores = torch.func.jacfwd(lambda delta, y=values: law.moved(delta).log_prob(y) + 0 * law.weight)(zero)
            # masked data may be anything, their scores too
            scores = torch.where(law.weight[..., None] != 0, scores, 0.0) * law.weight.sqrt()[..., None]
            flat = scores if each else scores.flatten(1, -2)
            parts.append(torch.einsum(subscripts if each else "sei,sej->ij", flat, flat))
    return sum(parts) / num


def laws_at(
    model: Callable,
    constrain: Callable[[Tensor], dict[str, Tensor]],
    u: Tensor,
    sites: Sequence[str],
    args: tuple,
    kwargs: Mapping[str, Any],
) -> dict[str, Law]:
    """The observed sites at the coordinates ``u`` ``(d,)``: one run, and one forward sensitivity for each of d.

    Raises:
        SolveError: the parameters of a distribution are not finite there.
    """

    # what is not observed is drawn once, since drawing has no derivative in forward mode
    drawn: dict[str, Tensor] = {}

    def run(v: Tensor) -> dict[str, dict[str, Any]]:
        nodes = trace_model(model, constrain(v) | drawn, args, kwargs).nodes
        return {name: dict(nodes[name]) | {"times": _times(nodes, name)} for name in sites}

    def parameters(v: Tensor) -> dict[str, list[Tensor]]:
        return {name: _tensors(_bare(node["fn"])) for name, node in run(v).items()}

    with seeded(0), torch.no_grad():
        drawn |= {name: node["value"] for name, node in run(u).items()}
        nodes = run(u)
        jacobians = torch.func.jacfwd(parameters, randomness="same")(u)
    laws = {}
    for name, node in nodes.items():
        fn = _bare(node["fn"])
        every = list(zip(_tensors(fn), jacobians[name], strict=True))
        if not all(bool(torch.isfinite(part).all()) for pair in every for part in pair):
            raise SolveError(
                f"site {name!r}: the distribution, or its derivative, is not finite here: a solve fails.\n"
                "Try: another point, or lde.analysis.stress_test(model, ...) to see where solves fail."
            )
        # exact zeros are constants, and some divergences look at the values of those
        pairs = [(x, j) for x, j in every if bool((j != 0).any())]
        tensors, derivatives = zip(*pairs, strict=True) if pairs else ((), ())
        laws[name] = Law(fn, tensors, derivatives, _weight(node, fn), node["times"])
    return laws


def _bare(fn: Distribution) -> Distribution:
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    return fn


def _weight(node: Mapping[str, Any], fn: Distribution) -> Tensor:
    event = len(fn.event_shape)
    shape = node["value"].shape[: node["value"].ndim - event]
    mask = observed_mask(node)
    weight = torch.ones(shape) if mask is None else torch.as_tensor(mask).to(torch.get_default_dtype())
    weight = weight.expand(node["value"].shape)[(...,) + (0,) * event] if weight.ndim > len(shape) else weight
    return weight.expand(shape) * node["scale"]


def _times(nodes: Mapping[str, Any], name: str) -> Tensor | None:
    """Times of an observed site: its own, or those of the first solve of the model."""
    records = [nodes[name]["infer"].get("lde_observe"), *(n["infer"].get("lde_ode") for n in _samples(nodes))]
    times = next((r["times"] for r in records if r and r.get("times") is not None), None)
    return None if times is None else times.reshape(-1, times.shape[-1])[0]


def _samples(nodes: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [node for node in nodes.values() if node["type"] == "sample"]


def _tensors(part: Any) -> list[Tensor]:
    """All floating tensors inside a distribution, its inner ones and its transforms, in a fixed order."""
    found = []
    for value in _children(part).values():
        if isinstance(value, Tensor):
            found += [value] if value.is_floating_point() else []
        else:
            found += _tensors(value)
    return found


def _with_tensors(part: Any, new: Mapping[int, Tensor]) -> Any:
    """A copy with tensors exchanged, by identity; validation is off in it."""
    if isinstance(part, Tensor):
        return new.get(id(part), part)
    if isinstance(part, list | tuple):
        return type(part)(_with_tensors(value, new) for value in part)
    made = copy.copy(part)
    for key, value in _children(part).items():
        made.__dict__[key] = _with_tensors(value, new)
    if isinstance(made, Distribution):
        made._validate_args = False
    return made


def _children(part: Any) -> dict[Any, Any]:
    kinds = (Tensor, Distribution, Transform)
    if isinstance(part, list | tuple):
        return dict(enumerate(part))
    items = part.__dict__.items()
    return {
        key: value
        for key, value in items
        if isinstance(value, kinds)
        or (isinstance(value, list | tuple) and value and all(isinstance(x, kinds) for x in value))
    }

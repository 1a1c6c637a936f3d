# SPDX-License-Identifier: Apache-2.0
"""The log-joint density of a Pyro model as a function of one flat unconstrained vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.model_checks import check_observed, check_plates
from pyro_latentde.sites.ode_record import solve_record

__all__ = ["Aux", "LatentSite", "LogJoint"]

Aux = tuple[Tensor, Tensor]  # (did a solve fail, number of solver steps), per row


@dataclass(frozen=True)
class LatentSite:
    """Where a latent site lives in the flat vector: coordinates ``start`` to ``stop``, mapped by
    ``transform``."""

    name: str
    shape: torch.Size
    dtype: torch.dtype
    start: int
    stop: int
    flat_shape: torch.Size
    support: Constraint
    transform: Transform


class _SiteValues(Messenger):
    """Give every latent site the image of its coordinates, and add up the log-Jacobians.

    The support is taken from the distribution at hand, so a support that depends on other sites is right too.
    Observed sites get other data where there are any.
    """

    def __init__(self, sites: Mapping[str, LatentSite], u: Tensor, data: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.sites, self.u, self.data = sites, u, data or {}
        self.log_jacobian: Tensor = u.new_zeros(())

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] and msg["name"] in self.data:
            msg["value"] = self.data[msg["name"]]
        site = self.sites.get(msg["name"])
        if site is None or msg["is_observed"]:
            return
        transform = biject_to(msg["fn"].support)
        x = self.u[site.start : site.stop].reshape(site.flat_shape).to(site.dtype)
        msg["value"] = transform(x)
        msg["done"] = True
        self.log_jacobian = self.log_jacobian + transform.log_abs_det_jacobian(x, msg["value"]).sum()


class LogJoint:
    r"""Log-joint density of a model over its latent sites, mapped to the whole of :math:`R^d`.

    .. math:: \ell(u) = \log p(\theta(u), y) + \log \left| \det \partial \theta / \partial u \right|

    The model runs once with its shapes checked; after that value validation is off, and a failed solve is a
    log-density of minus infinity.

    Args:
        model: Pyro model; every latent site continuous.
        args: positional arguments of the model, fixed from now on.
        kwargs: keyword arguments of the model, fixed from now on.

    Attributes:
        sites: the latent sites in the order of the model.
        dim: number of unconstrained coordinates ``d``.
        dtype, device: of the flat vector.
        has_fixed_supports: False if the support of some site depends on other sites.

    Raises:
        ShapeError: a likelihood does not fit its data.
        DataError: a value was observed outside the support of its distribution.
        LatentDEError: discrete latent sites, subsampled plates, or no latent site at all.

    Example:
        >>> import pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("rate", dist.Exponential(torch.tensor(1.0)))
        >>> joint = LogJoint(model)
        >>> lp, grad, _ = joint.value_and_grad(torch.zeros(3, 1))
        >>> lp, grad.shape
        (tensor([-1., -1., -1.]), torch.Size([3, 1]))
    """

    def __init__(self, model: Callable, args: tuple = (), kwargs: Mapping[str, Any] | None = None) -> None:
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs or {})
        trace = self.sample_trace(seed=0)
        self.sites = _latent_sites(trace)
        self.dim = self.sites[-1].stop
        values = [trace.nodes[site.name]["value"] for site in self.sites]
        self.dtype = torch.float64 if any(v.dtype == torch.float64 for v in values) else values[0].dtype
        self.device = values[0].device
        self._by_name = {site.name: site for site in self.sites}
        with pyro.validation_enabled(False):
            check_observed(trace)
        self.has_fixed_supports = self._supports_are_fixed(trace)

    def sample_trace(self, seed: int) -> poutine.Trace:
        """Run the model forward once with its own random seed; the global generators keep their state."""
        with torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
            torch.manual_seed(seed)
            try:
                return poutine.trace(self.model).get_trace(*self.args, **self.kwargs)
            except NotImplementedError as error:  # Pyro's improper distributions cannot be drawn from
                raise LatentDEError(
                    f"the model cannot be run forward: {str(error).splitlines()[0]}.\nTry: give every latent site a "
                    "proper prior; starts and simulations are drawn from it."
                ) from error

    def log_density(self, u: Tensor, data: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Aux]:
        """Log-density at one ``u`` ``(d,)``: a scalar, with the state of the solves.

        Values in ``data`` take the place of what the model observes at those sites.
        """
        trace, values = self._run(u, data)
        lp = trace.log_prob_sum() + values.log_jacobian
        solves = _solves(trace)
        failed = torch.zeros((), dtype=torch.bool, device=u.device)
        steps = torch.zeros((), dtype=torch.int64, device=u.device)
        for solve in solves:
            failed = failed | (solve["status"] != 0).any()
            steps = steps + solve["n_steps"].sum()
        return lp, (failed, steps)

    def potential(self, u: Tensor) -> Tensor:
        """Minus the log-density at one ``u`` ``(d,)``; plus infinity where a solve failed."""
        with pyro.validation_enabled(False):
            lp, (failed, _) = self.log_density(u)
        return torch.where(failed | ~torch.isfinite(lp), torch.full_like(lp, math.inf), -lp)

    def value_and_grad(self, u: Tensor, data: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Aux]:
        """Log-density ``(C,)``, gradient ``(C, d)`` and state of the solves ``(C,)`` for the rows of ``u``
        ``(C, d)``.

        Each row may have data of its own, observed site -> ``(C, *site shape)``. Rows whose log-density or gradient
        is not finite get minus infinity and a zero gradient.
        """
        with pyro.validation_enabled(False):
            row_wise = torch.func.vmap(torch.func.grad_and_value(self.log_density, has_aux=True))
            grad, (lp, aux) = row_wise(u, dict(data or {}))
        return (*_reject_failures(lp, grad, aux[0]), aux)

    def value_and_grad_in_a_loop(
        self, u: Tensor, data: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Aux]:
        """The same as ``value_and_grad``, one row after the other, for models that cannot be vectorised."""
        rows = []
        for i, row in enumerate(u):
            row = row.detach().requires_grad_(True)
            with pyro.validation_enabled(False):
                lp, aux = self.log_density(row, {name: value[i] for name, value in (data or {}).items()})
            (grad,) = torch.autograd.grad(lp, row)
            rows.append((lp.detach(), grad, *aux))
        lp, grad, failed, steps = (torch.stack(column) for column in zip(*rows, strict=True))
        return (*_reject_failures(lp, grad, failed), (failed, steps))

    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """Values of the latent sites for ``u`` ``(*batch, d)``: name -> ``(*batch, *site shape)``."""
        batch = u.shape[:-1]
        if self.has_fixed_supports:
            flat = [u[..., s.start : s.stop].reshape(batch + s.flat_shape).to(s.dtype) for s in self.sites]
            return {s.name: s.transform(x).contiguous() for s, x in zip(self.sites, flat, strict=True)}
        rows = [self._values_by_running(row) for row in u.reshape(-1, self.dim)]
        stacked = {s.name: torch.stack([row[s.name] for row in rows]) for s in self.sites}
        return {name: value.reshape(batch + value.shape[1:]) for name, value in stacked.items()}

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat vector ``(*batch, d)`` of site values ``(*batch, *site shape)``; undoes ``constrain``."""
        parts = []
        for site in self.sites:
            if site.name not in values:
                raise LatentDEError(f"no value for latent site {site.name!r}; given: {sorted(values)}.")
            value = torch.as_tensor(values[site.name]).to(self.device, site.dtype)
            batch = value.shape[: value.dim() - len(site.shape)]
            if value.shape[len(batch) :] != site.shape:
                raise ShapeError(
                    f"value of latent site {site.name!r}: expected (..., {', '.join(map(str, site.shape))}), "
                    f"got {tuple(value.shape)}."
                )
            if batch and not self.has_fixed_supports:
                rows = [{k: torch.as_tensor(v)[i] for k, v in values.items()} for i in range(batch[0])]
                return torch.stack([self.unconstrain(row) for row in rows])
            transform = site.transform if self.has_fixed_supports else self._transform_at(site, values)
            parts.append(transform.inv(value).reshape(*batch, -1).to(self.dtype))
        return torch.cat(parts, dim=-1)

    def site_log_probs(self, u: Tensor) -> tuple[dict[str, float], list[int]]:
        """Log-probability by site and the status of every solved row at one ``u`` ``(d,)``."""
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = self._run(u)
            trace.log_prob_sum()
        nodes = {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}
        by_site = {name: float(site["log_prob_sum"]) for name, site in nodes.items()}
        return by_site, [int(code) for solve in _solves(trace) for code in solve["status"].reshape(-1)]

    def _run(self, u: Tensor, data: Mapping[str, Tensor] | None = None) -> tuple[poutine.Trace, _SiteValues]:
        values = _SiteValues(self._by_name, u, data)
        with values:
            return poutine.trace(self.model).get_trace(*self.args, **self.kwargs), values

    def _values_by_running(self, u: Tensor) -> dict[str, Tensor]:
        with torch.no_grad(), pyro.validation_enabled(False):
            trace, _ = self._run(u)
        return {site.name: trace.nodes[site.name]["value"] for site in self.sites}

    def _transform_at(self, site: LatentSite, values: Mapping[str, Tensor]) -> Transform:
        """Transform of a site whose support depends on the other values (one set of values only)."""
        given = {s.name: torch.as_tensor(values[s.name]).to(self.device, s.dtype) for s in self.sites}
        with torch.no_grad(), pyro.validation_enabled(False):
            conditioned = poutine.condition(self.model, data=given)
            trace = poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)
        return biject_to(trace.nodes[site.name]["fn"].support)

    def _supports_are_fixed(self, trace: poutine.Trace) -> bool:
        """Whether every transform is the same at another draw from the prior."""
        other = self.sample_trace(seed=1)
        probes = [torch.full(s.flat_shape, 0.3, dtype=s.dtype, device=self.device) for s in self.sites]
        return all(
            torch.equal(site.transform(x), biject_to(other.nodes[site.name]["fn"].support)(x))
            for site, x in zip(self.sites, probes, strict=True)
        )


def _reject_failures(lp: Tensor, grad: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
    bad = failed | ~torch.isfinite(lp) | ~torch.isfinite(grad).all(-1)
    return lp.masked_fill(bad, -math.inf), grad.masked_fill(bad.unsqueeze(-1), 0.0)


def _solves(trace: poutine.Trace) -> list[dict[str, Any]]:
    """Records of the solves that tell how they went; a trajectory of many segments does not."""
    records = [solve_record(site) for site in trace.nodes.values()]
    return [record for record in records if record and record.get("status") is not None]


def _latent_sites(trace: poutine.Trace) -> list[LatentSite]:
    sites, start = [], 0
    for name, node in trace.nodes.items():
        if node["type"] == "sample":
            check_plates(name, node)
        if node["type"] != "sample" or node["is_observed"] or type(node["fn"]).__name__ == "_Subsample":
            continue
        support = node["fn"].support
        if support.is_discrete:
            raise LatentDEError(
                f"latent site {name!r} is discrete ({type(node['fn']).__name__}); "
                "gradients need continuous sites.\nTry: sum it out by hand in the likelihood, or pyro.infer.MCMC "
                'and its NUTS with infer={"enumerate": "parallel"}, which sum it out for you.'
            )
        transform, value = biject_to(support), node["value"]
        flat_shape = transform.inv(value).shape
        stop = start + flat_shape.numel()
        sites.append(LatentSite(name, value.shape, value.dtype, start, stop, flat_shape, support, transform))
        start = stop
    if not sites or not start:
        seen = [name for name, node in trace.nodes.items() if node["type"] == "sample"]
        raise LatentDEError(
            f"the model has no latent site to infer: its sample sites {seen} are all observed.\n"
            "Try: leave out obs= at the sites you want a posterior of."
        )
    return sites

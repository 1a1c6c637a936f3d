# SPDX-License-Identifier: Apache-2.0
"""Where chains start: a finite log-density and gradient, elsewhere for each chain, not hopelessly far out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer.ascent import ascend
from pyro_latentde.infer.log_joint import LogJoint
from pyro_latentde.infer.start_failures import explain_failure

__all__ = ["chain_generators", "find_many_starts", "find_starts"]

CANDIDATES = 20
ROUNDS = 5
FEWEST, MOST_NUMBERS = 4, 4000
CLIMB_STEPS = 150
# Places that are searched for where there are many chains, candidates of each, and how far around the others start.
# Fewer candidates do there: a place that holds no mass is left in warm-up, when its chains take the place of others.
SEARCHES, FEWER, SPREAD = 16, 8, 0.1
_EXPECTED = "expected 'auto', a dict of site values, a fit or a Posterior"

RowDensity = Callable[[Tensor], tuple]  # rows (n, d) -> log-densities (n,), gradients (n, d), ...

_log = logging.getLogger("pyro_latentde")


def chain_generators(seed: int, num_chains: int, stream: int = 0) -> list[np.random.Generator]:
    """One generator for each chain, the same for chain ``i`` whatever ``num_chains`` is.

    Args:
        seed: seed of the run.
        num_chains: number of chains.
        stream: independent streams for different purposes.

    Example:
        >>> a, b = chain_generators(0, 2)[1], chain_generators(0, 5)[1]
        >>> a.random() == b.random()
        True
    """
    sequences = (np.random.SeedSequence(seed, spawn_key=(chain, stream)) for chain in range(num_chains))
    return [np.random.default_rng(sequence) for sequence in sequences]


def find_starts(
    joint: LogJoint,
    num_chains: int,
    seed: int,
    start: Any = "auto",
    record: Callable[[Tensor], RowDensity] | None = None,
    candidates: int = CANDIDATES,
) -> np.ndarray:
    """Starts of the chains in unconstrained coordinates.

    With ``"auto"`` each chain has candidates of its own, most of them drawn from the prior and some uniform
    on (-2, 2) in unconstrained coordinates. All that have a finite log-density and gradient climb for a
    while, because posteriors of differential equations have broad, flat and worthless modes that hold a chain
    for its whole warm-up. The chain starts on the path that came to the most worth, a rough log-mass (see
    ``ascend``), where it first is within ``d`` of it: not at the very best place, which is no typical one and
    the same for every chain.

    Args:
        joint: the log-joint.
        num_chains: number of chains ``C``.
        seed: seed of the run; the candidates of a chain depend on it and on the chain's number only.
        start: ``"auto"`` or None; a dictionary of site values, each ``(*site shape)`` for all chains or
            ``(C, *site shape)``, sites left out are searched; a ``Posterior``, or a fit with ``posterior(n)``
            or ``sample_start(n, seed)``, whose draws are the candidates.
        record: makes, from candidates (n, d), a faster log-joint of any number of rows to climb with; by default
            the model runs at each step.
        candidates: most that a chain has in each of at most five rounds.

    Returns:
        ``(C, d)`` float64.

    Raises:
        InitError: no candidate worked; tells what failed and where.

    Example:
        >>> import pyro.distributions as dist
        >>> joint = LogJoint(lambda: pyro.sample("x", dist.LogNormal(torch.tensor(0.0), 1.0)))
        >>> find_starts(joint, 4, seed=0).shape
        (4, 1)
    """
    if start is None:
        start = "auto"
    if isinstance(start, str) and start != "auto":
        raise LatentDEError(f"start: {_EXPECTED}, got {start!r}.")
    given = _given_values(joint, start, num_chains) if isinstance(start, Mapping) else [{}] * num_chains
    rngs = chain_generators(seed, num_chains, stream=1)
    if isinstance(start, str | Mapping):
        pools = _searched(joint, rngs, given, candidates)
    else:
        pools = [_drawn(joint, start, chain, seed) for chain in range(num_chains)]
    searched = isinstance(start, str | Mapping) and len(given[0]) < len(joint.sites)
    if not searched or not _can_batch(joint, pools[0]):
        chosen = [pool[0] for pool in pools]  # draws of a fit, given values: as they are; else the best
    else:
        density = joint.value_and_grad if record is None else record(torch.cat(pools))
        at_once = max(1, int(2e7 // (CLIMB_STEPS * candidates * joint.dim)))  # bounds the memory of the paths
        chosen = []
        for i in range(0, num_chains, at_once):
            chosen += _climb(joint, density, pools[i : i + at_once], given[i : i + at_once])
    return torch.stack(chosen).to("cpu", torch.float64).numpy()


def find_many_starts(
    joint: LogJoint,
    num_chains: int,
    seed: int,
    start: Any = "auto",
    record: Callable[[Tensor], RowDensity] | None = None,
) -> np.ndarray:
    """The same for tens to thousands of chains: at most 16 places are searched for, the chains start around them.

    Around means normal with standard deviation .1 in unconstrained coordinates, halved as often as needed to lose at
    most d nats. Given values and draws are taken as they are.

    Args:
        joint: the log-joint.
        num_chains: number of chains ``C``.
        seed: seed of the run.
        start: as in `find_starts`.
        record: as there.

    Returns:
        ``(C, d)`` float64.

    Raises:
        InitError: no candidate worked.

    Example:
        >>> import pyro.distributions as dist
        >>> joint = LogJoint(lambda: pyro.sample("x", dist.Normal(torch.tensor(0.0), 1.0)))
        >>> find_many_starts(joint, 100, seed=0).shape
        (100, 1)
    """
    searched = start is None or isinstance(start, str)
    if num_chains <= SEARCHES or not searched:
        return find_starts(joint, num_chains, seed, start, record)
    found = torch.from_numpy(find_starts(joint, SEARCHES, seed, start, record, FEWER))
    centres = found[torch.arange(num_chains) % SEARCHES].to(joint.device, joint.dtype)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, 4)))
    offset = torch.from_numpy(rng.normal(0.0, SPREAD, tuple(centres.shape))).to(centres)
    offset[:SEARCHES] = 0.0
    least = _evaluate(joint, centres)[0] - joint.dim
    for _ in range(10):
        far = ~(_evaluate(joint, centres + offset)[0] >= least)
        if not far.any():
            break
        offset = torch.where(far[:, None], 0.5 * offset, offset)
    else:
        offset = torch.where(far[:, None], 0.0, offset)
    return (centres + offset).to("cpu", torch.float64).numpy()


def _searched(
    joint: LogJoint, rngs: list[np.random.Generator], given: list[Mapping[str, Tensor]], most: int
) -> list[Tensor]:
    """Candidates ``(n, d)`` of each chain with finite log-density and gradient, the best first."""
    complete = len(given[0]) == len(joint.sites)
    # thousands of coordinates are series of a population: their sum tells candidates apart, and each costs a lot
    number = 1 if complete else min(most, max(FEWEST, MOST_NUMBERS // joint.dim))
    tried: list[list[Tensor]] = [[] for _ in rngs]
    pools: list[Tensor | None] = [None] * len(rngs)
    for _ in range(1 if complete else ROUNDS):
        open_chains = [chain for chain, pool in enumerate(pools) if pool is None]
        if not open_chains:
            break
        for chain in open_chains:
            tried[chain].append(_candidates(joint, rngs[chain], given[chain], number))
        lps = _evaluate(joint, torch.cat([tried[chain][-1] for chain in open_chains]))[0].split(number)
        for chain, lp in zip(open_chains, lps, strict=True):
            order = lp.argsort(descending=True)
            order = order[torch.isfinite(lp[order])]
            pools[chain] = tried[chain][-1][order] if len(order) else None
    for chain, pool in enumerate(pools):
        if pool is None:
            raise InitError(explain_failure(joint, torch.cat(tried[chain]), chain))
    return pools


def _drawn(joint: LogJoint, start: Any, chain: int, seed: int) -> Tensor:
    """Draws ``(n, d)`` of a fit or a posterior with finite log-density and gradient, in the order drawn."""
    draws = joint.unconstrain(_draws_of(start, joint, CANDIDATES, chain, seed))
    lp, _, _ = _evaluate(joint, draws)
    if not torch.isfinite(lp).any():
        raise InitError(explain_failure(joint, draws, chain))
    return draws[torch.isfinite(lp)]


def _can_batch(joint: LogJoint, pool: Tensor) -> bool:
    try:
        joint.value_and_grad(pool)
    except Exception as error:  # row by row, climbing could take longer than sampling
        _log.debug("starts are the best candidates, they do not climb: %s", error)
        return False
    return True


def _climb(
    joint: LogJoint, density: RowDensity, pools: list[Tensor], given: list[Mapping[str, Tensor]]
) -> list[Tensor]:
    """Let the candidates of some chains climb together; one start per chain. Given sites stay as they are."""
    free = torch.ones(len(pools), joint.dim, dtype=joint.dtype, device=joint.device)
    for row, fixed in zip(free, given, strict=True):
        for site in joint.sites:
            row[site.start : site.stop] = site.name not in fixed
    sizes = [len(pool) for pool in pools]
    free = torch.repeat_interleave(free, torch.tensor(sizes, device=joint.device), dim=0)

    def value_and_grad(u: Tensor) -> tuple[Tensor, Tensor]:
        lp, grad, *_ = density(u)
        return lp, grad * free

    path, worth = ascend(value_and_grad, torch.cat(pools), CLIMB_STEPS)
    chosen = []
    for rows, rows_worth in zip(path.split(sizes, dim=1), worth.split(sizes, dim=1), strict=True):
        best = rows_worth.amax(0).argmax()
        enough = rows_worth[:, best] >= rows_worth[:, best].max() - joint.dim
        chosen.append(rows[int(enough.int().argmax()), best])
    return chosen


def _candidates(joint: LogJoint, rng: np.random.Generator, given: Mapping[str, Tensor], n: int) -> Tensor:
    rows = torch.from_numpy(rng.uniform(-2.0, 2.0, (n, joint.dim))).to(joint.device, joint.dtype)
    if len(given) < len(joint.sites):
        part = 3 * n // 4
        from_prior = _prior_draws(joint, part, int(rng.integers(2**62)))
        usable = torch.isfinite(from_prior).all(-1, keepdim=True)
        rows[:part] = torch.where(usable, from_prior, rows[:part])
    for site in joint.sites:
        if site.name in given:
            rows[:, site.start : site.stop] = given[site.name]
    return rows


def _prior_draws(joint: LogJoint, n: int, seed: int) -> Tensor:
    """``n`` draws from the prior, ``(n, d)``, in one vectorised run of the model where that works."""
    names = [site.name for site in joint.sites]

    def draw(_: Tensor) -> dict[str, Tensor]:
        trace = poutine.trace(joint.model).get_trace(*joint.args, **joint.kwargs)
        return {name: trace.nodes[name]["value"] for name in names}

    with torch.no_grad(), torch.random.fork_rng(devices=[]), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        try:
            values = torch.func.vmap(draw, randomness="different")(torch.zeros(n))
        except Exception as error:  # .item(), branches, a sampler without a batching rule
            _log.debug("prior draws one by one: %s", error)
            runs = [draw(torch.zeros(())) for _ in range(n)]
            values = {name: torch.stack([run[name] for run in runs]) for name in names}
    return joint.unconstrain(values)


def _evaluate(joint: LogJoint, u: Tensor) -> tuple[Tensor, Tensor, Any]:
    try:
        return joint.value_and_grad(u)
    except Exception as error:  # the engine of the run will say so in its reason
        _log.debug("candidates one by one: %s", error)
        return joint.value_and_grad_in_a_loop(u)


def _given_values(joint: LogJoint, start: Mapping[str, Any], num_chains: int) -> list[dict[str, Tensor]]:
    """Unconstrained coordinates of the given sites, for each chain."""
    unknown = sorted(set(start) - {site.name for site in joint.sites})
    if unknown:
        latent = [site.name for site in joint.sites]
        raise LatentDEError(f"start: {unknown} are no latent sites; those are {latent}.")
    if not joint.has_fixed_supports:
        raise LatentDEError("start: values cannot be given for this model: a site's support depends on other sites.")
    given: list[dict[str, Tensor]] = [{} for _ in range(num_chains)]
    for site in joint.sites:
        if site.name not in start:
            continue
        value = torch.as_tensor(start[site.name]).to(joint.device, site.dtype)
        if value.shape == site.shape:
            value = value.expand(num_chains, *site.shape)
        if value.shape != (num_chains, *site.shape):
            raise LatentDEError(
                f"start[{site.name!r}]: expected shape {tuple(site.shape)}, or "
                f"{(num_chains, *site.shape)} for one value per chain; got {tuple(value.shape)}."
            )
        inside = site.support.check(value)
        if not bool(inside.all()):
            raise LatentDEError(f"start[{site.name!r}] = {value.tolist()} lies outside its support.")
        flat = site.transform.inv(value).reshape(num_chains, -1).to(joint.dtype)
        for chain in range(num_chains):
            given[chain][site.name] = flat[chain]
    return given


def _draws_of(start: Any, joint: LogJoint, n: int, chain: int, seed: int) -> dict[str, Tensor]:
    """``n`` draws of a fit or a posterior, name -> ``(n, *site shape)``."""
    of_chain = int(chain_generators(seed, chain + 1, stream=3)[chain].integers(2**62))
    if hasattr(start, "sample_start"):
        values = start.sample_start(n, of_chain)
    elif hasattr(start, "samples"):
        # one shuffled deck for all chains, each begins at another card: no two chains start at the same draw
        first = next(iter(start.samples.values()))
        deck = chain_generators(seed, 1, stream=2)[0].permutation(first.shape[0] * first.shape[1])
        index = torch.as_tensor(np.resize(np.roll(deck, -chain), n))
        values = {name: value.flatten(0, 1)[index] for name, value in start.samples.items()}
    elif hasattr(start, "posterior"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(of_chain)
            values = {name: value.flatten(0, 1) for name, value in start.posterior(n).samples.items()}
    else:
        raise LatentDEError(f"start: {_EXPECTED}, got {type(start).__name__}.")
    missing = [site.name for site in joint.sites if site.name not in values]
    if missing:
        raise LatentDEError(f"start: {type(start).__name__} has no draws of latent sites {missing}.")
    return {site.name: values[site.name].detach().to(joint.device, site.dtype) for site in joint.sites}

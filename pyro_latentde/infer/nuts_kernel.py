# SPDX-License-Identifier: Apache-2.0
"""One chain of the No-U-Turn sampler, as a coroutine on a flat vector.

The chain never evaluates the log-density itself: it *yields* a position and is sent the answer. A driver can
so collect the wishes of many chains, which are in different iterations and at different depths of their
trees, and answer them all in one batched call. Nothing waits in lockstep.

A trajectory is a growing row of leapfrog points. Complete binary sub-trees are kept on a stack, as in a
binary
counter: two neighbours of equal size are merged as soon as the right one is complete. This is the recursion
of the original algorithm without recursion, with memory proportional to the depth.
"""

import json
import math
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np
import torch

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.adaptation import DualAveraging, Metric, adaptation_windows

__all__ = ["STAT_NAMES", "Answer", "ChainRecord", "run_chain"]

# (log-density, gradient (d,), did a solve fail, number of solver steps)
Answer = tuple[float, np.ndarray, bool, int]
Asking = Generator[np.ndarray, Answer, None]

MAX_ENERGY_ERROR = 1000.0
STAT_NAMES = {
    "lp": np.float64,
    "energy": np.float64,
    "diverging": np.bool_,
    "acceptance_rate": np.float64,
    "step_size": np.float64,
    "n_steps": np.int64,
    "tree_depth": np.int64,
    "reached_max_tree_depth": np.bool_,
    "ode_failed": np.int64,
    "ode_steps": np.int64,
}


class ChainRecord:
    """What a chain has done so far: warm-up first, then the draws.

    Attributes:
        positions: ``(num_warmup + num_samples, d)``.
        stats: name -> ``(num_warmup + num_samples,)``, names and types of ``STAT_NAMES``.
        count: number of finished iterations.
        num_gradients: leapfrog steps so far.
        num_divergent, num_failed: divergent iterations and failed solves so far, warm-up included.
        num_divergent_solves: divergent iterations with a failed solve in them.
        num_solver_steps: so far.
        step_size: of the last iteration.
        boundary: what the chain goes on from after its last finished iteration, if it `keeps` that.
    """

    def __init__(self, num_iterations: int, dim: int, keeps: bool = False) -> None:
        self.keeps = keeps
        self.boundary: dict[str, Any] | None = None
        self.boundary_count = 0
        self.positions = np.empty((num_iterations, dim))
        self.stats = {name: np.zeros(num_iterations, kind) for name, kind in STAT_NAMES.items()}
        self.count = self.num_gradients = self.num_divergent = self.num_failed = 0
        self.num_divergent_solves = self.num_solver_steps = 0
        self.step_size = math.nan

    def add(self, point: "_Point", values: tuple) -> None:
        """Store one finished iteration; ``values`` in the order of ``STAT_NAMES``."""
        i = self.count
        self.positions[i] = point.q
        for column, value in zip(self.stats.values(), values, strict=True):
            column[i] = value
        self.step_size = values[4]
        self.num_gradients += values[5]
        self.num_divergent += values[2]
        self.num_failed += values[8]
        self.num_divergent_solves += values[2] and values[8] > 0
        self.num_solver_steps += values[9]
        self.count = i + 1

    def state(self) -> dict[str, Any]:
        """All finished iterations and the boundary after them, as tensors and plain types."""
        if self.boundary is None:
            return {"count": 0}
        point, step, metric, adapt, rng = self.boundary.values()
        n = self.boundary_count
        return {
            "count": n,
            "positions": torch.from_numpy(self.positions[:n].copy()),
            "stats": {name: torch.from_numpy(column[:n].copy()) for name, column in self.stats.items()},
            "point": [torch.from_numpy(point.q), point.lp, torch.from_numpy(np.array(point.grad))],
            "step": step,
            "metric": torch.from_numpy(metric.inverse.copy()),
            "adapt": adapt,
            "rng": json.dumps(rng),  # its numbers have 128 bits
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        n = state["count"]
        if not n:
            return
        self.positions[:n] = state["positions"].numpy()
        for name, column in state["stats"].items():
            self.stats[name][:n] = column.numpy()
        q, lp, grad = state["point"]
        point = _Point(q.numpy(), q.numpy(), q.numpy(), lp, grad.numpy())
        self.boundary = {
            "point": point,
            "step": state["step"],
            "metric": Metric(state["metric"].numpy()),
            "adapt": state["adapt"],
            "rng": json.loads(state["rng"]),
        }
        self.count = self.boundary_count = n
        stats = {name: column[:n] for name, column in self.stats.items()}
        self.num_gradients, self.num_divergent = int(stats["n_steps"].sum()), int(stats["diverging"].sum())
        self.num_failed, self.num_solver_steps = int(stats["ode_failed"].sum()), int(stats["ode_steps"].sum())
        self.num_divergent_solves = int((stats["diverging"] & (stats["ode_failed"] > 0)).sum())
        self.step_size = float(self.stats["step_size"][n - 1])


class _Point:
    """A phase-space point: position, momentum, velocity (inverse metric times momentum), and what is known
    there."""

    __slots__ = ("energy", "grad", "lp", "p", "q", "v")

    def __init__(self, q: np.ndarray, p: np.ndarray, v: np.ndarray, lp: float, grad: np.ndarray) -> None:
        self.q, self.p, self.v, self.lp, self.grad = q, p, v, lp, grad
        self.energy = 0.5 * float(p.dot(v)) - lp


class _Tree:
    """A run of neighbouring points: its two ends, summed momentum, log-weight, and one point drawn from
    it."""

    __slots__ = ("chosen", "first", "last", "log_weight", "rho", "size")

    def __init__(
        self, first: _Point, last: _Point, rho: np.ndarray, log_weight: float, size: int, chosen: _Point
    ) -> None:
        self.first, self.last, self.rho = first, last, rho
        self.log_weight, self.size, self.chosen = log_weight, size, chosen


def _join(a: _Tree, b: _Tree, uniform: float, biased: bool) -> tuple[_Tree, bool]:
    """Join ``b`` behind ``a``; returns the tree and whether it may go on (no end turns back on the summed
    momentum).

    The point is drawn in proportion to the weights inside a sub-tree, and with a bias to the newer half at
    the top.
    """
    high, low = (a.log_weight, b.log_weight) if a.log_weight > b.log_weight else (b.log_weight, a.log_weight)
    log_weight = high + math.log1p(math.exp(low - high))
    log_odds = b.log_weight - (a.log_weight if biased else log_weight)
    chosen = b.chosen if log_odds >= 0.0 or uniform < math.exp(log_odds) else a.chosen
    rho = a.rho + b.rho
    start, end = a.first.v, b.last.v
    goes_on = start.dot(rho) > 0.0 and end.dot(rho) > 0.0
    if goes_on and a.size + b.size > 2:
        # also across the seam: a plain check misses trajectories that have turned by a full period
        across = a.rho + b.first.p
        goes_on = start.dot(across) > 0.0 and b.first.v.dot(across) > 0.0
        if goes_on:
            across = b.rho + a.last.p
            goes_on = a.last.v.dot(across) > 0.0 and end.dot(across) > 0.0
    return _Tree(a.first, b.last, rho, log_weight, a.size + b.size, chosen), goes_on


class _Tally:
    """Counts over one trajectory."""

    __slots__ = ("accept", "diverging", "failed", "leapfrogs", "steps")

    def __init__(self) -> None:
        self.accept, self.leapfrogs, self.failed, self.steps, self.diverging = 0.0, 0, 0, 0, False


def _grow(
    edge: _Point,
    size: int,
    step: float,
    metric: Metric,
    energy0: float,
    rng: np.random.Generator,
    tally: _Tally,
) -> Generator[np.ndarray, Answer, _Tree | None]:
    """Integrate ``size`` leapfrog steps (a power of two) from ``edge``; None when it turned or diverged."""
    half, velocity = 0.5 * step, metric.velocity
    stack: list[_Tree] = []
    for _ in range(size):
        p = edge.p + half * edge.grad
        q = edge.q + step * velocity(p)
        lp, grad, failed, steps = yield q
        p = p + half * grad
        edge = _Point(q, p, velocity(p), lp, grad)
        log_weight = energy0 - edge.energy
        tally.leapfrogs += 1
        tally.failed += failed
        tally.steps += steps
        if not log_weight > -MAX_ENERGY_ERROR:  # also true of NaN
            tally.diverging = True
            return None
        tally.accept += 1.0 if log_weight >= 0.0 else math.exp(log_weight)
        tree = _Tree(edge, edge, p, log_weight, 1, edge)
        while stack and stack[-1].size == tree.size:
            tree, goes_on = _join(stack.pop(), tree, rng.random(), biased=False)
            if not goes_on:
                return None
        stack.append(tree)
    return stack[0]


def _transition(
    start: _Point, step: float, metric: Metric, rng: np.random.Generator, max_tree_depth: int
) -> Generator[np.ndarray, Answer, tuple[_Point, _Tally, int]]:
    """One NUTS iteration: double the trajectory at random ends until it turns; returns the drawn point."""
    tally, depth = _Tally(), 0
    tree = _Tree(start, start, start.p, 0.0, 1, start)
    while depth < max_tree_depth:
        if rng.random() < 0.5:  # turn the tree round: growth is always behind ``last``
            tree = _Tree(tree.last, tree.first, tree.rho, tree.log_weight, tree.size, tree.chosen)
            step = -step
        grown = yield from _grow(tree.last, tree.size, step, metric, start.energy, rng, tally)
        if grown is None:
            break
        depth += 1
        tree, goes_on = _join(tree, grown, rng.random(), biased=True)
        if not goes_on:
            break
    return tree.chosen, tally, depth


def _find_step_size(
    point: _Point, step: float, metric: Metric, rng: np.random.Generator
) -> Generator[np.ndarray, Answer, float]:
    """Double or halve the step until one leapfrog step crosses an acceptance probability of .8."""
    direction = 0
    while True:
        p = metric.momentum(rng)
        energy = 0.5 * float(p.dot(metric.velocity(p))) - point.lp
        p = p + 0.5 * step * point.grad
        q = point.q + step * metric.velocity(p)
        lp, grad, _, _ = yield q
        p = p + 0.5 * step * grad
        accepted = energy - (0.5 * float(p.dot(metric.velocity(p))) - lp) > math.log(0.8)
        if direction == 0:
            direction = 1 if accepted else -1
        elif accepted != (direction == 1):
            return step
        step = step * 2.0**direction
        if step > 1e7:
            raise LatentDEError(
                "NUTS: every step size up to 1e7 is accepted, so the log-density is flat and the "
                "posterior improper.\nTry: give every latent site a proper prior."
            )
        if step < 1e-14:
            raise LatentDEError(
                f"NUTS: no step size down to 1e-14 is accepted at log-density {point.lp:.6g}: the "
                "gradient does not belong to the log-density, or the start sits on an edge of the region "
                "where the solve works.\n"
                "Try: another start, a tighter solver tolerance, checking the gradient by differences."
            )


def run_chain(
    q: np.ndarray,
    record: ChainRecord,
    rng: np.random.Generator,
    *,
    num_warmup: int,
    num_samples: int,
    target_accept: float = 0.8,
    max_tree_depth: int = 10,
    dense_mass: bool = True,
    metric: Metric | None = None,
    informed: bool | None = None,
) -> Asking:
    """Run one chain from ``q``: yields positions ``(d,)``, expects an ``Answer`` for each, fills ``record``.

    A log-density of minus infinity or NaN ends a trajectory as a divergence; the chain goes on from where it
    was.

    Args:
        q: ``(d,)`` float64 start with a finite log-density and gradient.
        record: made for ``num_warmup + num_samples`` iterations; from one that was loaded the chain goes on.
        rng: the only source of randomness of the chain.
        num_warmup: iterations that adapt step size and metric.
        num_samples: iterations after that.
        target_accept: mean acceptance probability the step size is tuned to.
        max_tree_depth: a trajectory has at most ``2**max_tree_depth - 1`` leapfrog steps.
        dense_mass: adapt a full covariance, or variances only.
        metric: the metric at the start, of that kind; by default the unit metric.
        informed: whether that metric is better than a few draws; by default any that is given. One that is not counts
            as five draws.

    Yields:
        Positions where log-density and gradient are wanted.

    References:
        Hoffman & Gelman (2014), The No-U-Turn Sampler. Betancourt (2017), A Conceptual Introduction to
        Hamiltonian Monte Carlo, appendix A (multinomial weights, generalised criterion). Stan 2.21 (checks
        across the seam).

    Example:
        >>> record = ChainRecord(150, 2)
        >>> chain = run_chain(np.zeros(2), record, np.random.default_rng(0), num_warmup=100, num_samples=50)
        >>> q = next(chain)
        >>> while record.count < 150:
        ...     try:
        ...         q = chain.send((-0.5 * q @ q, -q, False, 0))
        ...     except StopIteration:
        ...         pass
        >>> record.positions.shape
        (150, 2)
    """
    windows = adaptation_windows(num_warmup, informed=metric is not None if informed is None else informed)
    window_starts = {stop: start for start, stop in windows}
    guess = metric.inverse if metric is not None and informed is False else None
    if record.boundary is None:
        lp, grad, _, _ = yield q
        metric = Metric.identity(len(q), dense_mass) if metric is None else metric
        point = _Point(q, q, q, lp, grad)
        step = yield from _find_step_size(point, 1.0, metric, rng)
        adapt = DualAveraging(step, target_accept)
    else:
        point, step, metric, saved, rng.bit_generator.state = record.boundary.values()
        adapt = DualAveraging(step, target_accept)
        vars(adapt).update(saved)
    for i in range(record.count, num_warmup + num_samples):
        p = metric.momentum(rng)
        point = _Point(point.q, p, metric.velocity(p), point.lp, point.grad)
        point, tally, depth = yield from _transition(point, step, metric, rng, max_tree_depth)
        accept = tally.accept / tally.leapfrogs
        at_limit = depth >= max_tree_depth
        values = (point.lp, point.energy, tally.diverging, accept, step, tally.leapfrogs, depth, at_limit)
        record.add(point, (*values, tally.failed, tally.steps))
        if i < num_warmup:
            adapt.update(accept)
            step = adapt.current
            if i + 1 in window_starts:
                metric = Metric.estimate(record.positions[window_starts[i + 1] : i + 1], dense_mass, guess)
                step = yield from _find_step_size(point, step, metric, rng)
                adapt.restart(step)
            if i + 1 == num_warmup:
                step = adapt.average
        if record.keeps:
            kept = (point, step, metric, dict(vars(adapt)), rng.bit_generator.state)
            record.boundary = dict(zip(("point", "step", "metric", "adapt", "rng"), kept, strict=True))
            record.boundary_count = i + 1

# SPDX-License-Identifier: Apache-2.0
"""Networks as vector fields by diffrax, run by the Python of an environment with it; see `neural_fields`.

The last line is JSON: seconds of value and gradient with one step size for the batch, and with own steps by ``vmap``.
"""

import json
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

__all__: list[str] = []


def _network(weights: list[Array], y: Array) -> Array:
    for i in range(0, len(weights), 2):
        y = y @ weights[i].T + weights[i + 1]
        y = jax.nn.elu(y) if i + 2 < len(weights) else y
    return y


def _solve(weights: list[Array], y0: Array) -> Array:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, w: _network(w, y)),
        diffrax.Dopri5(),
        0.0,
        5.0,
        None,
        y0,
        weights,
        saveat=diffrax.SaveAt(ts=jnp.linspace(0.0, 5.0, 100, dtype=y0.dtype)),
        stepsize_controller=diffrax.PIDController(rtol=1e-5, atol=1e-5),
        max_steps=256,
    )
    return solution.ys


def main() -> None:
    task = json.load(sys.stdin)
    jax.config.update("jax_enable_x64", task["double"])
    weights, y0 = [jnp.array(w) for w in task["weights"]], jnp.array(task["y0"])
    modes = {"batch": _solve, "rows": jax.vmap(_solve, (None, 0))}
    seconds = {}
    for name, solve in modes.items():
        run = jax.jit(jax.value_and_grad(lambda w, y, solve=solve: jnp.mean(solve(w, y) ** 2), (0, 1)))
        jax.block_until_ready(run(weights, y0))
        turns, end = [], time.perf_counter() + 4.0
        while len(turns) < 200 and (len(turns) < 5 or time.perf_counter() < end):
            start = time.perf_counter()
            jax.block_until_ready(run(weights, y0))
            turns.append(time.perf_counter() - start)
        seconds[name] = min(turns)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()

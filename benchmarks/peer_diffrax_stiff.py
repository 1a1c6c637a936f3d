# SPDX-License-Identifier: Apache-2.0
"""Robertson's problem by diffrax, run by the Python of an environment with it; see `stiff`. The last line is JSON."""

import json
import sys
import time

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

__all__: list[str] = []

jax.config.update("jax_enable_x64", True)


def _rober(t: Array, y: Array, k: Array) -> Array:
    a, b, c = k[0] * y[0], k[1] * y[1] * y[1], k[2] * y[1] * y[2]
    return jnp.stack([c - a, a - b - c, b])


def main() -> None:
    task = json.load(sys.stdin)
    rates = jnp.array(task["rates"]) * jnp.linspace(0.95, 1.05, task["rows"])[:, None]

    def last(k: Array) -> Array:
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(_rober),
            diffrax.Kvaerno5(),
            0.0,
            task["end"],
            None,
            jnp.array([1.0, 0.0, 0.0]),
            k,
            stepsize_controller=diffrax.PIDController(rtol=1e-8, atol=1e-12),
            max_steps=4096,
        )
        return solution.ys[-1].sum()

    run = jax.jit(jax.value_and_grad(lambda k: jax.vmap(last)(k).sum()))
    jax.block_until_ready(run(rates))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(run(rates))
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": min(seconds)}))


if __name__ == "__main__":
    main()

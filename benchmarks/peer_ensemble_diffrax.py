# SPDX-License-Identifier: Apache-2.0
"""Lorenz ensembles by diffrax, run by the Python of an environment with it; see `lorenz_ensemble`. Last line: JSON."""

import json
import sys
import time
from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
from jax import Array

__all__: list[str] = []

jax.config.update("jax_enable_x64", True)


def _lorenz(t: Array, y: Array, rho: Array) -> Array:
    return jnp.stack([10.0 * (y[1] - y[0]), y[0] * (rho - y[2]) - y[1], y[0] * y[1] - (8.0 / 3.0) * y[2]])


def _solver(task: dict) -> Callable:
    fixed, dtype = task["kind"] == "fixed", jnp.dtype(task["dtype"])
    control = diffrax.ConstantStepSize() if fixed else diffrax.PIDController(rtol=task["tol"], atol=task["tol"])

    def last(rho: Array) -> Array:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(_lorenz),
            diffrax.Tsit5(),
            jnp.array(0.0, dtype),
            jnp.array(1.0, dtype),
            jnp.array(1e-3, dtype) if fixed else None,
            jnp.array([1.0, 0.0, 0.0], dtype),
            rho,
            stepsize_controller=control,
            max_steps=4096 if not fixed else 1024,
        ).ys[-1]

    if task["kind"] == "gradient":
        return jax.jit(jax.grad(lambda rho: jax.vmap(last)(rho).sum()))
    return jax.jit(jax.vmap(last))


def main() -> None:
    task = json.load(sys.stdin)
    device = jax.devices("gpu" if task["device"] == "cuda" else "cpu")[0]
    run, found = _solver(task), {}
    with jax.default_device(device):
        for rows in task["sizes"]:
            rho = jnp.linspace(0.0, 21.0, rows, dtype=task["dtype"])
            jax.block_until_ready(run(rho))
            times = []
            for _ in range(5):
                start = time.perf_counter()
                jax.block_until_ready(run(rho))
                times.append(time.perf_counter() - start)
                if times[-1] > task["limit"]:
                    break
            found[rows] = min(times)
            if found[rows] > task["limit"]:
                break
    print(json.dumps(found))


if __name__ == "__main__":
    main()

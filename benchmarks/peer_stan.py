# SPDX-License-Identifier: Apache-2.0
"""The lynx-hare posterior by Stan, run by the Python of an environment with ``pystan``; see `effective_draws`.

Reads the task from standard input and writes the draws; the last line is JSON with the seconds of each part.
"""

import json
import re
import sys
import time

import numpy as np
import stan

__all__: list[str] = []

PROGRAM = """
functions {
  vector field(real t, vector z, vector theta) {
    return [(theta[1] - theta[2] * z[2]) * z[1], (-theta[3] + theta[4] * z[1]) * z[2]]';
  }
}
data {
  int<lower=1> n;
  array[n] real<lower=0> years;
  array[2] real<lower=0> first;
  array[n, 2] real<lower=0> counts;
}
parameters {
  vector<lower=0>[4] theta;
  vector<lower=0>[2] z0;
  array[2] real<lower=0> sigma;
}
transformed parameters {
  array[n] vector[2] z = ode_rk45_tol(field, z0, 0.0, years, 1e-6, 1e-6, 10000, theta);
}
model {
  theta[{1, 3}] ~ normal(1, 0.5);
  theta[{2, 4}] ~ normal(0.05, 0.05);
  z0 ~ lognormal(log(10), 1);
  sigma ~ lognormal(-1, 1);
  for (k in 1:2) {
    first[k] ~ lognormal(log(z0[k]), sigma[k]);
    counts[, k] ~ lognormal(log(z[, k]), sigma[k]);
  }
}
"""


def _elapsed(output: bytes) -> tuple[float, float]:
    """Seconds of warm-up and of sampling of one chain, as Stan writes them."""
    lines = [line for line in output.decode(errors="replace").splitlines() if '"topic":"logger"' in line]
    found = [re.findall(rf"([\d.e+-]+) seconds \({part}\)", "".join(lines)) for part in ("Warm-up", "Sampling")]
    return float(found[0][-1]), float(found[1][-1])


def main() -> None:
    task = json.load(sys.stdin)
    counts = task["counts"]
    data = {"n": len(counts) - 1, "years": list(range(1, len(counts))), "first": counts[0], "counts": counts[1:]}
    start = time.perf_counter()
    model = stan.build(PROGRAM, data=data, random_seed=task["seed"] + 1)
    built = time.perf_counter()
    fit = model.sample(num_chains=4, num_warmup=task["warmup"], num_samples=task["samples"])
    wall = time.perf_counter() - built
    parts = np.array([_elapsed(output) for output in fit.stan_outputs]).sum(0)
    # fit[name] is (..., draw * chain), the chain running fastest
    draws = np.concatenate([fit[name].reshape(-1, task["samples"], 4) for name in ("theta", "z0", "sigma")])
    np.save(task["out"], draws.transpose(2, 1, 0))
    share = float(parts[0] / parts.sum())
    print(json.dumps({"compile": built - start, "warmup": wall * share, "sampling": wall * (1 - share)}))


if __name__ == "__main__":
    main()

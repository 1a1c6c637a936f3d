# SPDX-License-Identifier: Apache-2.0
r"""A one-legged robot that is thrown into the air, falls and rolls: the hopper of the DeepMind Control Suite.

MuJoCo solves

.. math::
    M(q) \dot v + c(q, v) = \tau + J(q)^\top f, \qquad \dot q = v

with contact forces f and no torques of the motors; there is no `vector_field` to write down.

======  ==============================================  ============  ===========================
symbol  meaning                                         unit          range at the start
======  ==============================================  ============  ===========================
q       x, z; pitch, waist, hip, knee, ankle            m; rad        U(0, 0.5); U(-2, 2)
v       their rates                                     m / s; rad/s  U(-5, 5)
M, c    mass matrix; Coriolis and gravity forces
f, J    contact forces, limits of the joints; Jacobian
======  ==============================================  ============  ===========================

A series has 200 states (q, v) at steps of 0.005 s, without noise. As in the published experiment, values are scaled
to (value - least) / largest, over the whole data set and for each coordinate; the errors printed there have these
units. The states z are not scaled.

Needs two packages that are not installed with this one: ``mujoco``, and ``dm-control`` for its file ``hopper.xml``.

References:
    Todorov, E., Erez, T. and Tassa, Y. (2012). MuJoCo: a physics engine for model-based control. IROS.
    Tassa, Y. et al. (2018). DeepMind Control Suite. arXiv:1801.00690 (the robot).
    Rubanova, Y., Chen, R. T. Q. and Duvenaud, D. (2019). Latent ODEs for irregularly-sampled time series.
    arXiv:1907.03907 (the experiment).
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_latentde.data.series import Series
from pyro_latentde.models.systems.simulation import Simulation, even_times, random_stream

__all__ = ["PARAMETERS", "STATES", "simulate"]

POSITIONS = ("x", "z", "pitch", "waist", "hip", "knee", "ankle")
STATES = POSITIONS + tuple(f"{name}_rate" for name in POSITIONS)
PARAMETERS: dict[str, tuple[float, float]] = {}  # the same robot in all series
STEP = 0.005  # s


def simulate(n: int, seed: int = 0, *, num_times: int = 200, scaled: bool = True) -> Simulation:
    """Falls of n hoppers; 10,000 take twenty seconds.

    Args:
        n: number of series; 10,000 in the published experiment, of which 8,000 train.
        seed: of the starts; the unscaled n series are the first n of more.
        num_times: states of each series.
        scaled: whether the values are scaled as in the experiment, by the extremes of these n series.

    Returns:
        Simulation: series (n, num_times, 14), z the same without scaling, truth empty.

    Raises:
        ImportError: a package is missing.
        ValueError: no series, or fewer than two states.
    """
    times = even_times(n, num_times, STEP)
    mujoco, file = _robot()
    robot = mujoco.MjModel.from_xml_path(str(file))
    data = mujoco.MjData(robot)
    stream = random_stream(seed, 0)
    states = np.empty((n, num_times, len(STATES)))
    for path in states:
        mujoco.mj_resetData(robot, data)
        data.qpos[:2] = stream.uniform(0.0, 0.5, 2)
        data.qpos[2:] = stream.uniform(-2.0, 2.0, 5)
        data.qvel[:] = stream.uniform(-5.0, 5.0, 7)
        for k in range(num_times):
            path[k, :7], path[k, 7:] = data.qpos, data.qvel
            mujoco.mj_step(robot, data)
    z = torch.from_numpy(states)
    values = (z - z.amin((0, 1))) / z.amax((0, 1)) if scaled else z
    return Simulation(Series.from_tensors(times, values, names=STATES, dtype=torch.float32), z, {})


def _robot() -> tuple[Any, Path]:
    """MuJoCo, and the robot's file."""
    suite = find_spec("dm_control")
    missing = [name for name in ("mujoco", "dm-control") if find_spec(name.replace("-", "_")) is None]
    if missing:
        raise ImportError(
            f"the hopper needs {' and '.join(missing)}: MuJoCo moves the robot, and dm-control brings its file "
            'hopper.xml. Try: pip install "mujoco<4", then pip install --no-deps dm-control'
        )
    import mujoco

    return mujoco, Path(next(iter(suite.submodule_search_locations))) / "suite" / "hopper.xml"

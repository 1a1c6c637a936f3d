# SPDX-License-Identifier: Apache-2.0
"""The Runge-Kutta kernels: source code for one method and one number of states.

Three loops over rows, all writing only to their own rows and to the thread's work array ``w``:

* ``forward``: the adaptive (or fixed, or replayed) solve, which also records every accepted step (t, h, y);
* ``adjoint``: the exact reverse of the recorded steps (discretise, then differentiate);
* ``tangent``: the exact forward derivative along the recorded steps.

``stepper.py`` is the same algorithm in plain torch; read that first. Rows never share arithmetic, so a row gives the
same bits alone and in any batch. Arrays are flat; a stride of 0 shares one entry among all rows.

References:
    Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd ed., Springer 1993, II.4 (step size
    control, starting step) and II.6 (dense output).
"""

from pyro_latentde.solve.fused.templates.adjoint import adjoint_source
from pyro_latentde.solve.fused.templates.events import event_functions
from pyro_latentde.solve.fused.templates.first_step import FIRST_STEP
from pyro_latentde.solve.fused.templates.forward import forward_source
from pyro_latentde.solve.fused.templates.insertion_point import INSERTION_POINT
from pyro_latentde.solve.fused.templates.lanes.adjoint import lanes_adjoint_source
from pyro_latentde.solve.fused.templates.lanes.forward import lanes_forward_source
from pyro_latentde.solve.fused.templates.lanes.parts import LaneLayout
from pyro_latentde.solve.fused.templates.newton import newton_source
from pyro_latentde.solve.fused.templates.parts import WorkLayout, record_width, work_size
from pyro_latentde.solve.fused.templates.stops import pass_stop_source
from pyro_latentde.solve.fused.templates.tangent import tangent_source

__all__ = [
    "FIRST_STEP",
    "INSERTION_POINT",
    "LaneLayout",
    "WorkLayout",
    "adjoint_source",
    "event_functions",
    "forward_source",
    "lanes_adjoint_source",
    "lanes_forward_source",
    "newton_source",
    "pass_stop_source",
    "record_width",
    "tangent_source",
    "work_size",
]

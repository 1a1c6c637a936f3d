# SPDX-License-Identifier: Apache-2.0
"""What is known of a numerical method: one record, from which every engine takes its coefficients.

A step of size h from (t, y) computes stages k_i = f(t + c_i h, y + h sum_j a_ij k_j), then

    y_new      = y + h sum_i b_i k_i
    y(t + θh)  = y + h sum_i b_i(θ) k_i,   b_i(θ) = sum_q interpolant[i][q] θ^(q+1),   b_i(1) = b_i
    error      = h sum_i errors[0][i] k_i

where implicit methods (ESDIRK) have their own k_i, with weight gamma, in the sum of every stage but the first.

A symplectic method, for y = (q, p) with dq/dt = T(t, p) and dp/dt = V(t, q), alternates kicks and drifts,

    p += kicks[i] h V(t + C_i h, q),   q += drifts[i] h T(t + K_i h, p)

up to a last kick, with C_i and K_i the sums of the drifts and kicks so far. Between its ends a step is the cubic with
the states and slopes there (Hermite).

Every interpolant is at most one order below its method, so that outputs between steps converge as fast as
outputs at steps.
"""

import math
from dataclasses import dataclass

__all__ = ["Method", "Row"]

Row = tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """One method: Runge-Kutta with its error estimate and dense output, or symplectic.

    Args:
        name: The name users write, ``"tsit5"``.
        order: Order of convergence of the solution.
        kind: ``"explicit"``, ``"implicit"`` (ESDIRK), ``"switching"``: explicit until `stiff` is better, or
            ``"symplectic"``, whose two stages are the slopes at the ends of a step.
        c: Nodes of the main stages, ``(s,)``, in units of the step.
        a: Row i holds the weights of stages 0..i-1 in stage i, of implicit methods also its own; row 0 is empty.
        b: Weights of the solution, ``(s,)``.
        errors: Empty for fixed-step methods; one row ``b - bhat``; or DOP853's two rows (order 5, order 3).
        error_order: k in the step-size factor ``error ** (-1 / k)``; None without an error estimate.
        fsal: True if the last main stage is f(t + h, y_new), the first stage of the next step.
        dense_c: Nodes of the further stages that only outputs inside the step need.
        dense_a: Their weights over all earlier stages, main and further.
        interpolant: Per stage (main, then further) the coefficients of θ, θ^2, ...
        reference: Where the coefficients were published.
        filtered: Solve with the matrix of Newton's method for the error, which else grows with stiffness.
        stiff: The implicit method of a switching one.
        kicks: Weights of the kicks of a symplectic one, ``(m + 1,)``.
        drifts: Weights of the drifts between them, ``(m,)``.

    Example:
        >>> from pyro_latentde.solve.methods.catalog import get_method
        >>> method = get_method("tsit5")
        >>> method.order, method.stages, method.adaptive
        (5, 7, True)
    """

    name: str
    order: int
    kind: str
    c: Row
    a: tuple[Row, ...]
    b: Row
    errors: tuple[Row, ...]
    error_order: int | None
    fsal: bool
    dense_c: Row
    dense_a: tuple[Row, ...]
    interpolant: tuple[Row, ...]
    reference: str
    filtered: bool = False
    stiff: "Method | None" = None
    kicks: Row = ()
    drifts: Row = ()

    @property
    def uses_newton(self) -> bool:
        """True if some steps are implicit."""
        return self.kind in ("implicit", "switching")

    @property
    def gamma(self) -> float:
        """Weight of a stage in itself; 0 for explicit methods."""
        return self.a[-1][-1] if self.kind == "implicit" else 0.0

    @property
    def predictor(self) -> tuple[Row, ...]:
        """Row i: weights of stages 0..i-1 in the first guess of stage i, a polynomial through them."""
        return tuple(_extrapolation(self.c[:i], node) for i, node in enumerate(self.c))

    @property
    def stages(self) -> int:
        """Number of main stages, the repeated last one included."""
        return len(self.c)

    @property
    def adaptive(self) -> bool:
        """True if the method estimates its error and can choose its steps."""
        return bool(self.errors)

    @property
    def evals(self) -> int:
        """Evaluations of the field in one explicit step; a kick and a drift are one."""
        return len(self.drifts) or self.stages - 1

    @property
    def dense_evals(self) -> int:
        """Evaluations that outputs inside a step add."""
        return 1 if self.kind == "symplectic" else len(self.dense_c)

    @property
    def kick_nodes(self) -> Row:
        """When each kick is taken, in units of the step."""
        return (*(math.fsum(self.drifts[:i]) for i in range(len(self.drifts))), 1.0)

    @property
    def drift_nodes(self) -> Row:
        """When each drift is taken, in units of the step."""
        return tuple(math.fsum(self.kicks[: i + 1]) for i in range(len(self.drifts)))


def _extrapolation(nodes: Row, at: float) -> Row:
    """Weights of the polynomial through the values at (the first three different of) the nodes; or the same node's."""
    same = [i for i, node in enumerate(nodes) if abs(node - at) < 1e-12]
    chosen = same[:1] or range(min(3, len(nodes)))
    weights = [0.0] * len(nodes)
    for i in chosen:
        weights[i] = math.prod((at - nodes[j]) / (nodes[i] - nodes[j]) for j in chosen if j != i)
    return tuple(weights)

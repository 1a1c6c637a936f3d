# SPDX-License-Identifier: Apache-2.0
"""The steady state as a row function: found by Newton's method or integration, differentiated implicitly.

From F(y; x) = 0 follows dy/dx = -(dF/dy)^-1 dF/dx. The derivatives take the state that was found as an input of its
own, so that they can be differentiated in turn, to any order.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_latentde.errors import SolveError
from pyro_latentde.solve.row_function import RowFunction
from pyro_latentde.solve.solution import Status
from pyro_latentde.solve.steady.conservation import Conserved, conserved_directions
from pyro_latentde.solve.steady.newton import Tolerance, find_roots
from pyro_latentde.solve.steady.settling import settle
from pyro_latentde.solve.torch_engine.differentiable_rows import TorchRows, differentiable, pulled_back, recordable
from pyro_latentde.solve.torch_engine.linearised_field import LinearisedField, MakeLinearised

__all__ = ["SteadyControl", "SteadyRows"]

# integrate(shared, leaves, y, spans, rows) -> states, statuses, numbers of steps
IntegrateRows = Callable[[Sequence[bool], Sequence[Tensor], Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class SteadyControl:
    """Settings of the search; ``differentiated``: states without a gradient are failures."""

    tolerance: Tolerance
    max_iterations: int
    max_steps: int
    stable: bool
    differentiated: bool


class _Equations:
    """F(y) = f(y), some components of it replaced by those of W (y - guess) where quantities are conserved."""

    def __init__(self, field: LinearisedField, guess: Tensor, shared: bool, conserved: Conserved | None) -> None:
        self.field, self.guess, self.shared = field, guess, shared
        self.conserved = None if conserved is None else conserved.to(guess)

    def residual(self, y: Tensor, rows: Tensor) -> Tensor:
        value = self.field.value(y, rows)
        return value if self.conserved is None else self._held(value, y, rows)

    def linearised(self, y: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, jacobian = self.field.jacobian(y, rows)
        if self.conserved is None:
            return value, jacobian, jacobian
        return self._held(value, y, rows), self.conserved.keep[:, None] * jacobian + self.conserved.hold, jacobian

    def _held(self, value: Tensor, y: Tensor, rows: Tensor) -> Tensor:
        start = self.guess if self.shared else self.guess[rows]
        return self.conserved.keep * value + (y - start) @ self.conserved.hold.T


class SteadyRows(RowFunction):
    """Inputs: guess ``(D,)``, then every parameter, each shared or per row. Outputs: y ``(R, D)`` and a report.

    The report ``(R, 3)`` holds status, Newton iterations and integration steps.
    """

    saved = (0, 1)
    follows = (None, None)

    def __init__(
        self,
        make_field: MakeLinearised,
        leaves: int,
        control: SteadyControl,
        conserved: Conserved | None,
        integrate: IntegrateRows,
        explain: Callable[[object, int, int], str],
    ) -> None:
        super().__init__()
        self.make_field, self.control, self.conserved = make_field, control, conserved
        self.integrate, self.explain, self.count = integrate, explain, 1 + leaves
        self.wrt = tuple(range(self.count))

    def outputs(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        guess = tensors[0]
        state = torch.empty(rows, guess.shape[-1], dtype=guess.dtype, device=guess.device)
        return [state, torch.empty(rows, 3, dtype=torch.int64, device=guess.device)]

    def run(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            tensors = [t.detach() for t in recordable(tensors)]
            if rows == 0:
                return self.outputs(rows, shared, tensors)
            y, report = self._search(rows, shared, tensors)
            return [torch.where((report[:, :1] == 0), y, torch.nan), report]

    def equations(self, shared: Sequence[bool], tensors: Sequence[Tensor]) -> _Equations:
        field = self.make_field(tensors[1:], shared[1:])
        return _Equations(field, tensors[0], shared[0], self.conserved)

    def _search(self, rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        control, conserved = self.control, 0 if self.conserved is None else len(self.conserved.weights)
        equations = self.equations(shared, tensors)
        guess = tensors[0].expand(rows, -1) if shared[0] else tensors[0]
        every = torch.arange(rows, device=guess.device)
        self._check_conserved(equations, guess, every)
        y, iterations, usable = guess, torch.zeros_like(every), torch.zeros_like(every, dtype=torch.bool)
        if not control.stable:
            y, _, usable, _, iterations = find_roots(equations, guess, every, control.tolerance, control.max_iterations)
        status, steps = torch.zeros_like(every), torch.zeros_like(every)
        rest = (~usable).nonzero()[:, 0]
        if len(rest):
            settled = settle(
                equations,
                lambda *arguments: self.integrate(shared[1:], tensors[1:], *arguments),
                guess[rest],
                rest,
                control.tolerance,
                conserved,
                control.max_steps,
            )
            y = y.index_copy(0, rest, settled.y)
            status = status.index_copy(0, rest, self._judged(equations, guess, rest, settled.y, settled.status))
            iterations = iterations.index_add(0, rest, settled.iterations)
            steps = steps.index_copy(0, rest, settled.steps)
        return y, torch.stack([status, iterations, steps], 1)

    def _judged(self, equations: _Equations, guess: Tensor, rows: Tensor, y: Tensor, status: Tensor) -> Tensor:
        """A state among others is as good as any where no gradient is asked for; else say what fixes it, if known."""
        singular = status == int(Status.SINGULAR)
        if not bool(singular.any()):
            return status
        if not self.control.differentiated:
            return torch.where(singular, int(Status.OK), status)
        first = int(singular.nonzero()[0, 0])
        row, known = rows[first : first + 1], self.conserved
        jacobian = equations.field.jacobian(y[first : first + 1], row)[1][0]
        slopes = equations.field.value(*_around(y[first], guess[row[0]], row))
        declared = y.new_zeros(0, y.shape[1]) if known is None else known.weights
        arrays = [x.double().cpu().numpy() for x in (jacobian, slopes, declared)]
        laws, more = conserved_directions(*arrays, 1e3 * torch.finfo(y.dtype).eps)
        if len(laws) and self._holds(equations, torch.from_numpy(laws).to(y), guess):
            raise SolveError(self.explain(laws, more, int(row)))
        return status

    def _holds(self, equations: _Equations, laws: Tensor, guess: Tensor) -> bool:
        """Whether laws found in one row hold in all: at some parameters only (a rate of zero) nothing is to declare."""
        every = torch.arange(len(guess), device=guess.device)
        probes, _ = _around(guess[0], guess[0], every[:1])
        for probe in probes[:3]:
            slopes = equations.field.value(probe.expand(len(guess), -1), every)
            rate, size = slopes @ laws.T, slopes.abs() @ laws.abs().T
            if bool((rate.abs() > torch.finfo(guess.dtype).eps ** 0.5 * size).any()):
                return False
        return True

    def _check_conserved(self, equations: _Equations, guess: Tensor, rows: Tensor) -> None:
        """What is said to be conserved must not move at the guess."""
        if self.conserved is None:
            return
        weights, slopes = equations.conserved.weights, equations.field.value(guess, rows)
        rate, size = slopes @ weights.T, slopes.abs() @ weights.abs().T
        wrong = (rate.abs() > torch.finfo(guess.dtype).eps ** 0.5 * size).nonzero()
        if len(wrong):
            row, k = wrong[0].tolist()
            raise SolveError(
                f"conserved= names a quantity that is not conserved: {weights[k].tolist()} y changes at the rate "
                f"{rate[row, k]:.4g} at y_guess {guess[row].tolist()} (row {row})."
            )

    def make_vjp(self) -> RowFunction:
        n = self.count

        def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
            keep = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.enable_grad():
                tensors = differentiable(recordable(tensors), self.wrt)
                x, (y, report, seed) = tensors[:n], tensors[n:]
                good = (report[:, 0] == 0).nonzero()[:, 0]
                if not len(good):
                    return [torch.zeros_like(t) for t in x]
                equations = self.equations(shared[:n], x)
                with torch.set_grad_enabled(keep):
                    matrix = equations.linearised(y[good], good)[1]
                    pull = -torch.linalg.solve(matrix.mT, seed[good])
                return pulled_back([equations.residual(y[good], good)], x, [pull], keep)

        wrt = (*range(n + 1), n + 2)
        return TorchRows(compute, lambda rows, shared, t: [torch.empty_like(v) for v in t[:n]], n + 3, wrt, self.wrt)

    def make_jvp(self) -> RowFunction:
        n = self.count

        def compute(rows: int, shared: tuple[bool, ...], tensors: Sequence[Tensor]) -> list[Tensor]:
            keep = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.enable_grad():
                tensors = differentiable(recordable(tensors), self.wrt)
                x, (y, report), moves = tensors[:n], tensors[n : n + 2], tensors[n + 2 :]
                good = (report[:, 0] == 0).nonzero()[:, 0]
                if not len(good):
                    return [torch.zeros_like(y)]
                equations = self.equations(shared[:n], x)
                with torch.set_grad_enabled(keep):
                    matrix = equations.linearised(y[good], good)[1]
                residual = equations.residual(y[good], good)
                seed = torch.zeros_like(residual).requires_grad_()
                bars = pulled_back([residual], x, [seed], True)
                (pushed,) = pulled_back(bars, [seed], moves, keep)
                move = -torch.linalg.solve(matrix, pushed)
                return [torch.zeros_like(y).index_copy(0, good, move)]

        wrt = (*range(n + 1), *range(n + 2, 2 * n + 2))
        return TorchRows(compute, lambda rows, shared, t: [torch.empty_like(t[n])], 2 * n + 2, wrt, (None,))


def _around(y: Tensor, guess: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Points of no particular kind near a steady state and the guess, and the row they belong to."""
    count = 2 * len(y) + 2
    share = torch.frac(0.754877666 * torch.arange(1, count * len(y) + 1, device=y.device)).to(y).reshape(count, -1)
    base = torch.where((torch.arange(count, device=y.device) % 2 == 0)[:, None], y, guess)
    scale = torch.maximum(base.abs(), 0.1 * torch.maximum(y.abs().max(), guess.abs().max()))
    scale = torch.where(scale > 0, scale, 1.0)
    return base + 0.3 * share * scale, row.expand(count)

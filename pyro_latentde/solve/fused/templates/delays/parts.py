# SPDX-License-Identifier: Apache-2.0
"""Pieces of source that the kernels of delay equations share: where things lie, and the look back.

A record of an accepted step is (t, h, y, all stages, the lags it was chosen for): lagged states are interpolated in the
row's own records. The history, ``past``, counts its outputs behind those of the field: it is given places D before
those that it writes to. ``solve/delays/lagged.py`` says which record a lagged time lies in, and is the same in plain
torch.
"""

from dataclasses import dataclass

from pyro_latentde.solve.delays.breaking_points import CLOSE
from pyro_latentde.solve.delays.lagged import SNAP
from pyro_latentde.solve.fused.templates.parts import combine, indent, interpolant, stage_rows
from pyro_latentde.solve.methods.catalog import Method

__all__ = ["EPS", "DelayLayout", "delay_helpers", "lagged_stage"]

EPS = "2.220446049250313e-16"


@dataclass(frozen=True)
class DelayLayout:
    """Sizes of a delay problem, and where things lie in the work array and in a record.

    Args:
        method: The method.
        d: Number of states.
        lags: Number of lags.
        leaves: Number of parameters.
        lag: Which of them holds the lags.
        past: Whether the history is a function.
    """

    method: Method
    d: int
    lags: int
    leaves: int
    lag: int
    past: bool

    @property
    def stages(self) -> int:
        return len(self.method.c) + len(self.method.dense_c)

    @property
    def wide(self) -> int:
        """States and lagged states side by side."""
        return self.d * (1 + self.lags)

    @property
    def width(self) -> int:
        """Numbers of a record."""
        return 2 + self.d + self.stages * self.d + self.lags

    @property
    def record_lags(self) -> int:
        return 2 + self.d + self.stages * self.d

    @property
    def moved(self) -> int:
        """Numbers that are known of a record's derivative: of its state, of its stages."""
        return self.d + self.stages * self.d

    def __getattr__(self, name: str) -> int:
        """Where a piece of the work array begins."""
        sizes = {
            **dict.fromkeys(("start", "y", "y_new", "lam", "start_bar", "y_dot", "start_dot"), self.d),
            **dict.fromkeys(("chosen",), self.lags),
            **dict.fromkeys(("ys", "bar", "ys_dot"), self.wide),
            **dict.fromkeys(("k", "k_bar"), self.stages * self.d),
            "scratch": 0,
        }
        if name not in sizes:
            raise AttributeError(name)
        names = list(sizes)
        return sum(sizes[n] for n in names[: names.index(name)])


def delay_helpers(at: DelayLayout) -> str:
    """Functions of every kernel: where the lagged times of a step lie, and the states there."""
    return f"{_seek(at)}\n{_look_back(at)}\n"


def _seek(at: DelayLayout) -> str:
    """``o[leaves + l]``: the record in which the lagged time of the first stage lies, ``begin - 1`` before t0."""
    return f"""
def nearness(t: float, h: float, start: float) -> float:
    return {SNAP!r} * abs(h) + 8.0 * {EPS} * max(abs(t), abs(start))


def seek(t: float, near: float, begin: int, pos: int, w: Floats, buf: Floats, o: Ints) -> int:
    for l in range({at.lags}):
        m = min(o[{at.leaves} + l], pos - 1)
        s = t - w[{at.chosen} + l]
        while m >= begin and buf[m * {at.width}] > s + near:
            m -= 1
        while m + 1 < pos and buf[(m + 1) * {at.width}] <= s + near:
            m += 1
        o[{at.leaves} + l] = m
    return 0


def record_of(l: int, t: float, c: float, h: float, near: float, pos: int, w: Floats, buf: Floats, o: Ints) -> int:
    m = o[{at.leaves} + l]
    if c > 0.0:
        s = t + c * h - w[{at.chosen} + l]
        while m + 1 < pos and buf[(m + 1) * {at.width}] < s - near:
            m += 1
    return m
"""


def _look_back(at: DelayLayout) -> str:
    """The lagged states of a stage, behind its state."""
    d, terms = at.d, _blend(at, "b", "buf")
    history = f"for i in range({d}):\n    w[place + i] = w[{at.start} + i]"
    if at.past:
        history = f"past(s, w, {at.ys}, place - {d}, {at.scratch}, p, o)"
    return f"""
def look_back(t: float, c: float, h: float, near: float, begin: int, pos: int, w: Floats, ys: int, buf: Floats,
              p: Floats, o: Ints) -> int:
    for l in range({at.lags}):
        m = record_of(l, t, c, h, near, pos, w, buf, o)
        s = t + c * h - p[o[{at.lag}] + l]
        place = ys + {d} + l * {d}
        if m < begin:
            {indent(history, 3)}
        else:
            rec = m * {at.width}
            theta = (s - buf[rec]) / buf[rec + 1]
            {indent(weights(at, "b"), 3)}
            for i in range({d}):
                w[place + i] = buf[rec + 2 + i] + buf[rec + 1] * ({terms})
    return 0
"""


def weights(at: DelayLayout, name: str, derivative: bool = False) -> str:
    """``b0 = ...`` for every stage that counts, at ``theta``."""
    return "\n".join(interpolant(at.method, name, derivative))


def _blend(at: DelayLayout, name: str, array: str, base: str = "", first: int | None = None) -> str:
    """``b0 * k0[i] + ...`` over stages that lie in a record."""
    base, first = base or "rec", 2 + at.d if first is None else first
    return " + ".join(
        f"{name}{s} * {array}[{base} + {first + s * at.d} + i]"
        for s, row in enumerate(at.method.interpolant)
        if any(row)
    )


record_blend = _blend


def lagged_stage(at: DelayLayout, s: int) -> str:
    """Compute stage s of a step: its state, lagged states, slope."""
    c, a = stage_rows(at.method)[s]
    return (
        f"for i in range({at.d}):\n"
        f"    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), at.d)})\n"
        f"look_back(t, {float(c)!r}, h, near, begin, pos, w, {at.ys}, buf, p, o)\n"
        f"field(t + {c!r} * h, w, {at.ys}, {at.k + s * at.d}, {at.scratch}, p, o)"
    )


def next_break(at: DelayLayout) -> str:
    """Source of the first breaking point after ``since``, both counted from t0."""
    order, names = at.method.order, [f"k{n}" for n in range(at.lags)]
    loops = "\n".join(
        "    " * (n + 1) + f"for {k} in range({' - '.join([str(order + 1), *names[:n]])}):" for n, k in enumerate(names)
    )
    inner = "    " * (at.lags + 1)
    total = " + ".join(f"{k} * p[o[{at.lag}] + {n}]" for n, k in enumerate(names))
    return f"""
def next_break(since: float, close: float, p: Floats, o: Ints) -> float:
    best = np.inf
{loops}
{inner}point = {total}
{inner}if point > since + close and point < best:
{inner}    best = point
    return best
"""


CLOSENESS = f"{CLOSE!r} * least + 16.0 * {EPS} * max(abs(t), abs(start))"

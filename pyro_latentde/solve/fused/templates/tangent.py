# SPDX-License-Identifier: Apache-2.0
"""The exact forward derivative along the recorded steps of each row."""

from pyro_latentde.solve.fused.templates.parts import WorkLayout, blend, combine, indent, interpolant, stage_rows
from pyro_latentde.solve.methods import Method

__all__ = ["explicit_tangent"]


def explicit_tangent(method: Method, d: int, leaves: int) -> str:
    """Source of ``tangent``: directional derivative of the outputs along given tangents of all inputs."""
    at = WorkLayout(method, d)
    k_dot = at.k_bar
    parts = []
    for s, (c, a) in enumerate(stage_rows(method)):
        parts.append(
            f"for i in range({d}):\n"
            f"    w[{at.ys} + i] = w[{at.y} + i] + h * ({combine(a, str(at.k), d)})\n"
            f"    w[{at.bar} + i] = w[{at.y_dot} + i] + h * ({combine(a, str(k_dot), d)})\n"
            f"field(t + {c!r} * h, w, {at.ys}, {at.k + s * d}, {at.scratch}, p, o)\n"
            f"field_jvp(t + {c!r} * h, t_dot, w, {at.ys}, {at.bar}, {k_dot + s * d}, {at.scratch}, p, o, pd, od)"
        )
    weights = "\n".join(interpolant(method, "b") + interpolant(method, "d", derivative=True))
    return f"""
def tangent(lo: int, hi: int, T: int, ts: FloatsAt, tss: int, p: FloatsAt, po: Ints, ps: Ints, pd: Floats,
            pdo: Ints, pds: Ints, status: Ints, buf: Floats, spans: Ints, y0_dot: Floats, ts_dot: Floats,
            t0_dot: Floats, ys_dot: Floats, w: Floats, o: Ints, od: Ints) -> int:
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
            od[k] = pdo[k] + r * pds[k]
        tt = r * tss
        t_dot = t0_dot[r]
        for i in range({d}):
            w[{at.y_dot} + i] = y0_dot[r * {d} + i]
        j = 0
        begin = spans[2 * r]
        end = spans[2 * r + 1] if status[r] == 0 else begin
        sign = 1.0
        if end > begin and buf[begin * {d + 2} + 1] < 0.0:
            sign = -1.0
        for n in range(begin, end):
            t = buf[n * {d + 2}]
            h = buf[n * {d + 2} + 1]
            t_new = buf[(n + 1) * {d + 2}] if n + 1 < end else ts[tt + T - 1]
            for i in range({d}):
                w[{at.y} + i] = buf[n * {d + 2} + 2 + i]
            {indent(chr(10).join(parts), 3)}
            while j < T and (sign * ts[tt + j] <= sign * t_new or n + 1 == end):
                theta = (ts[tt + j] - t) / h if h != 0.0 else 0.0
                {indent(weights, 4)}
                theta_dot = ts_dot[r * T + j] - t_dot
                for i in range({d}):
                    ys_dot[(r * T + j) * {d} + i] = (
                        w[{at.y_dot} + i]
                        + h * ({blend(method, "b", str(k_dot), d)})
                        + theta_dot * ({blend(method, "d", str(at.k), d)})
                    )
                j += 1
            for i in range({d}):
                w[{at.y_dot} + i] += h * ({combine(method.b, str(k_dot), d)})
        while j < T:
            for i in range({d}):
                ys_dot[(r * T + j) * {d} + i] = w[{at.y_dot} + i] if status[r] == 0 else 0.0
            j += 1
    return 0
"""

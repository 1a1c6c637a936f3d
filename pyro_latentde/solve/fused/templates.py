# SPDX-License-Identifier: Apache-2.0
"""The explicit Runge-Kutta kernels: source code for one method and one number of states.

Three loops over rows, all writing only to their own rows and to the thread's work array ``w``:

* ``forward``: the adaptive (or fixed, or replayed) solve, which also records every accepted step (t, h, y);
* ``adjoint``: the exact reverse of the recorded steps (discretise, then differentiate);
* ``tangent``: the exact forward derivative along the recorded steps.

``stepper.py`` is the same algorithm in plain torch; read that first. Rows never share arithmetic, so a row gives the same bits
alone and in any batch. Arrays are flat; a stride of 0 shares one entry among all rows.

References:
    Hairer, Norsett and Wanner, "Solving Ordinary Differential Equations I", 2nd ed., Springer 1993, II.4 (step size
    control, starting step) and II.6 (dense output).
"""

from collections.abc import Sequence

from pyro_latentde.solve.methods import Method

__all__ = ["explicit_adjoint", "explicit_forward", "explicit_tangent", "work_size"]


def _indent(text: str, levels: int) -> str:
    return text.replace("\n", "\n" + "    " * levels)


def _combine(weights: Sequence[float], base: str, d: int, index: str = "i") -> str:
    """``w0 * k0[i] + w1 * k1[i] + ...`` over the stages stored from ``base`` on, ``d`` apart."""
    terms = [f"{weight!r} * w[{base} + {s * d} + {index}]" for s, weight in enumerate(weights) if weight != 0.0]
    return " + ".join(terms) if terms else "0.0"


def _polynomial(coefficients: Sequence[float], derivative: bool) -> str:
    """``b(theta)`` or its derivative, by Horner's rule."""
    coefficients = [c * (q + 1) if derivative else c for q, c in enumerate(coefficients)]
    source = repr(coefficients[-1])
    for c in coefficients[-2::-1]:
        source = f"({c!r} + theta * {source})"
    return source if derivative else f"theta * {source}"


def _interpolant(method: Method, name: str, derivative: bool = False) -> list[str]:
    return [f"{name}{s} = {_polynomial(row, derivative)}" for s, row in enumerate(method.interpolant) if any(row)]


def _blend(method: Method, name: str, base: str, d: int, index: str = "i") -> str:
    terms = [f"{name}{s} * w[{base} + {s * d} + {index}]" for s, row in enumerate(method.interpolant) if any(row)]
    return " + ".join(terms)


class _Layout:
    """Where things lie in the work array, for D states and all stages of a method."""

    def __init__(self, method: Method, d: int) -> None:
        self.stages = len(method.c) + len(method.dense_c)
        self.y, self.y_new, self.lam, self.bar, self.y_dot = (i * d for i in range(5))
        self.k = 5 * d
        self.ys = self.k + self.stages * d
        self.k_bar = self.ys + self.stages * d
        self.scratch = self.k_bar + self.stages * d


def work_size(method: Method, d: int, scratch: int) -> int:
    """Entries of the work array one thread needs."""
    return _Layout(method, d).scratch + scratch


def _rows(method: Method) -> list[tuple[float, tuple[float, ...]]]:
    """Node and weights of every stage, the dense ones after the main ones."""
    return [*zip(method.c, method.a, strict=True), *zip(method.dense_c, method.dense_a, strict=True)]


def _stage(method: Method, at: _Layout, d: int, s: int, keep: bool) -> str:
    """Compute stage s; ``keep`` stores its argument for the reverse pass."""
    c, a = _rows(method)[s]
    place = at.ys + s * d if keep else at.ys
    return (
        f"for i in range({d}):\n"
        f"    w[{place} + i] = w[{at.y} + i] + h * ({_combine(a, str(at.k), d)})\n"
        f"field(t + {c!r} * h, w, {place}, {at.k + s * d}, {at.scratch}, p, o)"
    )


def explicit_forward(method: Method, d: int, leaves: int) -> str:
    """Source of ``forward``: see the module for what it does; step modes are 0 adaptive, 1 fixed, 2 replayed."""
    at = _Layout(method, d)
    main = len(method.c)
    stages = "\n".join(_stage(method, at, d, s, False) for s in range(1, main))
    dense = "\n".join(_stage(method, at, d, s, False) for s in range(main, at.stages))
    if dense:
        inside = "j < T and sign * ts[tt + j] < sign * t_new - rounding"
        beyond = "mode == 2 and last and abs(ts[tt + T - 1] - t_new) > rounding"
        dense = f"if {inside} or {beyond}:\n    {_indent(dense, 1)}\n    evals += {len(method.dense_c)}"
    weights = "\n".join(_interpolant(method, "b"))
    k = method.error_order or 1
    return f'''
def forward(lo, hi, T, y0, y0s, ts, tss, t0, t0s, p, po, ps, ys, status, counts, rtol, atol, max_steps,
            mode, step, hs, hss, keep, buf, pos, spans, w, o):
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
        tt = r * tss
        start = t0[r * t0s]
        t = start
        t_end = ts[tt + T - 1]
        span = t_end - t
        sign = 1.0 if span >= 0.0 else -1.0
        row_pos = pos
        spans[2 * r] = pos
        accepted = 0
        rejected = 0
        evals = 1
        code = 0
        fine = True
        for i in range({d}):
            w[{at.y} + i] = y0[r * y0s + i]
            fine = fine and abs(w[{at.y} + i]) < np.inf
        field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)
        for i in range({d}):
            fine = fine and abs(w[{at.k} + i]) < np.inf
        if not fine:
            code = 3
        j = 0
        while j < T and ts[tt + j] == start:  # whatever comes, the state at t0 is known
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = w[{at.y} + i]
            j += 1
        planned = 0
        finish = t_end
        rounding = 0.0
        h = 0.0
        if mode == 1:
            planned = int(math.ceil(abs(span) / step * (1.0 - 1e-12)))
            h = span / max(1, planned)
        elif mode == 2:
            offset = 0.0
            while planned < hss and hs[r * hss + planned] != 0.0:
                offset += hs[r * hss + planned]
                planned += 1
            finish = start + offset
            offset = 0.0
            if planned > 0:
                sign = 1.0 if hs[r * hss] > 0.0 else -1.0
        {_indent(_first_step(method, at, d, k), 2)}
        last = planned == 0 if mode == 2 else span == 0.0
        if keep and last and code == 0:  # nothing to do: a record of size 0 tells the derivative by the output times
            if (pos + 1) * {d + 2} > buf.size:
                return r, row_pos
            buf[pos * {d + 2}] = t
            buf[pos * {d + 2} + 1] = 0.0
            for i in range({d}):
                buf[pos * {d + 2} + 2 + i] = w[{at.y} + i]
            pos += 1
        before = 1.0
        retry = False
        unfinished = False
        while code == 0 and not last:
            if mode != 2 and accepted + rejected >= max_steps:
                code = 1
                break
            if mode == 0:
                remaining = t_end - t
                if abs(h) >= abs(remaining):
                    h = remaining
                    last = True
                elif 2.0 * abs(h) > abs(remaining):
                    h = 0.5 * remaining
                if not last and abs(h) < 16.0 * 2.220446049250313e-16 * max(abs(t), abs(t_end)):
                    code = 3 if unfinished else 2
                    break
            else:
                last = accepted == planned - 1
            if mode == 0:
                t_new = t_end if last else t + h
            elif mode == 1:
                t_new = t_end if last else start + (accepted + 1) * h
            else:
                h = hs[r * hss + accepted]
                offset += h
                t_new = start + offset
                if last:  # sums of steps miss the last output time by rounding
                    rounding = (hss + 4) * 2.220446049250313e-16 * max(abs(start), abs(t_end))
            {_indent(_fresh_slope(method, at), 3)}
            {_indent(stages, 3)}
            evals += {main - 1}
            total = 0.0
            for i in range({d}):
                w[{at.y_new} + i] = w[{at.y} + i] + h * ({_combine(method.b, str(at.k), d)})
                total += abs(w[{at.y_new} + i])
            {_indent(_last_stage(method, at, d), 3)}
            error = 0.0
            {_indent(_error_norm(method, at, d), 3)}
            fine = error < np.inf and total < np.inf
            if mode == 0 and (not fine or error > 1.0):
                rejected += 1
                unfinished = not fine
                shrink = 0.2
                if fine:
                    shrink = max(0.2, 0.9 * error ** (-{1.0 / k!r}))
                h = h * shrink
                retry = True
                last = False
                continue
            if not fine:
                rejected += 1
                code = 3
                break
            if keep:
                if (pos + 1) * {d + 2} > buf.size:
                    return r, row_pos
                at_record = pos * {d + 2}
                buf[at_record] = t
                buf[at_record + 1] = h
                for i in range({d}):
                    buf[at_record + 2 + i] = w[{at.y} + i]
                pos += 1
            {_indent(dense, 3)}
            while j < T and (sign * ts[tt + j] <= sign * t_new or last):
                gap = abs(ts[tt + j] - t_new)
                if mode == 2 and sign * ts[tt + j] > sign * t_new and gap > max(rounding, 1e-4 * abs(h)):
                    code = 1  # the given steps do not reach; a little beyond they do, for finite differences
                    break
                if gap <= rounding:
                    for i in range({d}):
                        ys[(r * T + j) * {d} + i] = w[{at.y_new} + i]
                else:
                    theta = (ts[tt + j] - t) / h
                    {_indent(weights, 5)}
                    for i in range({d}):
                        ys[(r * T + j) * {d} + i] = w[{at.y} + i] + h * ({_blend(method, "b", str(at.k), d)})
                j += 1
            accepted += 1
            t = t_new
            for i in range({d}):
                w[{at.y} + i] = w[{at.y_new} + i]
                w[{at.k} + i] = w[{at.k + (main - 1) * d if method.fsal else at.k} + i]
            if mode == 0:
                error = max(error, 1e-10)
                factor = 0.9 * error ** (-{0.7 / k!r}) * before ** {0.4 / k!r}
                factor = min(10.0, max(0.2, factor))
                if retry and factor > 1.0:
                    factor = 1.0
                before = error
                retry = False
                unfinished = False
                h = h * factor
        if j < T and code == 0:  # no steps were given
            code = 1
        while j < T:
            for i in range({d}):
                ys[(r * T + j) * {d} + i] = np.nan
            j += 1
        status[r] = code
        counts[3 * r] = accepted
        counts[3 * r + 1] = rejected
        counts[3 * r + 2] = evals
        spans[2 * r + 1] = pos
    return hi, pos
'''


def _last_stage(method: Method, at: _Layout, d: int) -> str:
    """The slope at the end of a step must be finite too where the next step begins with it."""
    if not method.fsal:
        return ""
    return f"for i in range({d}):\n    total += abs(w[{at.k + (len(method.c) - 1) * d} + i])"


def _fresh_slope(method: Method, at: _Layout) -> str:
    """The first stage of a step that does not begin with the last of the step before."""
    if method.fsal:
        return ""
    return (
        f"if accepted > 0 and not retry:\n"
        f"    field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)\n"
        f"    evals += 1"
    )


def _first_step(method: Method, at: _Layout, d: int, k: int) -> str:
    """Starting step: Hairer, Norsett and Wanner, section II.4, page 169; emitted as a call of a helper."""
    if not method.errors:
        return ""
    return (
        f"elif span != 0.0 and code == 0:\n"
        f"    h = sign * first_step(t, abs(span), sign, rtol, atol, {1.0 / k!r}, {d}, "
        f"w, {at.y}, {at.y_new}, {at.k}, {at.ys}, {at.scratch}, p, o)\n"
        f"    evals += 1"
    )


FIRST_STEP = '''
def first_step(t, span, sign, rtol, atol, power, d, w, y, y1, k, k1, ws, p, o):
    d0 = 0.0
    d1 = 0.0
    for i in range(d):
        scale = atol + rtol * abs(w[y + i])
        d0 += (w[y + i] / scale) ** 2
        d1 += (w[k + i] / scale) ** 2
    d0 = math.sqrt(d0 / d)
    d1 = math.sqrt(d1 / d)
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    for i in range(d):
        w[y1 + i] = w[y + i] + sign * h0 * w[k + i]
    field(t + sign * h0, w, y1, k1, ws, p, o)
    d2 = 0.0
    for i in range(d):
        scale = atol + rtol * abs(w[y + i])
        d2 += ((w[k1 + i] - w[k + i]) / scale) ** 2
    d2 = math.sqrt(d2 / d) / h0
    h1 = max(1e-6, 1e-3 * h0) if d1 <= 1e-15 and d2 <= 1e-15 else (0.01 / max(d1, d2)) ** power
    h = min(100.0 * h0, h1, span)
    return h if 0.0 < h < np.inf and d2 < np.inf else 1e-6 * span
'''

INSERTION_POINT = '''
def insertion_point(p, start, stride, size, right, value):
    lo = 0
    hi = size
    while lo < hi:
        mid = (lo + hi) // 2
        knot = p[start + stride * mid]
        if knot < value or (right and knot == value):
            lo = mid + 1
        else:
            hi = mid
    return lo
'''


def _error_norm(method: Method, at: _Layout, d: int) -> str:
    if not method.errors:
        return ""
    sums = [f"e{n} = 0.0" for n in range(len(method.errors))]
    squares = [f"    e{n} += (h * ({_combine(row, str(at.k), d)}) / scale) ** 2" for n, row in enumerate(method.errors)]
    loop = [
        f"for i in range({d}):",
        f"    scale = atol + rtol * max(abs(w[{at.y} + i]), abs(w[{at.y_new} + i]))",
        *squares,
    ]
    if len(method.errors) == 1:
        end = [f"error = math.sqrt(e0 / {d})"]
    else:  # DOP853: two estimates, Hairer, Norsett and Wanner, section II.10
        end = [
            "mixed = e0 + 0.01 * e1",
            "if mixed > 0.0 or mixed != mixed:",
            f"    error = e0 / math.sqrt(mixed * {d})",
        ]
    return "\n".join(["if mode == 0:", *("    " + line for line in [*sums, *loop, *end])])


def explicit_adjoint(method: Method, d: int, leaves: int) -> str:
    """Source of ``adjoint``: cotangents of y0, times, t0 and every parameter, from those of the outputs.

    The recorded steps h are constants and the grid starts at t0, so t0 shifts every t_n, and an output time moves along
    the interpolant of its step.
    """
    at = _Layout(method, d)
    main = len(method.c)
    cheap = main - 1 if method.fsal else main  # the repeated last stage serves outputs only
    stage = [_stage(method, at, d, s, True) for s in range(at.stages)]
    stage[0] = (
        f"for i in range({d}):\n    w[{at.ys} + i] = w[{at.y} + i]\n"
        f"field(t, w, {at.y}, {at.k}, {at.scratch}, p, o)"
    )
    forward = "\n".join(stage[:cheap])
    extra = "\n".join(stage[cheap:])
    extra = f"if first <= j:\n    {_indent(extra, 1)}" if extra else ""
    weights = "\n".join(_interpolant(method, "b") + _interpolant(method, "d", derivative=True))
    spread = "\n".join(
        f"w[{at.k_bar + s * d} + i] += h * b{s} * yb" for s, row in enumerate(method.interpolant) if any(row)
    )
    seed = "\n".join(f"w[{at.k_bar + s * d} + i] = {f'h * {b!r} * lam' if b else '0.0'}" for s, b in enumerate(_padded(method)))
    back = "\n".join(_reverse_stage(method, at, d, s) for s in range(cheap - 1, -1, -1))
    back_extra = "\n".join(_reverse_stage(method, at, d, s) for s in range(at.stages - 1, cheap - 1, -1))
    back_extra = f"if first <= j:\n    {_indent(back_extra, 1)}" if back_extra else ""
    return f'''
def adjoint(lo, hi, chunk, T, ts, tss, p, po, ps, gy, status, buf, spans, y0_bar, ts_bar, t0_bar, g, go, gs, gc, w, o, q):
    for r in range(lo, hi):
        for k in range({leaves}):
            o[k] = po[k] + r * ps[k]
            q[k] = go[k] + r * gs[k] + chunk * gc[k]
        tt = r * tss
        for i in range({d}):
            w[{at.lam} + i] = 0.0
        t_bar = 0.0
        if status[r] == 0:
            j = T - 1
            begin = spans[2 * r]
            sign = 1.0
            if spans[2 * r + 1] > begin and buf[begin * {d + 2} + 1] < 0.0:
                sign = -1.0
            for n in range(spans[2 * r + 1] - 1, begin - 1, -1):
                t = buf[n * {d + 2}]
                h = buf[n * {d + 2} + 1]
                for i in range({d}):
                    w[{at.y} + i] = buf[n * {d + 2} + 2 + i]
                first = j + 1
                while first > 0 and (n == begin or sign * ts[tt + first - 1] > sign * t):
                    first -= 1
                {_indent(forward, 4)}
                {_indent(extra, 4)}
                for i in range({d}):
                    lam = w[{at.lam} + i]
                    {_indent(seed, 5)}
                for jj in range(first, j + 1):
                    theta = (ts[tt + jj] - t) / h if h != 0.0 else 0.0
                    {_indent(weights, 5)}
                    slope = 0.0
                    for i in range({d}):
                        yb = gy[(r * T + jj) * {d} + i]
                        w[{at.lam} + i] += yb
                        {_indent(spread, 6)}
                        slope += yb * ({_blend(method, "d", str(at.k), d)})
                    ts_bar[r * T + jj] = slope
                    t_bar -= slope
                if h != 0.0:
                    {_indent(back_extra, 5)}
                    {_indent(back, 5)}
                j = first - 1
            while j >= 0:
                for i in range({d}):
                    w[{at.lam} + i] += gy[(r * T + j) * {d} + i]
                j -= 1
        for i in range({d}):
            y0_bar[r * {d} + i] = w[{at.lam} + i]
        t0_bar[r] = t_bar
    return 0
'''


def _padded(method: Method) -> list[float]:
    return [*method.b, *([0.0] * len(method.dense_c))]


def _reverse_stage(method: Method, at: _Layout, d: int, s: int) -> str:
    c, a = _rows(method)[s]
    pull = "\n    ".join(f"w[{at.k_bar + n * d} + i] += h * {weight!r} * yb" for n, weight in enumerate(a) if weight)
    return (
        f"t_bar += field_vjp(t + {c!r} * h, w, {at.ys + s * d}, {at.k_bar + s * d}, {at.bar}, {at.scratch}, p, o, g, q)\n"
        f"for i in range({d}):\n"
        f"    yb = w[{at.bar} + i]\n"
        f"    w[{at.lam} + i] += yb" + (f"\n    {pull}" if pull else "")
    )


def explicit_tangent(method: Method, d: int, leaves: int) -> str:
    """Source of ``tangent``: directional derivative of the outputs along given tangents of all inputs."""
    at = _Layout(method, d)
    k_dot = at.k_bar
    parts = []
    for s, (c, a) in enumerate(_rows(method)):
        parts.append(
            f"for i in range({d}):\n"
            f"    w[{at.ys} + i] = w[{at.y} + i] + h * ({_combine(a, str(at.k), d)})\n"
            f"    w[{at.bar} + i] = w[{at.y_dot} + i] + h * ({_combine(a, str(k_dot), d)})\n"
            f"field(t + {c!r} * h, w, {at.ys}, {at.k + s * d}, {at.scratch}, p, o)\n"
            f"field_jvp(t + {c!r} * h, t_dot, w, {at.ys}, {at.bar}, {k_dot + s * d}, {at.scratch}, p, o, pd, od)"
        )
    weights = "\n".join(_interpolant(method, "b") + _interpolant(method, "d", derivative=True))
    return f'''
def tangent(lo, hi, T, ts, tss, p, po, ps, pd, pdo, pds, status, buf, spans, y0_dot, ts_dot, t0_dot, ys_dot, w, o, od):
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
            {_indent(chr(10).join(parts), 3)}
            while j < T and (sign * ts[tt + j] <= sign * t_new or n + 1 == end):
                theta = (ts[tt + j] - t) / h if h != 0.0 else 0.0
                {_indent(weights, 4)}
                theta_dot = ts_dot[r * T + j] - t_dot
                for i in range({d}):
                    ys_dot[(r * T + j) * {d} + i] = (
                        w[{at.y_dot} + i]
                        + h * ({_blend(method, "b", str(k_dot), d)})
                        + theta_dot * ({_blend(method, "d", str(at.k), d)})
                    )
                j += 1
            for i in range({d}):
                w[{at.y_dot} + i] += h * ({_combine(method.b, str(k_dot), d)})
        while j < T:
            for i in range({d}):
                ys_dot[(r * T + j) * {d} + i] = w[{at.y_dot} + i] if status[r] == 0 else 0.0
            j += 1
    return 0
'''

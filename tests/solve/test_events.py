# SPDX-License-Identifier: Apache-2.0
"""Events: bouncing balls, spiking neurons and hitting times against closed forms and central differences."""

import math
import re

import pytest
import torch
from ode_fields import DOUBLE, central_difference, tensor
from torch.func import grad, jacfwd, jacrev, jvp, vmap

import pyro_latentde as lde
from pyro_latentde.errors import GradientPathError, ShapeError, SolveError
from pyro_latentde.solve.solution import Status

ENGINES = ("fused", "torch")


def fall(t, y, p):
    return torch.stack([y[1], -p["g"]])


BOUNCE = lde.Event(
    lambda t, y, p: y[0], lambda t, y, p: torch.stack([y[0], -p["e"] * y[1]]), direction=-1, max_events=8
)


def ball(x, engine, times=None, **settings):
    """Gravity, restitution and height of a ball that is let go; ``x`` is (..., 3)."""
    g, e, height = x.unbind(-1)
    times = torch.linspace(0, 5, 11, dtype=DOUBLE) if times is None else times
    y0 = torch.stack([height, torch.zeros_like(height)], -1)
    return lde.odesolve(fall, y0, times, {"g": g, "e": e}, events=BOUNCE, engine=engine, **settings)


def bounce_times(x, count):
    g, e, height = x.unbind(-1)
    first = torch.sqrt(2 * height / g)
    speed, times = g * first, [first]
    for _ in range(count - 1):
        speed = e * speed
        times.append(times[-1] + 2 * speed / g)
    return torch.stack(times, -1)


def bouncing_state(x, t):
    """Height and speed at times ``(T,)``."""
    g, e, height = x
    bounces = bounce_times(x.detach(), 8)
    states = []
    for moment in t:
        count = int((bounces < moment).sum())
        if count == 0:
            states.append(torch.stack([height - g * moment**2 / 2, -g * moment]))
            continue
        since = moment - bounce_times(x, count)[-1]
        speed = e**count * torch.sqrt(2 * height * g)
        states.append(torch.stack([speed * since - g * since**2 / 2, speed - g * since]))
    return torch.stack(states)


BALL = tensor(9.81, 0.8, 5.0)


@pytest.mark.parametrize(
    ("engine", "method"),
    [*(("fused", m) for m in ("tsit5", "dopri8", "bosh3", "kvaerno5", "auto")), ("torch", "tsit5"), ("torch", "auto")],
)
def test_a_ball_bounces_as_in_closed_form(engine, method):
    x, times = BALL.clone().requires_grad_(), torch.linspace(0, 5, 11, dtype=DOUBLE)
    solution = ball(x, engine, times, method=method)
    count = int(solution.events.count)
    assert count == 4 and solution.events.which.tolist() == [0] * 4 + [-1] * 4
    found, expected = solution.events.times[:count], bounce_times(x, count)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert solution.events.times[count:].isnan().all() and solution.events.states[count:].isnan().all()
    assert solution.events.states[:count, 0].abs().max() < 1e-13
    speeds = torch.sqrt(2 * x[2] * x[0]) * x[1] ** torch.arange(count, dtype=DOUBLE)
    torch.testing.assert_close(solution.events.states[:count, 1], -speeds, rtol=1e-11, atol=0)
    torch.testing.assert_close(solution.ys, bouncing_state(x, times), rtol=0, atol=1e-10)
    weights = torch.linspace(1, 2, count, dtype=DOUBLE)
    for mine, right in (
        ((found * weights).sum(), (expected * weights).sum()),
        ((solution.events.states[:count, 1] * weights).sum(), (-speeds * weights).sum()),
        ((solution.ys[1:] ** 2).sum(), (bouncing_state(x, times)[1:] ** 2).sum()),
    ):
        (a,), (b,) = (torch.autograd.grad(value, x, retain_graph=True) for value in (mine, right))
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def fire(t, y, p):
    """Leaky integrate and fire: tau dv/dt = -v + I, with a second state that follows and is not reset."""
    return torch.stack([(p["I"] - y[0]) / p["tau"], y[0] - 0.3 * y[1] * y[1]])


SPIKE = lde.Event(
    lambda t, y, p: y[0] - p["limit"], lambda t, y, p: torch.stack([p["rest"], y[1]]), direction=1, max_events=6
)


def neuron(x, engine, **settings):
    names = ("I", "tau", "limit", "rest")
    params = dict(zip(names, x.unbind(-1), strict=True))
    y0 = torch.zeros(*x.shape[:-1], 2, dtype=DOUBLE)
    return lde.odesolve(fire, y0, tensor(0.0, 1.0, 2.4), params, events=SPIKE, engine=engine, **settings)


def spike_times(x, count):
    current, tau, limit, rest = x.unbind(-1)
    first = -tau * torch.log(1 - limit / current)
    period = tau * torch.log((current - rest) / (current - limit))
    return first[..., None] + period[..., None] * torch.arange(count, dtype=DOUBLE)


NEURON = tensor(1.5, 0.7, 1.0, -0.2)


@pytest.mark.parametrize(("engine", "gradient"), [("fused", "discrete"), ("fused", "forward"), ("torch", "discrete")])
def test_spike_times_and_their_gradients(engine, gradient):
    x = NEURON.clone().requires_grad_()
    solution = neuron(x, engine, method="dopri8", rtol=1e-9, atol=1e-11, gradient=gradient)
    count = int(solution.events.count)
    expected = spike_times(x, count)
    assert count == 2 and float(spike_times(x.detach(), 3)[-1]) > 2.4
    torch.testing.assert_close(solution.events.times[:count], expected, rtol=1e-9, atol=0)
    for k in range(count):
        (mine,) = torch.autograd.grad(solution.events.times[k], x, retain_graph=True)
        (right,) = torch.autograd.grad(expected[k], x, retain_graph=True)
        torch.testing.assert_close(mine, right, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("fused", {"rtol": 1e-3}),
        ("fused", {"method": "rk4", "step_size": 0.4}),
        ("fused", {"method": "trbdf2", "rtol": 1e-3}),
        ("torch", {"method": "heun", "step_size": 0.6}),
    ],
    ids=str,
)
def test_gradients_are_exact_along_the_same_steps(engine, settings):
    """Central differences of replayed steps; at such tolerances the solution itself is far from the true one."""
    weights = torch.linspace(0.5, 2, 12, dtype=DOUBLE)

    def outcome(solution):
        events = solution.events
        return (solution.ys**2).sum() + (events.times[:2] * weights[:2]).sum() + (events.states[:2, 1] ** 3).sum()

    x = NEURON.clone().requires_grad_()
    solution = neuron(x, engine, **settings)
    assert int(solution.events.count) == 2
    again, close = neuron(x, engine, replay=solution), 1e-6 if settings.get("method") == "trbdf2" else 1e-11
    torch.testing.assert_close(again.ys, solution.ys, rtol=close, atol=close)
    torch.testing.assert_close(again.events.times[:2], solution.events.times[:2], rtol=close, atol=0)
    (mine,), (first,) = (torch.autograd.grad(outcome(s), x) for s in (again, solution))
    torch.testing.assert_close(first, mine, rtol=1e4 * close, atol=1e4 * close)
    right = central_difference(lambda x: outcome(neuron(x, engine, replay=solution)), NEURON)
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-9)


def decay_to(engine, level, times, **settings):
    """dy/dt = -k y^2 until y reaches the level; t* = (1 / level - 1 / y0) / k."""
    stop = lde.Event(lambda t, y, p: y[0] - level, terminal=True)
    y0 = tensor(2.0)
    return lambda k: lde.odesolve(lambda t, y, p: -p * y**2, y0, times, k, events=stop, engine=engine, **settings)


@pytest.mark.parametrize(("engine", "method"), [("fused", "dopri8"), ("fused", "kvaerno5"), ("torch", "dopri8")])
def test_a_terminal_event_gives_the_hitting_time_and_its_gradient(engine, method):
    level, k = tensor(0.5)[0].requires_grad_(), tensor(0.8)[0].requires_grad_()
    solution = decay_to(engine, level, tensor(0.0, 1.0, 3.0, 9.0), method=method, rtol=1e-8, atol=1e-10)(k)
    assert solution.ok and solution.events.times.shape == (1,)
    expected = (1 / level - 1 / 2.0) / k
    torch.testing.assert_close(solution.events.times[0], expected, rtol=1e-7, atol=0)
    mine = torch.autograd.grad(solution.events.times[0], (level, k), retain_graph=True)
    right = torch.autograd.grad(expected, (level, k))
    torch.testing.assert_close(mine, right, rtol=1e-6, atol=0)
    torch.testing.assert_close(solution.ys[2:, 0], tensor(0.5, 0.5), rtol=1e-14, atol=0)
    held = torch.autograd.grad(solution.ys[2:].sum(), (level, k))  # held at the level, whatever k is
    torch.testing.assert_close(held, (tensor(2.0)[0], tensor(0.0)[0]), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_event_that_never_fires_changes_nothing(engine):
    never = lde.Event(lambda t, y: y[0] + 1.0, terminal=True)
    solution = lde.odesolve(lambda t, y: -y, tensor(1.0), tensor(0.0, 2.0), events=never, engine=engine)
    plain = lde.odesolve(lambda t, y: -y, tensor(1.0), tensor(0.0, 2.0), engine=engine)
    assert solution.ok and int(solution.events.count) == 0 and solution.events.times.isnan().all()
    torch.testing.assert_close(solution.ys, plain.ys, rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_chattering_is_bounded_and_explained(engine):
    """With restitution 0.5 all bounces lie before t = 3 sqrt(2 h / g)."""
    x = torch.stack([tensor(9.81, 0.5, 5.0), tensor(9.81, 0.5, 500.0)])
    with pytest.raises(SolveError) as told:
        ball(x, engine)
    text = str(told.value)
    for part in ("too many events", "row [0]", "8 events", "terminal", "max_events", "the last at"):
        assert part in text, text
    x.requires_grad_()
    solution = ball(x, engine, on_failure="nan")
    assert solution.status.tolist() == [lde.Status.TOO_MANY_EVENTS, lde.Status.OK]
    assert solution.ys[0, -1].isnan().all() and solution.ys[1].isfinite().all()
    (gradient,) = torch.autograd.grad(solution.ys[:, 2:4].nan_to_num().sum(), x)
    assert (gradient[0] == 0).all() and gradient[1].abs().sum() > 0


@pytest.mark.parametrize("engine", ENGINES)
def test_a_relay_that_slides_is_told(engine):
    """dy/dt = .3 -+ 1 pushes back to y = 0 from both sides: it is crossed again and again, from t = 5/7 on.

    A row beside it that never gets there (dy/dt = 1.3 from above 0, without the switch) is solved.
    """

    one = tensor(1.0)

    def relay(t, y, p):
        return 0.3 + torch.where(y * p > 0, -one, one)

    event = lde.Event(lambda t, y, p: y[0], lambda t, y, p: y * 1.0, max_events=20)
    y0, p, times = tensor([0.5], [0.5]), tensor(1.0, -1.0), tensor(0.0, 2.0)
    with pytest.raises(SolveError) as told:
        lde.odesolve(relay, y0, times, p, events=event, engine=engine)
    text = str(told.value)
    assert "1 of 2 trajectories failed: too many events in 1. First: row [0], had 20 events between t=0.71428" in text
    assert "one more would be more than max_events: the condition crosses zero again and again" in text
    assert "y0 [0.5], parameters {p: 1}" in text
    for advice in ("terminal event", "clear of zero", "direction", "torch.tanh", "max_events", 'on_failure="nan"'):
        assert advice in text.split("Try:")[1]
    last = [float(t) for t in re.search(r"the last at ([^)]*)\)", text)[1].split(",")]
    assert len(last) == 3 and last == sorted(last) and last[-1] == pytest.approx(5 / 7, abs=1e-4)
    solution = lde.odesolve(relay, y0, times, p, events=event, engine=engine, on_failure="nan")
    assert solution.status.tolist() == [Status.TOO_MANY_EVENTS, Status.OK]
    assert solution.events.count.tolist() == [20, 0]
    torch.testing.assert_close(solution.ys[1, -1], tensor(0.5 + 2.6), rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", ["tsit5", "bosh3", "kvaerno3"])
def test_the_order_is_kept_across_an_event(method):
    """Equal steps: the error at the end falls as without the event, though the event lies anywhere in a step."""
    errors = []
    for size in (0.2, 0.1, 0.05):
        solution = neuron(NEURON, "fused", method=method, step_size=size)
        errors.append(float((solution.events.times[:2] - spike_times(NEURON, 2)).abs().max()))
    order = math.log2(errors[0] / errors[2]) / 2
    assert order > {"tsit5": 4.6, "bosh3": 2.7, "kvaerno3": 2.7}[method], errors


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_have_events_of_their_own(engine):
    x = torch.stack([tensor(9.81, 0.8, 5.0), tensor(1.62, 0.9, 40.0), tensor(9.81, 0.6, 0.5), tensor(3.7, 0.5, 2.0)])
    times = torch.linspace(0, 1.2, 4, dtype=DOUBLE)
    solution = ball(x, engine, times)
    assert solution.events.count.tolist() == [1, 0, 5, 1]
    for row in range(4):
        count = int(solution.events.count[row])
        torch.testing.assert_close(
            solution.events.times[row, :count], bounce_times(x[row], 8)[:count], rtol=0, atol=1e-12
        )
        alone = ball(x[row], engine, times)
        if engine == "fused":
            assert torch.equal(alone.ys, solution.ys[row])
            assert torch.equal(alone.events.times.nan_to_num(), solution.events.times[row].nan_to_num())
        torch.testing.assert_close(alone.ys, solution.ys[row], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("engine", ENGINES)
def test_decreasing_times(engine):
    """Backwards the ball rises to where it was thrown; y0 is what it was at t = 1."""
    x, times = tensor(9.81, 1.0, 5.0), tensor(0.0, -0.5, -2.0)
    solution = ball(x, engine, times)  # symmetric in time
    forward = ball(x, engine, -times)
    torch.testing.assert_close(solution.events.times[:1], -forward.events.times[:1], rtol=1e-12, atol=0)
    torch.testing.assert_close(solution.ys[:, 0], forward.ys[:, 0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_events_in_one_step_come_in_order(engine):
    """y = t: levels 0.7, 0.3 and 0.5 in one step, one of them terminal."""
    events = [lde.Event(lambda t, y, level=level: y[0] - level, terminal=level == 0.7) for level in (0.7, 0.3, 0.5)]
    settings = {"method": "midpoint", "step_size": 10.0, "engine": engine}
    solution = lde.odesolve(lambda t, y: torch.ones_like(y), tensor(0.0), tensor(0.0, 10.0), events=events, **settings)
    assert solution.events.which[:3].tolist() == [1, 2, 0]
    torch.testing.assert_close(solution.events.times[:3], tensor(0.3, 0.5, 0.7), rtol=1e-14, atol=0)
    torch.testing.assert_close(solution.ys[-1], tensor(0.7), rtol=1e-14, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_starting_at_zero_and_an_event_at_an_output_time(engine):
    """Thrown up from the ground: the start is no event, the landing is; outputs there show the state before."""
    x, speed = tensor(10.0, 0.5, 0.0), tensor(0.0, 5.0)
    params = {"g": x[0], "e": x[1]}
    solution = lde.odesolve(fall, speed, tensor(0.0, 1.0, 1.25), params, events=BOUNCE, engine=engine)
    assert int(solution.events.count) == 1 and abs(float(solution.events.times[0]) - 1.0) < 1e-14
    torch.testing.assert_close(solution.ys[1], tensor(0.0, -5.0), rtol=1e-12, atol=1e-12)
    both = lde.Event(BOUNCE.condition, BOUNCE.reset)  # in either direction: still only the landing
    again = lde.odesolve(fall, speed, tensor(0.0, 1.0, 1.25), params, events=both, engine=engine)
    assert int(again.events.count) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_transforms(engine):
    """vmap, forward mode and second derivatives of spike times against the closed form."""
    settings = {"method": "dopri8", "rtol": 1e-9 if engine == "fused" else 1e-5, "atol": 1e-11}

    def last(x):
        return neuron(x, engine, **settings).events.times[1]

    def right(x):
        return spike_times(x, 2)[1]

    rows = torch.stack([NEURON, NEURON * 1.05, NEURON * 0.97])
    close = 1e-8 if engine == "fused" else 1e-5
    torch.testing.assert_close(vmap(last)(rows), vmap(right)(rows), rtol=close, atol=0)
    torch.testing.assert_close(vmap(grad(last))(rows), vmap(grad(right))(rows), rtol=1e2 * close, atol=close)
    move = tensor(0.3, -0.2, 0.5, 0.1)
    torch.testing.assert_close(jvp(last, (NEURON,), (move,)), jvp(right, (NEURON,), (move,)), rtol=1e2 * close, atol=0)
    expected = jacfwd(grad(right))(NEURON)
    if engine == "fused":  # by the torch engine's replay
        torch.testing.assert_close(jacrev(grad(last))(NEURON), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(jacfwd(grad(last))(NEURON), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_stiff_equation_with_an_event(engine):
    """y follows cos t at once (rate 1e4) until cos t = 1/2."""
    rate = tensor(1e4)[0].requires_grad_()
    stop = lde.Event(lambda t, y, p: y[0] - 0.5, terminal=True)
    for method in ("kvaerno5", "auto") if engine == "fused" else ("kvaerno5",):
        solution = lde.odesolve(
            lambda t, y, p: -p * (y - torch.cos(t)), tensor(1.0), tensor(0.0, 3.0), rate, events=stop, method=method,
            engine=engine, rtol=1e-8, atol=1e-10,
        )  # fmt: skip
        # y = (cos t + s sin t) / (1 + s^2) + ..., s = 1 / rate
        shift = 1 / rate
        at = math.pi / 3
        for _ in range(20):
            at = torch.acos(0.5 * (1 + shift**2) - shift * torch.sin(torch.as_tensor(at)))
        torch.testing.assert_close(solution.events.times[0], at, rtol=1e-8, atol=0)
        (mine,), (right,) = torch.autograd.grad(solution.events.times[0], rate), torch.autograd.grad(at, rate)
        torch.testing.assert_close(mine, right, rtol=1e-4, atol=0)


def test_structured_states_captured_tensors_and_other_times():
    level = tensor(0.25)[0].requires_grad_()
    stop = lde.Event(lambda t, y: y["x"] - level, lambda t, y: {"x": y["x"] + 1.0, "z": y["z"]}, direction=-1)
    y0 = {"x": tensor(1.0)[0], "z": tensor(0.0)[0]}
    solution = lde.odesolve(lambda t, y: {"x": -y["x"], "z": y["x"]}, y0, tensor(0.0, 2.0), events=stop, rtol=1e-9)
    assert solution.events.states["x"].shape == (100,)
    torch.testing.assert_close(solution.events.times[0], -torch.log(level), rtol=1e-8, atol=0)
    (mine,) = torch.autograd.grad(solution.events.times[0], level, retain_graph=True)
    torch.testing.assert_close(mine, tensor(-4.0)[0], rtol=1e-7, atol=0)
    torch.testing.assert_close(solution.at(2.0)["z"], solution.ys["z"][-1], rtol=1e-13, atol=0)


def drop(event=BOUNCE, **settings):
    params = {"g": BALL[0], "e": BALL[1]}
    return lde.odesolve(fall, tensor(5.0, 0.0), tensor(0.0, 3.0), params, events=event, **settings)


def in_place(t, y, p):
    y[1] = -0.9 * y[1]
    return y


@pytest.mark.parametrize(
    ("event", "error", "words"),
    [
        (lambda: lde.Event(lambda t, y, p: y), ShapeError, ("shape (2,)", "scalar", "events=[...]")),
        (lambda: lde.Event(lambda t, y, p: 1.0), ShapeError, ("float", "scalar")),
        (lambda: lde.Event(lambda t, y, p: y[0] > 0), ShapeError, ("bool", "y[0] > 1.0")),
        (lambda: lde.Event(lambda t, y, p: y[0], lambda t, y, p: y[0]), ShapeError, ("reset", "()", "(2,)")),
        (lambda: lde.Event(lambda t, y, p: y[0], lambda t, y, p: (y[0], y[1])), ShapeError, ("reset", "tuple")),
        (lambda: lde.Event(lambda t, y, p: y[0], in_place), ShapeError, ("in place", "clone")),
        (lambda: lde.Event(lambda t, y, p: p["q"]), ShapeError, ("KeyError", "'q'", "condition(t, y, p)")),
        (lambda: lde.Event(lambda y: y[0]), ShapeError, ("f(t, y, p)", "(y)")),
        (lambda: lde.Event(lambda t, y, p: torch.log(y[1])), SolveError, ("non-finite",)),
        (lambda: lde.Event(lambda t, y, p: y[0], direction=2), SolveError, ("direction", "2", "-1")),
        (lambda: lde.Event(None), SolveError, ("condition", "NoneType")),
        (lambda: lde.Event(lambda t, y, p: y[0], 3.0), SolveError, ("reset", "float")),
        (lambda: lde.Event(lambda t, y, p: y[0], max_events=0), SolveError, ("max_events", "0")),
        (lambda: lde.Event(lambda t, y, p: y[0], lambda t, y, p: y, terminal=True), SolveError, ("terminal", "reset")),
        (lambda: lambda t, y, p: y[0], SolveError, ("lde.Event(condition, reset)", "function")),
    ],
)
def test_bad_events_are_explained(event, error, words):
    with pytest.raises(error) as told:
        drop(event())
    for word in words:
        assert word in str(told.value), str(told.value)


def test_what_cannot_be_with_events():
    with pytest.raises(SolveError, match="torchdiffeq"):
        drop(engine="torchdiffeq")
    with pytest.raises(GradientPathError, match="discrete"):
        drop(gradient="adjoint")
    with pytest.raises(SolveError, match="both sides"):
        lde.odesolve(fall, tensor(5.0, 0.0), tensor(-1.0, 1.0), {"g": BALL[0], "e": BALL[1]}, t0=0.0, events=BOUNCE)

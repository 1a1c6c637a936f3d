# SPDX-License-Identifier: Apache-2.0
"""Events in solves with doses, infusions and inputs with knots, against closed forms and central differences."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from ode_fields import DOUBLE, central_difference, tensor
from torch.func import grad, jacfwd, jvp, vmap

import pyro_latentde as lde
from pyro_latentde.errors import SolveError

ENGINES = ("fused", "torch")
TIGHT = {"method": "dopri8", "rtol": 1e-10, "atol": 1e-12}
TIMES = tensor(0.0, 1.0, 2.0, 3.0, 5.0, 7.0)


def washout(t, y, p):
    return -p["k"] * y


LOW = lde.Event(lambda t, y, p: y[0] - p["low"], max_events=4)


def bolus(x, engine, times=TIMES, **settings):
    """Doses into one compartment; a concentration that falls below ``low``. x: k, low, two amounts, two times."""
    doses = lde.Dose(x[..., 4:6], x[..., 2:4], 0)
    params = {"k": x[..., 0], "low": x[..., 1]}
    settings = {"events": LOW, "t0": 0.0, **TIGHT, **settings}
    y0 = torch.zeros(*x.shape[:-1], 1, dtype=DOUBLE)
    return lde.odesolve(washout, y0, times, params, doses=doses, engine=engine, **settings)


def bolus_law(x, times=TIMES):
    """Times at which the concentration falls below ``low``, and concentrations."""
    k, low, a, b, first, second = x.unbind(-1)
    together = a * torch.exp(-k * (second - first)) + b
    moments = torch.stack([first + torch.log(a / low) / k, second + torch.log(together / low) / k])
    since_a, since_b = (times - first).clamp(min=0), (times - second).clamp(min=0)
    given = a * (times >= first) * torch.exp(-k * since_a) + b * (times >= second) * torch.exp(-k * since_b)
    return moments, given


BOLUS = tensor(0.9, 1.0, 4.0, 3.0, 0.25, 2.5)


def compare_gradients(mine, right, x, close=1e-8):
    for one, other in zip(mine, right, strict=True):
        (a,), (b,) = (torch.autograd.grad(value, x, retain_graph=True) for value in (one, other))
        torch.testing.assert_close(a, b, rtol=close, atol=close)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_threshold_between_doses(engine):
    """The second dose carries the concentration over the threshold, which is no event."""
    x = BOLUS.clone().requires_grad_()
    solution = bolus(x, engine)
    (moments, given), found = bolus_law(x), solution.events
    assert solution.engine == engine and found.which.tolist() == [0, 0, -1, -1]
    torch.testing.assert_close(found.times[:2], moments, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.ys[:, 0], given, rtol=1e-9, atol=1e-9)
    compare_gradients((*found.times[:2], *solution.ys[3:, 0]), (*moments, *given[3:]), x)


def top_up(x, engine, **settings):
    """A concentration that falls below ``low`` is doubled; an infusion slows the fall from x[4] to x[5]."""
    k, low, start, amount, begin, end = x.unbind(-1)
    doses = lde.Dose(begin[..., None], amount[..., None], 0, duration=(end - begin)[..., None])
    again = lde.Event(LOW.condition, lambda t, y, p: 2.0 * y, direction=-1, max_events=6)
    settings = {"events": again, **settings}
    params, times = {"k": k, "low": low}, tensor(0.0, 1.0, 2.4)
    return lde.odesolve(washout, start[..., None], times, params, doses=doses, engine=engine, **settings)


TOP_UP = tensor(0.9, 1.0, 1.4, 1.0, 0.5, 1.9)


@pytest.mark.parametrize(
    ("engine", "settings"),
    [
        ("fused", {"rtol": 1e-3}),
        ("fused", {"rtol": 1e-3, "gradient": "forward"}),
        ("fused", {"method": "heun", "rtol": 1e-2}),
        ("fused", {"method": "dopri8", "step_size": 0.6}),
        ("fused", {"method": "trbdf2", "rtol": 1e-3}),
        ("fused", {"method": "auto", "rtol": 1e-2, "atol": 1e-3}),
        ("torch", {"rtol": 1e-3}),
        ("torch", {"method": "rk4", "step_size": 0.4}),
        ("torch", {"method": "trbdf2", "step_size": 0.6}),
    ],
    ids=str,
)
def test_gradients_are_exact_along_the_same_steps(engine, settings):
    """By central differences of replayed steps, to doses and their times too; the solution is far from the true one."""
    weights = torch.linspace(0.5, 2, 12, dtype=DOUBLE)

    def outcome(solution):
        found, count = solution.events, int(solution.events.count)
        assert count == 2
        return (solution.ys**2).sum() + (found.times[:count] * weights[:count]).sum() + (found.states[:count]).sum()

    x = TOP_UP.clone().requires_grad_()
    solution = top_up(x, engine, **settings)
    again, close = top_up(x, engine, replay=solution), 1e-6 if settings.get("method") == "trbdf2" else 1e-11
    torch.testing.assert_close(again.ys, solution.ys, rtol=close, atol=close)
    (mine,), (first,) = (torch.autograd.grad(outcome(s), x) for s in (again, solution))
    torch.testing.assert_close(first, mine, rtol=1e4 * close, atol=1e4 * close)
    right = central_difference(lambda x: outcome(top_up(x, engine, replay=solution)), TOP_UP)
    torch.testing.assert_close(mine, right, rtol=1e-8, atol=1e-8)


def pendulum(x, engine, **settings):
    """A driven pendulum with kicks, a push for a while, a wall to bounce off, and marks to pass."""
    mark = lde.Event(lambda t, y, p: y[1] - p["mark"] * torch.cos(t), max_events=9)
    wall = lde.Event(
        lambda t, y, p: y[0] - 0.5, lambda t, y, p: torch.stack([y[0], -p["loss"] * y[1]]), direction=1, max_events=9
    )
    kicks = lde.Dose(tensor(0.0, 1.0, 1.0, 2.5), tensor(0.6, 0.2, 0.1, 0.4), 1)
    push = lde.Dose(x[..., :1] + 0.7, tensor(0.5), 1, duration=1.1)
    drive = lde.Input(tensor(0.0, 1.5, 3.0), tensor(0.3, -0.2, 0.5), "linear")
    params = {"u": drive, "loss": x[..., 1], "mark": x[..., 2]}
    y0 = torch.stack([x[..., 0], 0.2 * x[..., 0]], -1)
    return lde.odesolve(
        lambda t, y, p: torch.stack([y[1], p["u"](t) - torch.sin(y[0])]), y0, tensor(0.0, 1.0, 2.5, 4.0), params,
        events=[mark, wall], doses=[kicks, push], engine=engine, **settings,
    )  # fmt: skip


PENDULA = tensor([0.2, 0.8, 0.1], [0.4, 0.5, 0.3])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"at_dose": "before", "method": "auto"},
        {"method": "trbdf2", "step_size": 0.5},
        {"method": "rk4", "step_size": 0.3},
    ],
    ids=str,
)
def test_engines_agree(settings):
    """Values, numbers of steps, gradients and tangents."""
    move, found = tensor([0.3, -0.2, 0.5], [0.1, 0.2, -0.4]), []
    for engine in ENGINES:
        x = PENDULA.clone().requires_grad_()
        solution = pendulum(x, engine, **settings)
        events = solution.events
        assert (events.count > 2).all() and (events.which == 1).any()
        outcome = (solution.ys**2).sum() + events.times.nansum() + (events.states.nan_to_num() ** 3).sum()
        (gradient,) = torch.autograd.grad(outcome, x)
        turns = jvp(lambda x, engine=engine: pendulum(x, engine, **settings).ys, (PENDULA,), (move,))[1]
        found.append((solution.ys.detach(), events.times.detach(), gradient, turns, solution.counts[:, :2]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10, equal_nan=True)


def fire(t, y, p):
    """Leaky integrate and fire: dv/dt = -v + I(t)."""
    return p["I"](t) - y


SPIKE = lde.Event(lambda t, y, p: y[0] - p["limit"], lambda t, y, p: 0.0 * y, direction=1, max_events=12)


def neuron(x, engine, times=(0.0, 2.0, 6.0), **settings):
    """x: the currents between the knots, and the limit."""
    current = lde.Input(tensor(0.0, 1.3, 2.9), x[..., :3], "previous")
    params, y0 = {"I": current, "limit": x[..., 3]}, torch.zeros(*x.shape[:-1], 1, dtype=DOUBLE)
    settings = {"events": SPIKE, **TIGHT, **settings}
    return lde.odesolve(fire, y0, tensor(*times), params, engine=engine, **settings)


def spike_times(x):
    """From v' = I - v piece by piece."""
    *currents, limit = x
    ends, t, v, found = (1.3, 2.9, 6.0), 0.0, 0.0, []
    for current, end in zip(currents, ends, strict=True):
        while bool(current > limit):
            spike = t + torch.log((current - v) / (current - limit))
            if float(spike.detach()) > end:
                break
            found.append(spike)
            t, v = spike, 0.0
        v = current + (v - current) * torch.exp(-(end - t) * torch.ones_like(limit))
        t = end
    return torch.stack(found)


NEURON = tensor(1.6, 0.8, 2.5, 1.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_neuron_with_a_current_in_pieces(engine):
    x = NEURON.clone().requires_grad_()
    solution, right = neuron(x, engine), spike_times(x)
    count = int(solution.events.count)
    assert count == len(right) == 7
    torch.testing.assert_close(solution.events.times[:count], right, rtol=1e-9, atol=0)
    compare_gradients(solution.events.times[[0, 2, 6]], right[[0, 2, 6]], x)


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_with_numbers_of_events_and_doses_of_their_own(engine):
    x = torch.stack([BOLUS, BOLUS, BOLUS, tensor(0.9, 5.0, 4.0, 0.3, 0.25, 2.5)])
    x[1, 5], x[2, 4] = torch.nan, 2.5  # one dose; two at the same time
    solution = bolus(x, engine)
    assert solution.ok.all() and solution.events.count.tolist() == [2, 1, 1, 0]
    (first, second), given = bolus_law(BOLUS)
    torch.testing.assert_close(solution.events.times[0, :2], torch.stack([first, second]), rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.events.times[1, 0], first, rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.events.times[2, 0], 2.5 + torch.log(tensor(7.0)[0]) / 0.9, rtol=1e-9, atol=0)
    for row in range(4):
        alone = bolus(x[row], engine)
        close = {"rtol": 0, "atol": 0} if engine == "fused" else {"rtol": 1e-13, "atol": 1e-13}
        torch.testing.assert_close(alone.ys, solution.ys[row], **close)
        torch.testing.assert_close(alone.events.times, solution.events.times[row], **close, equal_nan=True)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("at_dose", ["after", "before"])
@pytest.mark.parametrize("settings", [{}, {"method": "midpoint", "step_size": 0.4}], ids=str)
def test_an_event_at_the_very_time_of_a_dose_comes_first(engine, at_dose, settings):
    """dy/dt = 1 reaches 1 at t = 1, is set to 1/2, and then gets 2."""
    event = lde.Event(lambda t, y: y[0] - 1.0, lambda t, y: 0.5 * y)
    solution = lde.odesolve(
        lambda t, y: torch.ones_like(y), tensor(0.0), tensor(0.0, 1.0, 2.0), doses=lde.Dose([1.0], [2.0], 0),
        at_dose=at_dose, events=event, engine=engine, **settings,
    )  # fmt: skip
    assert solution.events.count == 1
    torch.testing.assert_close(solution.events.times[0], tensor(1.0)[0], rtol=1e-14, atol=0)
    torch.testing.assert_close(solution.events.states[0], tensor(1.0), rtol=1e-14, atol=0)
    here = 2.5 if at_dose == "after" else 1.0
    torch.testing.assert_close(solution.ys[:, 0], tensor(0.0, here, 3.5), rtol=1e-13, atol=1e-13)
    last = lde.odesolve(
        lambda t, y: torch.ones_like(y), tensor(0.0), tensor(0.0, 1.0), doses=lde.Dose([1.0], [2.0], 0),
        at_dose=at_dose, events=event, engine=engine, **settings,
    )  # fmt: skip
    torch.testing.assert_close(last.ys[-1], tensor(here), rtol=1e-13, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_event_at_a_knot_happens_once(engine):
    """The slope is 1 until t = 1, where y reaches its level, and then 1/2: nothing but the slope changes there."""
    slope = lde.Input(tensor(0.0, 1.0), tensor(1.0, 0.5), "previous")
    for level in (1.0, 1.0 - 1e-16, 1.0 + 1e-15):
        event = lde.Event(lambda t, y, u, level=level: y[0] - level, max_events=3)
        settings = {"events": event, "engine": engine, "rtol": 1e-4}
        solution = lde.odesolve(lambda t, y, u: u(t) + 0 * y, tensor(0.0), tensor(0.0, 3.0), slope, **settings)
        assert int(solution.events.count) == 1, level
        torch.testing.assert_close(solution.events.times[0], tensor(1.0)[0], rtol=1e-14, atol=0)
        torch.testing.assert_close(solution.ys[-1], tensor(2.0), rtol=1e-13, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_condition_that_jumps_at_a_knot_is_watched_from_behind_it(engine):
    """The level falls from 3 to 1 while y = t is 2, and rises to 3 again: only at t = 3 they meet."""
    level = lde.Input(tensor(0.0, 2.0, 2.5), tensor(3.0, 1.0, 3.0), "previous")
    event = lde.Event(lambda t, y, u: y[0] - u(t))
    solution = lde.odesolve(
        lambda t, y, u: torch.ones_like(y), tensor(0.0), tensor(0.0, 4.0), level, events=event, engine=engine
    )
    assert int(solution.events.count) == 1
    torch.testing.assert_close(solution.events.times[0], tensor(3.0)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_terminal_event_between_doses(engine):
    """What would be given later has no say."""
    x = BOLUS.clone().requires_grad_()
    stop = lde.Event(LOW.condition, direction=-1, terminal=True)
    solution, (moments, _) = bolus(x, engine, events=stop), bolus_law(x)
    torch.testing.assert_close(solution.events.times, moments[:1], rtol=1e-9, atol=0)
    torch.testing.assert_close(solution.ys[2:], torch.ones(4, 1, dtype=DOUBLE), rtol=1e-12, atol=0)
    compare_gradients(solution.events.times, moments[:1], x)
    (held,) = torch.autograd.grad(solution.ys[2:].sum(), x)
    torch.testing.assert_close(held, tensor(0.0, 4.0, 0.0, 0.0, 0.0, 0.0), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("engine", ENGINES)
def test_decreasing_times(engine):
    """Backwards from t = 3: dy/dt = 1 before the jump at t = 2 and 2 after it; y is set to 4 where it is 1.5."""
    event = lde.Event(lambda t, y: y[0] - 1.5, lambda t, y: 0 * y + 4.0, direction=-1)
    solution = lde.odesolve(
        lambda t, y: torch.where(t > 2, 2.0, 1.0) + 0 * y, tensor(4.0), tensor(3.0, 0.0), jumps=[2.0], events=event,
        engine=engine,
    )  # fmt: skip
    torch.testing.assert_close(solution.events.times[:1], tensor(1.5), rtol=1e-13, atol=0)
    torch.testing.assert_close(solution.ys[-1], tensor(2.5), rtol=1e-13, atol=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_transforms(engine):
    """vmap, forward mode and second derivatives of the time of the second event against the closed form."""

    def last(x):
        return bolus(x, engine, tensor(0.0, 7.0), rtol=1e-6).events.times[1]

    def right(x):
        return bolus_law(x)[0][1]

    rows, move = torch.stack([BOLUS, BOLUS * 1.05]), tensor(0.3, -0.2, 0.5, 0.1, 0.2, -0.4)
    torch.testing.assert_close(vmap(last)(rows), vmap(right)(rows), rtol=1e-6, atol=0)
    torch.testing.assert_close(vmap(grad(last))(rows), vmap(grad(right))(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(jvp(last, (BOLUS,), (move,)), jvp(right, (BOLUS,), (move,)), rtol=1e-6, atol=0)
    torch.testing.assert_close(jacfwd(grad(last))(BOLUS), jacfwd(grad(right))(BOLUS), rtol=1e-4, atol=1e-4)


def test_in_a_pyro_model():
    """Both arguments of ``lde.ode``, in a plate; the times of the events are a site and have gradients."""

    def model():
        k = pyro.sample("k", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
        with pyro.plate("people", 2):
            low = pyro.sample("low", dist.LogNormal(torch.zeros((), dtype=DOUBLE), 1.0))
            doses = lde.Dose(tensor([0.25, 2.5], [0.25, 2.5]), tensor(4.0, 3.0), "blood")
            zero, params = torch.zeros(2, 1, dtype=DOUBLE), {"k": k, "low": low}
            settings = {"t0": 0.0, "states": ["blood"], "rtol": 1e-10, "atol": 1e-12}
            _, found = lde.ode("z", washout, zero, TIMES, params, doses=doses, events=LOW, **settings)
            pyro.sample("seen", dist.Normal(found.times[:, 1], 0.1), obs=tensor(4.0, 4.1))

    x = tensor(0.9, 1.0, 0.7, requires_grad=True)
    values = {"k": x[0], "low": x[1:]}
    nodes = pyro.poutine.trace(pyro.poutine.condition(model, values)).get_trace().nodes
    expected = torch.stack([bolus_law(torch.cat([x[:1], low[None], BOLUS[2:]]))[0] for low in x[1:]])
    torch.testing.assert_close(nodes["z.events"]["value"][:, :2], expected, rtol=1e-9, atol=0)
    seen = nodes["seen"]["fn"].log_prob(nodes["seen"]["value"]).sum()
    right = dist.Normal(expected[:, 1], 0.1).log_prob(tensor(4.0, 4.1)).sum()
    compare_gradients([seen], [right], x, close=1e-6)


def test_what_is_refused():
    with pytest.raises(SolveError, match="replay= expects .* with events"):
        bolus(BOLUS, "fused", replay=bolus(BOLUS, "fused", events=None))
    with pytest.raises(SolveError, match="memory_budget"):
        bolus(BOLUS, "torch", memory_budget="1 MB")


def test_steps_that_do_not_fit_are_told():
    """The steps of solves with events are kept as a whole, or not at all."""
    x = BOLUS.repeat(20, 1).requires_grad_()
    with pytest.raises(SolveError, match="20 rows with events needs.*limit is 1.0 KB.*no_grad"):
        bolus(x, "fused", memory_budget="1 KB")
    with torch.no_grad():
        assert bolus(x, "fused", memory_budget="1 KB").ok.all()
    (whole,) = torch.autograd.grad(bolus(x, "fused", memory_budget="10 MB").events.times[:, 1].sum(), x)
    (plain,) = torch.autograd.grad(bolus(x, "fused").events.times[:, 1].sum(), x)
    assert torch.equal(whole, plain)


def decay_in_two(x, engine, times=TIMES, **settings):
    """Two states that decay; where the first falls to ``low`` it is doubled, and the second is halved."""
    a, b, low = x.unbind(-1)
    event = lde.Event(
        lambda t, y, p: y[0] - p["low"], lambda t, y, p: torch.stack([2 * y[0], 0.5 * y[1]]), direction=-1,
        max_events=8,
    )  # fmt: skip
    settings = {"events": event, "positive": [0], **TIGHT, **settings}
    params = {"a": a, "b": b, "low": low}
    return lde.odesolve(
        lambda t, y, p: torch.stack([-p["a"] * y[0], -p["b"] * y[1]]), tensor(2.0, 1.0), times, params, engine=engine,
        **settings,
    )  # fmt: skip


DECAY = tensor(0.7, 0.3, 1.2)


@pytest.mark.parametrize(("engine", "positive"), [("torch", [0]), ("fused", [0]), ("fused", True)])
def test_positive_states_are_seen_and_given_back_in_the_users_units(engine, positive):
    x = DECAY.clone().requires_grad_()
    solution = decay_in_two(x, engine, positive=positive)
    first = torch.log(2.0 / x[2]) / x[0]
    moments = first + torch.log(tensor(2.0)[0]) / x[0] * torch.arange(7, dtype=DOUBLE)
    count = int((moments < 7).sum())
    assert count == int(solution.events.count) == 7
    torch.testing.assert_close(solution.events.times[:count], moments, rtol=1e-9, atol=0)
    before = x[2].expand(count), torch.exp(-x[1] * moments) * 0.5 ** torch.arange(7, dtype=DOUBLE)
    torch.testing.assert_close(solution.events.states[:count], torch.stack(before, 1), rtol=1e-8, atol=0)
    since = [int((moments < float(t)).sum()) for t in TIMES]
    exact = torch.stack([2.0 ** (n + 1) * torch.exp(-x[0] * t) for n, t in zip(since, TIMES, strict=True)])
    torch.testing.assert_close(solution.ys[:, 0], exact, rtol=1e-8, atol=0)
    mine = solution.events.times[3], solution.events.states[:count, 1].sum(), (solution.ys[:, 0] ** 2).sum()
    compare_gradients(mine, (moments[3], before[1].sum(), (exact**2).sum()), x, close=1e-6)


def test_a_reset_to_what_is_not_positive_fails_its_row():
    event = lde.Event(lambda t, y: y[0] - 0.5, lambda t, y: y - 1.0, direction=-1)
    solution = lde.odesolve(
        lambda t, y: -y, tensor([1.0], [0.4]), tensor(0.0, 2.0), events=event, positive=True, on_failure="nan"
    )
    assert solution.status.tolist() == [lde.Status.NON_FINITE, lde.Status.OK]

# SPDX-License-Identifier: Apache-2.0
"""Variational fits: exact answers, skipped updates, parameters that belong to one fit."""

import math
import os
import signal
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

import pyro_latentde as lde
from pyro_latentde.errors import InitError, LatentDEError
from pyro_latentde.infer import fit_svi
from pyro_latentde.infer.svi_steps import Clip, make_optimizer

generator = torch.Generator().manual_seed(0)
X = torch.randn(30, 2, generator=generator, dtype=torch.float64)
X[:, 1] += X[:, 0]  # correlated
Y = X @ torch.tensor([1.0, -2.0], dtype=torch.float64) + 0.3 * torch.randn(30, generator=generator).double()
NOISE, PRIOR = 0.3, 2.0


def regression(x, y):
    b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((x * b).sum(-1), NOISE), obs=y)


def exact():
    """Mean, covariance and log-evidence of the regression."""
    precision = X.T @ X / NOISE**2 + torch.eye(2).double() / PRIOR**2
    covariance = torch.linalg.inv(precision)
    marginal = NOISE**2 * torch.eye(30).double() + PRIOR**2 * X @ X.T
    evidence = torch.distributions.MultivariateNormal(torch.zeros(30).double(), marginal).log_prob(Y)
    return covariance @ (X.T @ Y) / NOISE**2, covariance, float(evidence)


def test_full_rank_guide_finds_the_exact_posterior_and_evidence():
    mean, covariance, evidence = exact()
    fit = fit_svi(regression, AutoMultivariateNormal, X, Y, num_particles=8, vectorize_particles=True, progress=False)
    draws, sd = fit.posterior(4000)["b"][0], covariance.diag().sqrt()
    # errors of the fit stay below a tenth of a posterior sd; sampling adds 1/sqrt(4000)
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.15
    assert (draws.std(0) / sd - 1).abs().max() < 0.1
    correlation = covariance[0, 1] / sd.prod()
    assert abs(torch.corrcoef(draws.T)[0, 1] - correlation) < 0.05
    assert fit.elbo(500) == pytest.approx(evidence, abs=0.05)
    assert fit.losses.shape == (2000,) and fit.n_skipped == 0 and fit.elapsed > 0


def test_mean_field_guide_has_the_law_that_theory_gives_it():
    """The best factorised normal has the exact mean and the precision's inverse diagonal (Bishop 10.1.2)."""
    mean, covariance, _ = exact()
    fit = fit_svi(regression, AutoNormal, X, Y, num_particles=8, vectorize_particles=True, progress=False)
    draws, sd = fit.posterior(4000)["b"][0], torch.linalg.inv(covariance).diag() ** -0.5
    assert ((draws.mean(0) - mean) / sd).abs().max() < 0.2
    assert (draws.std(0) / sd - 1).abs().max() < 0.1


def guide_function(x, y):
    loc = pyro.param("loc", lambda: torch.zeros(2).double())
    scale = pyro.param("scale", lambda: torch.ones(2).double(), constraint=constraints.positive)
    pyro.sample("b", dist.Normal(loc, scale).to_event(1))


class GuideModule(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2).double())
        self.scale = PyroParam(torch.ones(2).double(), constraint=constraints.positive)

    def forward(self, x, y):
        pyro.sample("b", dist.Normal(self.loc, self.scale).to_event(1))


@pytest.mark.parametrize("local", [False, True], ids=["param store", "module local"])
@pytest.mark.parametrize("make", [lambda: guide_function, GuideModule, lambda: AutoNormal(regression)])
def test_every_kind_of_guide_with_both_kinds_of_parameters(make, local):
    mean, covariance, _ = exact()
    with pyro.settings.context(module_local_params=local):
        fit = fit_svi(regression, make(), X, Y, num_steps=1000, learning_rate=0.05, progress=False)
        draws = fit.posterior(1000)["b"][0]
    assert (draws.mean(0) - mean).abs().max() < 0.15
    assert not list(pyro.get_param_store()), "a fit leaves the global store alone"


def test_fits_do_not_share_parameters():
    short = fit_svi(regression, guide_function, X, Y, num_steps=5, progress=False)
    before = short.posterior(10)["b"]
    pyro.param("loc", torch.full((2,), 77.0).double())
    long = fit_svi(regression, guide_function, X, Y, num_steps=500, progress=False)
    pyro.clear_param_store()
    assert torch.equal(short.posterior(10)["b"], before)
    assert not torch.equal(long.posterior(10)["b"], before)
    again = fit_svi(regression, guide_function, X, Y, num_steps=5, progress=False)
    assert torch.equal(again.losses, short.losses) and torch.equal(again.posterior(10)["b"], before)


def test_parameters_of_the_model_go_with_the_posterior():
    def empirical_bayes(x, y):
        noise = pyro.param("noise", lambda: torch.tensor(2.0).double(), constraint=constraints.positive)
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((x * b).sum(-1), noise), obs=y)

    fit = fit_svi(empirical_bayes, AutoNormal, X, Y, num_steps=1500, progress=False)
    p = fit.posterior(500)
    spread = (p.predict().observations["y"] - (p["b"][..., None, :] * X).sum(-1)).std().item()
    assert spread == pytest.approx(fit.params["params"]["noise"].exp().item(), rel=0.05)
    assert 0.2 < spread < 0.45


@pytest.mark.parametrize("choice", ["sgd", torch.optim.RMSprop, pyro.optim.Adam({"lr": 0.05}), "closure"])
def test_optimizers(choice):
    if choice == "closure":
        choice = lambda params: torch.optim.Adam(params, lr=0.05, betas=(0.8, 0.9))  # noqa: E731
    rate = 1e-4 if choice == "sgd" else 0.03
    fit = fit_svi(regression, AutoDelta, X, Y, num_steps=400, optimizer=choice, learning_rate=rate, progress=False)
    assert (fit.posterior(2)["b"][0, 0] - exact()[0]).abs().max() < 0.1


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "adagrad"])
def test_optimizers_move_as_torchs_plain_loops_do(name):
    start, scales = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([1e-3, 1.0, 1e3])
    mine, plain = ([start[:2].clone().requires_grad_(), start[2:].clone().requires_grad_()] for _ in range(2))
    classes = {cls.__name__.lower(): cls for cls in vars(torch.optim).values() if isinstance(cls, type)}
    steps = make_optimizer(name, 0.01)(mine), classes[name](plain, lr=0.01, foreach=False)
    for _ in range(20):
        for params, optimizer in zip((mine, plain), steps, strict=True):
            for param in params:
                param.grad = (param.detach() * scales).cos()
            optimizer.step()
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert (mine[0] - start[:2]).abs().max() > 0.05


def test_parameters_without_a_fused_kernel_are_optimised_too():
    on_no_device = torch.zeros(3, device="meta", requires_grad=True)
    assert not make_optimizer("adam", 0.1)([on_no_device]).param_groups[0]["fused"]


def test_bad_options():
    with pytest.raises(ValueError, match="adamm"):
        make_optimizer("adamm", 0.1)
    for bad in (0, -1.0, "some"):
        with pytest.raises(ValueError, match="clip"):
            Clip(bad)


def test_clip():
    assert Clip(None).factor(1e9) == 1.0
    assert Clip(2.0).factor(8.0) == 0.25 and Clip(2.0).factor(1.0) == 1.0
    auto = Clip("auto")
    assert [auto.factor(1.0) for _ in range(9)] == [1.0] * 9 and auto.factor(100.0) == pytest.approx(0.1)


def poisoned(when, what):
    """The regression, made non-finite at some calls: in its density, or in the gradient only."""
    calls = []

    class Poison(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * math.nan

    def model(x, y):
        if torch.is_grad_enabled():
            calls.append(1)
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
        if torch.is_grad_enabled() and when(len(calls)):
            b = b * math.nan if what == "loss" else Poison.apply(b)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((x * b).sum(-1), NOISE), obs=y)

    return model


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_non_finite_steps_are_skipped_and_counted(what):
    model = poisoned(lambda n: n % 5 == 0, what)
    fit = fit_svi(model, guide_function, X, Y, num_steps=1000, learning_rate=0.05, start_at=None, progress=False)
    assert fit.n_skipped == 200 and fit.losses.isnan().sum() == 200
    assert (fit.posterior(1000)["b"][0].mean(0) - exact()[0]).abs().max() < 0.15


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("loss", r"step 54: log-density of site 'y' of the model is nan. Skipped \(5 of last 50\). "
         r"Stopping: 5 skips in a row; restored step 49"),
        ("gradient", r"step 54: non-finite gradient for 'loc' \(loss finite\)"),
    ],
)  # fmt: skip
def test_repeated_failures_restore_and_stop_with_the_name(what, message):
    model = poisoned(lambda n: n > 50, what)
    with pytest.raises(LatentDEError, match=message) as caught:
        fit_svi(model, guide_function, X, Y, num_steps=200, max_skips=5, start_at=None, progress=False)
    fit = caught.value.fit
    assert len(fit.losses) == 55 and fit.n_skipped == 5
    reference = fit_svi(regression, guide_function, X, Y, num_steps=200, start_at=None, progress=False)
    assert torch.equal(fit.losses[:50], reference.losses[:50])
    assert fit.params["params"]["loc"].isfinite().all()


def test_a_model_that_raises_again_and_again_keeps_the_fit():
    """The search for the culprit meets the same error: its text is the cause, and the parameters are put back."""
    calls = []

    def model(x, y):
        calls.extend([1] * torch.is_grad_enabled())
        if len(calls) > 50:
            torch.linalg.cholesky(-torch.eye(2))
        regression(x, y)

    message = r"step 54: _?LinAlgError: .*cholesky.*restored step 49"
    with pytest.raises(LatentDEError, match=f"(?s){message}") as caught:
        fit_svi(model, guide_function, X, Y, num_steps=200, max_skips=5, start_at=None, progress=False)
    reference = fit_svi(regression, guide_function, X, Y, num_steps=200, start_at=None, progress=False)
    assert len(caught.value.fit.losses) == 55
    assert torch.equal(caught.value.fit.losses[:50], reference.losses[:50])


def test_no_finite_step_at_all_is_an_init_error():
    with pytest.raises(InitError, match="none of the first 4 steps.*init_loc_fn"):
        fit_svi(poisoned(lambda n: True, "loss"), guide_function, X, Y, max_skips=4, start_at=None, progress=False)


def explosive(y):
    k = pyro.sample("k", dist.Normal(torch.zeros(()).double(), 1.0))
    z = lde.ode("z", lambda t, y, k: k * y * y, torch.ones(1).double(), torch.linspace(0, 1, 3).double(), k)
    pyro.sample("obs", dist.Normal(z, 0.1).to_event(2), obs=y)


def test_failed_solves_are_skipped_and_the_fit_goes_on():
    """y' = k y^2 has no solution at t = 1 for k >= 1; a wide guide meets that again and again."""
    data = (1 / (1 - 0.5 * torch.linspace(0, 1, 3).double()))[:, None]
    start = init_to_value(values={"k": torch.tensor(0.5).double()})
    guide = AutoNormal(explosive, init_loc_fn=start, init_scale=2.0)
    fit = fit_svi(explosive, guide, data, num_steps=2000, progress=False)
    assert fit.n_skipped > 0
    assert fit.posterior(500)["k"].mean() == pytest.approx(0.5, abs=0.05)


def test_a_missing_datum_without_mask_names_the_site():
    bad = Y.clone()
    bad[3] = math.nan
    with pytest.raises(LatentDEError, match="site 'y'"):
        fit_svi(regression, guide_function, X, bad, start_at=None, progress=False)


def test_site_of_the_guide_that_the_model_lacks():
    def wrong(x, y):
        pyro.sample("bb", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))

    with pytest.raises(LatentDEError, match="(?s)do not match.*bb"):
        fit_svi(regression, wrong, X, Y, progress=False)


def test_a_model_that_cannot_take_particles_is_told():
    """With particles b is (8, 1, 2); the extra dimension below would silently count the data eight times."""

    def wrong(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((x * b.unsqueeze(-2)).sum(-1), NOISE), obs=y)

    with pytest.raises(ValueError, match='at site "y"'):
        fit_svi(wrong, AutoNormal, X, Y, num_particles=8, vectorize_particles=True, progress=False)


def test_seed_decides_everything():
    a, b, c = (fit_svi(regression, AutoNormal, X, Y, num_steps=20, seed=s, progress=False).losses for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_start_of_an_autoguide_is_searched_only_where_none_was_given():
    def far_out(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(()).double(), 3.0))
        pyro.sample("y", dist.Normal(x - 4, 0.2), obs=y)

    zero = torch.tensor(0.0).double()
    near = fit_svi(far_out, AutoDelta(far_out), zero, num_steps=2, progress=False)
    assert abs(near.posterior(1)["x"].item() - 4) < 0.5
    own = AutoDelta(far_out, init_loc_fn=init_to_value(values={"x": torch.tensor(-3.0).double()}))
    assert abs(fit_svi(far_out, own, zero, num_steps=2, progress=False).posterior(1)["x"].item() + 3) < 0.2
    given = fit_svi(far_out, AutoDelta, zero, num_steps=2, start_at={"x": torch.tensor(1.0).double()}, progress=False)
    assert abs(given.posterior(1)["x"].item() - 1) < 0.2


def test_minibatches_through_a_plate():
    def minibatch(x, y):
        b = pyro.sample("b", dist.Normal(torch.zeros(2).double(), PRIOR).to_event(1))
        with pyro.plate("data", len(y), subsample_size=10) as i:
            pyro.sample("y", dist.Normal(x[i] @ b, NOISE), obs=y[i])

    fit = fit_svi(minibatch, AutoNormal, X, Y, num_steps=1500, progress=False)
    assert (fit.posterior(1000)["b"][0].mean(0) - exact()[0]).abs().max() < 0.1


def test_own_elbo_and_sample_start():
    fit = fit_svi(regression, AutoNormal, X, Y, num_steps=600, elbo=Trace_ELBO(num_particles=2), progress=False)
    starts = fit.sample_start(3, seed=1)
    assert starts["b"].shape == (3, 2) and len(starts["b"].unique(dim=0)) == 3
    assert (starts["b"] - exact()[0]).abs().max() < 1.0


def test_interrupt_returns_the_fit_so_far():
    assert threading.current_thread() is threading.main_thread()
    calls = []

    def model(x, y):
        calls.append(1)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGINT)
        return regression(x, y)

    fit = fit_svi(model, guide_function, X, Y, num_steps=100_000, start_at=None, progress=False)
    assert 0 < len(fit.losses) < 45 and fit.attrs["interrupted"] == len(fit.losses)
    assert fit.posterior(3)["b"].shape == (1, 3, 2)

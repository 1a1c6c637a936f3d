# SPDX-License-Identifier: Apache-2.0
"""Refinement of an amortized guide for the series at hand, against exact posteriors of a linear Gaussian model."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from linear_ode import PRIOR_MEAN, PRIOR_SD, exact, linear_model, linear_series
from pyro.nn import PyroModule

import pyro_latentde as lde
from pyro_latentde.errors import LatentDEError
from pyro_latentde.guides.series_guide import SeriesGuide
from pyro_latentde.infer import fit_svi, refine
from pyro_latentde.infer.schedules import cosine
from pyro_latentde.models import GOKU
from pyro_latentde.nn import LeastSquares, RecurrentEncoder

PRIORS = {"z0": dist.Normal(PRIOR_MEAN, PRIOR_SD).to_event(1)}


class Linear(PyroModule):
    def forward(self, series: lde.Series, times: None = None) -> None:
        linear_model(series)


def test_the_gap_to_the_exact_evidence_closes() -> None:
    torch.manual_seed(0)
    guide = SeriesGuide(PRIORS, RecurrentEncoder(3, 16).double()).double()
    fit = fit_svi(Linear(), guide, linear_series(20), num_steps=150, learning_rate=0.01, progress=False)
    new = linear_series(5, seed=9)
    before, weights = fit.inference_gap(new, 2000), copy.deepcopy(guide.state_dict())
    refined = refine(fit, new, num_steps=600, learning_rate=cosine(0.01, 1e-4, 600), num_particles=4, progress=False)
    after = refined.inference_gap(new, 2000)
    # 2000 weights of a normal guide near a normal posterior: the estimate of the gap moves by less than .02
    assert (before > 0.3).all() and (after < 0.1).all(), (before, after)
    _, mean, _ = exact(new)
    error = {name: (f.encode(new, 2000)["z0"].mean(0) - mean).norm() for name, f in (("old", fit), ("new", refined))}
    assert error["new"] < 0.2 * error["old"]
    assert refined.attrs["refined"] == len(refined.losses) == 600
    assert all(torch.equal(value, weights[name]) for name, value in fit.guide.state_dict().items())
    assert torch.equal(fit.inference_gap(new, 2000), before)


def _pendulum(t, z, p):
    return torch.stack([z[1], -p["stiffness"] * z[0].sin()])


def _goku(**options) -> GOKU:
    torch.manual_seed(1)
    start = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return GOKU(_pendulum, start, {"stiffness": dist.Uniform(0.5, 2.0)}, values=3, **options)


def _videos(n: int, seed: int = 0) -> lde.Series:
    return lde.Series.from_tensors(torch.linspace(0, 2, 6), torch.rand(n, 6, 3, generator=torch.manual_seed(seed)))


def test_only_what_belongs_to_single_series_learns() -> None:
    """The model, and the posterior of what all series share, stay as they were trained."""
    pair = _goku(unknown=torch.nn.Linear(2, 1), into=[1], shared={"drag": dist.LogNormal(0.0, 1.0)})
    fit = fit_svi(pair.model, pair.guide, _videos(6), num_steps=3, learning_rate=0.01, progress=False)
    refined = refine(fit, _videos(3, 1), num_steps=3, progress=False)
    for name, value in pair.model.state_dict().items():
        assert torch.equal(refined.model.state_dict()[name], value), name
    moved = {n for n, value in pair.guide.state_dict().items() if not torch.equal(refined.guide.state_dict()[n], value)}
    assert any(n.startswith("heads") for n in moved) and not any(n.startswith("shared") for n in moved)
    assert all(param.requires_grad for param in (*pair.model.parameters(), *pair.guide.parameters()))
    pyro.clear_param_store()
    assert refined.forecast(_videos(3, 1), horizon=2).means.isfinite().all()


def test_a_guide_that_reads_a_decoder_reads_the_copy() -> None:
    decoder = torch.nn.Linear(2, 3)
    pair = _goku(decoder=decoder, guide={"frames": LeastSquares(decoder)})
    fit = fit_svi(pair.model, pair.guide, _videos(6), num_steps=2, progress=False)
    refined = refine(fit, _videos(3, 1), num_steps=2, progress=False)
    (read,) = refined.guide.frames._decoder
    assert read is refined.model.decoder and read is not decoder


def test_a_refined_fit_is_saved_and_loaded(tmp_path) -> None:
    pair, new = _goku(), _videos(3, 1)
    fit = fit_svi(pair.model, pair.guide, _videos(6), num_steps=2, progress=False)
    refined = refine(fit, new, num_steps=4, seed=3, progress=False)
    again = refine(fit, new, num_steps=4, seed=3, progress=False)
    other = _goku()
    loaded = lde.infer.Fit.load(refined.save(tmp_path / "weights.pt"), other.model, other.guide)
    for one in (again, loaded):
        assert torch.equal(one.encode(new, 5)["z0"], refined.encode(new, 5)["z0"])


def test_functions_cannot_be_copied() -> None:
    fit = fit_svi(linear_model, SeriesGuide(PRIORS, RecurrentEncoder(3, 4).double()).double(), linear_series(4),
                  num_steps=1, progress=False)  # fmt: skip
    with pytest.raises(LatentDEError, match="the model is function, expected a module"):
        refine(fit, linear_series(2))

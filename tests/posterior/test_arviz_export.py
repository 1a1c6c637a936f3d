# SPDX-License-Identifier: Apache-2.0
"""Export to both generations of ArviZ: groups, dimensions, coordinates, values."""

import importlib
import subprocess
import sys

import arviz
import conjugate_model as conjugate
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray

import pyro_latentde as lde
from pyro_latentde import Posterior, Series
from pyro_latentde.analysis.scalars import scalar_draws
from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer import prior
from pyro_latentde.posterior import inspect_model
from pyro_latentde.posterior.arviz_export import build_datatree, build_inference_data, make_groups

TIMES = torch.tensor([1900.0, 1901.0, 1903.5], dtype=torch.float64)


def model(series):
    """A global vector beside a plate of size one and a plate of three: what other converters stumble over."""
    k = pyro.sample("k", dist.LogNormal(torch.zeros(2).double(), 0.1).to_event(1))
    z0 = pyro.sample("z0", dist.LogNormal(torch.zeros(2).double(), 0.1).to_event(1))
    with pyro.plate("batch", 1, dim=-2), pyro.plate("unit", 3, dim=-1):
        pyro.sample("x", dist.Normal(torch.zeros(()).double(), 1.0))
    with pyro.plate("outer", 3, dim=-2):
        pyro.sample("w", dist.Normal(torch.zeros(()).double(), 1.0))
    z = lde.ode(
        "z",
        lambda t, y, p: -p["k"] * y,
        z0,
        series.times[0],
        {"k": k},
        states=("hare", "lynx"),
        event_dims={"k": 1},
    )
    lde.observe("obs", lambda z: dist.Normal(z, 0.1), series, z)


@pytest.fixture(scope="module")
def series():
    values = torch.tensor([[1.0, 2.0], [float("nan"), 1.0], [0.5, 0.2]], dtype=torch.float64)
    return Series.from_tensors(TIMES, values, names=("hare", "lynx"))


@pytest.fixture(scope="module")
def posterior(series):
    draws = prior(model, series, num_samples=20)
    samples = {name: value.reshape(2, 10, *value.shape[2:]) for name, value in draws.samples.items()}
    stats = {"lp": torch.arange(20.0).reshape(2, 10), "diverging": torch.zeros(2, 10, dtype=torch.bool)}
    return Posterior(
        samples=samples,
        stats=stats,
        sites=draws.sites,
        model=model,
        args=(series,),
        attrs={"inference": "nuts"},
    )


@pytest.fixture(scope="session")
def arviz_base(tmp_path_factory):
    """arviz-base, on which ArviZ 1.x stands; ArviZ 1.x itself needs a newer Python than 3.11."""
    try:
        yield importlib.import_module("arviz_base")
    except ModuleNotFoundError:
        target = str(tmp_path_factory.mktemp("arviz_base"))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*command, "--target", target, "arviz-base==0.8.2"], check=True)
        sys.path.insert(0, target)
        importlib.invalidate_caches()
        yield importlib.import_module("arviz_base")
        sys.path.remove(target)


DIMS = {
    ("posterior", "k"): ("chain", "draw", "k_dim_0"),
    ("posterior", "z0"): ("chain", "draw", "z_state"),
    ("posterior", "x"): ("chain", "draw", "batch", "unit"),
    ("posterior", "w"): ("chain", "draw", "outer"),
    ("sample_stats", "lp"): ("chain", "draw"),
    ("log_likelihood", "obs"): ("chain", "draw", "z_time", "z_state"),
    ("posterior_predictive", "obs"): ("chain", "draw", "z_time", "z_state"),
    ("posterior_predictive", "z"): ("chain", "draw", "z_time", "z_state"),
    ("prior", "x"): ("chain", "draw", "batch", "unit"),
    ("prior_predictive", "obs"): ("chain", "draw", "z_time", "z_state"),
    ("observed_data", "obs"): ("z_time", "z_state"),
    ("constant_data", "z_times"): ("z_time",),
}


def check(data, posterior, series):
    """What must be true of either container."""
    for (group, name), dims in DIMS.items():
        assert data[group][name].dims == dims, (group, name)
    z = data["posterior_predictive"]["z"]
    assert z.coords["z_time"].values.tolist() == TIMES.tolist()
    assert z.coords["z_state"].values.tolist() == ["hare", "lynx"]
    assert (data["posterior"]["x"].values == posterior["x"].numpy()).all()
    assert (data["posterior"]["w"].values == posterior["w"][..., 0].numpy()).all()
    assert (data["sample_stats"]["lp"].values == posterior.stats["lp"].numpy()).all()
    exact = posterior["z0"][..., None, :] * torch.exp(-posterior["k"][..., None, :] * (TIMES - 1900)[:, None])
    assert np.allclose(z.values, exact.numpy(), rtol=1e-4)
    observed = data["observed_data"]["obs"]
    assert np.isnan(observed.sel(z_time=1901.0, z_state="hare"))
    assert np.isnan(observed.values).sum() == 1
    assert (data["log_likelihood"]["obs"].sel(z_time=1901.0, z_state="hare") == 0).all()
    assert data["prior"].sizes["draw"] == 30
    attrs = data["posterior"].attrs
    assert attrs["inference_library"] == "pyro_latentde" and attrs["inference"] == "nuts"


@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")  # prior draws
def test_inference_data_of_arviz_0(posterior, series, tmp_path):
    data = posterior.to_arviz(prior=prior(model, series, num_samples=30))
    assert isinstance(data, arviz.InferenceData)
    check(data, posterior, series)
    assert np.isfinite(float(arviz.loo(data, var_name="obs").elpd_loo))
    data.to_netcdf(str(tmp_path / "all.nc"))
    back = arviz.from_netcdf(str(tmp_path / "all.nc"))
    check(back, posterior, series)
    back.close()


def test_datatree_of_arviz_1(posterior, series, arviz_base, tmp_path):
    made = make_groups(posterior, prior=prior(model, series, num_samples=30))
    tree = build_datatree(made)
    assert isinstance(tree, xarray.DataTree)
    check(tree, posterior, series)
    tree.to_netcdf(tmp_path / "all.nc", engine="h5netcdf")
    with xarray.open_datatree(tmp_path / "all.nc", engine="h5netcdf") as back:
        check(back, posterior, series)


def test_the_installed_version_chooses_the_container(posterior, arviz_base, monkeypatch):
    assert isinstance(posterior.to_arviz(["posterior"]), arviz.InferenceData)
    monkeypatch.setattr(arviz, "__version__", "1.3.0")
    assert isinstance(posterior.to_arviz(["posterior"]), xarray.DataTree)


def test_summed_likelihood_beside_a_pointwise_variable():
    y = torch.zeros(3, 2)

    def joint(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("series", 3):
            pyro.sample("y", dist.Normal(mu, 1.0).expand([3, 2]).to_event(1), obs=y)

    p = Posterior(samples={"mu": torch.randn(2, 8)}, sites=inspect_model(joint, y), model=joint, args=(y,))
    for data in (p.to_arviz(), build_inference_data(make_groups(p))):
        assert data["log_likelihood"]["y"].dims == ("chain", "draw", "series")
        assert data["posterior_predictive"]["y"].dims == ("chain", "draw", "series", "y_dim_0")


def test_loo_of_the_conjugate_model():
    y = conjugate.data()
    result = arviz.loo(conjugate.posterior(y).to_arviz())
    exact = 0.0
    for i in range(len(y)):
        mean, sd = conjugate.exact(torch.cat([y[:i], y[i + 1 :]]))
        law = torch.distributions.Normal(mean, (sd**2 + conjugate.SD_NOISE**2) ** 0.5)
        exact += float(law.log_prob(y[i]))
    assert result.elpd_loo == pytest.approx(exact, abs=0.05)


def test_own_names_win(posterior):
    data = posterior.to_arviz(["posterior"], dims={"k": ["rate"]}, coords={"rate": ["up", "down"], "unit": [7, 8, 9]})
    assert data["posterior"]["k"].coords["rate"].values.tolist() == ["up", "down"]
    assert data["posterior"]["x"].coords["unit"].values.tolist() == [7, 8, 9]
    with pytest.raises(ValueError, match="dims of 'k'"):
        posterior.to_arviz(["posterior"], dims={"k": ["a", "b"]})


def test_a_plate_that_shares_its_name_with_a_site():
    def clash():
        with pyro.plate("x", 3):
            pyro.sample("x_", dist.Normal(0.0, 1.0))
        pyro.sample("x0", dist.Normal(0.0, 1.0))

    p = Posterior(samples={"x": torch.randn(1, 4, 3)}, sites=inspect_model(clash))
    assert p.to_arviz(["posterior"])["posterior"]["x"].dims == ("chain", "draw", "x_dim_0")


def test_arguments_and_series_times_go_to_constant_data():
    def with_inputs(times, dose, data):
        k = pyro.sample("k", dist.LogNormal(torch.zeros(()).double(), 0.1))
        with pyro.plate("series", 2):
            z = lde.ode("z", lambda t, y, k: -k * y, dose[:, None], times, k)
            pyro.sample("obs", dist.Normal(z, 1.0).to_event(2), obs=data)

    times = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 4.0]]).double()
    args = (times, torch.tensor([1.0, 2.0]).double(), torch.zeros(2, 3, 1).double())
    p = Posterior(
        samples={"k": torch.ones(1, 4).double()},
        sites=inspect_model(with_inputs, *args),
        model=with_inputs,
        args=args,
    )
    data = p.to_arviz()
    assert set(data["constant_data"].data_vars) == {"times", "dose", "z_times"}
    assert (data["constant_data"]["z_times"].values == times.numpy()).all()
    assert data["constant_data"]["z_times"].dims == ("series", "z_time")
    assert "z_time" not in data["posterior_predictive"].coords or data["posterior_predictive"].z_time.dtype == int
    assert data["posterior_predictive"]["z"].dims == ("chain", "draw", "series", "z_time", "z_state")


def people(series):
    """A plate "series" of two with a vector, and a plate of the series that the user named."""
    with lde.series_plate(series):
        pyro.sample("rates", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("patients", len(series)):
        level = pyro.sample("level", dist.Normal(torch.zeros(()).double(), 1.0))
        lde.observe("obs", lambda z: dist.Normal(z, 1.0), series, level[..., None, None].expand(*level.shape, 3, 1))


@pytest.mark.parametrize(
    ("ids", "labels"), [(["Ann", 7], ("Ann", "7")), (["Ann", "Ann"], ("0", "1")), (None, ("0", "1"))]
)
def test_rows_of_a_summary_are_named_by_the_ids_of_the_series(ids, labels):
    series = Series.from_tensors([0.0, 1.0, 2.0], torch.zeros(2, 3, 1), ids=ids)
    draws = prior(people, series, num_samples=8)
    first, second = labels
    expected = [f"rates[{row}, {i}]" for row in labels for i in (0, 1)] + [f"level[{first}]", f"level[{second}]"]
    table = draws.summary()
    assert table.index.tolist() == expected
    assert table.loc[f"rates[{second}, 0]", "mean"] == pytest.approx(float(draws["rates"][..., 1, 0].mean()))
    assert list(scalar_draws(draws, ["level"])) == expected[-2:]
    assert draws.to_arviz(["posterior"])["posterior"]["level"].coords["patients"].values.tolist() == [0, 1]


def test_wrong_groups_are_told(posterior):
    with pytest.raises(LatentDEError, match="unknown ArviZ groups"):
        posterior.to_arviz(["posteriors"])
    with pytest.raises(LatentDEError, match="needs prior="):
        posterior.to_arviz(["prior"])
    with pytest.raises(LatentDEError, match="needs the model"):
        Posterior(samples=posterior.samples, sites=posterior.sites).to_arviz(["log_likelihood"])

# SPDX-License-Identifier: Apache-2.0
"""Files: exact, readable by others, never unpickled, and malformed ones are told."""

import pickle

import arviz
import conjugate_model as conjugate
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_latentde import Posterior
from pyro_latentde.errors import CheckpointError, LatentDEError
from pyro_latentde.posterior import inspect_model


def rich(y):
    a = pyro.sample("a/b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("series", 1, dim=-2), pyro.plate("unit", 3, dim=-1):
        pyro.sample("x", dist.Normal(a.sum(), 1.0))
    pyro.sample("obs", dist.Normal(a.sum(), 1.0), obs=y)


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_round_trip_to_the_bit(tmp_path):
    awkward = torch.tensor([[float("nan"), -0.0, float("inf")], [5e-324, 0.1, -1e300]], dtype=torch.float64)
    p = Posterior(
        samples={"a/b": torch.randn(2, 3, 2), "x": torch.randn(2, 3, 1, 3).to(torch.bfloat16)},
        stats={"lp": awkward, "diverging": awkward > 0, "n_steps": torch.arange(6).reshape(2, 3)},
        sites=inspect_model(rich, torch.tensor(0.1)),
        attrs={"inference": "nuts", "seed": 3, "step": [0.1, 0.2], "note": None},
    )
    q = Posterior.load(p.save(tmp_path / "p.nc"))
    for mine, theirs in ((p.samples, q.samples), (p.stats, q.stats)):
        assert list(mine) == list(theirs) and all(same(mine[name], theirs[name]) for name in mine)
    assert q.attrs == p.attrs
    assert list(q.sites) == list(p.sites)
    for name, site in p.sites.items():
        other = q.sites[name]
        assert (site.kind, site.shape, site.event_dim, site.plates) == (
            other.kind,
            other.shape,
            other.event_dim,
            other.plates,
        )
    assert q.sites["obs"].value == p.sites["obs"].value
    assert [path.name for path in tmp_path.iterdir()] == ["p.nc"], "the temporary file was left behind"


def test_arviz_opens_the_file(tmp_path):
    p = conjugate.posterior(conjugate.data(), draws=10)
    data = arviz.from_netcdf(p.save(tmp_path / "p.nc"))
    assert (data.posterior["mu"].values == p["mu"].numpy()).all()
    assert set(data.groups()) == {"posterior", "sample_stats", "observed_data"}
    data.close()


def test_a_model_given_to_load_makes_predictions_work_again(tmp_path):
    y = conjugate.data()
    path = conjugate.posterior(y, draws=10).save(tmp_path / "p.nc")
    with pytest.raises(LatentDEError, match="Posterior.load.*model="):
        Posterior.load(path).predict()
    again = Posterior.load(path, model=conjugate.model, args=(y,))
    assert again.predict().observations["y"].shape == (2, 10, 5)


def test_another_model_is_refused(tmp_path):
    path = conjugate.posterior(conjugate.data(), draws=10).save(tmp_path / "p.nc")

    def other(y):
        pyro.sample("nu", dist.Normal(0.0, 1.0))

    with pytest.raises(CheckpointError, match="'mu', which is not a latent site"):
        Posterior.load(path, model=other, args=(conjugate.data(),))


def test_malformed_files_are_told(tmp_path):
    good = conjugate.posterior(conjugate.data(), draws=500).save(tmp_path / "good.nc").read_bytes()
    ran = []

    class Evil:
        def __reduce__(self):
            return ran.append, (1,)

    foreign = tmp_path / "foreign.nc"
    arviz.from_dict(posterior={"x": torch.zeros(1, 3).numpy()}).to_netcdf(str(foreign))
    cases = {
        "text": b"not a file of numbers",
        "empty": b"",
        "cut": good[: len(good) // 2],
        "pickle": pickle.dumps(Evil()),
        "foreign": foreign.read_bytes(),
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a complete file"):
            Posterior.load(path)
    assert not ran
    with pytest.raises(CheckpointError, match="there is no file"):
        Posterior.load(tmp_path / "absent.nc")

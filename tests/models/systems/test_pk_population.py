# SPDX-License-Identifier: Apache-2.0
"""Population pharmacokinetics: equations against their closed form, data against their law."""

import pytest
import torch
from torch.func import jacfwd, vmap

from pyro_latentde.models.systems import pk_population as pk
from pyro_latentde.solve.integrate import odesolve


def test_closed_form_obeys_the_equations():
    _, _, truth = pk.simulate(num_series=3, seed=1)
    p = {name: truth[name][:1] for name in ("ka", "CL", "V")}
    one = {name: value[0] for name, value in p.items()}

    def state(t):
        return pk.exact_solution(t.reshape(1, 1), torch.tensor([80.0]).double(), p)[0, 0]

    times = torch.tensor([0.0, 0.3, 2.0, 20.0]).double()
    rates = vmap(jacfwd(state))(times)
    fields = torch.stack([pk.vector_field(t, state(t), one) for t in times])
    torch.testing.assert_close(rates, fields, atol=1e-10, rtol=1e-10)
    assert state(times[0]).tolist() == [80.0, 0.0]


def test_model_solves_to_the_stated_error():
    series, z, truth = pk.simulate(num_series=200, seed=2)
    model, dose = pk.population(), series.covariates[:, 0]
    start = torch.stack([dose, 0 * dose], dim=-1)
    p = {name: truth[name] for name in ("ka", "CL", "V")}
    options = {"t0": torch.zeros(200).double(), "event_dims": dict.fromkeys(p, 0), **model.settings}
    solved = odesolve(pk.vector_field, start, series.times, p, **options).ys
    assert (solved[..., 1] / z[..., 1]).log().abs().max() < 3e-4


def test_simulated_people_follow_the_population():
    series, z, truth = pk.simulate(num_series=3000, seed=3)
    for name in ("ka", "CL", "V", "sigma"):
        x = truth[name].log()
        # 5 standard errors: a false alarm in 200,000 for the eight of them
        assert abs(x.mean() - truth[f"{name}_typical"].log()) < 5 * truth[f"{name}_spread"] / 3000**0.5
        assert abs(x.std() / truth[f"{name}_spread"] - 1) < 5 / 6000**0.5
    residual = (series.values[..., 0] / (z[..., 1] / truth["V"][:, None])).log() / truth["sigma"][:, None]
    assert abs(residual.std() - 1) < 5 / (2 * 60_000) ** 0.5
    assert series.covariates[:4, 0].tolist() == [50.0, 100.0, 200.0, 50.0] and z[:, 0, 0].lt(200).all()


def test_simulation_is_reproducible():
    one, two, other = (pk.simulate(num_series=4, missing=0.3, seed=seed).series for seed in (4, 4, 5))
    assert torch.equal(one.values, two.values) and torch.equal(one.mask, two.mask)
    assert not torch.equal(one.values, other.values) and not one.complete and one.mask[:, 0].all()
    times = torch.tensor([[1.0, 3.0, 2.0]]).expand(4, -1)
    assert pk.simulate(times, num_series=4, parameters={"ka_typical": 2.0}).series.times[0].tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="has no .'speed'.; it has"):
        pk.simulate(parameters={"speed": 1.0})

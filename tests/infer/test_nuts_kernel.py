# SPDX-License-Identifier: Apache-2.0
"""The NUTS chain alone, on densities whose moments are known, and its adaptation."""

import arviz as az
import numpy as np
import pytest
from scipy import stats

from pyro_latentde.errors import LatentDEError, ShapeError
from pyro_latentde.infer.adaptation import DualAveraging, Metric, adaptation_windows
from pyro_latentde.infer.nuts_kernel import STAT_NAMES, ChainRecord, _Point, _transition, run_chain

# |z| of a mean that is right exceeds this with probability 7e-6; every test below looks at less than 40 of
# them, so a right sampler fails a test at another seed once in 3,000 times
Z_BOUND = 4.5


def sample(density, dim, seed, num_warmup=500, num_samples=2000, start=None, **settings):
    """Run one chain on ``density(q) -> (lp, grad)``; a third and fourth entry may tell of solves."""
    record = ChainRecord(num_warmup + num_samples, dim)
    rng = np.random.default_rng(seed)
    start = rng.uniform(-1, 1, dim) if start is None else np.asarray(start, float)
    chain = run_chain(start, record, rng, num_warmup=num_warmup, num_samples=num_samples, **settings)
    q, asked = next(chain), 1
    with np.errstate(all="ignore"):
        while True:
            answer = density(q)
            try:
                q = chain.send(answer if len(answer) == 4 else (*answer, False, 0))
            except StopIteration:
                break
            asked += 1
    record.asked = asked
    return record


def z_score(x, mean):
    """Deviation of the mean of chains ``(chain, draw)`` in Monte-Carlo standard errors."""
    return (x.mean() - mean) / (x.std() / np.sqrt(az.ess(x)))


def gaussian(covariance):
    precision = np.linalg.inv(covariance)

    def density(q):
        grad = -precision @ q
        return 0.5 * q @ grad, grad

    return density


def correlated(dim=5, rho=0.9):
    scale = np.geomspace(0.1, 10, dim)
    return (rho + (1 - rho) * np.eye(dim)) * np.outer(scale, scale)


@pytest.mark.parametrize("dense", [True, False])
def test_means_and_covariances_of_a_correlated_gaussian(dense):
    covariance = correlated()
    records = [sample(gaussian(covariance), 5, seed, dense_mass=dense) for seed in range(2)]
    draws = np.stack([record.positions[500:] for record in records])
    white = draws @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    for i in range(5):
        assert abs(z_score(white[..., i], 0.0)) < Z_BOUND
        for j in range(i + 1):
            assert abs(z_score(white[..., i] * white[..., j], float(i == j))) < Z_BOUND
    assert not any(record.stats["diverging"][500:].any() for record in records)


def test_a_dense_metric_needs_fewer_steps_on_a_correlated_gaussian():
    steps = [sample(gaussian(correlated()), 5, 0, dense_mass=d).stats["n_steps"][500:].mean() for d in (True, False)]
    assert steps[0] < 0.7 * steps[1]


def test_banana():
    # x ~ N(0, 1), y | x ~ N(x^2, .5^2): E y = 1, Var y = 2.25, E x y = 0, E x^2 y = 3
    def density(q):
        x, y = q
        r = (y - x * x) / 0.25
        return -0.5 * x * x - 0.5 * r * (y - x * x), np.array([-x + 2 * x * r, -r])

    draws = np.stack([sample(density, 2, seed, target_accept=0.95).positions[500:] for seed in range(3)])
    x, y = draws[..., 0], draws[..., 1]
    for values, mean in (
        (x, 0.0),
        (x**2, 1.0),
        (y, 1.0),
        ((y - 1) ** 2, 2.25),
        (x * y, 0.0),
        ((y - x**2) ** 2, 0.25),
    ):
        assert abs(z_score(values, mean)) < Z_BOUND


def test_funnel():
    # v ~ N(0, 1), x | v ~ N(0, exp(v)): mild enough for the neck to be visited
    def density(q):
        v, x = q
        w = x * x * np.exp(-v)
        return -0.5 * v * v - 0.5 * v - 0.5 * w, np.array([-v - 0.5 + 0.5 * w, -x * np.exp(-v)])

    draws = np.stack([sample(density, 2, seed, target_accept=0.95).positions[500:] for seed in range(3)])
    v, x = draws[..., 0], draws[..., 1]
    white = x * np.exp(-v / 2)
    for values, mean in ((v, 0.0), (v**2, 1.0), (white, 0.0), (white**2, 1.0), (v * white**2, 0.0)):
        assert abs(z_score(values, mean)) < Z_BOUND
    thinned = v[:, :: int(np.ceil(2 * v.size / az.ess(v)))].ravel()
    assert stats.kstest(thinned, "norm").pvalue > 1e-4  # false alarm: 1 in 10,000


def test_a_bimodal_density_in_one_dimension_has_the_right_weights():
    # .3 N(-2, 1) + .7 N(2, 1): multinomial weights and direction choices must be right to balance the modes
    def density(q):
        a, b = np.log(0.3) - 0.5 * (q[0] + 2) ** 2, np.log(0.7) - 0.5 * (q[0] - 2) ** 2
        lp = np.logaddexp(a, b)
        return lp, np.array([-(q[0] + 2) * np.exp(a - lp) - (q[0] - 2) * np.exp(b - lp)])

    x = np.stack([sample(density, 1, seed, num_samples=4000).positions[500:, 0] for seed in range(2)])
    assert abs(z_score((x > 0).astype(float), 0.3 * stats.norm.cdf(-2) + 0.7 * stats.norm.cdf(2))) < Z_BOUND
    assert abs(z_score(x, 0.8)) < Z_BOUND


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    a, b, c = (sample(gaussian(correlated()), 5, seed, 100, 100).positions for seed in (3, 3, 4))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("target", [0.6, 0.8, 0.95])
def test_dual_averaging_finds_the_step_of_a_known_response(target):
    # acceptance exp(-eps): the target is met at eps = -log(target); noise is part of the game
    rng, steps = np.random.default_rng(0), DualAveraging(1.0, target)
    for _ in range(2000):
        steps.update(float(np.clip(np.exp(-steps.current) + 0.05 * rng.standard_normal(), 0, 1)))
    assert np.exp(-steps.average) == pytest.approx(target, abs=0.02)


@pytest.mark.parametrize("target", [0.7, 0.9])
def test_warm_up_reaches_the_target_acceptance(target):
    records = [sample(gaussian(np.eye(20)), 20, seed, 800, 400, target_accept=target) for seed in range(3)]
    rates = np.stack([record.stats["acceptance_rate"] for record in records])
    assert rates[:, 400:800].mean() == pytest.approx(target, abs=0.03)
    # the step that is kept averages the logarithm of a noisy step: a little shorter, so more is accepted
    assert rates[:, 800:].mean() > target - 0.02


def test_windows_are_contiguous_double_and_end_before_the_last_phase():
    assert adaptation_windows(19) == []
    for n in (20, 37, 100, 150, 333, 1000, 5000):
        windows = adaptation_windows(n)
        assert all(a[1] == b[0] for a, b in zip(windows, windows[1:], strict=False))
        assert all(stop > start + 1 for start, stop in windows)
        assert windows[-1][1] == n - min(50, n // 10)
        sizes = [stop - start for start, stop in windows]
        assert all(b == 2 * a for a, b in zip(sizes[:-1], sizes[1:-1], strict=False))


def test_a_known_metric_is_kept_for_one_long_window():
    assert adaptation_windows(300, informed=True) == [(10, 270)]
    assert adaptation_windows(19, informed=True) == []


def test_a_metric_that_is_given():
    covariance = np.array([[4.0, 1.0], [1.0, 1.0]])
    assert np.array_equal(Metric.given(covariance, 2, dense=True).inverse, covariance)
    assert Metric.given(covariance, 2, dense=False).inverse.tolist() == [4.0, 1.0]
    assert Metric.given(np.array([4.0, 1.0]), 2, dense=True).inverse.tolist() == [[4.0, 0.0], [0.0, 1.0]]
    with pytest.raises(ShapeError, match=r"variances \(3,\) or a covariance \(3, 3\).*got shape \(2, 2\)"):
        Metric.given(covariance, 3, dense=True)
    for dense, wrong in ((True, np.ones((2, 2)) * 2), (False, np.array([1.0, 0.0])), (True, covariance * np.nan)):
        with pytest.raises(LatentDEError, match="metric: not"):
            Metric.given(wrong, 2, dense)


@pytest.mark.parametrize("dense", [True, False])
def test_momenta_have_the_metric_as_precision(dense):
    rng, covariance = np.random.default_rng(0), correlated(3)
    metric = Metric(covariance if dense else np.diag(covariance).copy())
    p = np.array([metric.momentum(rng) for _ in range(20_000)])
    kinetic = np.array([0.5 * row @ metric.velocity(row) for row in p])
    # 2 K is chi-square with 3 degrees of freedom
    assert abs(2 * kinetic.mean() - 3) / np.sqrt(6 / 20_000) < Z_BOUND
    expected = np.linalg.inv(metric.inverse if dense else np.diag(metric.inverse))
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert np.allclose(np.cov(p, rowvar=False) / scale, expected / scale, atol=0.05)


def test_the_metric_of_a_short_window_stays_diagonal():
    draws = np.random.default_rng(0).standard_normal((20, 30))
    assert Metric.estimate(draws, dense=True).inverse.ndim == 1
    assert Metric.estimate(draws[:, :4], dense=True).inverse.shape == (4, 4)


@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_failing_regions_are_divergences_and_the_chain_goes_on(bad):
    # N(0, 1) cut at 1, where "the solve fails": the sampler must give the truncated normal
    def density(q):
        failed = bool(q[0] > 1.0)
        return (bad, np.zeros(1), True, 5) if failed else (-0.5 * q[0] ** 2, -q, False, 5)

    records = [sample(density, 1, seed, start=[0.0]) for seed in range(3)]
    x = np.stack([record.positions[500:, 0] for record in records])
    stats_ = {name: np.stack([record.stats[name][500:] for record in records]) for name in STAT_NAMES}
    assert x.max() <= 1.0
    truncated = stats.truncnorm(-np.inf, 1.0)
    assert abs(z_score(x, truncated.mean())) < Z_BOUND
    assert abs(z_score(x**2, truncated.moment(2))) < Z_BOUND
    assert stats_["diverging"].sum() > 100
    assert np.array_equal(stats_["ode_failed"] > 0, stats_["diverging"])
    assert np.array_equal(stats_["ode_steps"], 5 * stats_["n_steps"])
    assert np.isfinite(stats_["lp"]).all() and np.isfinite(stats_["energy"]).all()


def test_a_trajectory_grows_on_both_sides_and_visits_no_point_twice():
    both_sides = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        start = _Point(np.zeros(2), np.ones(2), np.ones(2), 0.0, np.zeros(2))
        trajectory, asked = _transition(start, 0.05, Metric.identity(2, False), rng, 3), []
        q = next(trajectory)
        while True:
            asked.append(q)
            try:
                q = trajectory.send((-0.5 * q @ q, -q, False, 0))
            except StopIteration as end:
                chosen, tally, depth = end.value
                break
        # seven steps and the start, evenly spaced on the orbit q = sin t (1, 1)
        angles = np.sort(np.arcsin([0.0, *(q[0] for q in asked)]))
        assert (tally.leapfrogs, depth) == (7, 3)
        assert np.allclose(np.diff(angles), 0.05, atol=1e-4)
        assert any(np.array_equal(chosen.q, q) for q in [start.q, *asked])
        both_sides += angles[0] < 0 < angles[-1]
    assert both_sides > 20  # all three doublings agree in one case of four


def test_statistics_belong_together():
    record = sample(gaussian(np.eye(3)), 3, 0, 200, 300, max_tree_depth=2)
    s = record.stats
    assert record.count == 500
    assert s["n_steps"].sum() == record.num_gradients < record.asked
    assert (s["n_steps"] <= 3).all()
    assert np.array_equal(s["reached_max_tree_depth"], s["tree_depth"] == 2)
    assert np.allclose(s["lp"], -0.5 * (record.positions**2).sum(1))
    assert (s["energy"] >= -s["lp"]).all()
    assert ((s["acceptance_rate"] >= 0) & (s["acceptance_rate"] <= 1)).all()
    assert len(np.unique(s["step_size"][200:])) == 1


def test_a_flat_density_is_called_improper():
    with pytest.raises(LatentDEError, match="improper"):
        sample(lambda q: (0.0, np.zeros(2)), 2, 0, 10, 10)


def test_a_wrong_gradient_at_a_wall_is_told():
    with pytest.raises(LatentDEError, match="no step size"):
        sample(lambda q: (0.0 if abs(q[0]) < 1e-30 else -np.inf, np.ones(1)), 1, 0, 10, 10, start=[0.0])

# SPDX-License-Identifier: Apache-2.0
"""Stationary laws of the kernels on Gaussians, from their linear maps: no random numbers, so no false alarms."""

import numpy as np
import pytest
from scipy.linalg import solve_discrete_lyapunov

from pyro_latentde.errors import LatentDEError
from pyro_latentde.infer.sgmcmc_kernels import Hamiltonian, Langevin, PreconditionedLangevin

COVARIANCE = np.array([[1.0, 0.8], [0.8, 2.0]])
PRECISION = np.linalg.inv(COVARIANCE)
METRIC = np.array([0.5, 1.5])
KEPT = np.zeros(1, dtype=bool)


def moved(kernel, state, noise, gradient_noise, step_size):
    """State (positions, momenta) after one step on the Gaussian."""
    u, momentum = state[None, :2], state[None, 2:]
    if momentum.size:
        kernel.momentum = kernel.kicked = momentum
    u = kernel.move(u, -u @ PRECISION + gradient_noise, step_size, noise[None], KEPT)
    return np.concatenate([u[0], kernel.momentum[0]]) if momentum.size else u[0]


def stationary(kernel, step_size, gradient_variance=0.0):
    """Exact covariance of positions (and momenta): that of the linear recursion which the kernel is here."""
    dim = 4 if isinstance(kernel, Hamiltonian) else 2
    zero, two = np.zeros(dim), np.zeros(2)
    a = np.stack([moved(kernel, row, two, two, step_size) for row in np.eye(dim)], axis=1)
    own = np.stack([moved(kernel, zero, row, two, step_size) for row in np.eye(2)], axis=1)
    brought = np.stack([moved(kernel, zero, two, row, step_size) for row in np.eye(2)], axis=1)
    return solve_discrete_lyapunov(a, own @ own.T + gradient_variance * brought @ brought.T)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("metric", [np.ones(2), METRIC])
def test_langevin_has_its_known_covariance(temperature, metric):
    step_size = 0.3
    # with a = I - eps G P / 2: the solution of C = a C a' + eps T G is T (P - eps P G P / 4)^-1
    exact = temperature * np.linalg.inv(PRECISION - step_size / 4 * PRECISION @ np.diag(metric) @ PRECISION)
    got = stationary(Langevin(temperature, metric), step_size)
    assert np.allclose(got, exact, rtol=1e-12)
    assert np.allclose(stationary(Langevin(temperature, metric), 1e-6), temperature * COVARIANCE, rtol=1e-5)


@pytest.mark.parametrize("friction", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("step_size", [0.01, 0.5])
def test_hamiltonian_positions_and_momenta_are_exact_on_gaussians(friction, temperature, step_size):
    got = stationary(Hamiltonian(temperature, METRIC, friction), step_size)
    assert np.allclose(got[:2, :2], temperature * COVARIANCE, rtol=1e-9)
    assert np.allclose(got[2:, 2:], temperature * np.eye(2), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "kernel", [Langevin(2.0, METRIC), Hamiltonian(2.0, METRIC, 0.3), Hamiltonian(2.0, METRIC, 0.02)]
)
def test_heat_is_the_part_of_the_variance_that_minibatches_add(kernel):
    step_size, variance = 1e-3, 40.0
    added = np.diag(stationary(kernel, step_size, variance) - stationary(kernel, step_size))[:2]
    heat = kernel.heat(step_size, np.full(2, variance))
    # by coordinate only where coordinates are independent: metric and correlation mix them
    assert (
        heat.min() < (added / np.diag(2.0 * COVARIANCE)).min()
        and (added / np.diag(2.0 * COVARIANCE)).max() < heat.max()
    )


@pytest.mark.parametrize("friction", [0.02, 0.3, 1.0])
def test_heat_of_one_metric_for_all(friction):
    step_size, variance = 1e-3, 40.0
    for kernel in (Langevin(2.0, 0.5), Hamiltonian(2.0, 0.5, friction)):
        added = stationary(kernel, step_size, variance) - stationary(kernel, step_size)
        heat = kernel.heat(step_size, np.array(variance))
        assert np.allclose(added[:2, :2], heat * 2.0 * COVARIANCE, rtol=0.02)


@pytest.mark.parametrize("friction", [0.1, 0.5])
def test_noise_known_of_minibatches_is_left_out(friction):
    step_size, variance = 1e-3, 30.0
    bare = stationary(Hamiltonian(1.0, 1.0, friction), step_size, variance)[:2, :2] - COVARIANCE
    kernel = Hamiltonian(1.0, 1.0, friction, variance)
    corrected = stationary(kernel, step_size, variance)[:2, :2] - COVARIANCE
    assert np.abs(bare).max() > 0.02 and np.abs(corrected).max() < 1e-3 * np.abs(bare).max()
    assert np.allclose(kernel.heat(step_size, np.full(2, variance)), 0.0)


def test_more_noise_than_friction_takes_out_is_told():
    kernel = Hamiltonian(1.0, 1.0, friction=0.01, gradient_variance=100.0)
    kernel.begin(np.zeros((1, 2)))
    with pytest.raises(LatentDEError, match="more than friction takes out"):
        kernel.move(np.zeros((1, 2)), np.zeros((1, 2)), 0.1, np.zeros((1, 2)), KEPT)


def test_a_chain_that_was_put_back_retraces_its_path():
    kernel = Hamiltonian(1.0, METRIC, friction=1e-13)
    rng, zeros = np.random.default_rng(0), np.zeros((1, 2))
    kernel.begin(rng.standard_normal((1, 2)))
    path = [rng.standard_normal((1, 2))]
    for _ in range(5):
        path.append(kernel.move(path[-1], -path[-1] @ PRECISION, 0.1, zeros, KEPT))
    back = path[-2]  # the step to path[-1] is undone
    back = kernel.move(back, -back @ PRECISION, 0.1, zeros, ~KEPT)
    for expected in path[-3::-1]:
        assert np.allclose(back, expected, atol=1e-5)
        back = kernel.move(back, -back @ PRECISION, 0.1, zeros, KEPT)


def test_an_overflowed_kick_is_forgotten():
    kernel = Hamiltonian()
    kernel.begin(np.zeros((1, 2)))
    kernel.momentum = kernel.kicked = np.full((1, 2), np.inf)
    assert np.isfinite(kernel.move(np.zeros((1, 2)), np.zeros((1, 2)), 0.1, np.zeros((1, 2)), ~KEPT)).all()


def test_the_metric_of_rmsprop():
    kernel = PreconditionedLangevin(decay=0.9, regularization=0.5)
    grads = np.random.default_rng(0).standard_normal((40, 3, 2)) * [1.0, 30.0]
    for grad in grads:
        kernel.adapt(grad)
    squares = (grads**2).mean(1)
    by_hand = (1 + squares[:9].sum(0)) / 10  # the plain mean with a 1 until 1 / (1 - decay) = 10
    for square in squares[9:]:
        by_hand = 0.9 * by_hand + 0.1 * square
    assert np.allclose(kernel.metric, 1 / (0.5 + np.sqrt(by_hand)))
    kernel.adapt(np.zeros((0, 2)))  # all chains were put back
    assert np.allclose(kernel.metric, 1 / (0.5 + np.sqrt(by_hand)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hamiltonian(friction=0.0), "friction is the part"),
        (lambda: Hamiltonian(friction=1.1), "friction is the part"),
        (lambda: Hamiltonian(gradient_variance=-1.0), "variances are not negative"),
        (lambda: PreconditionedLangevin(decay=1.0), "decay must lie"),
        (lambda: PreconditionedLangevin(regularization=0.0), "regularization must be positive"),
    ],
)
def test_bad_settings_are_told(make, message):
    with pytest.raises(LatentDEError, match=message):
        make()

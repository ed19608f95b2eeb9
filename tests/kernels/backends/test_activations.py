from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch.autograd import gradcheck, gradgradcheck

from probkit.kernels.backends.activations import ACTIVATIONS, Tanh, activation_of
from probkit.kernels.backends.erf_mixture import NODES, tanh_mixture

F64 = torch.float64
CORRELATIONS = (-1.0, -0.9, -0.3, 0.0, 0.5, 0.95, 0.999, 1.0)
VARIANCES = (
    (0.01, 0.02),
    (0.3, 1.0),
    (1.0, 1.0),
    (2.5, 0.7),
    (6.0, 9.0),
    (40.0, 0.1),
    (80.0, 80.0),
)


def slope(u):
    return 1 / np.cosh(u) ** 2


def expectation(function, k1, k2, correlation):
    """E[f(u) f(v)] by the trapezoidal rule on the plane, whose error is below 1e-13 here.

    It falls like exp(-2 pi s / h) with the width s of the strip where f(sqrt(k) z) is analytic.
    """
    strip = math.pi / 2 / math.sqrt(max(k1, k2))
    z = np.arange(-9.0, 9.0, min(0.2, strip / 5.5))
    mass = np.exp(-(z**2) / 2)
    mass /= mass.sum()
    rest = math.sqrt(1 - correlation**2)
    u = function(math.sqrt(k1) * z)
    v = function(math.sqrt(k2) * (correlation * z[:, None] + rest * z[None, :]))
    return float((mass * u) @ v @ mass)


def test_tanh_is_a_sum_of_error_functions():
    scales, weights = (np.array(each) for each in tanh_mixture())
    assert len(scales) == NODES and (weights > 0).all()
    assert weights.sum() == pytest.approx(1.0, abs=1e-14)
    u = np.linspace(0, 40, 20001)[:, None]
    errors = erf(u / (scales * math.sqrt(2))) @ weights - np.tanh(u[:, 0])
    assert 1e-10 < np.abs(errors).max() < 1.4e-9
    density = np.sqrt(2 / np.pi) * np.exp(-((u / scales) ** 2) / 2) / scales
    assert np.abs(density @ weights - slope(u[:, 0])).max() < 7e-9


def test_more_nodes_are_closer():
    u = np.linspace(0, 20, 2001)[:, None]
    errors = []
    for nodes in (4, 8, 16):
        scales, weights = (np.array(each) for each in tanh_mixture(nodes))
        errors.append(np.abs(erf(u / (scales * math.sqrt(2))) @ weights - np.tanh(u[:, 0])).max())
    assert errors[0] > 100 * errors[1] > 1e4 * errors[2]


@pytest.mark.parametrize("variances", VARIANCES)
def test_tanh_against_high_order_quadrature(variances):
    k1, k2 = variances
    tanh, ones = Tanh(), torch.ones(1, 1, dtype=F64)
    for correlation in CORRELATIONS:
        K = correlation * math.sqrt(k1 * k2) * ones
        expected = expectation(np.tanh, k1, k2, correlation)
        assert tanh.covariance(K, k1 * ones, k2 * ones).item() == pytest.approx(expected, abs=3e-9)
        expected = expectation(slope, k1, k2, correlation)
        assert tanh.derivative(K, k1 * ones, k2 * ones).item() == pytest.approx(
            expected, abs=1.5e-8
        )
    k = torch.tensor(k1, dtype=F64)
    assert tanh.variance(k).item() == pytest.approx(expectation(np.tanh, k1, k1, 1.0), abs=3e-9)
    assert tanh.derivative_variance(k).item() == pytest.approx(
        expectation(slope, k1, k1, 1.0), abs=1.5e-8
    )


def test_tanh_is_closer_than_hermite_points():
    """The usual 32 x 32 Gauss-Hermite rule is a hundred times farther off at unit variance."""
    z, mass = np.polynomial.hermite_e.hermegauss(32)
    mass = mass / mass.sum()
    v = np.tanh(0.5 * z[:, None] + math.sqrt(0.75) * z[None, :])
    hermite = float((mass * np.tanh(z)) @ v @ mass)
    exact = expectation(np.tanh, 1.0, 1.0, 0.5)
    ones = torch.ones(1, 1, dtype=F64)
    ours = Tanh().covariance(0.5 * ones, ones, ones).item()
    assert abs(ours - exact) < abs(hermite - exact) / 100


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_moments_of_draws(name):
    """A million pairs of draws; four standard errors."""
    function = {"relu": torch.relu, "erf": torch.erf, "tanh": torch.tanh}[name]
    activation = activation_of(name)
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(2, 1_000_000, dtype=F64, generator=generator)
    k1, k2, correlation = 1.7, 0.6, 0.4
    u = math.sqrt(k1) * z[0]
    v = math.sqrt(k2) * (correlation * z[0] + math.sqrt(1 - correlation**2) * z[1])
    u, v = u.requires_grad_(), v.requires_grad_()
    slopes = [torch.autograd.grad(function(t).sum(), t)[0] for t in (u, v)]
    ones = torch.ones(1, 1, dtype=F64)
    where = (correlation * math.sqrt(k1 * k2) * ones, k1 * ones, k2 * ones)
    with torch.no_grad():
        cases = (
            (function(u) * function(v), activation.covariance(*where)),
            (slopes[0] * slopes[1], activation.derivative(*where)),
            (function(u) ** 2, activation.variance(k1 * ones)),
            (slopes[0] ** 2, activation.derivative_variance(k1 * ones)),
        )
        for draws, exact in cases:
            error = (draws.mean() - exact).abs().item()
            assert error < 4 * draws.std().item() / 1000


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_place_and_differentiable_forms_agree(name, points):
    activation = activation_of(name)
    k1, k2 = points(2, 4, 1).square() + 0.1, points(2, 1, 3, seed=1).square() + 0.1
    K = (k1 * k2).sqrt() * points(2, 4, 3, seed=2).tanh()
    rows, columns = activation.factors(k1), activation.factors(k2)
    for wanted in (False, True):
        tile, work, derivative = K.clone(), torch.empty_like(K), torch.empty_like(K)
        activation.covariance_(tile, rows, columns, 1.7, work, derivative, with_derivative=wanted)
        expected = 1.7 * activation.covariance(K, k1, k2)
        torch.testing.assert_close(tile, expected, rtol=1e-13, atol=1e-14)
        if wanted:
            expected = activation.derivative(K, k1, k2)
            torch.testing.assert_close(derivative, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_covariance_of_equal_inputs_is_the_variance(name):
    activation = activation_of(name)
    k = torch.tensor([0.0, 0.02, 1.0, 30.0], dtype=F64)
    K, column = k[:, None, None], k[:, None, None]
    torch.testing.assert_close(
        activation.covariance(K, column, column)[:, 0, 0], activation.variance(k)
    )


def test_tanh_gradients(points):
    k1 = (points(2, 1).square() + 0.1).requires_grad_()
    k2 = (points(1, 2, seed=1).square() + 0.1).requires_grad_()
    K = (0.3 * points(2, 2, seed=2)).tanh().mul((k1 * k2).sqrt().detach()).requires_grad_()
    tanh = Tanh()
    with torch.random.fork_rng(devices=[]):
        for function in (tanh.covariance, tanh.derivative):
            assert gradcheck(function, (K, k1, k2), rtol=1e-6, atol=1e-8)
            assert gradgradcheck(function, (K, k1, k2), fast_mode=True)
    slope_by_autograd = torch.autograd.grad(tanh.covariance(K, k1, k2).sum(), K)[0]
    torch.testing.assert_close(slope_by_autograd, tanh.derivative(K, k1, k2).detach())


def test_tanh_keeps_nothing_for_the_way_back(points):
    """144 terms of a tile would be 72 times its size and more."""
    K = (points(40, 40) * 0.1).requires_grad_()
    ones = torch.ones(40, 1, dtype=F64)
    kept = {}

    def keep(t):
        kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        total = Tanh().covariance(K, ones, ones.mT)
    assert sum(kept.values()) < 3 * K.numel()
    total.sum().backward()
    assert K.grad.isfinite().all()

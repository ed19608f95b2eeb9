"""Quadrature over a log scale against closed forms, high precision and fine grids."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from probkit.errors import DataError, NumericsWarning, ShapeError
from probkit.inference.quadrature import LogQuadrature, integrate_log
from probkit.models.scale_laws import BurrXII, Gamma, HalfCauchy, InverseGamma, LogNormal, ScaleLaw
from probkit.numerics import lgamma_difference

# Number of observations and their quadratic form: none, one, two, many; calm and in conflict.
_DATA = [(0, 0.0), (1, 1e-8), (1, 0.3), (2, 50.0), (20, 1e4), (10_000, 9e3), (10_000, 1e6)]


def _double(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _log_likelihood(u: Tensor, n: int, q: float) -> Tensor:
    return -0.5 * n * u - 0.5 * q * torch.exp((-u).clamp(max=700)) if n else torch.zeros_like(u)


def _integrate(law: ScaleLaw, n: int, q: float) -> LogQuadrature:
    return integrate_log(lambda u: law.log_prob_of_log(u) + _log_likelihood(u, n, q))


@pytest.mark.parametrize(("a", "b"), [(2.0, 1.5), (0.01, 1.0), (0.5, 1e-6), (1e8, 1e8)])
@pytest.mark.parametrize(("n", "q"), _DATA)
def test_inverse_gamma_closed_form(a: float, b: float, n: int, q: float) -> None:
    exact = (
        lgamma_difference(_double(a), n / 2).item()
        - n / 2 * math.log(b)
        - (a + n / 2) * math.log1p(q / (2 * b))
    )
    result = _integrate(InverseGamma(a, b), n, q)
    # Rounding: log z is about 20, so a (log z - log a) is off by a |delta| 4e-15 for large a.
    assert result.log_integral.item() == pytest.approx(exact, abs=1e-10, rel=1e-14)


_HEAVY = [
    HalfCauchy(1.0),
    HalfCauchy(1e-3),
    BurrXII(2.0, 1.0),
    BurrXII(20.0, 1.0),
    BurrXII(0.5, 0.5),
    LogNormal(0.0, 10.0),
    LogNormal(3.0, 0.01),
    Gamma(0.1, 1.0),
]


@pytest.mark.parametrize("k", range(len(_HEAVY)))
def test_prior_alone_integrates_to_one(k: int) -> None:
    assert abs(_integrate(_HEAVY[k], 0, 0.0).log_integral.item()) < 1e-11


@pytest.mark.parametrize("k", range(len(_HEAVY)))
@pytest.mark.parametrize(("n", "q"), _DATA[1:])
def test_against_a_million_points(k: int, n: int, q: float) -> None:
    law = _HEAVY[k]
    result = _integrate(law, n, q)
    low, high = result.nodes[0].item(), result.nodes[-1].item()
    margin = 0.1 * (high - low)
    points = 1_000_001
    u = torch.linspace(low - margin, high + margin, points, dtype=torch.float64)
    step = (high - low + 2 * margin) / (points - 1)
    g = law.log_prob_of_log(u) + _log_likelihood(u, n, q)
    reference = torch.logsumexp(g, 0).item() + math.log(step)
    # Neighbouring float64 points of the reference are uneven by up to |u| eps / step.
    rough = 4 * max(abs(low), abs(high)) * 2.2e-16 / step
    assert result.log_integral.item() == pytest.approx(reference, abs=1e-11 + rough, rel=1e-14)
    assert result.error.item() < 1e-9


@pytest.mark.parametrize(("n", "q"), [(0, 0.0), (1, 0.3), (2, 50.0)])
def test_half_cauchy_in_high_precision(n: int, q: float) -> None:
    with mpmath.workdps(30):

        def integrand(u: mpmath.mpf) -> mpmath.mpf:
            prior = mpmath.exp(u / 2) / (1 + mpmath.exp(u)) / mpmath.pi
            return prior * mpmath.exp(-mpmath.mpf(n) / 2 * u - mpmath.mpf(q) / 2 * mpmath.exp(-u))

        exact = mpmath.log(mpmath.quad(integrand, [-150, -20, -5, 0, 5, 20, 150]))
    got = _integrate(HalfCauchy(1.0), n, q).log_integral.item()
    assert got == pytest.approx(float(exact), abs=1e-12)


def test_weights_are_normalised_and_moments_right() -> None:
    result = integrate_log(lambda u: -0.5 * ((u - 3.0) / 0.2) ** 2)
    assert torch.logsumexp(result.log_weights, 0).item() == pytest.approx(0.0, abs=1e-14)
    assert result.mean(result.nodes).item() == pytest.approx(3.0, abs=1e-12)
    assert result.mean((result.nodes - 3.0) ** 2).item() == pytest.approx(0.04, rel=1e-12)
    exact = -0.5 * math.log(2 * math.pi * 0.04)
    assert result.log_density.max().item() == pytest.approx(exact, abs=1e-3)


def test_two_modes_are_both_covered() -> None:
    def g(u: Tensor) -> Tensor:
        left, right = -0.5 * (u + 30) ** 2, -0.5 * ((u - 40) / 0.3) ** 2 - 10
        return torch.logaddexp(left, right)

    exact = 0.5 * math.log(2 * math.pi) + math.log1p(0.3 * math.exp(-10))
    assert integrate_log(g).log_integral.item() == pytest.approx(exact, abs=1e-9)


def test_batch_equals_loop() -> None:
    a = torch.tensor([[0.5], [2.0], [300.0]], dtype=torch.float64)
    q = torch.tensor([1e-4, 3.0, 1e5, 7.0], dtype=torch.float64)
    law = InverseGamma(a, 1.0)

    def g(u: Tensor) -> Tensor:
        return law.log_prob_of_log(u) - 2.0 * u - 0.5 * q * torch.exp(-u)

    batch = integrate_log(g, batch_shape=(3, 4))
    assert batch.nodes.shape[1:] == (3, 4) and batch.log_integral.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            one = _integrate(InverseGamma(a[i, 0], 1.0), 4, q[j].item())
            assert batch.log_integral[i, j].item() == pytest.approx(
                one.log_integral.item(), abs=1e-12
            )


def test_gradients_ignore_where_the_nodes_lie() -> None:
    parameters = tuple(_double(v).requires_grad_() for v in (2.0, 1.0, 1.5, 3.0))

    def evidence(c: Tensor, d: Tensor, scale: Tensor, q: Tensor) -> Tensor:
        law = BurrXII(c, d, scale)
        return integrate_log(
            lambda u: law.log_prob_of_log(u) - 1.5 * u - 0.5 * q * torch.exp(-u)
        ).log_integral

    assert torch.autograd.gradcheck(evidence, parameters, eps=1e-5, atol=1e-8, rtol=1e-7)


def test_divergent_and_empty_integrals_are_errors() -> None:
    with pytest.raises(DataError, match="does not decay"):
        integrate_log(lambda u: torch.zeros_like(u))
    with pytest.raises(DataError, match="does not decay"):
        _integrate(HalfCauchy(1.0), 3, 0.0)  # all targets zero: p(y) is infinite
    with pytest.raises(DataError, match="nowhere finite"):
        integrate_log(lambda u: torch.full_like(u, torch.nan))
    with pytest.raises(ShapeError, match=r"\[node, \*batch\]"):
        integrate_log(lambda u: u.sum())


def test_rough_integrand_warns() -> None:
    def comb(u: Tensor) -> Tensor:
        return -0.5 * u**2 + 5.0 * torch.sign(torch.sin(3e3 * u))

    with pytest.warns(NumericsWarning, match="rough or discontinuous"):
        integrate_log(comb)

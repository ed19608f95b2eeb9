"""Banded smoothing of Markov priors against the dense Gaussian; each check against a wrong one."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from probkit.errors import DataError, ShapeError
from probkit.inference.message_passing import (
    MarkovPrior,
    NaturalSites,
    expected_log_transitions,
    join_components,
    markov_prior,
    smooth_sites,
    smoothed_covariances,
)
from probkit.inference.message_passing.kalman_banded import ROUNDING

F64 = torch.float64
NUS = (0.5, 1.5, 2.5)


def matern(nu: float, lengthscale: Tensor | float, gaps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """P_1, A_t and Q_t of a Matern process of unit variance, from its defining equation."""
    rate = torch.as_tensor(math.sqrt(2 * nu) / lengthscale, dtype=F64)
    zero = torch.zeros_like(rate)
    if nu == 0.5:
        drift, P = -rate.reshape(1, 1), torch.ones(1, 1, dtype=F64)
    elif nu == 1.5:
        drift = torch.stack((zero, zero + 1, -(rate**2), -2 * rate)).reshape(2, 2)
        P = torch.stack((zero + 1, zero, zero, rate**2)).reshape(2, 2)
    else:
        last = torch.stack((-(rate**3), -3 * rate**2, -3 * rate))
        drift = torch.cat((torch.eye(3, dtype=F64)[1:], last.unsqueeze(0)))
        p = rate**2 / 3
        P = torch.stack((zero + 1, zero, -p, zero, p, zero, -p, zero, rate**4)).reshape(3, 3)
    A = torch.linalg.matrix_exp(drift * gaps[:, None, None])
    return P, A, P - A @ P @ A.mT


def covariance(nu: float, lengthscale: float, x: Tensor) -> Tensor:
    """The Matern covariance matrix in closed form."""
    r = math.sqrt(2 * nu) * (x[:, None] - x).abs() / lengthscale
    return {0.5: 1 + 0 * r, 1.5: 1 + r, 2.5: 1 + r + r**2 / 3}[nu] * torch.exp(-r)


class Case(NamedTuple):
    prior: MarkovPrior
    covs: list[Tensor]
    sites: NaturalSites


def case(
    nus: tuple[float, ...],
    generator: torch.Generator,
    *,
    steps: int = 12,
    batch: tuple[int, ...] = (),
) -> Case:
    """Components of equal smoothness and different length scales, with rank-one sites."""
    x = 0.05 * torch.rand(steps, generator=generator, dtype=F64) + 0.1 * torch.arange(steps)
    scales = [0.3 + 0.2 * i for i in range(len(nus))]
    parts = [matern(nu, scale, x.diff()) for nu, scale in zip(nus, scales, strict=True)]
    P, A, Q = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
    first = torch.eye(P.shape[-1], dtype=F64)[:1]
    prior = join_components(markov_prior(P, A, Q, first))
    covs = [covariance(nu, scale, x) for nu, scale in zip(nus, scales, strict=True)]
    a = torch.randn(*batch, steps, len(nus), 1, generator=generator, dtype=F64)
    a[..., 1:2, :, :] = 0  # nothing observed at step 1
    y = torch.randn(*batch, steps, 1, 1, generator=generator, dtype=F64)
    return Case(prior, covs, NaturalSites(3 * (a @ y).squeeze(-1), 3 * a @ a.mT))


def dense(covs: list[Tensor], sites: NaturalSites) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [T, R], covariance [T, R, T, R] of the observed values, and log Z, all at once."""
    steps, r = sites.eta.shape
    K = torch.zeros(steps, r, steps, r, dtype=F64)
    for i, cov in enumerate(covs):
        K[:, i, :, i] = cov
    K = K.reshape(steps * r, steps * r)
    Lam, eta = torch.block_diag(*sites.precision), sites.eta.reshape(-1)
    J = torch.linalg.inv(torch.eye(steps * r, dtype=F64) + K @ Lam)
    V = J @ K
    evidence = torch.logdet(J) / 2 + eta @ V @ eta / 2
    return (V @ eta).reshape(steps, r), V.reshape(steps, r, steps, r), evidence


def check(case: Case, tolerance: float = 1e-8) -> None:
    H = case.prior.observation
    result = smooth_sites(case.prior, case.sites)
    mean, cov, evidence = dense(case.covs, case.sites)
    steps = len(mean)
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(result.log_evidence, evidence, **close)
    torch.testing.assert_close(result.mean @ H.T, mean, **close)
    for t in range(steps):
        torch.testing.assert_close(H @ result.cov[t] @ H.T, cov[t, :, t], **close)
    for t in range(steps - 1):
        torch.testing.assert_close(H @ result.cross_cov[t] @ H.T, cov[t + 1, :, t], **close)


@pytest.mark.parametrize("nu", NUS)
@pytest.mark.parametrize("components", [1, 2, 3])
def test_smoothing_equals_a_dense_gaussian_process(
    nu: float, components: int, generator: torch.Generator
) -> None:
    given = case((nu,) * components, generator)
    assert given.prior.precision is not None
    check(given)
    check(given._replace(prior=given.prior._replace(precision=None)))


@pytest.mark.parametrize("nu", NUS)
def test_covariances_of_distant_steps(nu: float, generator: torch.Generator) -> None:
    given = case((nu, nu), generator)
    H, steps = given.prior.observation, torch.tensor([0, 3, 4, 10])
    exact = dense(given.covs, given.sites)[1][steps][:, :, steps]
    for prior in (given.prior, given.prior._replace(precision=None)):
        cov = smoothed_covariances(prior, given.sites, steps)
        seen = torch.einsum("ra,iajb,sb->irjs", H, cov, H)
        torch.testing.assert_close(seen, exact, rtol=1e-7, atol=1e-8)
    several = NaturalSites(*(torch.stack((x, 2 * x)) for x in given.sites))
    for prior in (given.prior, given.prior._replace(precision=None)):
        both = smoothed_covariances(prior, several, steps)
        alone = smoothed_covariances(prior, given.sites, steps)
        torch.testing.assert_close(both[0], alone, rtol=1e-8, atol=1e-8)


def test_one_step(generator: torch.Generator) -> None:
    check(case((1.5, 1.5), generator, steps=1))


def test_a_wrong_precision_is_caught(generator: torch.Generator) -> None:
    given = case((1.5, 1.5), generator)
    precision = given.prior.precision
    assert precision is not None
    for wrong in (
        precision._replace(upper=precision.upper * (1 - 1e-6)),
        precision._replace(log_det=precision.log_det + 1e-3),
        precision._replace(diagonal=precision.diagonal * (1 + 1e-6)),
    ):
        with pytest.raises(AssertionError):
            check(given._replace(prior=given.prior._replace(precision=wrong)))


@pytest.mark.parametrize("nu", NUS)
def test_a_batch_is_a_loop_over_it(nu: float, generator: torch.Generator) -> None:
    given = case((nu, nu), generator, batch=(2, 3))
    together = smooth_sites(given.prior, given.sites)
    for i in range(2):
        for j in range(3):
            alone = smooth_sites(given.prior, NaturalSites(*(x[i, j] for x in given.sites)))
            for one, many in zip(alone, together, strict=True):
                torch.testing.assert_close(one, many[i, j], rtol=1e-10, atol=1e-10)


def test_each_sequence_may_have_its_own_prior(generator: torch.Generator) -> None:
    cases = [case((1.5, 1.5), generator) for _ in range(3)]
    fields = [torch.stack(x) for x in zip(*(c.prior[:3] for c in cases), strict=True)]
    prior = markov_prior(*fields, cases[0].prior.observation)
    sites = NaturalSites(*(torch.stack(x) for x in zip(*(c.sites for c in cases), strict=True)))
    together = smooth_sites(prior, sites)
    for i, given in enumerate(cases):
        alone = smooth_sites(given.prior, given.sites)
        for one, many in zip(alone, together, strict=True):
            torch.testing.assert_close(one, many[i], rtol=1e-9, atol=1e-9)


def test_sums_of_processes_are_observed_through_their_sum(generator: torch.Generator) -> None:
    given = case((1.5, 1.5), generator)
    add = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=F64)
    sites = NaturalSites(given.sites.eta[:, :1], given.sites.precision[:, :1, :1])
    result = smooth_sites(given.prior._replace(observation=add), sites)
    mean, cov, evidence = dense([given.covs[0] + given.covs[1]], sites)
    torch.testing.assert_close(result.mean @ add.T, mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.log_evidence, evidence, rtol=1e-9, atol=1e-9)
    variance = (add @ result.cov @ add.T).squeeze()
    exact = torch.stack([cov[t, :, t] for t in range(12)]).squeeze()
    torch.testing.assert_close(variance, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("nu", NUS)
def test_crowded_steps_fall_back_to_the_covariance_form(
    nu: float, generator: torch.Generator
) -> None:
    x = torch.cat((torch.linspace(0, 1, 6, dtype=F64), torch.tensor([0.4 + 1e-8], dtype=F64)))
    x = x.sort().values
    P, A, Q = matern(nu, 0.3, x.diff())
    prior = markov_prior(P, A, Q, torch.eye(len(P), dtype=F64)[:1])
    assert (prior.precision is None) == (nu > 0.5 or 0.3e8 / 2 * 2.2e-16 > ROUNDING)
    a = torch.randn(7, 1, 1, generator=generator, dtype=F64)
    check(Case(prior, [covariance(nu, 0.3, x)], NaturalSites(a.squeeze(-1), a @ a.mT)), 1e-7)


def test_single_precision_stays_single(generator: torch.Generator) -> None:
    given = case((0.5,), generator)
    half = MarkovPrior(*(x.float() for x in given.prior[:4]), None)  # type: ignore[misc,union-attr]
    assert markov_prior(*half[:4]).precision is None  # type: ignore[arg-type]
    result = smooth_sites(half, NaturalSites(*(x.float() for x in given.sites)), cross=False)
    assert result.mean.dtype == torch.float32
    assert result.cross_cov.shape == (0, 1, 1)
    exact = smooth_sites(given.prior, given.sites).mean
    torch.testing.assert_close(result.mean.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("nu", NUS)
def test_gradients_of_the_evidence(nu: float, generator: torch.Generator) -> None:
    """Fisher's identity against central differences, in the length scale and the variance."""
    x = torch.rand(9, generator=generator, dtype=F64).sort().values + torch.arange(9) * 0.1
    a = torch.randn(9, 1, 1, generator=generator, dtype=F64)
    sites = NaturalSites(a.squeeze(-1), 2 * a @ a.mT)
    log_theta = torch.tensor([-0.7, 0.4], dtype=F64)

    def chain(log_theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lengthscale, variance = log_theta.exp()
        P, A, Q = matern(nu, lengthscale, x.diff())
        return variance * P, A, variance * Q

    first = torch.eye(int(nu + 0.5), dtype=F64)[:1]

    def evidence(log_theta: Tensor) -> float:
        return smooth_sites(markov_prior(*chain(log_theta), first), sites).log_evidence.item()

    result = smooth_sites(markov_prior(*chain(log_theta), first), sites)
    m = result.mean
    second = result.cov + m.unsqueeze(-1) * m.unsqueeze(-2)
    lagged = result.cross_cov + m[1:].unsqueeze(-1) * m[:-1].unsqueeze(-2)
    log_theta.requires_grad_()
    expected_log_transitions(*chain(log_theta), second, lagged).backward()
    step = 1e-5
    for i in range(2):
        shift = step * torch.eye(2, dtype=F64)[i]
        centre = log_theta.detach()
        slope = (evidence(centre + shift) - evidence(centre - shift)) / (2 * step)
        # rounding of the evidence 1e-10 / step, curvature step^2
        assert abs(slope - log_theta.grad[i].item()) < 5e-5


def test_bad_input(generator: torch.Generator) -> None:
    given = case((1.5, 1.5), generator)
    P, A, Q, H, _ = given.prior
    with pytest.raises(
        ShapeError, match=r"expected transition \[\*batch, T - 1, S, S\] = \(11, 4, 4\)"
    ):
        markov_prior(P, A[..., :3], Q, H)
    with pytest.raises(ShapeError, match=r"expected noise \[\*batch, T - 1, S, S\]"):
        markov_prior(P, A, Q[1:], H)
    with pytest.raises(ShapeError, match=r"expected observation \[r, S\] = \(2, 4\), got \(2, 3\)"):
        markov_prior(P, A, Q, H[:, :3])
    with pytest.raises(DataError, match="noise"):
        markov_prior(P, A, Q * torch.nan, H)
    eta, Lam = given.sites
    with pytest.raises(ShapeError, match=r"eta \[\*batch, T, r\] = \(12, 2\)"):
        smooth_sites(given.prior, NaturalSites(eta[1:], Lam[1:]))
    with pytest.raises(DataError, match="eta"):
        smooth_sites(given.prior, NaturalSites(eta * torch.nan, Lam))
    Lam = Lam.clone()
    Lam[3] = -1e4 * torch.eye(2, dtype=F64)
    with pytest.raises(DataError, match="expected positive semi-definite site precisions, step 3"):
        smooth_sites(given.prior, NaturalSites(eta, Lam))

"""Missing entries: conjugate gradients, Hutchinson and Lanczos against dense answers."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from probkit import infer
from probkit.errors import CapabilityError, NumericsWarning
from probkit.models import EvidenceMaximization, KroneckerSBL
from probkit.models.sbl.e_step import data_form_moments
from probkit.models.sbl.metrics import nmse
from probkit.models.sbl.missing import conjugate_gradients, lanczos_log_det, masked_moments
from probkit.models.sbl.mode_products import outer
from probkit.models.sbl.moments import Moments
from probkit.models.sbl.simulators import simulate_kronecker
from probkit.testing.statistics import z_bound

REAL, COMPLEX = torch.float64, torch.complex128


class Setting:
    """Three modes, two snapshots, a fifth of the entries missing, one pruned index."""

    def __init__(self, dtype: torch.dtype) -> None:
        g = torch.Generator().manual_seed(0)
        self.factors = [
            torch.randn(m, n, generator=g, dtype=dtype) for m, n in ((3, 4), (4, 5), (5, 4))
        ]
        self.variances = [torch.rand(n, generator=g, dtype=REAL) for n in (4, 5, 4)]
        self.variances[1][2] = 0.0
        self.noise = torch.tensor(0.05, dtype=REAL)
        self.y = torch.randn(2, 3, 4, 5, generator=g, dtype=dtype)
        self.observed = (torch.rand(3, 4, 5, generator=g) < 0.8).to(REAL)

    def masked(self, probes: int, observed: Tensor | None = None) -> Moments:
        mask = self.observed if observed is None else observed
        return masked_moments(self.factors, self.variances, self.noise, self.y, mask, probes=probes)

    def dense(self) -> Moments:
        seen = self.observed.flatten() > 0
        dictionary = functools.reduce(torch.kron, self.factors)[seen]
        y = self.y.flatten(1)[:, seen]
        return data_form_moments(dictionary, outer(self.variances).flatten(), self.noise, y)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_the_mean_is_exact(dtype: torch.dtype) -> None:
    s = Setting(dtype)
    found, exact = s.masked(4), s.dense()
    torch.testing.assert_close(found.mean.flatten(1), exact.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.projection.flatten(1), exact.projection, rtol=0, atol=1e-7)
    torch.testing.assert_close(found.residual, exact.residual, rtol=1e-8, atol=0)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_estimates_lie_within_their_errors(dtype: torch.dtype) -> None:
    """Hutchinson's variance is at most B_jj (1 - B_jj) over the probes (B the shrinkage)."""
    s, probes = Setting(dtype), 400
    found, exact = s.masked(probes), s.dense()
    prior = outer(s.variances).flatten()
    shrink = prior * exact.leverage
    error = (shrink * (1 - shrink) / probes).sqrt()
    gap = (found.variance.flatten() - exact.variance).abs()
    assert float((gap - z_bound(len(gap)) * prior * error).max()) <= 1e-6
    # The log determinant: Rademacher probes have variance 2 (|A|_F^2 - |diag A|^2), A = log of the
    # precision of the missing entries.
    C = _full_covariance(s)
    hidden = s.observed.flatten() == 0
    block = torch.linalg.inv(C)[hidden][:, hidden]
    values, vectors = torch.linalg.eigh(block)
    log = (vectors * values.log()) @ vectors.mH
    spread = 2 * (log.abs().square().sum() - log.diagonal().abs().square().sum())
    error = float((spread / probes).sqrt())
    weight = 2 * (1.0 if dtype.is_complex else 0.5)  # two snapshots
    gap = float((found.log_evidence - exact.log_evidence).abs())
    assert gap <= z_bound() * weight * error + 1e-6


def _full_covariance(s: Setting) -> Tensor:
    H = functools.reduce(torch.kron, s.factors)
    eye = torch.eye(len(H), dtype=H.dtype)
    return (H * outer(s.variances).flatten()) @ H.mH + s.noise * eye


def test_nothing_missing_is_the_plain_step() -> None:
    from probkit.models.sbl.problem import moments_of

    s = Setting(REAL)
    found = s.masked(200, torch.ones_like(s.observed))
    exact = moments_of(s.factors, s.variances, s.noise, s.y)
    torch.testing.assert_close(found.mean, exact.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.log_evidence, exact.log_evidence)


def test_conjugate_gradients_solve_and_report() -> None:
    g = torch.Generator().manual_seed(1)
    half = torch.randn(8, 8, generator=g, dtype=COMPLEX)
    A = half @ half.mH + 0.1 * torch.eye(8, dtype=COMPLEX)
    right = torch.randn(3, 8, generator=g, dtype=COMPLEX)

    def apply(x: Tensor) -> Tensor:
        return (A @ x.mT).mT

    found = conjugate_gradients(apply, right, lambda r: r, dims=1)
    torch.testing.assert_close(found, torch.linalg.solve(A, right.mT).mT)
    with pytest.warns(NumericsWarning, match="stopped after 2 iterations"):
        conjugate_gradients(apply, right, lambda r: r, dims=1, max_iter=2)


def test_lanczos_is_exact_after_all_steps() -> None:
    g = torch.Generator().manual_seed(2)
    half = torch.randn(6, 6, generator=g, dtype=REAL)
    A = half @ half.T + 0.1 * torch.eye(6, dtype=REAL)
    v = torch.randn(4, 6, generator=g, dtype=REAL)
    values, vectors = torch.linalg.eigh(A)
    expected = ((v @ vectors).square() * values.log()).sum(-1)
    found = lanczos_log_det(lambda x: (A @ x.mT).mT, v, dims=1)
    torch.testing.assert_close(found, expected)


def test_a_fit_with_missing_entries() -> None:
    """Recovery, NaN where nothing was seen, draws and predictions of what is missing."""
    data = simulate_kronecker(
        1, sizes=(8, 7), data_sizes=(8, 9), nonzeros=2, snr_db=30, rank_one=False, rng=5
    )
    g = torch.Generator().manual_seed(3)
    observed = torch.rand(8, 9, generator=g) < 0.85
    y = torch.where(observed, data.y[0], torch.nan)
    model = KroneckerSBL([f[0] for f in data.factors], noise_var=float(data.noise_var[0]))
    post = infer(model, (y, observed), rng=0)
    assert float(nmse(post.analytic["weights"].mean, data.weights[0], dims=2)) < 0.02
    assert post.log_evidence.kind == "estimate"
    draws = post.sample(400, rng=1)["weights"]
    sd = post.analytic["weights"].variance.sqrt()
    gap = (draws.mean(0) - post.analytic["weights"].mean).abs()
    assert float((gap - z_bound(56) * draws.std(0) / 20).max()) <= 1e-9
    # The spread of draws is exact, that of the marginals estimated from 32 probes.
    used = sd > 0
    torch.testing.assert_close(draws.std(0)[used], sd[used], rtol=0.6, atol=0)
    field = torch.einsum("ia,jb,ab->ij", *model.factors, data.weights[0])
    prediction = post.predict(list(model.factors), site="f")
    z = (prediction.mean - field) / prediction.variance.sqrt()
    assert float(z.abs().max()) <= z_bound(72) + 1
    rows = post.predict(torch.kron(*model.factors)[:5], site="f")
    torch.testing.assert_close(rows.variance, prediction.variance.flatten()[:5])


def test_what_cannot_be_had_with_missing_entries() -> None:
    model = KroneckerSBL([torch.eye(3), torch.eye(2)], noise_var=0.1)
    y = torch.ones(3, 2, dtype=REAL)
    data = model.prepare((y, y > 0))
    with pytest.raises(CapabilityError, match="takes one problem without missing entries.*a mask"):
        model.log_evidence({}, data)


def test_learned_noise_counts_what_was_seen() -> None:
    data = simulate_kronecker(1, sizes=(6, 5), data_sizes=(12, 12), nonzeros=2, snr_db=15, rng=6)
    g = torch.Generator().manual_seed(4)
    observed = torch.rand(12, 12, generator=g) < 0.7
    fit = EvidenceMaximization(max_iter=100)
    post = infer(KroneckerSBL([f[0] for f in data.factors]), (data.y[0], observed), fit, rng=0)
    # About a hundred residuals: a standard error of 14 %.
    assert float(post.draws["noise_var"]) == pytest.approx(float(data.noise_var[0]), rel=0.45)

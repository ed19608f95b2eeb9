"""The E-steps against textbook formulas and against each other."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from probkit.models.sbl.e_step import data_form_moments, dense_moments, weight_form_moments
from probkit.models.sbl.kronecker_e_step import kronecker_moments, kronecker_spectrum
from probkit.models.sbl.linear_algebra import hermitian_cholesky
from probkit.models.sbl.mode_products import contract_all_but, mode_products, outer, outer_sum
from probkit.models.sbl.moments import Moments

FIELDS = tuple(Moments.__dataclass_fields__)
COMPLEX, REAL = torch.complex128, torch.float64


def draw(g: torch.Generator, *shape: int, dtype: torch.dtype = REAL) -> Tensor:
    return torch.randn(shape, generator=g, dtype=dtype)


def kron(factors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.kron, factors)


class Setting:
    """Three modes (2 x 4, 3 x 5, 4 x 3), two snapshots, one pruned index."""

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        g = torch.Generator().manual_seed(seed)
        self.factors = [draw(g, m, n, dtype=dtype) for m, n in ((2, 4), (3, 5), (4, 3))]
        self.variances = [torch.rand(n, generator=g, dtype=REAL) for n in (4, 5, 3)]
        self.variances[1][2] = 0.0
        self.noise = torch.tensor(0.3, dtype=REAL)
        self.y = draw(g, 2, 2, 3, 4, dtype=dtype)

    def factored(self) -> Moments:
        spectrum = kronecker_spectrum(self.factors, self.variances, self.noise)
        return kronecker_moments(spectrum, self.variances, self.y)


def assert_same(a: Moments, b: Moments, tolerance: float) -> None:
    for name in FIELDS:
        left, right = getattr(a, name), getattr(b, name)
        torch.testing.assert_close(
            left.flatten(), right.flatten(), rtol=tolerance, atol=tolerance, msg=name
        )


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_factored_is_textbook(dtype: torch.dtype) -> None:
    """Against Sigma = (H^H H / s2 + G^{-1})^{-1}, computed by inverses of dense matrices."""
    s = Setting(dtype)
    s.variances[1][2] = 0.4
    H, g = kron(s.factors), outer(s.variances).flatten()
    found = s.factored()
    covariance = torch.linalg.inv(H.mH @ H / s.noise + torch.diag(1 / g))
    y = s.y.flatten(1)
    mean = (covariance @ H.mH @ y.mT / s.noise).mT
    C = s.noise * torch.eye(24, dtype=REAL) + (H * g) @ H.mH
    torch.testing.assert_close(found.mean.flatten(1), mean, rtol=0, atol=1e-10)
    torch.testing.assert_close(
        found.variance.flatten(), covariance.diagonal().real, rtol=0, atol=1e-10
    )
    if dtype == REAL:
        law = MultivariateNormal(torch.zeros(24, dtype=REAL), C)
        expected = law.log_prob(y).sum()
    else:  # the density of the real and imaginary parts, with covariance [Re, -Im; Im, Re] / 2
        top = torch.cat([C.real, -C.imag], 1)
        real = torch.cat([top, torch.cat([C.imag, C.real], 1)], 0) / 2
        law = MultivariateNormal(torch.zeros(48, dtype=REAL), real)
        expected = law.log_prob(torch.cat([y.real, y.imag], 1)).sum()
    torch.testing.assert_close(found.log_evidence, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
@pytest.mark.parametrize("form", [data_form_moments, weight_form_moments])
def test_all_forms_agree(dtype: torch.dtype, form) -> None:
    s = Setting(dtype)
    dense = form(kron(s.factors), outer(s.variances).flatten(), s.noise, s.y.flatten(1))
    assert_same(s.factored(), dense, 1e-10)


def test_the_smaller_form_is_chosen() -> None:
    g = torch.Generator().manual_seed(1)
    for rows, columns in ((4, 9), (9, 4)):
        H, y = draw(g, rows, columns), draw(g, 1, rows)
        variance, noise = (
            torch.rand(columns, generator=g, dtype=REAL),
            torch.tensor(0.1, dtype=REAL),
        )
        chosen = dense_moments(H, variance, noise, y)
        assert_same(chosen, data_form_moments(H, variance, noise, y), 1e-10)
        assert_same(chosen, weight_form_moments(H, variance, noise, y), 1e-10)


def test_pruned_weights_are_zero_for_certain() -> None:
    found = Setting(REAL).factored()
    assert bool((found.mean[:, :, 2] == 0).all())
    assert bool((found.variance[:, 2] == 0).all())


def test_real_data_as_complex() -> None:
    """Twice the data and halved noise: a circular law with real data has its own constant."""
    s = Setting(REAL)
    real = s.factored()
    s.factors, s.y = [f.to(COMPLEX) for f in s.factors], s.y.to(COMPLEX)
    found = s.factored()
    torch.testing.assert_close(found.mean.real, real.mean)
    torch.testing.assert_close(found.mean.imag, torch.zeros_like(real.mean))
    torch.testing.assert_close(found.variance, real.variance)
    torch.testing.assert_close(found.freedom, real.freedom)
    # -2 log p = log|C| + q + M log 2 pi (real), -log p = log|C| + q + M log pi (complex)
    gap = 2 * real.log_evidence - found.log_evidence
    expected = -2 * 24 * torch.log(torch.tensor(2.0, dtype=REAL))
    torch.testing.assert_close(gap, expected)


def test_permuted_modes() -> None:
    s = Setting(COMPLEX)
    original = s.factored()
    order = (2, 0, 1)
    s.factors = [s.factors[i] for i in order]
    s.variances = [s.variances[i] for i in order]
    s.y = s.y.permute(0, *(i + 1 for i in order))
    found = s.factored()
    torch.testing.assert_close(found.mean, original.mean.permute(0, *(i + 1 for i in order)))
    torch.testing.assert_close(found.variance, original.variance.permute(order))
    torch.testing.assert_close(found.log_evidence, original.log_evidence)


def test_a_mode_of_size_one_changes_nothing() -> None:
    s = Setting(REAL)
    original = s.factored()
    s.factors.insert(1, torch.ones(1, 1, dtype=REAL))
    s.variances.insert(1, torch.ones(1, dtype=REAL))
    s.y = s.y.unsqueeze(2)
    assert_same(s.factored(), original, 1e-12)


def test_scaling() -> None:
    """y, sqrt(g) and sqrt(s2) times c: the mean scales, the shrinkage stays."""
    s, c = Setting(REAL), 7.0
    original = s.factored()
    s.y, s.noise = c * s.y, c**2 * s.noise
    s.variances = [c**2 * s.variances[0], *s.variances[1:]]
    found = s.factored()
    torch.testing.assert_close(found.mean, c * original.mean)
    torch.testing.assert_close(found.freedom, original.freedom)
    change = 2 * 24 * torch.log(torch.tensor(c, dtype=REAL))
    torch.testing.assert_close(found.log_evidence, original.log_evidence - change)


def test_a_batch_is_each_problem() -> None:
    settings = [Setting(COMPLEX, seed) for seed in range(3)]
    factors = [torch.stack(columns) for columns in zip(*(s.factors for s in settings), strict=True)]
    variances = [
        torch.stack(columns) for columns in zip(*(s.variances for s in settings), strict=True)
    ]
    noise, y = torch.stack([s.noise for s in settings]), torch.stack([s.y for s in settings])
    together = kronecker_moments(kronecker_spectrum(factors, variances, noise), variances, y)
    dense = dense_moments(
        torch.stack([kron(s.factors) for s in settings]),
        torch.stack([outer(s.variances).flatten() for s in settings]),
        noise,
        y.flatten(2),
    )
    for k, s in enumerate(settings):
        for batch in (together, dense):
            alone = s.factored()
            for name in FIELDS:
                left = getattr(batch, name)[k].flatten()
                torch.testing.assert_close(left, getattr(alone, name).flatten())


def test_evidence_is_differentiable() -> None:
    s = Setting(REAL)
    H, y = kron(s.factors), s.y.flatten(1)

    def evidence(g: Tensor, noise: Tensor) -> Tensor:
        return dense_moments(H, g, noise, y).log_evidence

    g = outer(s.variances).flatten() + 0.1
    assert torch.autograd.gradcheck(evidence, (g.requires_grad_(), s.noise.requires_grad_()))


def test_mode_products_are_kronecker_products() -> None:
    g = torch.Generator().manual_seed(3)
    matrices = [draw(g, 2, m, n) for m, n in ((3, 2), (1, 4), (5, 3))]
    x = draw(g, 2, 2, 4, 3)
    for k in range(2):
        expected = kron([m[k] for m in matrices]) @ x[k].flatten()
        torch.testing.assert_close(mode_products(x, matrices)[k].flatten(), expected)


def test_contractions_and_outer_sums() -> None:
    g = torch.Generator().manual_seed(4)
    vectors = [draw(g, 2, n) for n in (3, 4, 2)]
    x = draw(g, 2, 3, 4, 2)
    expected = torch.einsum("bijk,bi,bk->bj", x, vectors[0], vectors[2])
    torch.testing.assert_close(contract_all_but(x, vectors, 1), expected)
    total = outer_sum(vectors)
    torch.testing.assert_close(
        total[1, 2, 1, 0], vectors[0][1, 2] + vectors[1][1, 1] + vectors[2][1, 0]
    )


def test_complex_cholesky_climbs_the_jitter_ladder() -> None:
    g = torch.Generator().manual_seed(5)
    half = draw(g, 4, 2, dtype=COMPLEX)
    singular = half @ half.mH
    singular = (singular + singular.mH) / 2 - 1e-12 * torch.eye(4, dtype=REAL)
    from probkit.errors import NumericsWarning

    with pytest.warns(NumericsWarning, match="jitter"):
        factor = hermitian_cholesky(singular)
    torch.testing.assert_close(factor @ factor.mH, singular, rtol=0, atol=1e-4)

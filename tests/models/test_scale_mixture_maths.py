"""Scale mixtures as pure functions: evidence, posterior, predictions, noise outside the scale."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import scipy.stats
import torch
import torch.distributions as td
from scipy import integrate
from torch import Tensor

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.files import pack, unpack
from probkit.models import scale_mixture as M
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    PointMass,
    ScaleLaw,
    as_scale_law,
)

# --------------------------------------------------------------------------- a naive reference


def _relu_gram(x: Tensor) -> Tensor:
    """ReLU NNGP, three hidden layers, w_std 1.5, b_std 0.3, last w_std 1.2, no last bias."""
    k = 2.25 * x @ x.T / x.shape[1] + 0.09
    for a, b in ((2.25, 0.09), (2.25, 0.09), (1.44, 0.0)):
        d = k.diagonal().sqrt()
        scale = d[:, None] * d[None, :]
        c = (k / scale).clamp(-1, 1)
        j = (1 - c * c).sqrt() + (math.pi - torch.acos(c)) * c
        k = a * scale * j / (2 * math.pi) + b
    return k


def _erf_gram(x: Tensor) -> Tensor:
    """Erf NNGP, two hidden layers, w_std 2, b_std 0.5, last w_std 1, no last bias."""
    k = 4.0 * x @ x.T / x.shape[1] + 0.25
    for a, b in ((4.0, 0.25), (1.0, 0.0)):
        d = 1 + 2 * k.diagonal()
        ratio = 2 * k / (d[:, None] * d[None, :]).sqrt()
        k = a * 2 / math.pi * torch.asin(ratio) + b
    return k


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture
def gram() -> Tensor:
    """K with noise 0.1 inside [4, 4]."""
    x = torch.tensor(
        [[1.0, 0.5, -0.3], [0.2, -1.0, 0.7], [-0.4, 0.1, 0.9], [0.3, 0.3, 0.3]],
        dtype=torch.float64,
    )
    return _relu_gram(x) + 0.1 * torch.eye(4, dtype=torch.float64)


@pytest.fixture
def y() -> Tensor:
    return _double(0.5, -1.0, 0.8, 0.1)[:, None]


def _stats(gram: Tensor, y: Tensor) -> M.SufficientStats:
    return M.sufficient_stats(torch.linalg.cholesky(gram), y)


def _conditional(gram: Tensor, y: Tensor, n: int, *, joint: bool) -> M.Conditional:
    """Condition on the first ``n`` rows; noise is on the whole diagonal."""
    test = gram[..., n:, n:]
    return M.conditional(
        torch.linalg.cholesky(gram[..., :n, :n]),
        y[..., :n, :],
        gram[..., :n, n:],
        test if joint else test.diagonal(dim1=-2, dim2=-1),
        joint=joint,
    )


_LAWS: list[ScaleLaw] = [
    InverseGamma(2.0, 1.5),
    BurrXII(2.0, 1.0),
    LogNormal(0.2, 1.3),
    HalfCauchy(0.7),
    Gamma(0.8, 1.1),
    as_scale_law(td.Uniform(_scalar(0.2), _scalar(5.0))),
    as_scale_law(td.Pareto(_scalar(0.4), _scalar(1.5))),
    as_scale_law(td.HalfNormal(_scalar(2.0))),
]
_IDS = [type(getattr(law, "base", law)).__name__ for law in _LAWS]


# --------------------------------------------------------------------------- evidence


class TestEvidence:
    def test_reference_values(self, gram: Tensor, y: Tensor) -> None:
        stats = _stats(gram, y)
        ig = InverseGamma(2.0, 1.5)
        assert M.log_evidence(ig, stats).item() == pytest.approx(-5.475714662096, abs=5e-13)
        assert M.log_evidence(PointMass(1.0), stats).item() == pytest.approx(
            -5.033924190181, abs=5e-13
        )
        burr = M.quadrature(BurrXII(2.0, 1.0), stats)
        # In 40 digits: -5.4730187712203934851.
        assert burr.log_integral.item() == pytest.approx(-5.4730187712203935, abs=1e-13)
        by_quadrature = M.quadrature(ig, stats).log_integral.item()
        assert by_quadrature == pytest.approx(-5.475714662096, abs=1e-10)

    @pytest.mark.parametrize("law", _LAWS, ids=_IDS)
    def test_against_adaptive_integration(self, law: ScaleLaw, gram: Tensor, y: Tensor) -> None:
        def integrand(v: float) -> float:
            at = _scalar(v)
            normal = td.MultivariateNormal(torch.zeros(4).double(), v * gram)
            return float((law.log_prob(at) + normal.log_prob(y[:, 0])).exp())

        edges = [1e-3, 0.2, 0.4, 1.0, 5.0, 50.0, 1e4]
        pieces = zip(edges[:-1], edges[1:], strict=True)
        total = sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in pieces)
        # The rest of the heaviest tail, v^(-1.5 - 2), is below 1e-12 of the integral.
        got = M.log_evidence(law, _stats(gram, y)).exp().item()
        assert got == pytest.approx(total, rel=1e-8)

    def test_student_t_density(self, gram: Tensor, y: Tensor) -> None:
        a, b = 2.0, 1.5
        peer = scipy.stats.multivariate_t(shape=(b / a * gram).numpy(), df=2 * a)
        got = M.log_evidence(InverseGamma(a, b), _stats(gram, y)).item()
        assert got == pytest.approx(float(peer.logpdf(y[:, 0].numpy())), rel=1e-12)

    def test_outputs_share_one_scale(self, gram: Tensor, generator: torch.Generator) -> None:
        y = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        wide = torch.kron(gram, torch.eye(3, dtype=torch.float64))
        for law in _LAWS[:3]:
            shared = M.log_evidence(law, _stats(gram, y))
            stacked = M.log_evidence(law, _stats(wide, y.reshape(12, 1)))
            assert shared.item() == pytest.approx(stacked.item(), abs=1e-11)

    def test_many_certain_draws_give_the_gaussian_process(self, gram: Tensor, y: Tensor) -> None:
        stats = _stats(gram, y)
        plain = M.log_evidence(PointMass(1.0), stats).item()
        for law in (InverseGamma(1e8, 1e8), Gamma(1e8, 1e8), LogNormal(0.0, 1e-4)):
            assert M.log_evidence(law, stats).item() == pytest.approx(plain, abs=1e-6)
        given = _conditional(gram, y, 3, joint=False)
        t = M.predictive(
            M.scale_posterior(InverseGamma(1e8, 1e8), _stats(gram[:3, :3], y[:3])), given
        )
        normal = M.predictive(PointMass(1.0), given)
        # Up to two standard deviations; z away, the two laws differ by z^4 / (4 df).
        at = _double(-0.6, 0.1, 1.1)[:, None, None]
        assert torch.allclose(t.dist.log_prob(at), normal.dist.log_prob(at), atol=1e-6, rtol=0)
        assert torch.allclose(t.dist.variance, normal.dist.variance, rtol=1e-6)

    def test_batch_equals_loop(self, gram: Tensor, generator: torch.Generator) -> None:
        grams = torch.stack([gram, 2 * gram + 0.3 * torch.eye(4).double()])
        y = torch.randn(3, 1, 4, 2, generator=generator, dtype=torch.float64)
        scale = _double(0.5, 2.0)
        laws: list[Any] = [
            lambda s: InverseGamma(2.0 * s, 1.5),
            lambda s: BurrXII(2.0, 1.0, s),
            lambda s: PointMass(s),
        ]
        for make in laws:
            batch = M.log_evidence(make(scale), _stats(grams, y))
            assert batch.shape == (3, 2)
            for i in range(3):
                for j in range(2):
                    one = M.log_evidence(make(scale[j]), _stats(grams[j], y[i, 0]))
                    assert batch[i, j].item() == pytest.approx(one.item(), abs=1e-11)

    def test_gradients(self, gram: Tensor, y: Tensor) -> None:
        def evidence(p: Tensor, noise: Tensor, law: Any) -> Tensor:
            k = 0.5 * (gram + gram.T) + noise * torch.eye(4, dtype=torch.float64)
            return M.log_evidence(law(p), _stats(k, y))

        p, noise = _double(2.0, 1.5).requires_grad_(), _scalar(0.05).requires_grad_()
        for law in (
            lambda p: InverseGamma(p[0], p[1]),
            lambda p: BurrXII(p[0], p[1], p[1]),
            lambda p: HalfCauchy(p[0]),
            lambda p: as_scale_law(td.Pareto(p[0], p[1])),
            lambda p: as_scale_law(td.Uniform(0.1 * p[0], 3 * p[1])),
        ):
            assert torch.autograd.gradcheck(
                lambda p, e, law=law: evidence(p, e, law), (p, noise), eps=1e-5, atol=1e-6
            )

    def test_large_parameters_keep_their_gradient(self, gram: Tensor, y: Tensor) -> None:
        stats = _stats(gram, y)
        log_b = _scalar(math.log(1e8)).requires_grad_()
        M.log_evidence(InverseGamma(_scalar(1e8), log_b.exp()), stats).backward()
        assert log_b.grad is not None
        # d/d log(sigma^2) of the normal log density at sigma^2 = 1.
        assert log_b.grad.item() == pytest.approx(-2.0 + 0.5 * stats.total.item(), abs=1e-6)

    def test_zero_targets(self, gram: Tensor) -> None:
        stats = _stats(gram, torch.zeros(4, 1, dtype=torch.float64))
        assert math.isfinite(M.log_evidence(InverseGamma(2.0, 1.5), stats).item())
        with pytest.raises(DataError, match="does not decay"):
            M.log_evidence(HalfCauchy(1.0), stats)

    def test_shape_errors(self, gram: Tensor, y: Tensor) -> None:
        with pytest.raises(ShapeError, match=r"y\[:, None\]"):
            M.sufficient_stats(gram, y[:, 0])
        with pytest.raises(ShapeError, match="equal n"):
            M.sufficient_stats(gram, y[:3])


# --------------------------------------------------------------------------- posterior of sigma^2


class TestScalePosterior:
    def test_burr_mean(self, gram: Tensor, y: Tensor) -> None:
        posterior = M.scale_posterior(BurrXII(2.0, 1.0), _stats(gram, y))
        # In 40 digits: 1.4006094254301202605.
        assert posterior.mean.item() == pytest.approx(1.4006094254301203, abs=1e-12)

    def test_quadrature_of_the_closed_form(self, gram: Tensor, y: Tensor) -> None:
        law, stats = InverseGamma(2.0, 1.5), _stats(gram, y)
        exact = M.scale_posterior(law, stats)
        assert isinstance(exact, InverseGamma)
        got = M.ScalePosterior(law, stats, M.quadrature(law, stats))
        x = _double(0.01, 0.4, 1.0, 3.0, 50.0)
        assert torch.allclose(got.log_prob(x), exact.log_prob(x), atol=1e-11, rtol=0)
        assert torch.allclose(got.cdf(x), exact.cdf(x), atol=1e-6, rtol=0)
        q = _double(0.01, 0.3, 0.5, 0.95)
        assert torch.allclose(got.icdf(q), exact.icdf(q), rtol=1e-5)
        assert torch.allclose(got.mean, exact.mean, rtol=1e-10)
        assert torch.allclose(got.variance, exact.variance, rtol=1e-9)
        draws = D.sample(got, (5000,), generator=torch.Generator().manual_seed(1))
        assert scipy.stats.kstest(exact.cdf(draws).numpy(), "uniform").pvalue > 1e-4

    @pytest.mark.parametrize("law", _LAWS, ids=_IDS)
    def test_cdf_and_moments_of_every_law(self, law: ScaleLaw, gram: Tensor, y: Tensor) -> None:
        stats = _stats(gram, y)
        posterior = M.ScalePosterior(law, stats, M.quadrature(law, stats))

        def density(v: float, k: int = 0) -> float:
            return v**k * float(posterior.log_prob(_scalar(v)).exp())

        low, high = posterior.icdf(_double(0.1, 0.8)).tolist()
        assert integrate.quad(density, low, high)[0] == pytest.approx(0.7, abs=2e-6)
        edges = [1e-4, 0.2, 0.4, 1.0, 5.0, 50.0, 1e3, 1e5]
        pieces = list(zip(edges[:-1], edges[1:], strict=True))
        first = sum(integrate.quad(density, a, b, (1,), epsabs=1e-12)[0] for a, b in pieces)
        # The heaviest posterior tail here, v^(-3.5), leaves 1e-7 beyond the last edge.
        assert posterior.mean.item() == pytest.approx(first, rel=1e-6)

    def test_infinite_moments(self) -> None:
        # One value: the density of v = sigma^2 falls as v^(-3/2) v^(-1/2).
        one = M.SufficientStats(_double(1.0), _scalar(0.0), 1)
        posterior = M.scale_posterior(HalfCauchy(1.0), one)
        assert posterior.mean.item() == posterior.variance.item() == math.inf
        two = M.SufficientStats(_double(1.0), _scalar(0.0), 2)
        posterior = M.scale_posterior(HalfCauchy(1.0), two)
        assert math.isfinite(posterior.mean.item()) and posterior.variance.item() == math.inf
        # Finite, but with p(v) ~ v^(-2.05) most of int v p(v) dv lies far out.
        none = M.SufficientStats(_double(0.0), _scalar(0.0), 0)
        law = BurrXII(1.0, 1.05)
        assert M.scale_posterior(law, none).mean.item() == pytest.approx(law.mean.item(), rel=1e-8)

    def test_prior_is_returned_without_data(self) -> None:
        none = M.SufficientStats(_double(0.0), _scalar(0.0), 0)
        law = LogNormal(0.3, 0.8)
        posterior = M.scale_posterior(law, none)
        assert posterior.mean.item() == pytest.approx(law.mean.item(), rel=1e-10)
        assert posterior.variance.item() == pytest.approx(law.variance.item(), rel=1e-9)

    def test_batches_and_files(self, gram: Tensor, y: Tensor) -> None:
        law = BurrXII(_double(1.0, 2.0)[:, None], 1.0, _double(0.5, 1.0, 2.0))
        posterior = M.scale_posterior(law, _stats(gram, y))
        assert posterior.batch_shape == (2, 3)
        x = _double(0.7)
        one = M.scale_posterior(BurrXII(2.0, 1.0, 0.5), _stats(gram, y))
        picked = D.select(D.flatten_batch(posterior, 2), torch.tensor([3, 0]))
        assert picked.batch_shape == (2,)
        assert picked.mean[0].item() == pytest.approx(one.mean.item(), rel=1e-11)
        assert torch.allclose(picked.log_prob(x)[:1], one.log_prob(x), atol=1e-11)
        assert torch.allclose(picked.cdf(x)[:1], one.cdf(x), atol=1e-9)
        again = unpack(*pack(posterior))
        assert torch.equal(again.icdf(x), posterior.icdf(x))
        draws = D.sample(posterior, (5,), generator=torch.Generator().manual_seed(0))
        assert draws.shape == (5, 2, 3)


# --------------------------------------------------------------------------- predictions


class TestPredictive:
    def test_reference_values(self, gram: Tensor, y: Tensor) -> None:
        law = InverseGamma(2.0, 1.5)
        head = _stats(gram[:3, :3], y[:3])
        posterior = M.scale_posterior(law, head)
        for joint in (False, True):
            given = _conditional(gram, y, 3, joint=joint)
            t: Any = M.predictive(posterior, given, squeeze=True).dist
            assert t.df.item() == pytest.approx(7.0)
            assert t.loc.item() == pytest.approx(0.281954766575, abs=5e-13)
            scale = t.marginal_scale() if joint else t.scale
            assert scale.item() ** 2 == pytest.approx(0.222414141398, abs=5e-13)
            log_prob = t.log_prob(y[3]).item()
            assert log_prob == pytest.approx(-0.287095505247, abs=5e-13)
            difference = M.log_evidence(law, _stats(gram, y)) - M.log_evidence(law, head)
            assert log_prob == pytest.approx(difference.item(), abs=1e-12)

    @pytest.mark.parametrize("law", [*_LAWS, PointMass(1.7)], ids=[*_IDS, "PointMass"])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_joint_density_is_a_ratio_of_evidences(
        self, law: ScaleLaw, outputs: int, gram: Tensor, generator: torch.Generator
    ) -> None:
        y = torch.randn(4, outputs, generator=generator, dtype=torch.float64)
        head = _stats(gram[:2, :2], y[:2])
        parts = M.predictive(M.scale_posterior(law, head), _conditional(gram, y, 2, joint=True))
        if parts.log_weights is None:
            got = parts.dist.log_prob(y[2:])
        else:
            got = D.mixture_log_prob(parts.dist, parts.log_weights, y[2:])
        exact = M.log_evidence(law, _stats(gram, y)) - M.log_evidence(law, head)
        assert got.item() == pytest.approx(exact.item(), abs=1e-9)

    @pytest.mark.parametrize("law", [_LAWS[0], _LAWS[1], PointMass(1.7)])
    def test_marginals_of_the_joint(self, law: ScaleLaw, gram: Tensor, y: Tensor) -> None:
        posterior = M.scale_posterior(law, _stats(gram[:2, :2], y[:2]))
        wide, narrow = (
            M.predictive(posterior, _conditional(gram, y, 2, joint=joint)).dist
            for joint in (True, False)
        )
        at = _double(0.3, -2.0)[:, None]
        assert torch.allclose(D.marginals(wide).log_prob(at), narrow.log_prob(at), rtol=1e-12)

    def test_batched_predictions(self, gram: Tensor, y: Tensor) -> None:
        scale = _double(0.5, 1.0, 2.0)
        grams = torch.stack([gram, 2 * gram, 0.3 * gram])
        for make in (lambda s: InverseGamma(2.0, s), lambda s: BurrXII(2.0, 1.0, s)):
            for joint in (False, True):
                head = _stats(grams[:, :2, :2], y[:2])
                parts = M.predictive(
                    M.scale_posterior(make(scale), head), _conditional(grams, y, 2, joint=joint)
                )
                for k in range(3):
                    one = M.predictive(
                        M.scale_posterior(make(scale[k]), _stats(grams[k, :2, :2], y[:2])),
                        _conditional(grams[k], y, 2, joint=joint),
                    )
                    if parts.log_weights is None:
                        wide, single = parts.dist.variance, one.dist.variance
                    else:
                        wide = D.mixture_variance(parts.dist, parts.log_weights)
                        single = D.mixture_variance(one.dist, one.log_weights)
                    assert torch.allclose(wide[k], single, rtol=1e-10)

    def test_latent_variance_at_training_rows_stays_positive(self, gram: Tensor, y: Tensor) -> None:
        L = torch.linalg.cholesky(gram)
        given = M.conditional(L, y, gram, gram.diagonal())
        assert (given.scale > 0).all() and (given.scale < 1e-13).all()

    def test_gradient_with_respect_to_the_kernel(self, gram: Tensor, y: Tensor) -> None:
        posterior = M.scale_posterior(BurrXII(2.0, 1.0), _stats(gram[:3, :3], y[:3]))
        L = torch.linalg.cholesky(gram[:3, :3])

        def median_and_spread(cross: Tensor, test: Tensor) -> Tensor:
            parts = M.predictive(posterior, M.conditional(L, y[:3], cross, test))
            q = _double(0.5, 0.9)[:, None, None]
            return D.mixture_icdf(parts.dist, parts.log_weights, q)

        cross = gram[:3, 3:].clone().requires_grad_()
        test = gram[3:, 3].clone().requires_grad_()
        assert torch.autograd.gradcheck(median_and_spread, (cross, test), eps=1e-5, atol=1e-7)

    def test_refusals(self, gram: Tensor, y: Tensor) -> None:
        given = _conditional(gram, y.expand(4, 2), 3, joint=False)
        with pytest.raises(ShapeError, match="ONE output, got 2"):
            M.predictive(PointMass(1.0), given, squeeze=True)
        with pytest.raises(CapabilityError, match="from scale_posterior, got Gamma"):
            M.predictive(Gamma(1.0, 1.0), given)
        with pytest.raises(ShapeError, match=r"cross \[\*batch, n=3, m\]"):
            M.conditional(torch.linalg.cholesky(gram[:3, :3]), y[:3], gram[:2, 3:], gram[3:, 3])


# --------------------------------------------------------------------------- noise outside


class TestNoiseOutside:
    @pytest.mark.parametrize("noise", [0.05, 2.0])
    def test_likelihood(self, gram: Tensor, noise: float, generator: torch.Generator) -> None:
        y = torch.randn(4, 2, generator=generator, dtype=torch.float64)
        stats = M.spectral_stats(gram, y, noise)
        u = _double(-20.0, -1.0, 0.4, 6.0)
        covariance = u.exp()[:, None, None] * gram + noise * torch.eye(4).double()
        normal = td.MultivariateNormal(torch.zeros(4).double(), covariance.unsqueeze(1))
        assert torch.allclose(stats.log_likelihood(u), normal.log_prob(y.T).sum(-1), rtol=1e-11)

    def test_gradients_with_repeated_eigenvalues(self, generator: torch.Generator) -> None:
        # Repeated rows: eigenvalue 0 twice, and 3 twice.
        base = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 3]])
        gram = base.double().requires_grad_()
        y = torch.randn(4, 2, generator=generator, dtype=torch.float64).requires_grad_()
        noise, u = _scalar(0.3).requires_grad_(), _double(-1.0, 0.5).requires_grad_()

        def by_spectrum(k: Tensor, y: Tensor, e: Tensor, u: Tensor) -> Tensor:
            return M.spectral_stats(0.5 * (k + k.mT), y, e).log_likelihood(u)

        def dense(k: Tensor, y: Tensor, e: Tensor, u: Tensor) -> Tensor:
            k = 0.5 * (k + k.mT)
            covariance = u.exp()[:, None, None] * k + e * torch.eye(4).double()
            normal = td.MultivariateNormal(torch.zeros(4).double(), covariance.unsqueeze(1))
            return normal.log_prob(y.T).sum(-1)

        inputs = (gram, y, noise, u)
        weight = _double(1.0, -0.7)
        got = torch.autograd.grad((weight * by_spectrum(*inputs)).sum(), inputs)
        exact = torch.autograd.grad((weight * dense(*inputs)).sum(), inputs)
        for a, b in zip(got, exact, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("law", _LAWS, ids=_IDS)
    def test_evidence(self, law: ScaleLaw, gram: Tensor, y: Tensor) -> None:
        eye = torch.eye(4, dtype=torch.float64)

        def integrand(u: float) -> float:
            normal = td.MultivariateNormal(torch.zeros(4).double(), math.exp(u) * gram + 0.2 * eye)
            return float((law.log_prob_of_log(_scalar(u)) + normal.log_prob(y[:, 0])).exp())

        edges = [
            -60.0,
            -8.0,
            -2.0,
            *(_double(0.2, 0.4).log().tolist()),
            0.0,
            math.log(5.0),
            5.0,
            40.0,
        ]
        pieces = zip(edges[:-1], edges[1:], strict=True)
        total = sum(integrate.quad(integrand, a, b, epsabs=1e-13)[0] for a, b in pieces)
        got = M.log_evidence(law, M.spectral_stats(gram, y, 0.2)).exp().item()
        assert got == pytest.approx(total, rel=1e-8)

    def test_evidence_gradient(self, gram: Tensor, y: Tensor) -> None:
        noise, w = _scalar(0.2).requires_grad_(), _scalar(1.3).requires_grad_()
        d = _scalar(1.1).requires_grad_()

        def evidence(noise: Tensor, w: Tensor, d: Tensor) -> Tensor:
            return M.log_evidence(BurrXII(2.0, d), M.spectral_stats(w * gram, y, noise))

        assert torch.autograd.gradcheck(evidence, (noise, w, d), eps=1e-5, atol=1e-6)

    @pytest.mark.parametrize("law", [_LAWS[0], _LAWS[1], PointMass(1.7)])
    @pytest.mark.parametrize("outputs", [1, 2])
    def test_predictions_are_ratios_of_evidences(
        self, law: ScaleLaw, outputs: int, gram: Tensor, generator: torch.Generator
    ) -> None:
        y = torch.randn(4, outputs, generator=generator, dtype=torch.float64)
        head = M.spectral_stats(gram[:2, :2], y[:2], 0.2)
        posterior = M.scale_posterior(law, head)
        cross = gram[:2, 2:]

        def log_prob(m: int, at: Tensor, joint: bool) -> float:
            test = gram[2 : 2 + m, 2 : 2 + m]
            parts = M.spectral_predictive(
                posterior, head, cross[:, :m], test if joint else test.diagonal(), joint=joint
            )
            if parts.log_weights is None:
                return parts.dist.log_prob(at).sum().item()
            return D.mixture_log_prob(parts.dist, parts.log_weights, at).sum().item()

        whole = M.log_evidence(law, M.spectral_stats(gram, y, 0.2)) - M.log_evidence(law, head)
        assert log_prob(2, y[2:], True) == pytest.approx(whole.item(), abs=1e-9)
        if outputs == 1:
            k = gram[:3, :3]
            next_row = M.log_evidence(law, M.spectral_stats(k, y[:3], 0.2))
            exact = (next_row - M.log_evidence(law, head)).item()
            assert log_prob(1, y[2:3], False) == pytest.approx(exact, abs=1e-9)

    def test_latent_and_observation(self, gram: Tensor, y: Tensor) -> None:
        stats = M.spectral_stats(gram[:3, :3], y[:3], 0.2)
        posterior = M.scale_posterior(LogNormal(0.0, 1.0), stats)
        f, new = (
            M.spectral_predictive(
                posterior, stats, gram[:3, 3:], gram[3:, 3], observation=o, squeeze=True
            )
            for o in (False, True)
        )
        assert torch.allclose(new.dist.variance - f.dist.variance, _double(0.2), rtol=1e-10)
        assert D.mixture_mean(f.dist, f.log_weights).shape == (1,)

    def test_batch_equals_loop(self, gram: Tensor, y: Tensor) -> None:
        noise, grams = _double(0.1, 0.5), torch.stack([gram, 2 * gram])
        stats = M.spectral_stats(grams, y, noise)
        law = BurrXII(2.0, 1.0, _double(1.0, 3.0))
        evidence = M.log_evidence(law, stats)
        parts = M.spectral_predictive(
            M.scale_posterior(law, stats), stats, grams[:, :, :2], grams[:, 0, :2]
        )
        variance = D.mixture_variance(parts.dist, parts.log_weights)
        for k in range(2):
            one = M.spectral_stats(grams[k], y, noise[k])
            single = BurrXII(2.0, 1.0, _double(1.0, 3.0)[k])
            assert evidence[k].item() == pytest.approx(
                M.log_evidence(single, one).item(), abs=1e-11
            )
            alone = M.spectral_predictive(
                M.scale_posterior(single, one), one, grams[k, :, :2], grams[k, 0, :2]
            )
            expected = D.mixture_variance(alone.dist, alone.log_weights)
            assert torch.allclose(variance[k], expected, rtol=1e-9)

    def test_bad_noise(self, gram: Tensor, y: Tensor) -> None:
        with pytest.raises(DataError, match="noise_var must be > 0, got 0"):
            M.spectral_stats(gram, y, 0.0)

    def test_impossible_joint_prediction(self) -> None:
        n = 3
        stats = M.spectral_stats(torch.eye(n).double(), torch.ones(n, 1).double(), 0.1)
        posterior = M.scale_posterior(BurrXII(2.0, 1.0), stats)
        m = 60_000
        test = torch.zeros((), dtype=torch.float64).expand(m, m)
        cross = torch.zeros((), dtype=torch.float64).expand(n, m)
        with pytest.raises(DataError, match="joint prediction of 60000 rows at 301 scales needs"):
            M.spectral_predictive(posterior, stats, cross, test, joint=True)


# --------------------------------------------------------------------------- simulations


def test_exact_prior_simulation() -> None:
    """Under the true prior: calibrated t predictions, over-confident or lossy plain processes."""
    draws = 20_000
    generator = torch.Generator().manual_seed(7)
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)[:, None]
    gram = _erf_gram(x) + 0.01 * torch.eye(20, dtype=torch.float64)
    law = InverseGamma(2.0, 2.0)
    scale = D.sample(law, (draws,), generator=generator)
    noise = torch.randn(draws, 20, generator=generator, dtype=torch.float64)
    y = (scale.sqrt()[:, None] * (noise @ torch.linalg.cholesky(gram).T)).unsqueeze(-1)
    train, test = torch.arange(0, 20, 2), torch.arange(1, 20, 2)
    L = torch.linalg.cholesky(gram[train][:, train])
    stats = M.sufficient_stats(L, y[:, train])
    given = M.conditional(L, y[:, train], gram[train][:, test], gram.diagonal()[test])
    at = y[:, test]
    posteriors = (
        (M.scale_posterior(law, stats), -0.389, 0.004, 0.900),
        (PointMass(2.0), -0.207, 0.013, 0.919),
        (PointMass(stats.total / 10), -0.353, 0.004, 0.870),
    )
    for posterior, nll, nll_error, coverage in posteriors:
        dist = M.predictive(posterior, given).dist
        each = -dist.log_prob(at).mean((1, 2))
        # Both sides are Monte Carlo means: the given error and our own.
        error = math.hypot(nll_error, each.std().item() / math.sqrt(draws))
        assert abs(each.mean().item() - nll) < 3.5 * error
        inside = ((D.cdf(dist, at) - 0.5).abs() < 0.45).double().mean((1, 2))
        # The stated coverages are rounded to three digits.
        error = math.sqrt(2) * inside.std().item() / math.sqrt(draws)
        assert abs(inside.mean().item() - coverage) < 3.5 * error + 5e-4


@pytest.mark.slow
def test_wide_networks_follow_the_student_t_law() -> None:
    """One hidden layer of 1024 ReLU units whose last-layer variance is InverseGamma(2, 2)."""
    draws, width, block = 20_000, 1024, 2000
    generator = torch.Generator().manual_seed(3)
    x = _double(1.0, 0.5, -0.3)
    w_std, b_std = 1.5, 0.3
    pre_variance = w_std**2 * x.square().mean() + b_std**2
    outputs = []
    for _ in range(draws // block):
        w = torch.randn(block, width, 3, generator=generator, dtype=torch.float64)
        b = torch.randn(block, width, generator=generator, dtype=torch.float64)
        v = torch.randn(block, width, generator=generator, dtype=torch.float64)
        hidden = torch.relu(w_std / math.sqrt(3) * (w @ x) + b_std * b)
        outputs.append((v * hidden).sum(-1) / math.sqrt(width))
    scale = D.sample(InverseGamma(2.0, 2.0), (draws,), generator=generator)
    f = scale.sqrt() * torch.cat(outputs)
    given = M.Conditional(torch.zeros(1, 1).double(), (0.5 * pre_variance).reshape(1), False)
    t = M.predictive(InverseGamma(2.0, 2.0), given, squeeze=True).dist
    assert isinstance(t, D.StudentT) and t.df.item() == 4.0
    ks = scipy.stats.kstest(D.cdf(t, f[:, None])[:, 0].numpy(), "uniform").statistic
    normal = scipy.stats.kstest(((f - f.mean()) / f.std()).numpy(), "norm").statistic
    assert ks < 0.01
    assert normal > 0.03


def test_variance_of_a_heavy_mixture_warns_once() -> None:
    given = M.Conditional(torch.zeros(1, 1).double(), torch.ones(1).double(), False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dist = M.predictive(InverseGamma(1.0, 1.0), given).dist
        assert math.isinf(dist.variance.item())
    assert [w.category for w in caught] == [NumericsWarning]

"""Student-t laws, cdf and icdf, sampling with generators, mixtures, batches and storage."""

from __future__ import annotations

import math
import threading
from typing import Any

import mpmath
import pyro.distributions as pd
import pytest
import scipy.stats
import torch
import torch.distributions as td
from torch import Tensor

from probkit import distributions as D
from probkit.errors import CapabilityError, DataError, NumericsWarning, ShapeError
from probkit.files import pack, unpack


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _factor(generator: torch.Generator, *shape: int) -> Tensor:
    a = torch.randn(*shape, shape[-1], generator=generator, dtype=torch.float64)
    return torch.linalg.cholesky(a @ a.mT + torch.eye(shape[-1], dtype=torch.float64))


class TestStudentT:
    @pytest.mark.parametrize("df", [0.3, 1.0, 4.0, 30.0, 1e8])
    @pytest.mark.parametrize("x", [-40.0, -1.3, 0.2, 5.0])
    def test_log_prob_against_high_precision(self, df: float, x: float) -> None:
        law = D.StudentT(*_double(df, 0.5, 2.0))
        with mpmath.workdps(40):
            v, z = mpmath.mpf(df), (mpmath.mpf(x) - 0.5) / 2
            exact = (
                mpmath.loggamma((v + 1) / 2)
                - mpmath.loggamma(v / 2)
                - mpmath.log(v * mpmath.pi) / 2
                - mpmath.log(2)
                - (v + 1) / 2 * mpmath.log1p(z * z / v)
            )
            got = law.log_prob(torch.tensor(x, dtype=torch.float64)).item()
            assert abs(got - exact) < 2e-14 * (1 + abs(exact))

    @pytest.mark.parametrize("df", [0.5, 1.0, 2.5, 40.0])
    def test_cdf_and_icdf(self, df: float) -> None:
        law = D.StudentT(*_double(df, -1.0, 3.0))
        x = _double(-30.0, -1.0, 0.0, 12.0)
        expected = torch.as_tensor(scipy.stats.t(df, -1.0, 3.0).cdf(x.numpy()))
        for dist in (law, td.StudentT(law.df, law.loc, law.scale)):
            assert torch.allclose(D.cdf(dist, x), expected, rtol=1e-12)
            assert torch.allclose(D.icdf(dist, D.cdf(dist, x)), x, rtol=1e-9, atol=1e-12)

    def test_cdf_tends_to_the_normal(self) -> None:
        x = _double(-3.0, -0.5, 2.0)
        got = D.student_t_cdf(torch.tensor(1e9, dtype=torch.float64), x)
        assert torch.allclose(got, torch.special.ndtr(x), rtol=1e-7)

    def test_gradients(self) -> None:
        df, t = _double(0.7, 3.0, 25.0).requires_grad_(), _double(-2.0, 0.3, 1.5).requires_grad_()
        assert torch.autograd.gradcheck(D.student_t_cdf, (df, t), eps=1e-5, atol=1e-7)
        loc, scale = _double(0.3).requires_grad_(), _double(2.0).requires_grad_()
        q = _double(0.2, 0.9).requires_grad_()

        def quantile(df: Tensor, loc: Tensor, scale: Tensor, q: Tensor) -> Tensor:
            return D.icdf(D.StudentT(df, loc, scale), q)

        inputs = (_double(3.0).requires_grad_(), loc, scale, q)
        assert torch.autograd.gradcheck(quantile, inputs, eps=1e-5, atol=1e-6)

    def test_variance(self) -> None:
        assert D.StudentT(*_double(5.0, 0.0, 2.0)).variance.item() == pytest.approx(20 / 3)
        with pytest.warns(NumericsWarning, match="infinite for df <= 2, got df=2"):
            assert D.StudentT(*_double(2.0, 0.0, 1.0)).variance.item() == math.inf


class TestJointLaws:
    def test_student_t_log_prob(self, generator: torch.Generator) -> None:
        L = _factor(generator, 4)
        loc = torch.randn(4, generator=generator, dtype=torch.float64)
        x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
        law = D.MultivariateStudentT(3.5, loc, L)
        peer = scipy.stats.multivariate_t(loc.numpy(), (L @ L.T).numpy(), df=3.5)
        assert torch.allclose(law.log_prob(x), torch.as_tensor(peer.logpdf(x.numpy())), rtol=1e-12)

    def test_multi_output_is_the_law_of_all_entries(self, generator: torch.Generator) -> None:
        L = _factor(generator, 3)
        loc = torch.randn(3, 2, generator=generator, dtype=torch.float64)
        x = torch.randn(5, 3, 2, generator=generator, dtype=torch.float64)
        # Row-major entries of [row, output] have the scale factor L kron diag(output_scale).
        each = _double(1.0, 0.3)
        wide = torch.kron((2.0 * L).contiguous(), torch.diag(each))
        for law, peer in (
            (
                D.MultiOutputStudentT(4.0, loc, L, 2.0, each),
                D.MultivariateStudentT(4.0, loc.flatten(), wide),
            ),
            (
                D.MultiOutputNormal(loc, L, 2.0, each),
                td.MultivariateNormal(loc.flatten(), scale_tril=wide),
            ),
        ):
            assert torch.allclose(law.log_prob(x), peer.log_prob(x.flatten(1)), rtol=1e-12)
            assert torch.allclose(law.variance.flatten(), peer.variance, rtol=1e-12)
            assert torch.allclose(
                D.marginals(law).log_prob(x).flatten(1),
                D.marginals(peer).log_prob(x.flatten(1)),
                rtol=1e-12,
            )

    def test_batch_equals_loop(self, generator: torch.Generator) -> None:
        df, L = _double(3.0, 5.0)[:, None], _factor(generator, 3, 4)
        loc = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
        x = torch.randn(7, 2, 3, 4, generator=generator, dtype=torch.float64)
        batch = D.MultivariateStudentT(df, loc, L)
        assert batch.batch_shape == (2, 3) and batch.event_shape == (4,)
        for i in range(2):
            for j in range(3):
                one = D.MultivariateStudentT(df[i, 0], loc[i, j], L[j])
                assert torch.allclose(batch.log_prob(x)[:, i, j], one.log_prob(x[:, i, j]))
                assert torch.allclose(batch.covariance_matrix[i, j], one.covariance_matrix)
        shared = D.MultivariateStudentT(df, loc[0], L)
        assert torch.allclose(
            shared.log_prob(x)[:, 1], D.MultivariateStudentT(5.0, loc[0], L).log_prob(x[:, 1])
        )

    def test_amplitudes_share_one_factor(self, generator: torch.Generator) -> None:
        L, sigma = _factor(generator, 3), _double(0.5, 1.0, 4.0)
        loc = torch.randn(3, generator=generator, dtype=torch.float64)
        x = torch.randn(6, 1, 3, generator=generator, dtype=torch.float64)
        law = D.ScaledMultivariateNormal(loc, L, sigma)
        peer = td.MultivariateNormal(loc.expand(3, 3), scale_tril=sigma[:, None, None] * L)
        assert torch.allclose(law.log_prob(x), peer.log_prob(x), rtol=1e-12)
        assert torch.allclose(law.covariance_matrix, peer.covariance_matrix, rtol=1e-12)
        chosen = D.select(law, torch.tensor([2, 0, 2, 1]))
        assert chosen.stored_arguments()["scale_tril"].shape == (1, 3, 3)
        assert torch.equal(chosen.variance, law.variance[[2, 0, 2, 1]])

    def test_one_chi_square_per_draw(self, generator: torch.Generator) -> None:
        # With a chi-square for each coordinate, squares of two coordinates are uncorrelated; with a
        # shared one E[x^2 y^2] = df^2 / ((df-2)(df-4)) for unit scales.
        n, df = 200_000, 12.0
        law = D.MultiOutputStudentT(df, torch.zeros(2, 2).double(), torch.eye(2).double())
        x = D.sample(law, (n,), generator=generator)
        for other in (x[:, 1, 0], x[:, 0, 1]):
            product = x[:, 0, 0].square() * other.square()
            error = product.std() / math.sqrt(n)
            exact = df**2 / ((df - 2) * (df - 4))
            assert abs(product.mean() - exact) < 4 * error
            assert abs((df / (df - 2)) ** 2 - exact) > 8 * error  # independent draws would fail

    def test_draws_have_the_covariance(self, generator: torch.Generator) -> None:
        n, L = 100_000, _factor(generator, 3)
        loc = _double(1.0, -2.0, 0.5)
        law = D.MultivariateStudentT(9.0, loc, L)
        x = D.sample(law, (n,), generator=generator)
        centred = x - loc
        products = centred[:, :, None] * centred[:, None, :]
        z = (products.mean(0) - law.covariance_matrix) / (products.std(0) / math.sqrt(n))
        assert z.abs().max() < 4.5
        assert ((x.mean(0) - loc) / (x.std(0) / math.sqrt(n))).abs().max() < 4.5

    def test_batched_factors_in_draws(self, generator: torch.Generator) -> None:
        L = _factor(generator, 2, 3)
        each = _double(1.0, 0.1)
        law = D.MultiOutputNormal(torch.zeros(3, 2).double(), L, _double(1.0, 3.0), each)
        x = D.sample(law, (40_000,), generator=generator) / each
        sample = torch.einsum("sbic,sbjc->bij", x, x) / (2 * 40_000)
        exact = law.amplitude.square()[:, None, None] * L @ L.mT
        spread = (exact.diagonal(dim1=-2, dim2=-1)[:, :, None] ** 0.5) * (
            exact.diagonal(dim1=-2, dim2=-1)[:, None, :] ** 0.5
        )
        # The standard error of a covariance entry is at most sqrt(2 / n) of the scale product.
        assert ((sample - exact).abs() / spread).max() < 5 * math.sqrt(2 / 80_000)

    def test_rsample_is_differentiable(self, generator: torch.Generator) -> None:
        L = _factor(generator, 3).requires_grad_()
        loc = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        state = torch.get_rng_state()
        D.MultivariateStudentT(5.0, loc, L).rsample((4,)).sum().backward()
        torch.set_rng_state(state)
        assert loc.grad is not None and torch.equal(loc.grad, torch.full((3,), 4.0).double())
        assert L.grad is not None and torch.isfinite(L.grad).all()

    def test_infinite_variance_warns(self) -> None:
        law = D.MultivariateStudentT(1.5, torch.zeros(2).double(), torch.eye(2).double())
        with pytest.warns(NumericsWarning, match="df <= 2"):
            assert torch.isinf(law.variance).all()
        assert torch.equal(law.mean, torch.zeros(2).double())

    def test_wrong_shapes(self) -> None:
        with pytest.raises(ShapeError, match=r"scale_tril \[\*batch, row, row\]"):
            D.MultivariateStudentT(3.0, torch.zeros(2), torch.eye(3))


_ONE = torch.ones((), dtype=torch.float64)
_LAWS: list[tuple[Any, Any]] = [
    (td.Normal(0.5 * _ONE, 2.0), scipy.stats.norm(0.5, 2.0)),
    (td.Gamma(2.5 * _ONE, 3.0), scipy.stats.gamma(2.5, scale=1 / 3)),
    (td.InverseGamma(2.5 * _ONE, 3.0), scipy.stats.invgamma(2.5, scale=3.0)),
    (pd.InverseGamma(0.4 * _ONE, 3.0 * _ONE), scipy.stats.invgamma(0.4, scale=3.0)),
    (td.LogNormal(0.3 * _ONE, 0.7), scipy.stats.lognorm(0.7, scale=math.exp(0.3))),
    (td.HalfCauchy(2.0 * _ONE), scipy.stats.halfcauchy(scale=2.0)),
    (td.Beta(2.0 * _ONE, 0.7), scipy.stats.beta(2.0, 0.7)),
    (td.Weibull(2.0 * _ONE, 1.5), scipy.stats.weibull_min(1.5, scale=2.0)),
    (td.Exponential(2.0 * _ONE), scipy.stats.expon(scale=0.5)),
]


class TestCdf:
    @pytest.mark.parametrize(("law", "peer"), _LAWS, ids=lambda v: type(v).__name__)
    def test_against_scipy(self, law: Any, peer: Any) -> None:
        q = _double(1e-9, 0.02, 0.5, 0.9, 1 - 1e-6)
        x = torch.as_tensor(peer.ppf(q.numpy()))
        assert torch.allclose(D.icdf(law, q), x, rtol=1e-8, atol=1e-12)
        assert torch.allclose(D.cdf(law, x), q, rtol=1e-9, atol=1e-15)

    def test_normal_keeps_its_lower_tail(self) -> None:
        value = D.cdf(td.Normal(0.0 * _ONE, 1.0), _double(-20.0)).item()
        assert value == pytest.approx(scipy.stats.norm.cdf(-20.0), rel=1e-10)

    def test_numeric_inversion_of_a_mixture(self) -> None:
        law = td.MixtureSameFamily(
            td.Categorical(_double(0.3, 0.7)), td.Normal(_double(-50.0, 2.0), _double(0.1, 1.0))
        )
        q = _double(1e-12, 0.1, 0.2999, 0.31, 0.9, 1 - 1e-12)
        x = D.icdf(law, q)
        assert torch.allclose(D.cdf(law, x), q, rtol=1e-12)
        ends = D.icdf(law, _double(0.0, 1.0))
        assert ends.tolist() == [-math.inf, math.inf]

    def test_numeric_inversion_on_a_bounded_support(self) -> None:
        class Arcsine(td.Distribution):
            """A law without icdf of its own, on (2, 5)."""

            support = td.constraints.interval(2.0, 5.0)
            arg_constraints: dict[str, Any] = {}

            def cdf(self, value: Tensor) -> Tensor:
                return 2 / math.pi * torch.asin(((value - 2) / 3).clamp(0, 1).sqrt())

            def log_prob(self, value: Tensor) -> Tensor:
                return -math.log(math.pi) - 0.5 * ((value - 2) * (5 - value)).log()

        q = _double(1e-8, 0.25, 0.5, 0.999)
        expected = 2 + 3 * torch.sin(math.pi / 2 * q).square()
        assert torch.allclose(D.icdf(Arcsine(), q), expected, rtol=1e-12)
        assert D.icdf(Arcsine(), _double(0.0, 1.0)).tolist() == [2.0, 5.0]

    def test_implicit_gradients(self) -> None:
        loc, q = _double(-1.0, 2.0).requires_grad_(), _double(0.1, 0.6, 0.95).requires_grad_()

        def quantile(loc: Tensor, q: Tensor) -> Tensor:
            mixing = td.Categorical(_double(0.3, 0.7))
            return D.icdf(td.MixtureSameFamily(mixing, td.Normal(loc, _double(0.6, 1.0))), q)

        assert torch.autograd.gradcheck(quantile, (loc, q))
        rate = _double(2.0).requires_grad_()
        for cls in (td.Gamma, td.InverseGamma):
            assert torch.autograd.gradcheck(
                lambda r, p, cls=cls: D.icdf(cls(_double(2.5), r), p), (rate, q)
            )

    def test_missing_derivatives_are_errors(self) -> None:
        a = _double(2.0).requires_grad_()
        with pytest.raises(CapabilityError, match="no derivative in the concentration"):
            D.icdf(td.Gamma(a, _double(1.0)), _double(0.5))
        with pytest.raises(CapabilityError, match="Beta cdf has no derivatives"):
            D.cdf(td.Beta(a, _double(1.0)), _double(0.5))

    def test_refusals(self) -> None:
        joint = td.MultivariateNormal(torch.zeros(2), torch.eye(2))
        with pytest.raises(CapabilityError, match="one-dimensional law, got MultivariateNormal"):
            D.cdf(joint, torch.zeros(2))
        with pytest.raises(CapabilityError, match="no distribution function is known for VonMises"):
            D.cdf(td.VonMises(0.0, 1.0), torch.tensor(0.0))
        with pytest.raises(DataError, match=r"\[0, 1\]"):
            D.icdf(td.Normal(0.0, 1.0), torch.tensor(1.5))
        with pytest.raises(CapabilityError, match="marginals of Dirichlet are not known"):
            D.marginals(td.Dirichlet(torch.ones(3)))

    def test_marginals(self) -> None:
        base = td.Normal(torch.zeros(2, 3), 1.0)
        assert D.marginals(td.Independent(base, 1)).batch_shape == (2, 3)
        assert D.marginals(base) is base


class TestSampling:
    @pytest.mark.parametrize(
        "law",
        [
            *(law for law, _ in _LAWS),
            D.StudentT(3.0 * _ONE, 1.0, 2.0),
            td.Gamma(0.3 * _ONE, 2.0),
        ],
        ids=lambda law: type(law).__name__,
    )
    def test_agrees_with_the_cdf(self, law: Any) -> None:
        x = D.sample(law, (20_000,), generator=torch.Generator().manual_seed(11))
        result = scipy.stats.kstest(D.cdf(law, x).numpy(), "uniform")
        assert result.pvalue > 1e-4  # eleven fixed seeds: one false alarm in a thousand suites

    def test_seeds_and_global_stream(self) -> None:
        laws = [
            td.Normal(torch.zeros(3), 1.0),
            td.Weibull(torch.ones(3), 2.0),
            td.MultivariateNormal(torch.zeros(3), torch.eye(3)),
            td.Independent(td.LogNormal(torch.zeros(3), 1.0), 1),
            D.ScaledMultivariateNormal(torch.zeros(3), torch.eye(3), 2.0),
        ]
        before = torch.get_rng_state()
        for law in laws:
            first, again, other = (
                D.sample(law, (4,), generator=torch.Generator().manual_seed(seed))
                for seed in (1, 1, 2)
            )
            assert first.shape == (4, 3)
            assert torch.equal(first, again) and not torch.equal(first, other)
        assert torch.equal(before, torch.get_rng_state())

    def test_generator_advances_and_threads_do_not_mix(self) -> None:
        law = td.Gamma(torch.ones(5), 1.0)
        g = torch.Generator().manual_seed(0)
        assert not torch.equal(D.sample(law, generator=g), D.sample(law, generator=g))
        alone = D.sample(law, (1000,), generator=torch.Generator().manual_seed(3))
        found: dict[int, Tensor] = {}

        def draw(k: int) -> None:
            found[k] = D.sample(law, (1000,), generator=torch.Generator().manual_seed(3))

        threads = [threading.Thread(target=draw, args=(k,)) for k in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(found[k], alone) for k in range(4))


class TestMixtures:
    def test_against_torch(self, generator: torch.Generator) -> None:
        log_w = torch.randn(4, generator=generator, dtype=torch.float64)
        loc = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        scale = torch.rand(4, 3, generator=generator, dtype=torch.float64) + 0.2
        parts = td.Normal(loc, scale)
        peer = td.MixtureSameFamily(
            td.Categorical(logits=log_w.expand(3, 4)), td.Normal(loc.T, scale.T)
        )
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        assert torch.allclose(D.mixture_log_prob(parts, log_w, x), peer.log_prob(x), rtol=1e-12)
        assert torch.allclose(D.mixture_cdf(parts, log_w, x), peer.cdf(x), rtol=1e-10)
        assert torch.allclose(D.mixture_mean(parts, log_w), peer.mean, rtol=1e-12)
        assert torch.allclose(D.mixture_variance(parts, log_w), peer.variance, rtol=1e-12)
        q = _double(0.01, 0.5, 0.99)[:, None]
        x = D.mixture_icdf(parts, log_w, q)
        assert x.shape == (3, 3)
        assert torch.allclose(D.mixture_cdf(parts, log_w, x), q.expand(3, 3), rtol=1e-12)
        # Weights of their own for each entry.
        each = log_w[:, None] + torch.randn(4, 3, generator=generator, dtype=torch.float64)
        got = D.mixture_log_prob(parts, each, x)
        for k in range(3):
            one = D.mixture_log_prob(td.Normal(loc[:, k], scale[:, k]), each[:, k], x[:, k])
            assert torch.allclose(got[:, k], one)

    def test_joint_components(self, generator: torch.Generator) -> None:
        parts = D.ScaledMultivariateNormal(
            torch.zeros(3).double(), _factor(generator, 3), _double(0.5, 2.0)
        )
        x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        log_w = _double(0.2, 0.8).log()
        each = torch.stack([D.select(parts, k).log_prob(x) for k in range(2)])
        expected = torch.logsumexp(each + log_w[:, None], 0)
        assert torch.allclose(D.mixture_log_prob(parts, log_w, x), expected, rtol=1e-12)
        assert D.mixture_variance(parts, log_w).shape == (3,)

    def test_quantiles_with_distant_components_and_ends(self) -> None:
        parts = td.Normal(_double(-1e6, 0.0, 1e9), _double(1e-3, 1.0, 1e3))
        log_w = _double(0.25, 0.5, 0.25).log()
        q = _double(0.1, 0.26, 0.5, 0.74, 0.9)
        assert torch.allclose(D.mixture_cdf(parts, log_w, D.mixture_icdf(parts, log_w, q)), q)
        assert D.mixture_icdf(parts, log_w, _double(0.0, 1.0)).tolist() == [-math.inf, math.inf]

    def test_components_without_weight_do_not_matter(self) -> None:
        parts = D.StudentT(_double(4.0, 0.5), _double(0.0, 0.0), _double(1.0, 1e8))
        log_w = _double(0.0, -math.inf)
        one = D.StudentT(*_double(4.0, 0.0, 1.0))
        q = _double(0.01, 0.7)
        assert torch.allclose(D.mixture_icdf(parts, log_w, q), D.icdf(one, q), rtol=1e-12)
        with pytest.warns(NumericsWarning):
            assert D.mixture_variance(parts, log_w).item() == pytest.approx(2.0)

    def test_gradients(self) -> None:
        loc = _double(-1.0, 0.5, 2.0).requires_grad_()
        log_w, q = _double(0.1, 0.4, -1.0).requires_grad_(), _double(0.2, 0.9).requires_grad_()

        def quantile(loc: Tensor, log_w: Tensor, q: Tensor) -> Tensor:
            return D.mixture_icdf(td.Normal(loc, _double(1.0)), log_w, q)

        assert torch.autograd.gradcheck(quantile, (loc, log_w, q))

    def test_shape_errors(self) -> None:
        with pytest.raises(ShapeError, match=r"\[component, \*obs\]"):
            D.mixture_mean(td.Normal(0.0, 1.0), torch.zeros(1))
        with pytest.raises(ShapeError, match="log weights"):
            D.mixture_mean(td.Normal(torch.zeros(2), 1.0), torch.zeros(2, 1))


class TestBatchesAndStorage:
    @pytest.mark.parametrize(
        "law",
        [
            td.LogNormal(torch.zeros(2, 3), 1.0),
            pd.Normal(torch.zeros(2, 3, 4), 1.0).to_event(1),
            td.MultivariateNormal(torch.zeros(3), torch.eye(3)).expand((2, 3)),
            td.Categorical(logits=torch.zeros(2, 3, 4)),
            pd.Dirichlet(torch.ones(2, 3, 4)),
            D.StudentT(torch.ones(2, 3), 0.0, 1.0),
            D.MultivariateStudentT(4.0, torch.zeros(3, 2), torch.eye(2)).expand((2, 3)),
            D.MultiOutputNormal(torch.zeros(3, 4, 2), torch.eye(4), torch.ones(2, 3)),
            D.ScaledMultivariateNormal(torch.zeros(4), torch.eye(4), torch.ones(2, 3)),
        ],
        ids=lambda law: type(law).__name__,
    )
    def test_select_flatten_and_file(self, law: Any) -> None:
        x = D.sample(law, generator=torch.Generator().manual_seed(0))
        density = law.log_prob(x)
        flat = D.flatten_batch(law, 2)
        assert flat.batch_shape == (6,)
        assert torch.allclose(flat.log_prob(x.flatten(0, 1)), density.flatten(0, 1))
        index = torch.tensor([1, 0, 1])
        assert torch.allclose(D.select(law, index).log_prob(x[index]), density[index])
        assert torch.allclose(D.select(law, 1).log_prob(x[1]), density[1])
        reshaped = D.map_batch(law, lambda v: v.reshape(v.shape[:1] + (3, 1) + v.shape[2:]))
        assert torch.allclose(reshaped.log_prob(x.unsqueeze(2)), density.unsqueeze(2))
        again = unpack(*pack(law))
        assert type(again) is type(law) and again.batch_shape == law.batch_shape
        assert torch.equal(again.log_prob(x), density)

    def test_refusals(self) -> None:
        with pytest.raises(ShapeError, match="batch shape"):
            D.select(td.Normal(0.0, 1.0), 0)
        with pytest.raises(ShapeError, match="at least 2 batch dims"):
            D.flatten_batch(td.Normal(torch.zeros(3), 1.0), 2)
        with pytest.raises(CapabilityError, match="depends on other arguments"):
            D.select(pd.Delta(torch.zeros(2)), 0)

"""Laws of a variance: densities, quantiles, moments, checks and conversion."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as pd
import pytest
import scipy.stats
import torch
import torch.distributions as td
from scipy import integrate
from torch import Tensor
from torch.distributions import kl_divergence

from probkit import distributions as D
from probkit.errors import DataError, ShapeError
from probkit.files import pack, unpack
from probkit.models.scale_laws import (
    BurrXII,
    Gamma,
    HalfCauchy,
    InverseGamma,
    LogNormal,
    OtherLaw,
    PointMass,
    as_scale_law,
)


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


_LAWS: list[tuple[Any, Any]] = [
    (InverseGamma(2.5, 3.0), scipy.stats.invgamma(2.5, scale=3.0)),
    (InverseGamma(0.3, 1e-3), scipy.stats.invgamma(0.3, scale=1e-3)),
    (Gamma(0.4, 2.0), scipy.stats.gamma(0.4, scale=0.5)),
    (LogNormal(0.5, 1.2), scipy.stats.lognorm(1.2, scale=math.exp(0.5))),
    (BurrXII(2.0, 1.0), scipy.stats.burr12(2.0, 1.0)),
    (BurrXII(3.0, 2.0, 4.0), scipy.stats.burr12(3.0, 2.0, scale=4.0)),
]
_IDS = [f"{type(law).__name__}-{k}" for k, (law, _) in enumerate(_LAWS)]


class TestNamedLaws:
    @pytest.mark.parametrize(("law", "peer"), _LAWS, ids=_IDS)
    def test_against_scipy(self, law: Any, peer: Any) -> None:
        q = _double(1e-6, 0.1, 0.5, 0.99)
        x = torch.as_tensor(peer.ppf(q.numpy()))
        assert torch.allclose(law.log_prob(x), torch.as_tensor(peer.logpdf(x)), rtol=1e-10)
        assert torch.allclose(law.cdf(x), q, rtol=1e-9)
        assert torch.allclose(law.icdf(q), x, rtol=1e-8)
        assert law.mean.item() == pytest.approx(float(peer.mean()), rel=1e-9)
        # SciPy computes the Burr variance by quadrature, and gives NaN where it is infinite.
        variance = float(peer.var())
        if math.isfinite(variance):
            assert law.variance.item() == pytest.approx(variance, rel=1e-6)

    @pytest.mark.parametrize("s", [0.5, 3.0])
    def test_half_cauchy_is_that_of_sigma(self, s: float) -> None:
        law, sigma = HalfCauchy(s), scipy.stats.halfcauchy(scale=s)
        x = _double(1e-8, 0.3, 7.0, 1e6)
        root = x.sqrt()
        assert torch.allclose(law.cdf(x), torch.as_tensor(sigma.cdf(root.numpy())), rtol=1e-12)
        # Change of variables: p(x) = p(sigma) / (2 sigma).
        density = torch.as_tensor(sigma.logpdf(root.numpy())) - torch.log(2 * root)
        assert torch.allclose(law.log_prob(x), density, rtol=1e-12)
        assert torch.allclose(law.icdf(law.cdf(x)), x, rtol=1e-8)
        assert law.mean.item() == law.variance.item() == math.inf

    @pytest.mark.parametrize("law", [*(law for law, _ in _LAWS), HalfCauchy(2.0)])
    def test_density_of_the_log_integrates_to_the_cdf(self, law: Any) -> None:
        def density(u: float) -> float:
            return float(law.log_prob_of_log(torch.tensor(u, dtype=torch.float64)).exp())

        low, high = (law.icdf(_double(q)).log().item() for q in (0.2, 0.7))
        assert integrate.quad(density, low, high, epsabs=1e-11)[0] == pytest.approx(0.5, abs=1e-9)

    @pytest.mark.parametrize("law", [*(law for law, _ in _LAWS), HalfCauchy(2.0)])
    def test_draws(self, law: Any) -> None:
        x = D.sample(law, (20_000,), generator=torch.Generator().manual_seed(5))
        assert scipy.stats.kstest(law.cdf(x).numpy(), "uniform").pvalue > 1e-4

    def test_extreme_arguments_stay_finite(self) -> None:
        u = _double(-600.0, 600.0)
        for law in (BurrXII(2.0, 1.0), HalfCauchy(1.0), LogNormal(0.0, 1.0)):
            assert torch.isfinite(law.log_prob_of_log(u)).all()
        assert BurrXII(2.0, 1.0).log_prob_of_log(u)[1].item() == pytest.approx(-1200 + math.log(2))

    def test_infinite_moments(self) -> None:
        a = _double(0.5, 1.0, 1.5, 2.0, 2.5).requires_grad_()
        law = InverseGamma(a, _double(1.0))
        assert torch.isinf(law.mean).tolist() == [True, True, False, False, False]
        assert torch.isinf(law.variance).tolist() == [True, True, True, True, False]
        (law.mean[2] + law.variance[4]).backward()
        assert a.grad is not None and torch.isfinite(a.grad).all()
        assert torch.isinf(BurrXII(2.0, _double(0.5, 1.0)).mean).tolist() == [True, False]
        assert torch.isinf(BurrXII(2.0, _double(1.0, 1.5)).variance).tolist() == [True, False]

    def test_point_mass(self) -> None:
        law = PointMass(2.0)
        assert law.sample((3,)).tolist() == [2.0, 2.0, 2.0]
        assert law.log_prob(_double(2.0, 1.0)).tolist() == [0.0, -math.inf]
        assert law.cdf(_double(1.9, 2.0)).tolist() == [0.0, 1.0]
        assert law.icdf(_double(0.3)).tolist() == [2.0]
        assert (law.mean.item(), law.variance.item()) == (2.0, 0.0)

    def test_gradients(self) -> None:
        u = _double(-1.0, 0.3, 2.0)
        for cls, values in (
            (InverseGamma, (2.0, 1.5)),
            (Gamma, (2.0, 1.5)),
            (LogNormal, (0.3, 1.5)),
            (BurrXII, (2.0, 1.0, 1.5)),
            (HalfCauchy, (2.0,)),
        ):
            parameters = tuple(_double(v).requires_grad_() for v in values)
            assert torch.autograd.gradcheck(
                lambda *p, cls=cls: cls(*p).log_prob_of_log(u), parameters
            )


class TestParameters:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: InverseGamma(-1.0, 1.0), r"concentration \(alpha\) must be > 0, got -1"),
            (lambda: InverseGamma(1.0, 0.0), r"rate \(beta\) must be > 0, got 0"),
            (lambda: BurrXII(0.0, 1.0), "BurrXII: c must be > 0, got 0"),
            (lambda: BurrXII(1.0, -2.0), "BurrXII: d must be > 0, got -2"),
            (lambda: HalfCauchy(_double(1.0, -3.0)), "HalfCauchy: scale must be > 0, got -3"),
            (lambda: LogNormal(math.nan, 1.0), "LogNormal: loc must be finite, got nan"),
            (lambda: Gamma(math.inf, 1.0), r"concentration \(alpha\) must be > 0, got inf"),
            (lambda: PointMass(0.0), "PointMass: value must be > 0"),
        ],
    )
    def test_bad_values(self, make: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            make()

    def test_shapes_dtypes_and_expansion(self) -> None:
        law = InverseGamma(_double(1.0, 2.0)[:, None], _double(1.0, 2.0, 3.0))
        assert law.batch_shape == (2, 3) and law.rate.dtype == torch.float64
        assert InverseGamma(torch.tensor(2.0), 0.1).rate.dtype == torch.float32
        # A Python number beside a float64 tensor is not rounded to float32.
        assert InverseGamma(_double(2.0), 0.1).rate.item() == 0.1
        assert BurrXII(2, 1).c.dtype == torch.float64
        assert law.expand((4, 2, 3)).batch_shape == (4, 2, 3)
        with pytest.raises(ShapeError, match=r"concentration \(2,\), rate \(3,\)"):
            InverseGamma(torch.ones(2), torch.ones(3))

    def test_files_and_selection(self) -> None:
        for law, _ in _LAWS:
            wide = law.expand((2, 3))
            again = unpack(*pack(wide))
            assert type(again) is type(law)
            x = _double(0.5)
            assert torch.equal(again.log_prob(x), wide.log_prob(x))
            assert D.select(wide, torch.tensor([1, 0, 1])).batch_shape == (3, 3)
        other = unpack(*pack(OtherLaw(td.Weibull(_double(1.0), _double(2.0)))))
        assert D.select(other, torch.tensor([0, 0])).batch_shape == (2,)


class TestDivergence:
    def test_inverse_gamma(self) -> None:
        kl = kl_divergence(InverseGamma(3.0, 4.0), InverseGamma(2.0, 1.5))
        assert kl.item() == pytest.approx(0.316295660562, abs=5e-13)
        same = InverseGamma(3.0, 4.0)
        assert kl_divergence(same, same).item() == pytest.approx(0.0, abs=1e-15)

    def test_gamma_and_log_normal_by_integration(self) -> None:
        for p, q in (
            (Gamma(3.0, 4.0), Gamma(2.0, 1.5)),
            (LogNormal(0.3, 0.8), LogNormal(-0.2, 1.5)),
        ):

            def term(u: float, p: Any = p, q: Any = q) -> float:
                at = torch.tensor(u, dtype=torch.float64)
                log_p = p.log_prob_of_log(at)
                return float(log_p.exp() * (log_p - q.log_prob_of_log(at)))

            assert kl_divergence(p, q).item() == pytest.approx(
                integrate.quad(term, -40, 12, points=[-1.0, 0.0, 1.0])[0], abs=1e-8
            )

    def test_entropy(self) -> None:
        peer = scipy.stats.invgamma(2.5, scale=3.0)
        assert InverseGamma(2.5, 3.0).entropy().item() == pytest.approx(float(peer.entropy()))


class TestConversion:
    def test_known_classes(self) -> None:
        one = _double(1.5)
        for law, cls in (
            (td.InverseGamma(one, one), InverseGamma),
            (pd.InverseGamma(one, one), InverseGamma),
            (td.Gamma(one, one), Gamma),
            (td.Chi2(one), Gamma),
            (td.LogNormal(one, one), LogNormal),
            (td.HalfCauchy(one), HalfCauchy),
            (pd.Delta(one), PointMass),
        ):
            converted = as_scale_law(law)
            assert type(converted) is cls
            if cls not in (HalfCauchy, PointMass):
                x = _double(0.3, 4.0)
                assert torch.allclose(converted.log_prob(x), law.log_prob(x))
        law = InverseGamma(2.0, 1.0)
        assert as_scale_law(law) is law

    def test_any_positive_law(self) -> None:
        law = as_scale_law(td.Uniform(_double(0.5), _double(3.0)))
        assert isinstance(law, OtherLaw)
        assert law.log_prob(_double(0.1, 1.0, 4.0)).tolist() == [
            -math.inf,
            pytest.approx(-math.log(2.5)),
            -math.inf,
        ]
        assert as_scale_law(td.HalfNormal(_double(1.0))).log_prob(_double(0.0)).isfinite().all()

    @pytest.mark.parametrize(
        ("law", "message"),
        [
            (td.Normal(0.0, 1.0), "positive support, got Normal"),
            (td.Uniform(-1.0, 1.0), "positive support, got Uniform"),
            (td.Poisson(1.0), "discrete"),
            (td.Dirichlet(torch.ones(3)), "one-dimensional, got Dirichlet"),
            (2.0, r"got float; use PointMass\(v\)"),
        ],
    )
    def test_refusals(self, law: Any, message: str) -> None:
        with pytest.raises(DataError, match=message):
            as_scale_law(law)

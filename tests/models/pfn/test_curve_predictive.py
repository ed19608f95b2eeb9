"""Laws of the metric: every output form against quadrature of the density, and each other."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.models.pfn.bars import BarDistribution
from probkit.models.pfn.curve_predictive import CurvePredictive
from probkit.models.pfn.normalizer import CurveNormalizer

KINDS = {
    "none": None,
    "accuracy": CurveNormalizer.accuracy(),
    "error": CurveNormalizer.error(),
    "log loss": CurveNormalizer.log_loss(2.3),
    "logistic": CurveNormalizer(False, -math.inf, -1.0, 1.0, math.inf),
}


def laws(kind, *, borders=None, single=False, curves=2, steps=3):
    g = torch.Generator().manual_seed(3)
    if borders is None:  # tails outside [0, 1], as the shipped borders have them
        inner = torch.linspace(-0.02, 1.03, 40, dtype=torch.float64)
        borders = torch.cat([inner.new_tensor([-0.1]), inner, inner.new_tensor([1.2])])
    logits = 2 * torch.randn(curves, steps, len(borders) - 1, generator=g, dtype=torch.float64)
    bars = BarDistribution(borders, logits)
    t = torch.arange(1.0, steps + 1, dtype=torch.float64).expand(curves, -1)
    return CurvePredictive(bars, KINDS[kind], t, single)


def grid(law):
    """Midpoints and widths of a fine grid over all the metric's mass, per entry."""
    if law.normalizer is None:
        edges = torch.linspace(-1.5, 2.5, 40_001, dtype=torch.float64)
    else:
        g = torch.linspace(1e-9, 1 - 1e-9, 40_001, dtype=torch.float64)
        edges = law.normalizer.denormalize(g).sort().values
    return (edges[1:] + edges[:-1]) / 2, edges.diff()


TAILS_INSIDE = torch.tensor([0.0, 0.2, 0.3, 0.5, 0.6, 0.9, 1.1], dtype=torch.float64)


@pytest.mark.parametrize("borders", [None, TAILS_INSIDE], ids=["inner", "tails"])
@pytest.mark.parametrize("kind", KINDS)
def test_moments_and_improvement_are_integrals_of_the_density(kind, borders):
    law = laws(kind, borders=borders)
    y, width = grid(law)
    density = law.log_prob(y[:, None, None]).exp()
    mass = density * width[:, None, None]
    assert torch.allclose(mass.sum(0), torch.ones(2, 3).double(), atol=4e-3)
    mean = (y[:, None, None] * mass).sum(0)
    assert torch.allclose(law.mean, mean, atol=4e-3)
    second = (y[:, None, None].square() * mass).sum(0)
    assert torch.allclose(law.variance, second - mean.square(), rtol=5e-3, atol=1e-3)
    best = float(mean[0, 0])
    sign = -1.0 if law.normalizer is not None and law.normalizer.minimize else 1.0
    gain = (sign * (y - best)).clamp_min(0)[:, None, None]
    assert torch.allclose(law.ei(best), (gain * mass).sum(0), atol=4e-3)
    above = mass[y > best].sum(0)
    assert torch.allclose(law.prob_above(best), above, atol=2e-3)
    better = 1 - above if sign < 0 else above
    assert torch.allclose(law.prob_better(best), better, atol=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_quantiles_invert_the_cdf(kind):
    law = laws(kind)
    q = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)
    values = law.quantile(q)
    assert values.shape == (4, 2, 3) and bool((values.diff(dim=0) > 0).all())
    assert torch.allclose(law.cdf(values), q[:, None, None].expand(4, 2, 3), atol=1e-5)
    assert torch.equal(law.median, law.quantile(0.5))


@pytest.mark.parametrize("kind", ["accuracy", "log loss"])
def test_samples_follow_the_law(kind):
    law = laws(kind)
    n = 20_000
    draws = law.sample(n, rng=0)
    z = (draws.mean(0) - law.mean) / (law.variance / n).sqrt()
    assert float(z.abs().max()) < 4.5  # six entries
    assert torch.equal(draws, law.sample(n, rng=0))


def test_nothing_lies_beyond_the_hard_bounds():
    law = laws("accuracy")
    assert law.cdf(1.0).eq(1).all() and law.cdf(0.0).eq(0).all()
    assert law.log_prob(1.1).eq(-math.inf).all() and law.log_prob(0.5).isfinite().all()
    loss = laws("log loss")
    assert loss.cdf(-0.1).eq(0).all() and loss.quantile(0.999999).isfinite().all()
    free = laws("none")
    assert bool((free.cdf(1.0) < 1).all())


def test_a_missing_jacobian_would_be_seen(monkeypatch):
    monkeypatch.setattr(CurveNormalizer, "log_jacobian", lambda self, y: torch.zeros_like(y))
    law = laws("accuracy")
    y, width = grid(law)
    mass = (law.log_prob(y[:, None, None]).exp() * width[:, None, None]).sum(0)
    assert bool((mass - 1).abs().gt(0.01).any())


def test_bounds_of_each_curve_agree_with_one_at_a_time():
    y0 = torch.tensor([2.3, 0.9], dtype=torch.float64)
    many = laws("none")
    law = CurvePredictive(many.bars, CurveNormalizer.log_loss(y0), many.t)
    for k in range(2):
        bars = BarDistribution(law.bars.borders, law.bars.logits[k : k + 1])
        one = CurvePredictive(bars, CurveNormalizer.log_loss(float(y0[k])), many.t[:1])
        for form in ("mean", "variance", "median"):
            assert torch.allclose(getattr(law, form)[k], getattr(one, form)[0])
        assert torch.allclose(law.ei(0.5)[k], one.ei(0.5)[0])
        assert torch.allclose(law.log_prob(0.4)[k], one.log_prob(0.4)[0])


def test_one_curve_has_no_curve_dim():
    many, one = laws("accuracy", curves=1), laws("accuracy", curves=1, single=True)
    assert one.mean.shape == (3,) and one.quantile([0.1, 0.9]).shape == (2, 3)
    assert one.sample(5, rng=0).shape == (5, 3)
    y = torch.tensor([0.2, 0.4, 0.6])
    assert torch.equal(one.log_prob(y), many.log_prob(y[None])[0])
    assert one.log_prob(torch.full((7, 3), 0.3)).shape == (7, 3)


def test_bad_input():
    law = laws("accuracy")
    with pytest.raises(DataError, match="levels strictly between 0 and 1, got 1.0"):
        law.quantile(1.0)
    with pytest.raises(ShapeError, match=r"expected \[\*, \*obs\] with obs = \(2, 3\)"):
        law.log_prob(torch.zeros(4))
    with pytest.raises(ShapeError, match=r"obs = \(2, 3\), got \(3, 3\)"):
        law.cdf(torch.zeros(3, 3))
    with pytest.raises(CapabilityError, match="use cdf or log_prob here"):
        _ = law.probs
    with pytest.raises(DataError, match="whole number of draws"):
        law.sample(0, rng=0)

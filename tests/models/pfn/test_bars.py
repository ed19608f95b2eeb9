"""The bar distribution against quadrature, and its tails against closed forms."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from probkit.errors import DataError, ShapeError
from probkit.models.pfn import BarDistribution
from probkit.models.pfn.bars import borders_from_sample, check_borders

GRID = torch.linspace(-14, 14, 2_000_001, dtype=torch.float64)
STEP = float(GRID[1] - GRID[0])


@pytest.fixture(scope="module")
def law():
    generator = torch.Generator().manual_seed(1)
    borders = torch.randn(12, generator=generator, dtype=torch.float64).sort().values
    logits = torch.randn(3, 11, generator=generator, dtype=torch.float64)
    return BarDistribution(borders, logits)


@pytest.fixture(scope="module")
def density(law):
    return law.log_prob(GRID[:, None]).exp()


def test_the_density_integrates_to_one(density):
    # a Riemann sum is off by at most a step times the density at each of the jumps
    assert (density.sum(0) * STEP - 1).abs().max() < 1e-4
    assert density.shape[1] == 3


def test_the_pieces_integrate_exactly():
    """Inner bars hold exactly their probability, tails one half inside their bar, half outside."""
    borders = torch.tensor([-1.0, 0.0, 1.0, 3.0]).double()
    law = BarDistribution(borders, torch.tensor([0.2, 0.5, 0.3]).double().log())
    at = law.cdf(borders)
    expected = torch.tensor([0.1, 0.2, 0.7, 0.85]).double()
    assert torch.allclose(at, expected, atol=1e-12)


def test_moments_equal_quadrature(law, density):
    mean = (GRID[:, None] * density).sum(0) * STEP
    variance = ((GRID[:, None] - mean).square() * density).sum(0) * STEP
    assert (law.mean - mean).abs().max() < 1e-4
    assert (law.variance - variance).abs().max() < 1e-4


@pytest.mark.parametrize("threshold", [-5.0, -1.5, -0.3, 0.0, 0.7, 1.2, 4.0])
def test_improvement_equals_quadrature(law, density, threshold):
    gain = ((GRID[:, None] - threshold).clamp_min(0) * density).sum(0) * STEP
    above = ((GRID[:, None] > threshold) * density).sum(0) * STEP
    assert torch.allclose(law.expected_improvement(threshold), gain, rtol=1e-4, atol=1e-4)
    assert (law.prob_above(threshold) - above).abs().max() < 1e-4
    assert torch.allclose(law.prob_above(threshold), 1 - law.cdf(threshold), atol=1e-12)


def test_quantiles_invert_the_distribution_function(law):
    q = torch.linspace(0.0005, 0.9995, 777, dtype=torch.float64)
    assert (law.cdf(law.quantile(q)) - q[:, None]).abs().max() < 1e-12


def test_quantiles_have_gradients_at_borders_too():
    """The quantile moves against the distribution function: dy = -dF(y) / density."""
    logits = torch.tensor([0.3, -0.2, 0.1, 0.4]).double().requires_grad_()
    borders = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).double()
    edge = logits.detach().softmax(-1).cumsum(-1)[1]
    for q in (edge, torch.tensor(0.1).double(), torch.tensor(0.4), torch.tensor(0.97).double()):
        law = BarDistribution(borders, logits)
        y = law.icdf(q)
        grad = torch.autograd.grad(y, logits)[0]
        assert grad.isfinite().all()
        slope = torch.autograd.grad(law.cdf(y.detach()), logits)[0]
        density = law.log_prob(y.detach()).exp()
        if q is not edge:
            assert torch.allclose(grad, -slope / density, atol=1e-6)


def test_samples_follow_the_law(law):
    drawn = law.draw(20_000, rng=torch.Generator().manual_seed(0))
    # P(Y <= y) of draws is uniform: the Kolmogorov statistic stays below its 0.1 % point
    for k in range(3):
        u = law.cdf(drawn)[:, k].sort().values
        steps = torch.arange(1, len(u) + 1) / len(u)
        assert (u - steps).abs().max() * math.sqrt(len(u)) < 1.95


def test_tails_are_half_normal(law):
    """Far out the log density falls as the square of the distance to the anchor."""
    scale = float(law.tail_scales[1])
    anchor = float(law.tail_anchors[1])
    d = torch.tensor([1.0, 2.0, 3.0]).double() * scale
    fall = law.log_prob((anchor + d)[:, None])
    assert torch.allclose(fall[0] - fall[1], torch.tensor(1.5).double(), atol=1e-9)
    assert torch.allclose(fall[1] - fall[2], torch.tensor(2.5).double(), atol=1e-9)


def test_a_law_that_ignores_its_tails_is_caught(law, density):
    """The mutant: moments with the middles of the outer bars."""
    middles = (law.borders[1:] + law.borders[:-1]) / 2
    wrong = law.probs @ middles
    mean = (GRID[:, None] * density).sum(0) * STEP
    assert (wrong - mean).abs().max() > 1e-2


def test_float32_keeps_the_variance_of_a_narrow_law():
    borders = torch.linspace(0.0, 1.0, 2001) + 10
    logits = torch.full((2000,), -40.0)
    logits[1200] = 0.0
    law = BarDistribution(borders, logits)
    assert law.variance.item() == pytest.approx(0.0005**2 / 12, rel=0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(0, 10_000))
def test_any_law_is_coherent(bars, seed):
    generator = torch.Generator().manual_seed(seed)
    borders = torch.rand(bars + 1, generator=generator, dtype=torch.float64).cumsum(0)
    borders = borders + 1e-3 * torch.arange(bars + 1)
    law = BarDistribution(borders, 3 * torch.randn(bars, generator=generator, dtype=torch.float64))
    q = torch.rand(20, generator=generator, dtype=torch.float64).sort().values
    y = law.icdf(q)
    assert (y.diff() >= 0).all()
    assert (law.cdf(y) - q).abs().max() < 1e-9
    assert law.variance > 0
    # E max(Y - f, 0) - E max(f - Y, 0) = E Y - f
    f = float(y[7])
    below = law.expected_improvement(f) - (law.mean - f)
    assert below >= -1e-9


def test_borders_follow_the_sample():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(400_000, generator=generator)
    borders = borders_from_sample(y, 100, floor=0.0)
    normal = torch.distributions.Normal(0.0, 1.0)
    mass = normal.cdf(borders).diff()
    assert mass[1:-1].max() / mass[1:-1].min() < 1.15
    # half of each tail of a thousandth lies in its bar
    assert normal.cdf(borders[0]).item() == pytest.approx(0.0005, rel=0.2)
    assert normal.cdf(borders[1]).item() == pytest.approx(0.001, rel=0.2)


def test_the_floor_bounds_the_widths():
    y = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    plain = borders_from_sample(y, 100, floor=0.0).diff()[1:-1].max()
    floored = borders_from_sample(y, 100, floor=0.5).diff()[1:-1].max()
    span = float(y.max() - y.min())
    assert floored < plain
    assert floored < span / 100 / 0.5


def test_outer_bars_do_not_depend_on_extremes():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(200_000, generator=generator)
    outlier = torch.cat([y, torch.tensor([1e4, -1e4])])
    assert torch.allclose(borders_from_sample(y, 50), borders_from_sample(outlier, 50), atol=1e-2)


def test_ties_in_the_sample_are_separated():
    y = torch.cat([torch.zeros(50_000), torch.linspace(-1, 1, 50_000)])
    assert (borders_from_sample(y, 64).diff() > 0).all()


def test_bad_input():
    few = torch.linspace(0, 1, 5)
    with pytest.raises(ShapeError, match=r"logits: expected \[..., bar\] with 3 bars"):
        BarDistribution(torch.arange(4.0), torch.zeros(4))
    with pytest.raises(DataError, match="strictly increasing"):
        check_borders(torch.tensor([0.0, 1.0, 1.0, 2.0]))
    with pytest.raises(ShapeError, match="at least three bars"):
        check_borders(torch.zeros(2))
    law = BarDistribution(torch.arange(4.0), torch.zeros(3))
    with pytest.raises(DataError, match=r"expected probabilities in \[0, 1\]"):
        law.icdf(torch.tensor(1.5))
    with pytest.raises(DataError, match="at least 10000 finite numbers, got 5"):
        borders_from_sample(few, 10)
    with pytest.raises(DataError, match="expected bars >= 3"):
        borders_from_sample(few, 2)


def test_densities_equal_those_of_pfns():
    """The reference implementation's numbers, made by benchmarks/pfn/_bars_fixture.py."""
    path = Path(__file__).parents[2] / "data" / "pfn" / "bars.json"
    told = {k: v for k, v in json.loads(path.read_text()).items() if isinstance(v, list)}
    told = {name: torch.tensor(value) for name, value in told.items()}
    law = BarDistribution(told["borders"], told["logits"])
    assert (law.log_prob(told["y"]) + told["negative_log_density"]).abs().max() < 1e-5
    assert (law.mean - told["mean"]).abs().max() < 1e-5

"""Expected improvement, and the posterior over finitely many values."""

from __future__ import annotations

import math

import pytest
import torch
from botorch.acquisition import qExpectedImprovement
from botorch.exceptions.warnings import NumericsWarning as BotorchNumericsWarning
from botorch.sampling import IIDNormalSampler
from botorch.sampling.get_sampler import get_sampler
from scipy import integrate, stats

from probkit.bo.llm import DiscreteExpectedImprovement, DiscretePosterior, expected_improvement
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.rng import scope


@pytest.mark.parametrize("direction", ["min", "max"])
def test_ei_is_the_closed_form(direction):
    mean = torch.tensor([-2.0, 0.0, 0.3, 1.0, 5.0], dtype=torch.float64)
    sd = torch.tensor([0.5, 1.0, 0.01, 2.0, 1.0], dtype=torch.float64)
    best = 0.31
    found = expected_improvement(mean, sd, best, direction)
    gain = (best - mean if direction == "min" else mean - best).numpy()
    z = gain / sd.numpy()
    closed = torch.tensor(gain * stats.norm.cdf(z) + sd.numpy() * stats.norm.pdf(z))
    torch.testing.assert_close(found.value, closed, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.log, closed.log(), rtol=1e-10, atol=1e-10)
    for k in range(5):

        def integrand(x, k=k):
            improvement = best - x if direction == "min" else x - best
            return max(0.0, improvement) * stats.norm.pdf(x, mean[k], sd[k])

        lo, hi = (-20.0, best) if direction == "min" else (best, 20.0)
        at = [float(mean[k])] if lo < mean[k] < hi else None
        assert integrate.quad(integrand, lo, hi, points=at)[0] == pytest.approx(
            float(found.value[k]), abs=1e-7
        )


def test_the_logarithm_is_exact_where_ei_underflows():
    # EI(z) = phi(z) (1 - |z| Mills(|z|)); its asymptotic series for large |z| (Abramowitz and
    # Stegun 26.2.12): phi(z) / z^2 (1 - 3 / z^2 + 15 / z^4 - ...)
    z = torch.tensor([7.0, 12.0, 40.0, 100.0], dtype=torch.float64)
    found = expected_improvement(z, torch.ones(4), 0.0)
    series = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - 2 * z.log()
    # log(1 - 3 / z^2 + 15 / z^4 - 105 / z^6 + ...): terms up to z^-4 leave less than 60 / z^6
    series += -3 / z**2 + 10.5 / z**4
    assert bool(((found.log - series).abs() < 70 / z**6 + 1e-12 * z**2).all())
    assert float(found.value[3]) == 0.0
    torch.testing.assert_close(found.value[0], found.log[0].exp(), rtol=1e-12, atol=0)


def test_the_switch_to_the_logarithm_is_seamless():
    at = torch.tensor([5.999999, 6.000001], dtype=torch.float64)
    below, above = expected_improvement(at, torch.ones(2), 0.0).value
    # the slope of EI is -Phi(-6) = -9.9e-10; over 2e-6 that is 1.2e-6 of EI
    assert float(below / above - 1) == pytest.approx(2e-6 * 6.3, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0.0], [0.0], 1.0), "standard deviations > 0, got 0.0"),
        (([0.0], [math.nan], 1.0), "standard deviations > 0, got nan"),
        (([0.0], [1.0], 1.0, "up"), "expected 'min' or 'max', got 'up'"),
    ],
)
def test_ei_refuses(arguments, message):
    with pytest.raises(DataError, match=message):
        expected_improvement(*arguments)


def posterior() -> DiscretePosterior:
    values = torch.tensor([[[3.0, 1.0, 2.0]], [[0.0, 0.0, 5.0]]], dtype=torch.float64)
    probs = torch.tensor([[[0.5, 0.2, 0.3]], [[1.0, 0.0, 0.0]]], dtype=torch.float64)
    return DiscretePosterior(values, probs)


def test_a_discrete_posterior_has_exact_moments_and_quantiles():
    post = posterior()
    torch.testing.assert_close(post.mean[:, 0], torch.tensor([2.3, 0.0]).double())
    torch.testing.assert_close(post.variance[:, 0], torch.tensor([0.61, 0.0]).double())
    levels = torch.tensor([0.1, 0.2, 0.21, 0.5, 0.51, 1.0], dtype=torch.float64)
    assert post.quantile(levels)[:, 0, 0].tolist() == [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]
    assert post.quantile(levels)[:, 1, 0].tolist() == [0.0] * 6


def test_its_draws_have_its_law():
    post = posterior()
    sampler = IIDNormalSampler(torch.Size([4000]), seed=3)
    draws = sampler(post)
    assert draws.shape == (4000, 2, 1)
    for value, p in ((1.0, 0.2), (2.0, 0.3), (3.0, 0.5)):
        share = float((draws[:, 0, 0] == value).double().mean())
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / 4000)
    assert bool((draws[:, 1] == 0.0).all())


def test_batches_are_sampled_like_their_elements():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(3, 2, 1, 4, generator=generator, dtype=torch.float64)
    probs = torch.rand(3, 2, 1, 4, generator=generator, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True)
    base = torch.randn(5, 3, 2, 1, generator=generator, dtype=torch.float64)
    together = DiscretePosterior(values, probs).rsample_from_base_samples(torch.Size([5]), base)
    for b in range(3):
        alone = DiscretePosterior(values[b], probs[b])
        expected = alone.rsample_from_base_samples(torch.Size([5]), base[:, b])
        assert torch.equal(together[:, b], expected)


def test_botorch_finds_a_sampler_for_it():
    post = posterior()
    draws = get_sampler(post, torch.Size([256]), seed=1)(post)
    # scrambled Sobol points of 256: the mean is within 4 standard errors of independent draws
    assert abs(float(draws[:, 0, 0].mean()) - 2.3) < 4 * math.sqrt(0.61 / 256)
    with scope(rng=0):
        assert post.rsample(torch.Size([2, 3])).shape == (2, 3, 2, 1)


class Fixed(torch.nn.Module):
    """A model with one posterior, whatever the points."""

    num_outputs = 1
    batch_shape = torch.Size([])

    def __init__(self, post):
        super().__init__()
        self.post = post

    def posterior(self, X, **_):
        return self.post


@pytest.mark.parametrize("maximize", [False, True])
def test_discrete_ei_is_a_sum(maximize):
    values = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
    probs = torch.tensor([[[[0.2, 0.3, 0.5]]]], dtype=torch.float64)
    model = Fixed(DiscretePosterior(values, probs))
    found = DiscreteExpectedImprovement(model, 2.5, maximize=maximize)(torch.zeros(1, 1, 2))
    expected = 0.5 * 1.5 if maximize else 0.2 * 1.5 + 0.3 * 0.5
    assert float(found) == pytest.approx(expected, abs=1e-12)


def test_discrete_ei_agrees_with_monte_carlo():
    values = torch.tensor([[[[1.0, 2.0, 4.0]]]], dtype=torch.float64)
    probs = torch.tensor([[[[0.2, 0.3, 0.5]]]], dtype=torch.float64)
    model = Fixed(DiscretePosterior(values, probs))
    sampler = IIDNormalSampler(torch.Size([4000]), seed=5)
    with pytest.warns(BotorchNumericsWarning, match="qLogExpectedImprovement"):
        sampled = qExpectedImprovement(model, best_f=2.5, sampler=sampler)(torch.zeros(1, 1, 2))
    # the improvement is 1.5 or 0 with equal probability
    assert abs(float(sampled) - 0.75) < 4 * 0.75 / math.sqrt(4000)


def test_discrete_ei_needs_a_discrete_posterior():
    from botorch.models import SingleTaskGP

    x = torch.rand(3, 2, generator=torch.Generator().manual_seed(0)).double()
    acquisition = DiscreteExpectedImprovement(SingleTaskGP(x, x[:, :1]), 0.0)
    with pytest.raises(CapabilityError, match="needs a DiscretePosterior, got GPyTorchPosterior"):
        acquisition(x[:1, None])


def test_other_laws_are_refused():
    half = torch.tensor([[0.5, 0.5]])
    with pytest.raises(ShapeError, match=r"values and probs \[\*batch, q, m, value\]"):
        DiscretePosterior(half, half)
    with pytest.raises(DataError, match="probabilities >= 0 that sum to 1"):
        DiscretePosterior(half[None], 0.9 * half[None])
    with pytest.raises(ShapeError, match="expected base samples"):
        posterior().rsample_from_base_samples(torch.Size([2]), torch.zeros(2, 1, 1))

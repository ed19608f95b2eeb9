"""The learning-curve prior has the statistics of the released one, and a density that fits it."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.pfn import CurvePrior
from probkit.models.pfn.curve_prior import mean_curve
from probkit.testing import ModelConformance

N = 50_000


@pytest.fixture(scope="module")
def drawn():
    prior = CurvePrior()
    values, (t, y) = prior.sample_dataset(N, rng=0)
    return prior, values, t, y, mean_curve(values, t)


def test_the_rejection_rule_keeps_a_fifth():
    prior = CurvePrior()
    kept = prior.accepts(prior.propose(100_000, rng=torch.Generator().manual_seed(0)))
    assert kept.float().mean().item() == pytest.approx(0.205, abs=0.005)


def test_statistics_of_the_mean_curves(drawn):
    _, _, _, _, f = drawn
    # stated by the reference implementation, with its tolerances (four standard errors)
    assert f[:, 0].mean().item() == pytest.approx(0.417, abs=0.004)
    assert f[:, -1].mean().item() == pytest.approx(0.612, abs=0.004)
    assert f[:, 0].std().item() == pytest.approx(0.227, abs=0.003)
    assert f[:, -1].std().item() == pytest.approx(0.228, abs=0.003)
    assert (f[:, -1] - f[:, 0]).median().item() == pytest.approx(0.158, abs=0.003)
    rising = (f.diff(dim=1) >= 0).all(1).float().mean().item()
    assert rising == pytest.approx(0.515, abs=0.01)


def test_statistics_of_the_noisy_values(drawn):
    _, _, _, y, _ = drawn
    outside = ((y < 0) | (y > 1)).float().mean().item()
    assert outside == pytest.approx(0.011, abs=0.001)
    ordered = y.flatten().sort().values
    place = (torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]).double() * len(ordered)).long()
    expected = torch.tensor([0.094, 0.279, 0.612, 0.899, 0.999])
    assert (ordered[place] - expected).abs().max() < 0.006


def test_a_wrong_law_of_the_noise_is_caught(drawn):
    """The mutant: the paper's misprint ln sigma^2 ~ N(-8, 2), whose sd of ln sigma is 1/sqrt 2."""
    _, _, _, y, f = drawn
    spread = ((y - f).square().mean(1).log() / 2).std().item()
    assert spread == pytest.approx(1.0, abs=0.02)
    assert abs(spread - math.sqrt(0.5)) > 0.2


def test_the_curve_by_hand():
    values = {
        "weight": torch.tensor([0.5, 0.25, 1.0]),
        "power_limit": torch.tensor(0.8),
        "power_scale": torch.tensor(0.4),
        "power_log_rate": torch.tensor(math.log(0.5)),
        "log_limit": torch.tensor(0.6),
        "log_scale": torch.tensor(0.3),
        "growth_limit": torch.tensor(0.2),
        "growth_start": torch.tensor(0.1),
        "growth_log_rate": torch.tensor(math.log(0.3)),
        "growth_log_shape": torch.tensor(math.log(0.7)),
    }
    t = 4.0
    expected = 0.5 * (0.8 - 0.4 * t**-0.5) + 0.25 * (0.6 - 0.3 / math.log(t + 1))
    expected += 0.2 - (0.2 - 0.1) * math.exp(-0.3 * t**0.7)
    assert mean_curve(values, torch.tensor([t])).item() == pytest.approx(expected, abs=1e-6)


def test_extreme_rates_do_not_overflow():
    prior = CurvePrior()
    values = {name: v[:1] for name, v in prior.sample_dataset(1, rng=0)[0].items()}
    for rate in (-40.0, 40.0):
        for name in ("power_log_rate", "growth_log_rate", "growth_log_shape"):
            f = mean_curve({**values, name: torch.tensor([rate])}, prior.epochs)
            assert f.isfinite().all()


def test_the_log_prior_is_that_of_the_laws(drawn):
    prior, values, *_ = drawn
    few = {name: v[:7] for name, v in values.items()}
    total = prior.log_prior(few)
    assert total.isfinite().all()
    normals = {"power_log_rate": (0, 2), "growth_log_rate": (-2, 1), "growth_log_shape": (0, 0.5)}
    normals["log_noise"] = (-4, 1)
    widths = {"power_limit": 1.25, "power_scale": 1.2, "log_limit": 1, "log_scale": 1}
    widths |= {"growth_limit": 1, "growth_start": 2}
    expected = -sum(math.log(w) for w in widths.values())
    for name, (mean, sd) in normals.items():
        z = (few[name] - mean) / sd
        expected = expected - 0.5 * z.square() - math.log(sd) - 0.5 * math.log(2 * math.pi)
    assert torch.allclose(total, expected, atol=1e-4)


def test_rejected_values_have_no_density(drawn):
    prior, values, *_ = drawn
    few = {name: v[:3].clone() for name, v in values.items()}
    few["power_limit"][0] = 1.3  # outside its law
    few["weight"][1] = 0.0  # a flat curve at zero does not learn
    total = prior.log_prior(few)
    assert total.isinf().tolist() == [True, True, False]


def test_seeds_decide():
    prior = CurvePrior()
    first, again = (prior.sample_dataset(5, rng=3)[1][1] for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, prior.sample_dataset(5, rng=4)[1][1])


class TestConformance(ModelConformance):
    """One curve of six epochs under a prior of horizon 20."""

    def problem(self):
        prior = CurvePrior(horizon=20, dtype=torch.float64)
        t = torch.arange(1, 7, dtype=torch.float64)
        y = torch.tensor([0.30, 0.38, 0.41, 0.47, 0.49, 0.52], dtype=torch.float64)
        return prior, (t, y), torch.arange(7, 12, dtype=torch.float64)

    def sampler(self):
        from probkit.inference import SMC

        return SMC(n=64, moves=2)

    def dataset(self, values, data, index):
        t, y = data
        return {name: value[index] for name, value in values.items()}, (t, y[index])

    # the density is known up to the constant of rejection, and rejected points have no gradient
    test_prior_draws_follow_the_density = None
    test_gradient_is_that_of_differences = None


def test_the_gradient_at_an_accepted_point():
    prior = CurvePrior(dtype=torch.float64)
    values, (t, y) = prior.sample_dataset(1, rng=1)
    point = {name: value[0].clone().requires_grad_() for name, value in values.items()}
    log_joint = prior.log_joint(point, (t, y[0]))
    grads = torch.autograd.grad(log_joint, list(point.values()))
    for name, grad in zip(point, grads, strict=True):
        up, down = ({**point, name: point[name] + h} for h in (1e-6, -1e-6))
        rise = prior.log_joint(up, (t, y[0])) - prior.log_joint(down, (t, y[0]))
        assert grad.sum().item() == pytest.approx(rise.item() / 2e-6, rel=1e-3, abs=1e-3)


def test_bad_input():
    with pytest.raises(DataError, match=r"horizon: expected a whole number of epochs >= 2"):
        CurvePrior(horizon=1)
    prior = CurvePrior()
    t = torch.arange(1.0, 4.0)
    with pytest.raises(ShapeError, match=r"t \[epoch\] and y \[epoch\] of equal length"):
        prior.prepare((t, t[:2]))
    with pytest.raises(DataError, match="y must be finite, got nan at epoch 1"):
        prior.prepare((t, torch.tensor([0.1, math.nan, 0.2])))
    with pytest.raises(DataError, match="t: expected epochs >= 1, got 0"):
        prior.prepare((t - 1, t))
    with pytest.raises(DataError, match="expected one curve as a pair"):
        prior.prepare(t)

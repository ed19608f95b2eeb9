"""Sampled posteriors of one curve: against the network, against the truth, and bad input."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.models.pfn.curve_prior import CurvePrior, mean_curve
from probkit.models.pfn.curve_reference import curve_posterior, polish, sampled_scores
from probkit.models.pfn.curves import Curves
from probkit.models.pfn.normalizer import CurveNormalizer

ACC = CurveNormalizer.accuracy()


def noisy_curve():
    """A curve of the prior with noise 0.03, whose posterior is not thin."""
    values, _ = CurvePrior().sample_dataset(1, rng=4)
    values["log_noise"] = torch.full_like(values["log_noise"], -3.5)
    return values, (CurvePrior().epochs, CurvePrior().simulate(values, None, rng=5))


def test_the_posterior_covers_the_truth():
    values, (t, y) = noisy_curve()
    post = curve_posterior(t[:30], y[0, :30], n=300, moves=6, last_moves=9, runs=2, rng=0)
    assert post.draws["weight"].shape == (2, 300, 3)
    f = mean_curve(post.draws, t.double()[[49, 99]]).flatten(0, 1)
    truth = mean_curve(values, t[[49, 99]])[0].double()
    assert bool(((f.mean(0) - truth).abs() < 4 * f.std(0) + 0.01).all())
    assert CurvePrior().accepts({k: v.flatten(0, 1) for k, v in post.draws.items()}).all()


def test_scores_are_mixtures_over_particles():
    _, (t, y) = noisy_curve()
    post = curve_posterior(t[:10], y[0, :10], n=64, moves=2, last_moves=2, runs=2, rng=0)
    scores = sampled_scores(post, t[10:13], y[0, 10:13])
    assert scores.shape == (2, 3)
    one = {name: value[1] for name, value in post.draws.items()}
    scale = one["log_noise"].exp()[:, None]
    law = torch.distributions.Normal(mean_curve(one, t[10:13].double()), scale)
    expected = law.log_prob(y[0, 10:13].double()).exp().mean(0).log()
    assert torch.allclose(scores[1], expected, atol=1e-9)


def test_polish_agrees_with_the_network_where_that_is_easy(lc):
    _, (_, y) = noisy_curve()
    seen = Curves(None, y[0, :40].clamp(0, 1).double())
    steps = torch.tensor([50.0, 100.0])
    fine = polish(seen, steps, n=300, runs=2, rng=0)
    network = lc.predict(seen, steps)
    gap = (fine.predictive.median - network.median).abs()
    # a fifth of the width of the law, and what two short runs differ by
    assert bool((gap < 0.2 * network.variance.sqrt() + 3 * fine.spread + 0.01).all())
    q = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(fine.predictive.cdf(fine.predictive.quantile(q))[:, 0], q, atol=1e-4)


def test_polish_speaks_the_metric():
    error = Curves(None, [0.7, 0.6, 0.5, 0.45, 0.42], CurveNormalizer.error(), horizon=10)
    fine = polish(error, n=32, runs=2, rng=0)
    assert fine.predictive.median.shape == (5,) and fine.spread.shape == (5,)
    assert bool((fine.predictive.median < 0.5).all()) and fine.predictive.mean.isfinite().all()


def test_bad_input():
    with pytest.raises(DataError, match="polish: expected one curve, got 2; take curves"):
        polish(Curves(None, [[0.1], [0.2]]), rng=0)
    with pytest.raises(DataError, match=r"steps after the last observed one \(2\) and up to"):
        polish(Curves(None, [0.1, 0.2]), torch.tensor([2.0]), rng=0)

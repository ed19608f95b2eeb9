"""Choosing and mixing surrogates by leave-one-out predictions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal

import probkit as pk
from probkit.bo.surrogates import (
    AutoSurrogate,
    HMCSurrogate,
    StackedSurrogate,
    loo_log_density,
    make_surrogate,
    warm_state,
)
from probkit.bo.surrogates.loo import stacking_weights


def _data(rows=14):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(rows, 2, generator=generator).double()
    return x, torch.sin(5 * x[:, :1]) + 0.1 * torch.randn(rows, 1, generator=generator).double()


@pytest.mark.parametrize("name", ["gp", "ibnn", "gp-exact"])
def test_leaving_one_out_is_predicting_it_from_the_rest(name):
    x, y = _data()
    model = make_surrogate(name, x, y, outcome="none", rng=0)
    K = model.covar_module(x).to_dense().detach()
    noise = torch.diag_embed(model.likelihood.noise.detach().expand(14))
    mean = model.mean_module.constant.detach()
    expected = []
    for i in range(14):
        rest = [k for k in range(14) if k != i]
        gain = torch.linalg.solve((K + noise)[rest][:, rest], K[rest, i])
        centre = mean + gain @ (y[rest, 0] - mean)
        variance = K[i, i] - gain @ K[rest, i] + noise[i, i]
        expected.append(Normal(centre, variance.sqrt()).log_prob(y[i, 0]))
    torch.testing.assert_close(
        loo_log_density(model).detach(), torch.stack(expected), rtol=1e-5, atol=1e-5
    )


@pytest.mark.slow
def test_leaving_one_out_of_draws_is_importance_sampling():
    """Where weights are nearly equal, smoothing changes little: noise is large here."""
    x, y = _data()
    spec = HMCSurrogate(
        hidden=(), prior="iid", prior_std=1.0, learn_gains=None, noise="fixed", noise_var=1.0,
        chains=16, draws=400, warmup=60, ascent=50, length=2.0, max_steps=16,
    )  # fmt: skip
    model = make_surrogate(spec, x, y, outcome="none", rng=0)
    features = torch.cat([x, torch.ones(14, 1).double()], 1)
    expected = []
    for i in range(14):
        rest = [k for k in range(14) if k != i]
        covariance = torch.linalg.inv(features[rest].T @ features[rest] + torch.eye(3).double())
        centre = features[i] @ covariance @ features[rest].T @ y[rest, 0]
        variance = 1 + features[i] @ covariance @ features[i]
        expected.append(Normal(centre, variance.sqrt()).log_prob(y[i, 0]))
    # Monte Carlo errors over eight seeds: at most .004, and .025 for the last row, which pulls
    # hardest, so that the weights of a posterior without it vary most.
    tolerance = torch.full((14,), 4 * 0.004).double()
    tolerance[13] = 4 * 0.025
    assert bool(((loo_log_density(model) - torch.stack(expected)).abs() <= tolerance).all())


def test_weights_of_a_stack_maximise_its_density():
    generator = torch.Generator().manual_seed(3)
    densities = torch.randn(3, 25, generator=generator).double()
    weights = stacking_weights(densities)

    def score(w):
        return float(torch.logsumexp(densities + w.log()[:, None], 0).mean())

    assert float(weights.sum()) == pytest.approx(1.0)
    best = score(weights)
    trials = torch.distributions.Dirichlet(torch.ones(3).double())
    with pk.scope(rng=0):
        for other in trials.sample((200,)):
            assert score(other) <= best + 1e-6


def test_the_best_candidate_is_taken():
    x, y = _data()
    model = make_surrogate("auto", x, y, rng=0)
    scores = model.diagnostics
    winner = max(scores, key=scores.get)
    alone = make_surrogate(winner, x, y, rng=0)
    torch.testing.assert_close(
        model.posterior(x).mean, alone.posterior(x).mean, rtol=1e-4, atol=1e-4
    )
    state = warm_state(model)
    assert set(state["candidates"]) == {"gp", "gp-paper", "ibnn"}
    again = make_surrogate("auto", x, y, previous=state, rng=0)
    assert max(again.diagnostics, key=again.diagnostics.get) == winner


def test_a_stack_is_a_mixture():
    x, y = _data()
    parts = [
        make_surrogate("gp", x, y, rng=0),
        make_surrogate("ensemble", x, y, options={"steps": 20, "members": 4}, rng=0),
    ]
    weights = torch.tensor([0.3, 0.7]).double()
    stack = StackedSurrogate(parts, weights)
    at = x[:6].reshape(3, 2, 2) * 0.8
    posteriors = [part.posterior(at) for part in parts]
    mean = sum(w * p.mean for w, p in zip(weights, posteriors, strict=True))
    second = sum(
        w * (p.variance + p.mean.square()) for w, p in zip(weights, posteriors, strict=True)
    )
    found = stack.posterior(at)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, second - mean.square(), rtol=1e-5, atol=1e-9)
    with pk.scope(rng=0):
        draws = found.rsample(torch.Size([4000]))
    error = (draws.mean(0) - mean) / (found.variance / 4000).sqrt()
    assert float(error.abs().max()) < 4.5
    made = make_surrogate("auto", x, y, options={"method": "stack"}, rng=0)
    assert sum(made.diagnostics.values()) == pytest.approx(1.0)
    with pytest.raises(pk.CapabilityError, match="a stack of surrogates cannot be conditioned"):
        stack.fantasize(at, None)


def test_bad_options_are_named():
    x, y = _data()
    with pytest.raises(pk.DataError, match="'auto' cannot choose itself"):
        AutoSurrogate(("auto", "gp"))
    with pytest.raises(pk.DataError, match="candidates: expected distinct names"):
        AutoSurrogate(())
    with pytest.raises(pk.DataError, match="method: expected 'select' or 'stack', got 'mix'"):
        AutoSurrogate(method="mix")
    with pytest.raises(pk.CapabilityError, match="leave-one-out densities: expected a Gaussian"):
        loo_log_density(
            make_surrogate(
                "ensemble", x, y, options={"steps": 5, "members": 2}, rng=0
            ).subset_output
        )
    with pytest.raises(pk.DataError, match=r"weights: expected \[model=1\] >= 0"):
        StackedSurrogate([make_surrogate("gp", x, y, rng=0)], torch.tensor([-1.0]))

"""Scores by Fisher's identity and what climbs along them, against exact gradients."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Gamma, LogNormal, Uniform

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import ScoreAscent, score
from probkit.models.state_space import DiscreteHMM, LinearGaussian, StochasticVolatility

NAMES = ("transition", "transition_cov", "observation_cov")


def exact_gradient(exact, model, y):
    values = {name: getattr(model, name).clone().requires_grad_() for name in NAMES}
    log_evidence = exact.gaussian(model.at(values), y).log_evidence
    return dict(zip(NAMES, torch.autograd.grad(log_evidence, list(values.values())), strict=True))


def check_score(exact, model, y, runs=10, n=150):
    truth = exact_gradient(exact, LinearGaussian(0.8, 0.5, 1.0, 0.3), y)
    values = {name: getattr(model, name) for name in NAMES}
    found = [score(model, values, y, n=n, rng=k).gradient for k in range(runs)]
    for name in NAMES:
        samples = torch.stack([one[name][0, 0] for one in found])
        # Self-normalised estimates have a bias of order 1 / n beside their noise.
        allowed = (
            4 * samples.std() / runs**0.5 + 3 * samples.std() ** 2 / abs(truth[name][0, 0]) / n
        )
        assert abs(float(samples.mean() - truth[name])) < float(allowed)


def test_score_of_the_linear_gaussian_model(exact):
    model = LinearGaussian(0.8, 0.5, 1.0, 0.3)
    y = model.simulate_path(15, rng=3)[1][0]
    check_score(exact, model, y)


class NoInitialTerm(LinearGaussian):
    """A mutant: the law of x_0 is left out of the score."""

    def log_transition(self, t, old, new, data):
        return super().log_transition(t, old, new, data) * (1.0 if t > 0 else 0.0)


class HalfObservation(LinearGaussian):
    """A mutant: observations count half in gradients, but not in weights."""

    def log_weight(self, t, old, new, data):
        value = super().log_weight(t, old, new, data)
        return 0.5 * value + 0.5 * value.detach()


def test_the_score_check_catches_mutants(exact, monkeypatch):
    y = LinearGaussian(0.8, 0.5, 1.0, 0.3).simulate_path(15, rng=3)[1][0]
    with pytest.raises(AssertionError):
        check_score(exact, NoInitialTerm(0.8, 0.5, 1.0, 0.3), y)
    with pytest.raises(AssertionError):
        check_score(exact, HalfObservation(0.8, 0.5, 1.0, 0.3), y)


def test_score_of_the_discrete_chain(exact, hmm):
    """Counts of transitions over their probabilities (the score of an unnormalised matrix)."""
    model, y = hmm
    truth = exact.hmm(model, y).pairs.sum(0) / model.transition
    values = {"transition": model.transition}
    found = torch.stack(
        [score(model, values, y, n=200, rng=k).gradient["transition"] for k in range(10)]
    )
    error = (found.mean(0) - truth).abs()
    assert bool((error < 4.5 * found.std(0) / 10**0.5 + 0.02).all())


@pytest.mark.slow
def test_maximum_likelihood_of_the_linear_gaussian_model(exact):
    y = LinearGaussian(0.8, 0.5, 1.0, 0.3).simulate_path(40, rng=3)[1][0]
    model = LinearGaussian(0.5, 0.5, 1.0, 1.0, prior=prior())
    post = infer(model, y, ScoreAscent(n=60, steps=120, lr=0.3), rng=0)
    assert post.is_point_estimate
    fitted = {name: value[0, 0] for name, value in post.draws.items()}
    start = {"transition": model.transition, "observation_cov": model.observation_cov}

    def log_likelihood(values):
        return float(exact.gaussian(model.at(values), y).log_evidence)

    best = max(
        log_likelihood({"transition": torch.tensor([[a]]), "observation_cov": torch.tensor([[r]])})
        for a in torch.linspace(0.5, 0.97, 25).double()
        for r in torch.linspace(0.02, 0.9, 25).double()
    )
    assert log_likelihood(fitted) > best - 0.15
    assert log_likelihood(fitted) > log_likelihood(start) + 0.5


def prior():
    return {
        "transition": Uniform(
            torch.full((1, 1), -0.99).double(), torch.full((1, 1), 0.99).double()
        ),
        "observation_cov": LogNormal(torch.zeros(1, 1).double(), torch.ones(1, 1).double()),
    }


@pytest.mark.slow
def test_ascent_of_the_volatility_model():
    one = torch.ones(()).double()
    model = StochasticVolatility(0.9, 0.3, prior={"scale": Gamma(2 * one, one)})
    y = 3.0 * StochasticVolatility(0.9, 0.3).simulate_path(40, rng=0)[1][0]
    post = infer(model, y, ScoreAscent(n=40, steps=15, lr=0.5), rng=0, chains=2)
    assert post.draws["scale"].shape == (2, 1)
    assert bool((post.draws["scale"] > 2.0).all()) and bool((post.draws["scale"] < 4.5).all())
    trace = post.sample_stats["log_likelihood_trace"]
    assert trace.shape == (2, 15)
    assert bool((trace[:, -5:].mean(1) >= trace[:, :1].mean(1)).all())
    mode = infer(model, y, ScoreAscent(n=40, steps=15, lr=0.5, prior=True), rng=0)
    # The prior Gamma(2, 1) pulls towards 1.
    assert float(mode.draws["scale"][0]) < float(post.draws["scale"][0])


class NoAt(DiscreteHMM):
    at = None


def test_what_scores_need(hmm):
    model, y = hmm
    with pytest.raises(CapabilityError, match="score needs at"):
        score(
            NoAt(model.initial, model.transition, model.emission),
            {"transition": model.transition},
            y,
            rng=0,
        )
    with pytest.raises(CapabilityError, match="DiscreteHMM has no unknown parameters"):
        infer(model, y, ScoreAscent(), rng=0)
    with pytest.raises(DataError, match="has no parameter slope"):
        score(model, {"slope": torch.ones(())}, y, n=10, rng=0)
    with pytest.raises(DataError, match="0 < lr"):
        ScoreAscent(lr=0.0)

"""Particle marginal Metropolis-Hastings against exact posteriors on a grid."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Beta, Dirichlet, Gamma, Uniform

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import ParticleMarginalMH, pmmh
from probkit.models.state_space import DiscreteHMM, StochasticVolatility


class Sticky(DiscreteHMM):
    """Two states that stay with an unknown probability."""

    def at(self, values):
        stay = values["initial"]
        rows = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
        return DiscreteHMM([0.5, 0.5], rows, self.emission)


Y = torch.tensor([0, 0, 1, 0, 1, 1])


def sticky():
    law = Beta(torch.tensor(2.0).double(), torch.tensor(3.0).double())
    emission = [[0.9, 0.1], [0.2, 0.8]]
    model = Sticky([0.5, 0.5], [[0.5, 0.5], [0.5, 0.5]], emission, prior={"initial": law})
    return model


def exact_mean(exact, model):
    stay = torch.linspace(0.0005, 0.9995, 1000).double()
    log_posterior = torch.stack(
        [
            model.log_prior({"initial": s}) + exact.hmm(model.at({"initial": s}), Y).log_evidence
            for s in stay
        ]
    )
    weights = log_posterior.softmax(0)
    mean = (weights * stay).sum()
    return float(mean), float((weights * (stay - mean) ** 2).sum() ** 0.5)


def check_posterior(exact, **options):
    model = sticky()
    mean, sd = exact_mean(exact, model)
    post = infer(model, Y, ParticleMarginalMH(**options), rng=0, chains=8)
    draws = post.draws["initial"]
    found = draws.mean(1)
    assert abs(exact.z(found, mean)) < 4
    spread = (draws - mean).square().mean(1)
    assert abs(exact.z(spread, sd**2)) < 4
    # Chains of a few hundred draws must be long enough to say something.
    assert float(found.std()) < 0.5 * sd
    return post


@pytest.mark.slow
def test_few_particles_still_give_the_exact_posterior(exact):
    post = check_posterior(exact, n=6, draws=600, warmup=150)
    assert 0.1 < float(post.sample_stats["accepted"].double().mean()) < 0.7


@pytest.mark.slow
def test_mutants_are_caught(exact, monkeypatch):
    def without_jacobian(self, problem, free, flat, rng):
        values, _ = free.constrain(flat)
        return {
            "flat": flat,
            "log_prior": problem.model.log_prior(values),
            "log_likelihood": self._log_likelihood(problem, values, rng),
        }

    monkeypatch.setattr(ParticleMarginalMH, "_evaluate", without_jacobian)
    with pytest.raises(AssertionError):
        check_posterior(exact, n=6, draws=600, warmup=150)


def test_draws_statistics_and_resumption(tmp_path):
    options = ParticleMarginalMH(n=5, draws=15, warmup=5)
    model = sticky()
    post = infer(model, Y, options, rng=0, chains=2)
    assert post.draws["initial"].shape == (2, 15)
    assert post.sample_stats["accepted"].shape == (2, 15)
    stop = [lambda info: info.step == 12]
    infer(model, Y, options, rng=0, chains=2, checkpoint=tmp_path, callbacks=stop)
    resumed = infer(model, Y, options, rng=0, chains=2, checkpoint=tmp_path)
    assert torch.equal(resumed.draws["initial"], post.draws["initial"])


def test_an_accepted_estimate_is_kept():
    """The chain must carry the estimate along, not make a new one of the point where it stays."""
    post = infer(sticky(), Y, ParticleMarginalMH(n=5, draws=60, warmup=0), rng=0)
    estimate = post.sample_stats["log_likelihood_estimate"][0]
    stayed = ~post.sample_stats["accepted"][0]
    assert bool((estimate[1:] == estimate[:-1])[stayed[1:]].all()) and bool(stayed.any())


def test_continuous_model():
    one = torch.ones(()).double()
    prior = {"scale": Gamma(2 * one, 2 * one), "persistence": Uniform(0 * one, one)}
    model = StochasticVolatility(prior=prior)
    y = StochasticVolatility(0.9, 0.3).simulate_path(25, rng=0)[1][0]
    post = infer(model, y, ParticleMarginalMH(n=20, draws=20, warmup=20), rng=0)
    assert set(post.draws) == {"scale", "persistence"}
    assert bool((post.draws["persistence"].abs() < 1).all())


def test_bad_input():
    with pytest.raises(CapabilityError, match="has no unknown parameters; name them in prior="):
        infer(StochasticVolatility(), torch.zeros(3), ParticleMarginalMH(), rng=0)
    with pytest.raises(DataError, match="whole n >= 1"):
        ParticleMarginalMH(n=0)
    law = Dirichlet(torch.ones(2).double())
    model = DiscreteHMM([0.5, 0.5], torch.eye(2), torch.eye(2), prior={"initial": law})
    with pytest.raises(DataError, match="all particles died for 50 draws"):
        infer(model, torch.tensor([0, 1]), ParticleMarginalMH(n=5), rng=0)
    assert pmmh.math is math

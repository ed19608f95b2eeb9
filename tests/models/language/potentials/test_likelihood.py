"""Exact likelihoods: the language model is the prior of what its text says."""

from __future__ import annotations

import math

import pytest
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError
from probkit.inference import ParticleFilter
from probkit.models.language import GuidedGeneration, MarkovLM, Steps
from probkit.models.language.answers import answer_posterior, last_number
from probkit.models.language.potentials import LikelihoodPotential, ModelLikelihood
from probkit.models.language.protocol import Prefix


def test_only_finished_texts_are_weighed_unless_early():
    def log_likelihood(answer):
        return -float(answer)

    prefixes = [Prefix("?", text=text) for text in ("1", "12", "x", "")]
    plain = LikelihoodPotential(log_likelihood, last_number)
    assert plain.log_value(prefixes, [False] * 4).tolist() == [0.0] * 4
    assert plain.log_value(prefixes, [True] * 4).tolist() == [-1.0, -12.0, -math.inf, -math.inf]
    early = LikelihoodPotential(log_likelihood, last_number, early=True, unparsed=-5.0)
    assert early.log_value(prefixes, [False] * 4).tolist() == [-1.0, -12.0, 0.0, 0.0]
    assert early.log_value(prefixes, [True] * 4).tolist() == [-1.0, -12.0, -5.0, -5.0]


DIGITS = 4
LM = MarkovLM(
    [0.4, 0.3, 0.2, 0.1],
    [[0.25] * 4] * 4,
    end=1.0,
    symbols=[str(k) for k in range(DIGITS)],
)


class Poisson:
    """Counts with a rate that the text names: conjugate to nothing, enumerable here."""

    def log_likelihood(self, values, data):
        rate = values["rate"] + 0.5
        return torch.distributions.Poisson(rate).log_prob(data).sum(-1)


def test_the_posterior_of_an_answer_is_bayes_rule():
    """p(answer | data) proportional to p_LM(answer) p(data | answer), by enumeration."""
    data = torch.tensor([2.0, 1.0], dtype=torch.float64)
    likelihood = ModelLikelihood(Poisson(), data, site="rate")
    potential = LikelihoodPotential(likelihood, last_number)
    model = GuidedGeneration(LM, potential, steps=Steps(stop=(), max_tokens=1, max_steps=2))
    post = pk.infer(model, "rate: ", ParticleFilter(400), rng=0, chains=20)
    rates = torch.arange(DIGITS, dtype=torch.float64)
    joint = torch.tensor([0.4, 0.3, 0.2, 0.1]).double().log()
    joint = joint + torch.distributions.Poisson(rates[:, None] + 0.5).log_prob(data).sum(-1)
    exact = joint.softmax(0)
    answers = answer_posterior(post, last_number)
    for k in range(DIGITS):
        place = answers.answers.index(k)
        assert abs(float(answers.probs[place] - exact[k])) < 4 * float(answers.errors[place])
    assert float(answers.errors.max()) < 0.02
    ratio = (post.log_evidence.value - joint.logsumexp(0)).exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / 20**0.5


def test_values_by_name():
    data = torch.tensor([2.0], dtype=torch.float64)
    by_name = ModelLikelihood(Poisson(), data)
    assert by_name({"rate": 1.0}) == ModelLikelihood(Poisson(), data, "rate")(1.0)
    with pytest.raises(DataError, match="expected values by name, got 1.0; say which site= it is"):
        by_name(1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_bad_likelihoods(value):
    potential = LikelihoodPotential(lambda answer: value, last_number)
    with pytest.raises(DataError, match="LikelihoodPotential: expected"):
        potential.log_value([Prefix("?", text="1")], [True])


def test_bad_options():
    with pytest.raises(DataError, match=r"expected functions log_likelihood\(answer\) and parse"):
        LikelihoodPotential(1.0, last_number)
    with pytest.raises(CapabilityError, match="object lacks it. Pass a function"):
        ModelLikelihood(object(), None)

"""Weights summed by answer: against sums by hand and against enumeration."""

from __future__ import annotations

import math

import pytest
import torch

import probkit as pk
from probkit.errors import CapabilityError, DataError, ShapeError
from probkit.inference import ParticleFilter
from probkit.models.language import GuidedGeneration, MarkovLM, Steps
from probkit.models.language.answers import answer_posterior, vote
from probkit.models.language.potentials import VerifierPotential
from probkit.posterior import Evidence, Posterior
from probkit.sources import Draws, Population


def test_a_vote_by_hand():
    answers = ["a", "b", "a", None, "c"]
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).double()
    found = vote(answers, weights.log())
    assert found.answers == ("b", "a")
    torch.testing.assert_close(found.probs, torch.tensor([0.4, 0.3]).double())
    assert found.unparsed == pytest.approx(0.3)
    assert found.mode == "b" and found.confidence == pytest.approx(0.4)
    assert found.ess == pytest.approx(1 / (0.01 + 0.16 + 0.04 + 0.09))
    assert found.counts.tolist() == [1, 2] and found.errors is None
    assert found.prob("a") == pytest.approx(0.3) and found.prob("c") == 0.0
    assert found.table().columns.tolist() == ["probability", "texts"]
    assert "unparsed=0.300" in repr(found)


def test_ties_go_to_the_first_met():
    assert vote(["b", "a", "a", "b"]).mode == "b"


def test_no_answer_at_all():
    found = vote([None, None])
    assert found.mode is None and found.confidence == 0.0 and found.unparsed == 1.0
    assert len(found.table()) == 0


def population(texts, log_weights, log_evidence=None):
    kind = (
        None if log_evidence is None else Evidence(torch.tensor(log_evidence).double(), "estimate")
    )
    source = Population(texts, torch.tensor(log_weights).double())
    return Posterior(source, model=None, log_evidence=kind)


def test_chains_are_pooled_by_their_evidence():
    texts, logs = [["a", "b"], ["a", "a"]], [[0.0, 0.0], [0.0, 0.0]]
    even = answer_posterior(population(texts, logs), str)
    torch.testing.assert_close(even.probs, torch.tensor([0.75, 0.25]).double())
    weighed = answer_posterior(population(texts, logs, [math.log(3.0), 0.0]), str)
    torch.testing.assert_close(weighed.probs, torch.tensor([0.625, 0.375]).double())
    one_dead = answer_posterior(population(texts, logs, [0.0, -math.inf]), str)
    torch.testing.assert_close(one_dead.probs, torch.tensor([0.5, 0.5]).double())


def test_answers_are_brought_to_one_form():
    post = population([["Paris ", "paris", "PARIS!", "London", "?"]], [[0.0] * 5])
    found = answer_posterior(
        post,
        lambda text: text.strip("! ") or None,
        normalise=lambda answer: None if answer == "?" else answer.lower(),
        aliases={"london": "paris"},
    )
    assert found.answers == ("paris",) and found.unparsed == pytest.approx(0.2)


LM = MarkovLM([0.5, 0.5], [[0.7, 0.3], [0.4, 0.6]], end=[0.2, 0.3])
POTENTIAL = VerifierPotential(lambda text: 0.9 if text.endswith("b") else 0.3)
STEPS = Steps(stop=(), max_tokens=1, max_steps=4)


def count_b(text):
    return text.count("b") if text else None


def exact_law():
    """p(number of b) under the guided law, by enumeration of all texts."""
    law = torch.zeros(5, dtype=torch.float64)
    for outcome in LM.outcomes(4):
        weight = math.exp(outcome.log_p)
        for symbol in outcome.text:
            weight *= 0.9 if symbol == "b" else 0.3
        law[outcome.text.count("b")] += weight
    return law / law.sum()


@pytest.fixture(scope="module")
def post():
    model = GuidedGeneration(LM, POTENTIAL, steps=STEPS)
    return pk.infer(model, "go", ParticleFilter(200), rng=0, chains=20)


def test_answers_of_a_filter_are_those_of_the_enumeration(post):
    exact = exact_law()
    found = answer_posterior(post, count_b)
    assert sorted(found.answers) == [0, 1, 2, 3, 4]
    for answer, p, error in zip(found.answers, found.probs, found.errors, strict=True):
        assert abs(float(p - exact[answer])) < 4 * float(error), answer
    assert float(found.errors.max()) < 0.02
    assert float(found.probs.sum()) + found.unparsed == pytest.approx(1.0)


def test_the_check_would_see_wrong_weights(post):
    """The same texts without their weights are draws of another law."""
    from dataclasses import replace

    source = post.source
    flat = Population(source.particles, torch.zeros_like(source.log_weights))
    found = answer_posterior(replace(post, source=flat), count_b)
    exact = exact_law()
    gaps = [
        abs(float(p - exact[a])) / float(e)
        for a, p, e in zip(found.answers, found.probs, found.errors, strict=True)
    ]
    assert max(gaps) > 4


def test_bad_input(post):
    with pytest.raises(DataError, match="expected at least one answer, got none"):
        vote([])
    with pytest.raises(ShapeError, match=r"one weight for each of 1 answers, got \(2,\)"):
        vote(["a"], torch.zeros(2))
    with pytest.raises(DataError, match="one above -inf and no NaN"):
        vote(["a"], torch.tensor([-math.inf]))
    with pytest.raises(DataError, match="expected hashable answers.*got \\['a'\\]"):
        vote([["a"]])
    with pytest.raises(DataError, match="every chain died out"):
        answer_posterior(population([["a"]], [[0.0]], [-math.inf]), str)
    draws = Posterior(Draws({"x": torch.zeros(1, 2)}), model=None)
    with pytest.raises(CapabilityError, match="a Population of answers.*got Draws"):
        answer_posterior(draws, str)

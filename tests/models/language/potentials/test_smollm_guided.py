"""Constraints and a judge on a real vocabulary: SmolLM2."""

from __future__ import annotations

import json
import math

import pytest
import torch

import probkit as pk
from probkit.inference import BestOfN, ParticleFilter
from probkit.models.language import GuidedGeneration, Law, Steps
from probkit.models.language.potentials import (
    GrammarPotential,
    JudgePotential,
    RegexPotential,
    VerifierPotential,
    tokens_where,
)
from probkit.models.language.protocol import Prefix

pytestmark = pytest.mark.slow

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome", "Oslo"]}, "rank": {"type": "integer"}},
    "required": ["city", "rank"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("potential", "text"),
    [
        (RegexPotential(r"[A-Z]{2}-\d{3}( or [A-Z]{2}-\d{3})*"), "AB-1"),
        (RegexPotential(r"[A-Z]{2}-\d{3}( or [A-Z]{2}-\d{3})*"), "AB-123"),
        (GrammarPotential(SCHEMA, "json"), '{"city": "'),
        (GrammarPotential(SCHEMA, "json"), '{"city": "Rome", "rank": 1'),
    ],
)
def test_masks_agree_with_weights_on_real_tokens(smollm, potential, text):
    vocabulary = smollm.vocabulary
    mask = potential.allowed(vocabulary)(Prefix("?", text=text))
    assert mask.shape == (len(vocabulary),) and bool(mask.any())
    chosen = [*mask.nonzero()[:100, 0].tolist(), *range(0, len(vocabulary), 97)]
    readable = [
        k for k in chosen if vocabulary[k] and "\N{REPLACEMENT CHARACTER}" not in vocabulary[k]
    ]
    prefixes = [Prefix("?", text=text + vocabulary[k]) for k in readable]
    alive = potential.log_value(prefixes, [False] * len(prefixes)) == 0.0
    assert mask[readable].tolist() == alive.tolist()


def test_masked_particles_write_valid_json(smollm):
    schema = GrammarPotential(SCHEMA, "json")
    proposal = Law(allowed=schema.allowed(smollm.vocabulary))
    steps = Steps(stop=(), max_tokens=4, max_steps=10)
    model = GuidedGeneration(smollm, schema, steps=steps, proposal=proposal)
    post = pk.infer(model, "A city in JSON: ", ParticleFilter(4), rng=0)
    particles = post.particles.particles[0]
    assert float(post.log_evidence.value) > -math.inf
    for particle in particles:
        alive = schema.log_value([particle.prefix], [particle.finished])
        assert alive.tolist() == [0.0], particle.text
        if particle.finished:
            assert set(json.loads(particle.text)) == {"city", "rank"}


def test_particles_outlive_independent_texts(smollm):
    """Six tokens without the letter e: the evidence of both proposals, and who is left."""
    rule = VerifierPotential(lambda text: "e" not in text.lower(), kind="value")
    steps = Steps(stop=(), max_tokens=1, max_steps=6)
    prompt = "On a sunny morning in May, my dog and I"
    mask = tokens_where(lambda text: "e" not in text.lower(), smollm.vocabulary)
    runs = {
        "bootstrap": GuidedGeneration(smollm, rule, steps=steps),
        "masked": GuidedGeneration(smollm, rule, steps=steps, proposal=Law(allowed=mask)),
    }
    log_z = {}
    for name, model in runs.items():
        post = pk.infer(model, prompt, ParticleFilter(16), rng=1)
        alive = post.log_weights[0] > -torch.inf
        assert int(alive.sum()) >= 4
        kept = [p.text for p, a in zip(post.particles.particles[0], alive, strict=True) if a]
        assert not any("e" in text.lower() for text in kept)
        log_z[name] = float(post.log_evidence.value)
    # single estimates of sixteen particles: they scatter by about one
    assert abs(log_z["bootstrap"] - log_z["masked"]) < 4.0


def test_a_real_judge_gives_probabilities_of_its_words(smollm):
    judge = JudgePotential(smollm, "The sum must be right.")
    prefixes = [
        Prefix("What is 2 + 2?", text=text) for text in ("4", "Answer: yes", '{"score": 1}')
    ]
    ratings = judge.log_value(prefixes, [True] * 3).exp()
    assert bool(((ratings > 1e-4) & (ratings < 1 - 1e-4)).all())
    assert len(set(ratings.tolist())) == 3
    model = GuidedGeneration(smollm, judge, steps=Steps(stop=(), max_tokens=2, max_steps=1))
    post = pk.infer(model, "2 + 2 = ", BestOfN(2), rng=0)
    assert bool(torch.isfinite(post.sample_stats["log_reward"]).all())

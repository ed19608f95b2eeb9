"""The parts of a language-model search with SmolLM2: real tokens, real probabilities."""

from __future__ import annotations

import pytest
import torch

from probkit.bo import Float, LLMCandidates, LLMSurrogate, Space
from probkit.bo.llm import DigitTree, ProblemCard
from probkit.models.language.protocol import Continuation

pytestmark = pytest.mark.slow

SPACE = Space(a=Float(0, 1), b=Float(0, 1))
CARD = ProblemCard("a small network", "validation loss", "min")
X = torch.tensor([[0.2, 0.3], [0.5, 0.9], [0.8, 0.1]], dtype=torch.float64)
Y = torch.tensor([0.4, 0.2, 0.7], dtype=torch.float64)


def surrogate(lm, **options):
    spec = LLMSurrogate(lm, SPACE, CARD, "none", outcome="score", n_perm=1, **options)
    return spec.condition(X, Y, rng=0)


def test_masses_of_numbers_are_scores_of_their_texts(smollm):
    model = surrogate(smollm, mode="logprob", decimals=1)
    prefix = smollm.start(model.prompts({"a": 0.4, "b": 0.4})[0])
    density = DigitTree(decimals=1, prune=1e-3).walk(smollm, [prefix])[0]
    assert density.total + density.tail == pytest.approx(1.0, abs=1e-6)
    assert density.total > 0.9  # it has understood that a number is wanted
    steps = [
        Continuation((), f"{space}0.{digit}", 0.0, 0.0, "length", 4)
        for digit in range(10)
        for space in ("", " ")
    ]
    scores = smollm.score([prefix] * len(steps), steps).exp().reshape(10, 2).sum(-1)
    for digit in range(10):
        mass = float(density.mass[density.values == digit / 10].sum())
        # other texts of the same number ("00.3") and branches not followed
        assert abs(mass - float(scores[digit])) < 0.01


def test_samples_and_labels_and_candidates_come_out_of_it(smollm):
    sampled = surrogate(smollm, k=6).predictions([{"a": 0.4, "b": 0.4}])
    assert float(sampled.valid) > 0.5 and bool(torch.isfinite(sampled.mean).all())
    label = surrogate(smollm, mode="classify").predictions([{"a": 0.4, "b": 0.4}])
    assert 0.0 < float(label.mean) < 1.0 and float(label.valid) == 1.0
    found = LLMCandidates(smollm, SPACE, CARD, "none", rounds=1).propose((X, Y), 2, rng=0)
    assert len(found) == 2 and bool(((found.X >= 0) & (found.X <= 1)).all())

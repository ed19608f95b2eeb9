"""Process rewards: aggregation decides the kind, scores are checked and clipped."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError, ShapeError
from probkit.models.language.potentials import RewardPotential, kind_of
from probkit.models.language.protocol import Continuation, Prefix

SCORES = [0.9, 0.5, 0.8]
PREFIX = Prefix("2 + 2?", text="one two three")


def step(text):
    return Continuation((), text, -1.0, -1.0, "length", 1)


@pytest.mark.parametrize(
    ("aggregation", "kind"),
    [("product", "per_step"), ("min", "value"), ("last", "value"), ("model", "value")],
)
def test_the_aggregation_decides_the_kind(aggregation, kind):
    assert kind_of(RewardPotential(lambda prompt, text: 0.5, aggregation)) == kind


def test_aggregations():
    def value(aggregation, scores):
        potential = RewardPotential(lambda prompt, text: scores, aggregation)
        return potential.log_value([PREFIX], [True]).exp().item()

    assert value("min", SCORES) == pytest.approx(0.5)
    assert value("last", SCORES) == pytest.approx(0.8)
    assert value("last", torch.tensor(SCORES)) == pytest.approx(0.8)
    assert value("model", 0.7) == pytest.approx(0.7)
    assert value("model", [0.7]) == pytest.approx(0.7)


def test_a_product_counts_every_score_once():
    """Steps one by one give prod r_t, not the product of products."""
    words = ["one", " two", " three"]
    reward = RewardPotential(lambda prompt, text: SCORES[: len(text.split())])
    total, text = 0.0, ""
    for word in words:
        total += reward.log_step([Prefix("2 + 2?", text=text)], [step(word)]).item()
        text += word
    assert math.exp(total) == pytest.approx(math.prod(SCORES))


def test_a_step_without_text_is_not_rated():
    reward = RewardPotential(lambda prompt, text: 0.5)
    assert reward.log_step([PREFIX], [step("")]).tolist() == [0.0]


def test_scores_are_clipped():
    def ends(clip):
        potential = RewardPotential(lambda p, text: float(len(text)), "model", clip)
        prefixes = [Prefix("?", text=""), Prefix("?", text="a")]
        return potential.log_value(prefixes, [False] * 2)

    torch.testing.assert_close(ends(1e-4).exp(), torch.tensor([1e-4, 1 - 1e-4]).double())
    assert ends(0.0).tolist() == [-math.inf, 0.0]


def test_a_batch_is_scored_by_one_call():
    calls = []

    def score(prompts, texts):
        calls.append((list(prompts), list(texts)))
        return [[0.25], [0.5, 0.75]]

    reward = RewardPotential(score, "last", batched=True)
    logs = reward.log_value([Prefix("p", text="a"), Prefix("q", text="b")], [False] * 2)
    assert calls == [(["p", "q"], ["a", "b"])]
    torch.testing.assert_close(logs.exp(), torch.tensor([0.25, 0.75]).double())


@pytest.mark.parametrize(
    ("aggregation", "scores", "message"),
    [
        ("model", 1.2, r"expected scores in \[0, 1\], got 1.2 for the text 'one two three'"),
        ("last", [0.5, -0.1], r"expected scores in \[0, 1\], got -0.1"),
        ("min", [1.5, 0.5], r"expected scores in \[0, 1\], got 1.5"),
        ("last", math.nan, "expected a number"),
        ("last", [], "expected at least one score"),
        ("model", [0.5, 0.6], "expected one score"),
        ("min", 0.5, "needs the scores of all steps, got one number"),
    ],
)
def test_bad_scores(aggregation, scores, message):
    potential = RewardPotential(lambda prompt, text: scores, aggregation)
    with pytest.raises(DataError, match=message):
        potential.log_value([PREFIX], [False])


def test_bad_batches_and_options():
    short = RewardPotential(lambda prompts, texts: [0.5], "model", batched=True)
    with pytest.raises(ShapeError, match="expected 2 scores, one for each text, got 1"):
        short.log_value([PREFIX] * 2, [False] * 2)
    with pytest.raises(DataError, match="expected aggregation 'product', 'min', 'last' or 'model'"):
        RewardPotential(lambda p, t: 0.5, "mean")
    with pytest.raises(DataError, match="expected 0 <= clip < 0.5, got 0.5"):
        RewardPotential(lambda p, t: 0.5, clip=0.5)
    with pytest.raises(DataError, match="expected a function, got 0.5"):
        RewardPotential(0.5)

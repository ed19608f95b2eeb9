"""The weights that the package ships, as they are."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.models.pfn import BarDistribution, CurvePrior, LearningCurvePFN
from probkit.models.pfn.curve_task import encode_epochs, encode_metric
from probkit.models.pfn.learning_curve import DEFAULT_WEIGHTS
from probkit.models.pfn.weight_files import load_weights

CURVES = 2000
# cut -> mean log density of later epochs asked for, after a training on one processor core
ASKED = {10: 1.52, 20: 1.90, 40: 2.17, 80: 2.32}


@pytest.fixture(scope="module")
def lc():
    return LearningCurvePFN.load()


@pytest.fixture(scope="module")
def curves():
    """Curves [curve, epoch] that no training has seen: the seeds of training are others."""
    return CurvePrior().sample_dataset(CURVES, rng=77_001)[1][1]


def law_after(lc, y, cut):
    t = CurvePrior().epochs
    logits = []
    for rows in y.split(500):
        x = encode_epochs(t[:cut]).expand(len(rows), -1, -1)
        query = encode_epochs(t[cut:]).expand(len(rows), -1, -1)
        logits.append(lc.network(x, encode_metric(rows[:, :cut]), query))
    return BarDistribution(lc.borders, torch.cat(logits), validate_args=False)


@pytest.mark.slow
@pytest.mark.parametrize("cut", sorted(ASKED))
def test_likelihood_and_coverage(lc, curves, cut):
    law = law_after(lc, curves, cut)
    target = curves[:, cut:]
    scores = law.log_prob(target).mean(1)
    error = scores.std() / math.sqrt(CURVES)
    assert scores.mean() > ASKED[cut] - 2 * error
    u = law.cdf(target)
    for level in (0.5, 0.9):
        hits = ((u - 0.5).abs() <= level / 2).float().mean(1)
        # what the model card states, up to three standard errors over curves
        stated = lc.card["measured"][f"coverage {level}"][str(cut)]
        assert abs(hits.mean() - stated) < 3 * hits.std() / math.sqrt(CURVES)


def test_the_card_states_what_it_must(lc):
    card = lc.card
    assert card["license"] == "Apache-2.0"
    assert card["complete"] is True
    assert card["training"]["seed"] == 0
    assert set(card["measured"]["log_likelihood"]) == {str(cut) for cut in ASKED}
    assert "command" in card
    assert "limits" in card


def test_half_precision_costs_nothing(lc, curves):
    """Weights moved by half a unit of float16 in the last place: under a thousandth of a nat."""
    y = curves[:200]
    generator = torch.Generator().manual_seed(0)
    before = law_after(lc, y, 40).log_prob(y[:, 40:]).mean()
    file = load_weights(DEFAULT_WEIGHTS)
    moved = LearningCurvePFN.load()
    with torch.no_grad():
        for weight in moved.network.parameters():
            sign = torch.randint(2, weight.shape, generator=generator) * 2 - 1
            weight.mul_(1 + sign * 2.0**-12)
    after = law_after(moved, y, 40).log_prob(y[:, 40:]).mean()
    assert abs(after - before) < 1e-3
    assert all(v.half().float().equal(v) for v in file.weights.values())


def test_the_file_is_small_and_of_this_prior():
    assert DEFAULT_WEIGHTS.stat().st_size < 15e6
    file = load_weights(DEFAULT_WEIGHTS, prior=CurvePrior().version)
    assert file.constants["horizon"] == 100
    assert len(file.borders) == file.network["bars"] + 1


def test_no_data_gives_the_prior_predictive(lc, curves):
    """From an empty curve, but for the first epochs, which training hardly ever asks for."""
    epochs = torch.tensor([5, 20, 50, 100])
    x, y = torch.zeros(1, 0, 2), encode_metric(torch.zeros(1, 0))
    query = encode_epochs(epochs[None].float())
    law = BarDistribution(lc.borders, lc.network(x, y, query)[0], validate_args=False)
    there = curves[:, epochs - 1]
    assert (law.mean - there.mean(0)).abs().max() < 0.03
    assert (law.variance.sqrt() - there.std(0)).abs().max() < 0.03


def test_an_observed_curve_narrows_the_law(lc, curves):
    wide, narrow = (law_after(lc, curves[:300], cut).variance[:, -1].sqrt() for cut in (5, 60))
    assert narrow.median() < 0.5 * wide.median()


def test_invariances_hold_for_the_shipped_network(lc, curves):
    """Order, company and padding change logits by less than 1e-4, relative to their spread."""
    t = CurvePrior().epochs
    y = curves[:4, :30]
    x, value = encode_epochs(t[:30]).expand(4, -1, -1), encode_metric(y)
    query = encode_epochs(t[30:60]).expand(4, -1, -1)
    logits = lc.network(x, value, query)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    lengths = torch.full((4,), 30)
    padded = torch.cat([x, x], 1), torch.cat([value, value + 1], 1)
    others = [
        lc.network(x[:, order], value[:, order], query),
        lc.network(*padded, query, lengths),
        torch.cat([lc.network(x[k : k + 1], value[k : k + 1], query[k : k + 1]) for k in range(4)]),
    ]
    for other in others:
        assert (other - logits).abs().max() < 1e-4 * max(1.0, float(logits.std()))
    alone = lc.network(x, value, query[:, 3:4])
    assert (alone[:, 0] - logits[:, 3]).abs().max() < 1e-4 * max(1.0, float(logits.std()))

"""Parallel tempering of models with tensor states."""

from __future__ import annotations

import math

import pytest
import torch

from probkit import infer
from probkit.inference import ParallelTempering, ParticleGibbs
from probkit.inference.smc.parallel import log_potential_of, swap, tempered


def test_swaps_keep_detailed_balance():
    """On two states a rung, the joint law of both rungs is left alone by swaps."""
    powers, sums = (1.0, 0.4), (0.0, 1.3)
    laws = [torch.softmax(torch.tensor([p * s for s in sums]).double(), 0) for p in powers]
    joint = laws[0][:, None] * laws[1][None, :]
    after = torch.zeros(2, 2, dtype=torch.float64)
    for a in range(2):
        for b in range(2):
            log_ratio = (powers[0] - powers[1]) * (sums[b] - sums[a])
            accept = math.exp(min(0.0, log_ratio))
            g = torch.Generator().manual_seed(0)
            hits = [swap([a, b], [sums[a], sums[b]], powers, rng=g)[2][0] for _ in range(800)]
            error = (accept * (1 - accept) / 800) ** 0.5
            assert abs(sum(hits) / 800 - accept) <= 3.5 * error
            after[b, a] += joint[a, b] * accept
            after[a, b] += joint[a, b] * (1 - accept)
    assert torch.allclose(after, joint)


def test_sums_of_potentials_are_log_likelihoods(exact, hmm):
    model, y = hmm
    path = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    expected = sum(model.emission.log()[path[t + 1], y[t]] for t in range(6))
    assert log_potential_of(model, path, y) == pytest.approx(float(expected))
    half = tempered(model, 0.5)
    states = torch.tensor([0, 1, 2])
    full = model.log_weight(1, states, states, y)
    assert torch.allclose(half.log_weight(1, states, states, y), 0.5 * full)
    assert half.initial is model.initial and tempered(model, 1.0) is model


@pytest.mark.slow
def test_the_coldest_rung_reaches_the_posterior(exact, hmm):
    model, y = hmm
    truth = exact.hmm(model, y)
    ladder = ParallelTempering(ParticleGibbs(2, draws=150, warmup=10), (1.0, 2.0))
    post = infer(model, y, ladder, rng=0, chains=8)
    one_hot = torch.nn.functional.one_hot(post.draws["path"], 3).double().mean(1)
    error = (one_hot.mean(0) - truth.marginals).abs()
    assert bool((error < 4 * one_hot.std(0) / 8**0.5 + 2e-3).all())
    assert post.sample_stats["swapped"].shape == (8, 150, 1)
    assert 0.1 < float(post.sample_stats["swapped"].double().mean()) < 1.0


def test_statistics_and_draws(hmm):
    ladder = ParallelTempering(ParticleGibbs(3, draws=4, warmup=1), (1.0, 2.0, 5.0))
    post = infer(*hmm, ladder, rng=0, chains=2)
    assert post.draws["path"].shape == (2, 4, 6)
    tree = post.to_datatree()
    assert tree["sample_stats"]["swapped"].shape == (2, 4, 2)
    assert tree["sample_stats"]["log_potential"].shape == (2, 4, 3)

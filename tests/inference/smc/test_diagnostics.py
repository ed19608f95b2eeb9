"""Evidence with error bars, tables of degeneracy, genealogies."""

from __future__ import annotations

import pytest
import torch

from probkit import infer
from probkit.errors import CapabilityError, DataError
from probkit.inference.smc import PaRIS, ParticleFilter, ParticleGibbs, degeneracy, evidence
from probkit.inference.smc.genealogy import paths, record, survivors


def test_evidence_has_an_honest_error_bar(exact, lgssm):
    y = lgssm.simulate_path(15, rng=2)[1][0]
    truth = exact.gaussian(lgssm, y).log_evidence
    inside = []
    for seed in range(12):
        found = evidence(infer(lgssm, y, ParticleFilter(40), rng=seed, chains=12))
        assert found.chains == 12
        inside.append(abs(found.log_mean - float(truth)) < 2 * found.relative_error)
    # 95 % of 12 nominally; fewer than 8 would have probability below 0.001.
    assert sum(inside) >= 8


def test_evidence_needs_estimates_and_chains(hmm):
    model, y = hmm
    with pytest.raises(DataError, match="needs at least 2 chains, got 1"):
        evidence(infer(model, y, ParticleFilter(5), rng=0))
    with pytest.raises(CapabilityError, match="expected a posterior with an evidence estimate"):
        evidence(infer(model, y, ParticleGibbs(3, draws=2, warmup=0), rng=0, chains=2))


def test_degeneracy_table(hmm):
    model, y = hmm
    table = degeneracy(infer(model, y, ParticleFilter(50), rng=0, chains=3))
    assert list(table) == ["ess", "resampled", "log_evidence", "unique_ancestors"]
    assert len(table) == 6 and table["unique_ancestors"].iloc[-1] == 50
    assert bool((table["unique_ancestors"].diff().dropna() >= 0).all())
    h = PaRIS(20, lambda t, old, new, data: new.double())
    assert "unique_ancestors" not in degeneracy(infer(model, y, h, rng=0))
    with pytest.raises(CapabilityError, match="without traces"):
        degeneracy(infer(model, y, ParticleGibbs(3, draws=2, warmup=0), rng=0))


def test_genealogy_by_hand():
    """Three generations: 0 -> {0, 1}, 2 -> {2}; then 1 -> {0, 1, 2}."""
    generations = record([], 3, None, torch.tensor([10, 11, 12]))
    generations = record(generations, 3, torch.tensor([0, 0, 2]), torch.tensor([20, 21, 22]))
    generations = record(generations, 3, torch.tensor([1, 1, 1]), torch.tensor([30, 31, 32]))
    assert survivors(generations).tolist() == [1, 1, 3]
    assert paths(generations).tolist() == [[10, 21, 30], [10, 21, 31], [10, 21, 32]]
    assert paths(generations, torch.tensor([2])).tolist() == [[10, 21, 32]]


def test_steps_without_resampling_cost_nothing():
    generations = record([], 3, None, None)
    generations = record(generations, 3, torch.tensor([0, 0, 2]), None)
    for _ in range(4):
        generations = record(generations, 3, None, None)
    assert len(generations) == 2
    assert survivors(generations).tolist() == [2, 3, 3, 3, 3, 3]

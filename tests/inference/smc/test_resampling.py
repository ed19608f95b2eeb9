"""Resampling schemes: unbiased numbers of offspring, bounds, groups, and mutants."""

from __future__ import annotations

import pytest
import torch

from probkit.errors import DataError
from probkit.inference.smc.resampling import RESAMPLERS, resolve, systematic

W = torch.tensor([0.0, 0.05, 0.31, 0.0, 0.04, 0.6, 0.0], dtype=torch.float64)


def counts(scheme, weights, n, repeats, seed=0):
    """Offspring numbers [repeat, particle]."""
    g = torch.Generator().manual_seed(seed)
    rows = [torch.bincount(scheme(weights, n, g), minlength=len(weights)) for _ in range(repeats)]
    return torch.stack(rows).double()


def check_unbiased(scheme, weights, n=10, repeats=2000):
    found = counts(scheme, weights, n, repeats)
    assert bool((found.sum(1) == n).all())
    expected = n * weights / weights.sum()
    # Numbers that never vary must be exact; the others pass a z-test at 4 standard errors.
    error = found.mean(0) - expected
    limit = 4 * found.std(0) / repeats**0.5 + 1e-9
    assert bool((error.abs() <= limit).all()), error


@pytest.mark.parametrize("name", RESAMPLERS)
@pytest.mark.parametrize("n", [1, 7, 10])
def test_mean_offspring_are_proportional_to_the_weights(name, n):
    check_unbiased(RESAMPLERS[name], W, n)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_ancestors_are_sorted_and_never_weightless(name):
    g = torch.Generator().manual_seed(1)
    for _ in range(200):
        ancestors = RESAMPLERS[name](W, 13, g)
        assert ancestors.dtype == torch.int64
        assert bool((ancestors.diff() >= 0).all())
        assert bool((W[ancestors] > 0).all())


def test_bounds_of_the_offspring_numbers():
    expected = 10 * W
    assert bool(((counts(RESAMPLERS["systematic"], W, 10, 500) - expected).abs() < 1).all())
    assert bool(((counts(RESAMPLERS["stratified"], W, 10, 500) - expected).abs() < 2).all())
    assert bool((counts(RESAMPLERS["residual"], W, 10, 500) >= (expected + 1e-9).floor()).all())


def test_variances_are_ordered():
    variance = {k: float(counts(s, W, 10, 2000).var(0).sum()) for k, s in RESAMPLERS.items()}
    multinomial = float((10 * W * (1 - W)).sum())
    assert variance["multinomial"] == pytest.approx(multinomial, rel=0.1)
    assert max(variance["systematic"], variance["residual"]) < 0.5 * variance["multinomial"]
    assert variance["stratified"] < variance["multinomial"]


@pytest.mark.parametrize("name", RESAMPLERS)
def test_groups_equal_a_loop(name):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(2)).double()
    weights = torch.softmax(logits, 1)
    streams = [torch.Generator().manual_seed(k) for k in range(3)]
    grouped = RESAMPLERS[name](weights, 11, streams)
    for k in range(3):
        alone = RESAMPLERS[name](weights[k], 11, torch.Generator().manual_seed(k))
        assert torch.equal(grouped[k], alone)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_whole_expectations_are_kept_by_low_variance_schemes(name):
    weights = torch.full((8,), 1 / 8, dtype=torch.float64)
    ancestors = RESAMPLERS[name](weights, 8, torch.Generator().manual_seed(0))
    if name != "multinomial":
        assert ancestors.tolist() == list(range(8))


@pytest.mark.parametrize("name", RESAMPLERS)
def test_one_particle_with_all_weight(name):
    weights = torch.zeros(5, dtype=torch.float64)
    weights[3] = 1e-300
    assert RESAMPLERS[name](weights, 4, torch.Generator().manual_seed(0)).tolist() == [3] * 4


def tilted(weights, n, rng):
    """A biased scheme: it resamples by weights of power 1.1."""
    return systematic(weights**1.2, n, rng)


def shifted(weights, n, rng):
    """A biased scheme: off by one on the comb."""
    return (systematic(weights, n, rng) + (torch.arange(n) == n - 1)).clamp_max(len(weights) - 1)


@pytest.mark.parametrize("mutant", [tilted, shifted])
def test_the_check_catches_biased_schemes(mutant):
    with pytest.raises(AssertionError):
        check_unbiased(mutant, W)


def test_unknown_scheme():
    with pytest.raises(DataError, match="expected one of multinomial, residual"):
        resolve("sorted")
    assert resolve(tilted) is tilted

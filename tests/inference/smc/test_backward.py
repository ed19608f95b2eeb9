"""Backward draws: the right law, by accept-reject as by looking at all particles."""

from __future__ import annotations

import math

import pytest
import torch

from probkit.errors import DataError
from probkit.inference.smc import Cloud, backward_draws
from probkit.models.state_space import LinearGaussian

G = torch.Generator().manual_seed(0)
OLD = torch.randn(6, 1, generator=G).double()
NEW = torch.randn(4, 1, generator=G).double()
LOG_WEIGHTS = torch.tensor([0.3, 0.0, 0.1, 0.25, 0.3, 0.05]).double().log()
CLOUD = Cloud(OLD, LOG_WEIGHTS, torch.zeros(()).double())
DRAWS = 4000


def kernel(model, *, weights=LOG_WEIGHTS, old=OLD):
    """Backward probabilities [new, old], pair by pair."""
    density = torch.distributions.Normal(
        model.transition[0, 0] * old[:, 0], model.transition_cov[0, 0].sqrt()
    )
    return torch.softmax(weights + density.log_prob(NEW), dim=1)


def check_law(model, **options):
    g = torch.Generator().manual_seed(1)
    found = backward_draws(model, 3, CLOUD, NEW, DRAWS, None, rng=g, **options)
    assert found.ancestors.shape == (4, DRAWS)
    for row, probs in zip(found.ancestors, kernel(model), strict=True):
        share = torch.bincount(row, minlength=6).double() / DRAWS
        error = (share - probs).abs()
        assert bool((error <= 4.5 * (probs * (1 - probs) / DRAWS).sqrt() + 1e-12).all())
    return found


@pytest.mark.parametrize("exact", [True, False, None])
def test_law_of_the_draws(exact):
    check_law(LinearGaussian(0.7, 0.3, 1.0, 1.0), exact=exact)


def test_rejection_gives_up_in_time():
    # Steps are so short that most proposals fail: the exact draw must take over.
    model = LinearGaussian(0.7, 0.0025, 1.0, 1.0)
    check_law(model, exact=False)


class ShiftedTime(LinearGaussian):
    """A mutant: the transition density of the old state from the new one."""

    def log_transition(self, t, old, new, data):
        return super().log_transition(t, new, old, data)


class NoDensity(LinearGaussian):
    """A mutant: ancestors by weight alone."""

    def log_transition(self, t, old, new, data):
        return 0.0 * super().log_transition(t, old, new, data)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mutant", [ShiftedTime, NoDensity])
def test_the_check_catches_mutants(mutant, exact):
    with pytest.raises((AssertionError, DataError)):
        check_law(mutant(0.7, 0.3, 1.0, 1.0), exact=exact)


class LowBound(LinearGaussian):
    def log_transition_bound(self, t, data):
        return super().log_transition_bound(t, data) - 2.0


def test_a_bound_that_is_none():
    with pytest.raises(DataError, match="expected an upper bound"):
        check_law(LowBound(0.7, 0.3, 1.0, 1.0), exact=False)


class OldMatters(LinearGaussian):
    """Weights that look at the old state; backward draws must see them."""

    local_weights = False

    def log_weight(self, t, old, new, data):
        return torch.where(old[:, 0] > 0, 0.0, -math.inf).double()


def test_weights_of_the_old_state_count():
    model = OldMatters(0.7, 0.3, 1.0, 1.0)
    g = torch.Generator().manual_seed(1)
    found = backward_draws(model, 3, CLOUD, NEW, 500, None, rng=g)
    assert bool((OLD[found.ancestors.unique(), 0] > 0).all())
    expected = kernel(model, weights=LOG_WEIGHTS + model.log_weight(3, OLD, None, None))
    share = torch.bincount(found.ancestors[0], minlength=6).double() / 500
    assert bool(((share - expected[0]).abs() < 0.1).all())


def test_an_impossible_ancestor():
    class Nowhere(LinearGaussian):
        def log_transition(self, t, old, new, data):
            return torch.full((len(new),), -math.inf)

    with pytest.raises(DataError, match="particle of step 3 has transition density zero"):
        check_law(Nowhere(0.7, 0.3, 1.0, 1.0), exact=True)

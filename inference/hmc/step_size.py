"""Step sizes: a first guess, and dual averaging, for every chain on its own."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.leapfrog import Phase, Point, kinetic, leapfrog
from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.potential import Potential

__all__ = ["DualAveraging", "first_step_size", "pooled_step_size", "shared_acceptance"]

_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
_MOST_DOUBLINGS = 60


class DualAveraging(NamedTuple):
    """Stochastic search for the step size whose mean acceptance is the target.

    Hoffman and Gelman (2014), section 3.2, with gamma = 0.05, t0 = 10 and kappa = 0.75.

    Attributes:
        log_step: [chain] log of the current step size.
        log_average: [chain] log of the averaged step size, the one to keep.
        error: [chain] running mean of target minus acceptance.
        centre: [chain] the value towards which log steps shrink.
        updates: Number of updates.
    """

    log_step: Tensor
    log_average: Tensor
    error: Tensor
    centre: Tensor
    updates: int

    @classmethod
    def start(cls, step: Tensor) -> DualAveraging:
        """Begin at step sizes ``step`` [chain], shrinking towards ten times as much."""
        log_step = step.log()
        return cls(log_step, log_step, torch.zeros_like(step), log_step + math.log(10.0), 0)

    def update(self, acceptance: Tensor, target: float) -> DualAveraging:
        """Learn from the acceptance probabilities [chain] of one transition."""
        count = self.updates + 1
        weight = 1.0 / (count + _T0)
        error = (1.0 - weight) * self.error + weight * (target - acceptance)
        log_step = self.centre - math.sqrt(count) / _GAMMA * error
        share = count**-_KAPPA
        log_average = share * log_step + (1.0 - share) * self.log_average
        return DualAveraging(log_step, log_average, error, self.centre, count)


def first_step_size(
    potential: Potential, metric: Metric, point: Point, momentum: Tensor, step: Tensor
) -> Tensor:
    """Double or halve each chain's step until the acceptance of one leapfrog step crosses 0.8.

    Args:
        potential: Energy and gradient.
        metric: Mass matrix.
        point: Where the chains are.
        momentum: [chain, D] whitened.
        step: [chain] step sizes to begin with.

    Returns:
        [chain] step sizes; where no step size in reach crosses, the last one tried.
    """

    def accepts(step: Tensor) -> Tensor:
        end = leapfrog(potential, metric, Phase(point, momentum), step[:, None])
        rise = end.point.energy + kinetic(end.momentum) - point.energy - kinetic(momentum)
        return rise < -math.log(0.8)

    grows = accepts(step)
    searching = torch.ones_like(grows)
    for _ in range(_MOST_DOUBLINGS):
        step = torch.where(searching, torch.where(grows, 2.0 * step, 0.5 * step), step)
        searching = searching & (accepts(step) == grows)
        if not bool(searching.any()):
            break
    return step


def pooled_step_size(step: Tensor) -> Tensor:
    """Give chains [chain] the median of their step sizes.

    The median is less noisy than any single step size, and equal steps keep lock-step chains
    together. A chain whose own is below half of it sits where the density is sharper, and keeps it.
    """
    middle = step.median().expand_as(step)
    return torch.where(step < 0.5 * middle, step, middle)


def shared_acceptance(acceptance: Tensor, step: Tensor) -> Tensor:
    """Average the acceptance [chain] over the chains that have the median step size [chain].

    Chains with equal steps so learn together and keep equal steps. The acceptance of one transition
    is so noisy that a chain on its own would settle below the target; others keep their own.
    """
    together = step == step.median()
    return torch.where(together, acceptance[together].mean(), acceptance)

"""The leapfrog integrator of all chains in one step."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from probkit.inference.hmc.metric import Metric
from probkit.inference.hmc.potential import Potential

__all__ = ["Phase", "Point", "kinetic", "leapfrog", "trajectory"]


class Point(NamedTuple):
    """A position with what is known there.

    Attributes:
        position: [chain, D], unconstrained.
        energy: Potential [chain].
        gradient: [chain, D] of the potential.
    """

    position: Tensor
    energy: Tensor
    gradient: Tensor

    def where(self, condition: Tensor, other: Point) -> Point:
        """Take this point in chains where ``condition`` [chain] holds, else ``other``."""
        column = condition[:, None]
        return Point(
            torch.where(column, self.position, other.position),
            torch.where(condition, self.energy, other.energy),
            torch.where(column, self.gradient, other.gradient),
        )


class Phase(NamedTuple):
    """A point with its whitened momentum [chain, D]."""

    point: Point
    momentum: Tensor


def kinetic(momentum: Tensor) -> Tensor:
    """Kinetic energy [*batch] of whitened momenta [*batch, D]."""
    return 0.5 * momentum.square().sum(-1)


def leapfrog(potential: Potential, metric: Metric, phase: Phase, step: Tensor) -> Phase:
    """Advance every chain by one leapfrog step (Neal 2011, equations 2.28 to 2.30).

    Args:
        potential: Energy and gradient.
        metric: Mass matrix.
        phase: Where the chains are.
        step: Signed step sizes [chain, 1]; negative ones go back in time.
    """
    return trajectory(potential, metric, phase, step, 1)


def trajectory(
    potential: Potential, metric: Metric, phase: Phase, step: Tensor, steps: int
) -> Phase:
    """Take ``steps`` leapfrog steps; the inner half steps of the momenta are joined."""
    (position, energy, gradient), momentum = phase
    half = 0.5 * step
    momentum = torch.addcmul(momentum, half, metric.force(gradient), value=-1)
    for done in range(1, steps + 1):
        position = torch.addcmul(position, step, metric.velocity(momentum))
        energy, gradient = potential(position)
        kick = half if done == steps else step
        momentum = torch.addcmul(momentum, kick, metric.force(gradient), value=-1)
    return Phase(Point(position, energy, gradient), momentum)
